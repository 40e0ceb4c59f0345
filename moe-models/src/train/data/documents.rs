//! Reads a source into documents, and these piece by piece: plain text or JSONL. Holds a piece of a text file, a line of a
//! JSONL file, never a source. Knows nothing of tokens.

use super::pieces::{GrowingDocument, Piece, document_pieces};
use super::text_source::{Characters, TextSource};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::AtomicU64;

/// The line that separates documents in a text file, and the text of the end-of-document token.
pub const SEPARATOR: &str = "<|endoftext|>";

/// Text that is held in memory, such as a program makes.
#[derive(Debug, Clone, PartialEq)]
pub struct Documents {
    /// The source's name.
    pub name: String,
    /// The user's weight, if any.
    pub weight: Option<f64>,
    /// Documents in order.
    pub texts: Vec<String>,
}

impl Documents {
    /// Bytes of text, separators not counted.
    pub fn text_bytes(&self) -> u64 {
        self.texts.iter().map(|t| t.len() as u64).sum()
    }

    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece<&str>> {
        self.texts.iter().flat_map(|text| document_pieces(text))
    }
}

impl TextSource {
    /// The pieces of every document, in file order; ends after an error. Adds to `read` the stored bytes that have been
    /// read.
    ///
    /// Text files: documents are separated by a line holding only `<|endoftext|>`; the newline before that line is not part
    /// of the document; a file without such a line is one document. JSONL files: one object per line with a string field
    /// `text`, blank lines skipped. Documents of white space only are dropped.
    ///
    /// # Errors
    /// [`Error::Io`] if the source cannot be read; [`Error::Format`] for broken xz data, invalid UTF-8 (byte offset given), a
    /// malformed JSONL line (line number given), a source without any text, or one that changed since it was opened.
    pub(crate) fn pieces<'a>(&'a self, read: &'a AtomicU64) -> impl Iterator<Item = Result<Piece<String>>> + Send + 'a {
        let parser = if self.format().jsonl { Parser::Jsonl(Jsonl::default()) } else { Parser::Text(Text::default()) };
        let (opened, failed) = match self.characters(read) {
            Ok(characters) => (Some(characters), None),
            Err(e) => (None, Some(Err(e))),
        };
        let parsed = opened.map(|characters| Pieces {
            source: self,
            characters: Some(characters),
            parser,
            ready: VecDeque::new(),
            found: false,
        });
        failed.into_iter().chain(parsed.into_iter().flatten())
    }
}

/// Reads on whenever the pieces of the last chunk are used up.
struct Pieces<'a> {
    source: &'a TextSource,
    /// `None` after the end or an error.
    characters: Option<Characters<'a>>,
    parser: Parser,
    ready: VecDeque<Piece<String>>,
    /// Whether there was any piece.
    found: bool,
}

impl Iterator for Pieces<'_> {
    type Item = Result<Piece<String>>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            let characters = self.characters.take()?;
            match self.advance(characters) {
                Ok(rest) => self.characters = rest,
                Err(e) => return Some(Err(e)),
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

impl<'a> Pieces<'a> {
    /// Parses one chunk; returns the rest, if there is one.
    fn advance(&mut self, mut characters: Characters<'a>) -> Result<Option<Characters<'a>>> {
        let (path, ready) = (self.source.path(), &mut self.ready);
        let chunk = characters.next_chunk()?;
        let ended = chunk.is_empty();
        match (&mut self.parser, ended) {
            (Parser::Text(text), false) => text.push(chunk, ready),
            (Parser::Text(text), true) => text.finish(ready),
            (Parser::Jsonl(jsonl), false) => jsonl.push(path, chunk, ready)?,
            (Parser::Jsonl(jsonl), true) => jsonl.finish(path, ready)?,
        }
        self.found |= !ready.is_empty();
        if !ended {
            return Ok(Some(characters));
        }
        characters.finish()?;
        if !self.found {
            return Err(Error::format(path, "holds no text: every document is empty; remove this source or fill it"));
        }
        Ok(None)
    }
}

enum Parser {
    Text(Text),
    Jsonl(Jsonl),
}

/// Splits text at separator lines.
#[derive(Default)]
struct Text {
    document: GrowingDocument,
    /// The beginning of a line as long as it may become a separator; empty inside any other line.
    line: String,
    /// Whether `line` is empty because what comes next is inside a line.
    inside_line: bool,
    /// Whether the document's last line has ended; its newline counts only if the document goes on.
    newline: bool,
}

impl Text {
    fn push(&mut self, chunk: &str, ready: &mut VecDeque<Piece<String>>) {
        for part in chunk.split_inclusive('\n') {
            let line_ends = part.ends_with('\n');
            let plain = self.line.is_empty() && !may_be_separator(part.trim_end_matches('\n'));
            if self.inside_line || plain {
                self.append(part, ready);
            } else {
                self.line.push_str(part);
                if line_ends || !may_be_separator(&self.line) {
                    self.end_line(ready);
                }
            }
            self.inside_line = !line_ends && self.line.is_empty();
        }
    }

    /// Decides on `line`, of which all has come that is needed.
    fn end_line(&mut self, ready: &mut VecDeque<Piece<String>>) {
        let line = std::mem::take(&mut self.line);
        if line.trim_end_matches(['\n', '\r']) == SEPARATOR {
            self.newline = false;
            self.document.end(ready);
        } else {
            self.append(&line, ready);
        }
    }

    fn append(&mut self, part: &str, ready: &mut VecDeque<Piece<String>>) {
        if self.newline && !part.is_empty() {
            self.document.push("\n", ready);
            self.newline = false;
        }
        let text = part.strip_suffix('\n');
        self.newline |= text.is_some();
        self.document.push(text.unwrap_or(part), ready);
    }

    fn finish(&mut self, ready: &mut VecDeque<Piece<String>>) {
        self.end_line(ready);
        if self.newline {
            self.document.push("\n", ready);
        }
        self.document.end(ready);
    }
}

/// Whether a line may turn out a separator of which `line` has come so far.
fn may_be_separator(line: &str) -> bool {
    line.strip_prefix(SEPARATOR).map_or_else(|| SEPARATOR.starts_with(line), |rest| rest.bytes().all(|b| b == b'\r'))
}

#[derive(serde::Deserialize)]
struct JsonLine {
    text: String,
}

/// Takes the text of one object per line.
#[derive(Default)]
struct Jsonl {
    line: String,
    /// Lines ended.
    lines: u64,
}

impl Jsonl {
    fn push(&mut self, path: &Path, chunk: &str, ready: &mut VecDeque<Piece<String>>) -> Result<()> {
        for part in chunk.split_inclusive('\n') {
            self.line.push_str(part);
            if part.ends_with('\n') {
                self.end_line(path, ready)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, path: &Path, ready: &mut VecDeque<Piece<String>>) -> Result<()> {
        if self.line.is_empty() { Ok(()) } else { self.end_line(path, ready) }
    }

    fn end_line(&mut self, path: &Path, ready: &mut VecDeque<Piece<String>>) -> Result<()> {
        let line = std::mem::take(&mut self.line);
        self.lines += 1;
        if line.trim().is_empty() {
            return Ok(());
        }
        let parsed: JsonLine = serde_json::from_str(&line).map_err(|e| {
            let number = self.lines;
            Error::format(path, format!("line {number}: expected a JSON object with a string field \"text\": {e}"))
        })?;
        // Before the pieces are made: a long document is then held twice, not three times.
        drop(line);
        if !parsed.text.trim().is_empty() {
            ready.extend(document_pieces(&parsed.text).map(Piece::into_owned));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "documents_tests.rs"]
mod tests;
