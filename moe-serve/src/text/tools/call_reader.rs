//! [`CallReader`]: `{"name": ..., "arguments": {...}}` read as it grows; [`ValueReader`]: where a JSON value ends.

use super::AnswerPart;

/// How far a reader is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// All text is read, more is needed.
    More,
    /// The call is whole.
    Done,
    /// This is no call.
    Broken,
}

/// Follows one JSON value to its end. It does not check it.
#[derive(Debug, Default)]
pub(super) struct ValueReader {
    depth: usize,
    begun: bool,
    in_string: bool,
    escaped: bool,
}

impl ValueReader {
    /// How many bytes of `text` belong to the value, and whether it ends there. White space before it belongs to it.
    pub(super) fn read(&mut self, text: &str) -> (usize, bool) {
        for (at, byte) in text.bytes().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => {
                        self.in_string = false;
                        if self.depth == 0 {
                            return (at + 1, true);
                        }
                    }
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.in_string = true,
                b'{' | b'[' => self.depth += 1,
                // The bracket of what a bare number or word stands in.
                b'}' | b']' | b',' if self.depth == 0 => return (at, true),
                b'}' | b']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (at + 1, true);
                    }
                }
                b' ' | b'\t' | b'\r' | b'\n' if self.depth == 0 => {
                    if self.begun {
                        return (at, true);
                    }
                    continue;
                }
                _ => {}
            }
            self.begun = true;
        }
        (text.len(), false)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Start,
    BeforeKey,
    Key,
    Colon,
    Value,
}

/// Reads one object. The name is told as soon as it is known, arguments from then on as they come.
#[derive(Debug)]
pub(super) struct CallReader {
    /// If set, the only names there are.
    known: Option<Vec<String>>,
    place: Place,
    key: String,
    escaped: bool,
    value: String,
    reader: ValueReader,
    named: bool,
    /// Arguments that came before the name.
    early: Option<String>,
    has_arguments: bool,
}

impl CallReader {
    pub(super) fn new(known: Option<Vec<String>>) -> Self {
        Self {
            known,
            place: Place::Start,
            key: String::new(),
            escaped: false,
            value: String::new(),
            reader: ValueReader::default(),
            named: false,
            early: None,
            has_arguments: false,
        }
    }

    /// Whether the name was told, so that it is a call whatever comes.
    pub(super) fn is_named(&self) -> bool {
        self.named
    }

    /// Reads on; returns how many bytes it took.
    pub(super) fn read(&mut self, text: &str, out: &mut Vec<AnswerPart>) -> (usize, Step) {
        let mut at = 0;
        while at < text.len() {
            if self.place == Place::Value {
                let (bytes, ended) = self.reader.read(&text[at..]);
                let chunk = &text[at..at + bytes];
                at += bytes;
                self.value_goes_on(chunk, out);
                if ended && !self.value_ends(out) {
                    return (at, Step::Broken);
                }
                continue;
            }
            let Some(c) = text[at..].chars().next() else { break };
            at += c.len_utf8();
            match (self.place, c) {
                (Place::Key, c) => self.key_goes_on(c),
                (_, c) if c.is_ascii_whitespace() => {}
                (Place::Start, '{') => self.place = Place::BeforeKey,
                (Place::BeforeKey, ',') => {}
                (Place::BeforeKey, '"') => self.place = Place::Key,
                (Place::BeforeKey, '}') => return (at, self.ends(out)),
                (Place::Colon, ':') => {
                    self.place = Place::Value;
                    self.reader = ValueReader::default();
                    self.value.clear();
                }
                _ => return (at, Step::Broken),
            }
        }
        (at, Step::More)
    }

    fn key_goes_on(&mut self, c: char) {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' => self.escaped = true,
            '"' => self.place = Place::Colon,
            c => self.key.push(c),
        }
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    fn value_goes_on(&mut self, chunk: &str, out: &mut Vec<AnswerPart>) {
        // White space before the value is not part of it.
        let chunk = if self.value.is_empty() { chunk.trim_start() } else { chunk };
        self.value.push_str(chunk);
        if self.is_arguments() && self.named && self.value.starts_with('{') && !chunk.is_empty() {
            out.push(AnswerPart::Arguments(chunk.to_owned()));
        }
    }

    /// False if this is no call.
    fn value_ends(&mut self, out: &mut Vec<AnswerPart>) -> bool {
        let (value, is_arguments) = (std::mem::take(&mut self.value), self.is_arguments());
        let is_name = std::mem::take(&mut self.key) == "name";
        self.place = Place::BeforeKey;
        if is_arguments {
            self.has_arguments = true;
            // Some models write the object as a string once more.
            let text = serde_json::from_str::<String>(&value).unwrap_or_else(|_| value.clone());
            if !self.named {
                self.early = Some(text);
            } else if !value.starts_with('{') {
                out.push(AnswerPart::Arguments(text));
            }
        } else if is_name && !self.named {
            let Ok(name) = serde_json::from_str::<String>(&value) else { return false };
            if self.known.as_ref().is_some_and(|known| !known.contains(&name)) {
                return false;
            }
            self.named = true;
            out.push(AnswerPart::Call(name));
            out.extend(self.early.take().map(AnswerPart::Arguments));
        }
        true
    }

    fn ends(&mut self, out: &mut Vec<AnswerPart>) -> Step {
        if !self.named {
            return Step::Broken;
        }
        if !self.has_arguments {
            out.push(AnswerPart::Arguments("{}".into()));
        }
        Step::Done
    }
}
