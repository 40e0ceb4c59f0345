//! [`AnswerReader`]: the text of one choice to pieces of text, thought and calls.

use super::piece::{CallPiece, Piece};
use super::prepare::Reading;
use crate::text::{AnswerParser, AnswerPart, ToolFormat};
use moe_core::CounterRng;

/// Reads one choice.
#[derive(Debug)]
pub(super) struct AnswerReader {
    choice: usize,
    parser: Box<dyn AnswerParser>,
    format: ToolFormat,
    parallel: bool,
    call_seed: u64,
    /// Calls that have begun.
    calls: usize,
    /// Whether what came last was a thought.
    thinks: bool,
}

impl AnswerReader {
    pub(super) fn new(reading: &Reading, choice: usize, call_seed: u64) -> Self {
        let Reading { format, ref tools, parallel, or_form } = *reading;
        let parser = if or_form { format.parser_or_form(tools) } else { format.parser(tools) };
        Self { choice, parser, format, parallel, call_seed, calls: 0, thinks: false }
    }

    pub(super) fn has_called(&self) -> bool {
        self.calls > 0
    }

    /// Whether the text so far ends in a thought, or in the mark that ends one.
    pub(super) fn thinks(&self) -> bool {
        self.thinks
    }

    /// The pieces of more text, at least one.
    pub(super) fn read(&mut self, text: &str, ended: bool) -> Vec<Piece> {
        let mut parts = self.parser.push(text);
        if ended {
            parts.extend(self.parser.finish());
        }
        let mut pieces: Vec<Piece> = parts.into_iter().filter_map(|part| self.piece(part)).collect();
        if pieces.is_empty() {
            pieces.push(Piece { choice: self.choice, ..Piece::default() });
        }
        pieces
    }

    fn piece(&mut self, part: AnswerPart) -> Option<Piece> {
        let piece = Piece { choice: self.choice, ..Piece::default() };
        // Of calls that may not stand side by side the first one counts.
        let is_dropped = |calls: usize| calls > 1 && !self.parallel;
        self.thinks = matches!(part, AnswerPart::Reasoning(_));
        match part {
            AnswerPart::Text(text) => Some(Piece { text, ..piece }),
            AnswerPart::Reasoning(reasoning) => Some(Piece { reasoning, ..piece }),
            AnswerPart::Call(name) => {
                self.calls += 1;
                let index = self.calls - 1;
                let id = self.format.call_id(CounterRng::mix(self.call_seed, &[self.choice as u64, index as u64]));
                let call = CallPiece { index, opening: Some((id, name)), arguments: String::new() };
                (!is_dropped(self.calls)).then(|| Piece { calls: vec![call], ..piece })
            }
            AnswerPart::Arguments(arguments) => {
                let call = CallPiece { index: self.calls.saturating_sub(1), opening: None, arguments };
                (!is_dropped(self.calls)).then(|| Piece { calls: vec![call], ..piece })
            }
        }
    }
}
