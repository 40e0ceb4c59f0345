//! [`MarkedParser`]: calls as JSON objects after a mark, alone or in a list; what several families have in common.

use super::call_reader::{CallReader, Step, ValueReader};
use super::pending::{Pending, TextOut};
use super::{AnswerPart, Stepwise};

/// How a family marks its calls.
#[derive(Debug)]
pub(super) struct Marks {
    /// Calls follow one of these.
    pub(super) opens: &'static [&'static str],
    /// May follow a call.
    pub(super) closes: &'static [&'static str],
    /// Stand around and between calls, beside white space.
    pub(super) punctuation: &'static str,
    /// An answer may begin with a call of a known tool without any mark.
    pub(super) bare: bool,
    /// A call may also be a name, this, and the arguments.
    pub(super) after_name: Option<&'static str>,
}

#[derive(Debug)]
enum State {
    Text,
    /// Between calls; with the mark that led here, as long as no call followed it.
    Between(String),
    /// In an object; with its text, in case it is none.
    Object(CallReader, String),
    Name(String),
    Arguments(ValueReader),
}

/// Reads one answer.
#[derive(Debug)]
pub(super) struct MarkedParser {
    marks: &'static Marks,
    known: Vec<String>,
    pending: Pending,
    state: State,
    text: TextOut,
    /// Whether the answer had something other than white space.
    begun: bool,
}

impl MarkedParser {
    pub(super) fn new(marks: &'static Marks, known: Vec<String>) -> Self {
        let (pending, text) = Default::default();
        Self { marks, known, pending, state: State::Text, text, begun: false }
    }

    /// One step; false if more text is needed, of which none comes if `last`.
    fn step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text => self.text_step(last, out),
            State::Between(mark) => self.between_step(mark, last, out),
            State::Object(reader, raw) => self.object_step(reader, raw, last, out),
            State::Name(mark) => self.name_step(mark, last, out),
            State::Arguments(mut reader) => {
                let (bytes, ended) = reader.read(&self.pending.0);
                if bytes > 0 {
                    out.push(AnswerPart::Arguments(self.pending.take_front(bytes)));
                }
                self.state = if ended { State::Between(String::new()) } else { State::Arguments(reader) };
                ended
            }
        }
    }

    fn text_step(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        if self.marks.bare && !self.begun {
            let start = self.pending.0.trim_start();
            if start.is_empty() && !last {
                return false;
            }
            if start.starts_with('{') {
                self.begun = true;
                self.state = State::Object(CallReader::new(Some(self.known.clone())), String::new());
                return true;
            }
        }
        if let Some((before, mark)) = self.pending.take_through(self.marks.opens) {
            self.text.push(&before, out);
            self.begun = true;
            self.state = State::Between(mark.to_owned());
            return true;
        }
        let certain = if last { self.pending.take() } else { self.pending.take_certain(self.marks.opens) };
        self.begun |= !certain.trim().is_empty();
        self.text.push(&certain, out);
        false
    }

    fn between_step(&mut self, mark: String, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        let all: Vec<&str> = self.marks.opens.iter().chain(self.marks.closes).copied().collect();
        loop {
            self.pending.skip(char::is_whitespace);
            if self.pending.skip_marker(&all) {
                continue;
            }
            if !last && self.pending.may_begin(&all) {
                self.state = State::Between(mark);
                return false;
            }
            let front = self.pending.0.chars().next();
            if !front.is_some_and(|c| self.marks.punctuation.contains(c)) {
                break;
            }
            self.pending.take_front(1);
        }
        let begins_name = |c: char| self.marks.after_name.is_some() && (c.is_ascii_alphanumeric() || c == '_');
        match self.pending.0.chars().next() {
            Some('{') => {
                // What stands between two arguments has no meaning without the mark.
                let known = self.marks.bare.then(|| self.known.clone());
                self.state = State::Object(CallReader::new(known), mark);
            }
            Some(c) if begins_name(c) => self.state = State::Name(mark),
            // Text after calls; or a mark that calls nothing.
            Some(_) => self.text.push(&mark, out),
            None => self.text.push(&mark, out),
        }
        true
    }

    fn object_step(&mut self, mut reader: CallReader, mut raw: String, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        let first = out.len();
        let (bytes, step) = reader.read(&self.pending.0, out);
        let taken = self.pending.take_front(bytes);
        if out[first..].iter().any(|part| matches!(part, AnswerPart::Call(_))) {
            self.text.call();
        }
        if !reader.is_named() {
            raw.push_str(&taken);
        }
        match step {
            Step::Done => self.state = State::Between(String::new()),
            Step::More if !last => {
                self.state = State::Object(reader, raw);
                return false;
            }
            // A call that breaks off stays one; an object that names no tool was text.
            _ if reader.is_named() => {}
            _ => self.text.push(&raw, out),
        }
        true
    }

    fn name_step(&mut self, mark: String, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        let after = self.marks.after_name.unwrap_or("{");
        if let Some((name, _)) = self.pending.take_through(&[after]) {
            self.text.call();
            // An id may stand between the name and its arguments.
            let name = name.split('[').next().unwrap_or_default().trim();
            out.push(AnswerPart::Call(name.to_owned()));
            self.state = State::Arguments(ValueReader::default());
            return true;
        }
        if last {
            self.text.push(&(mark + &self.pending.take()), out);
        } else {
            self.state = State::Name(mark);
        }
        false
    }
}

impl Stepwise for MarkedParser {
    fn pending(&mut self) -> &mut Pending {
        &mut self.pending
    }

    fn advance(&mut self, last: bool, out: &mut Vec<AnswerPart>) -> bool {
        self.step(last, out)
    }

    fn end(&mut self, out: &mut Vec<AnswerPart>) {
        self.text.finish(out);
    }
}
