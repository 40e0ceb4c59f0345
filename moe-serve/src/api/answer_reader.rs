//! [`AnswerReader`]: the text of one choice to pieces of text, thought and calls.

use super::piece::{CallPiece, Piece};
use super::prepare::{CallReading, Reading};
use crate::text::{AnswerParser, AnswerPart, ThoughtParser, ToolFormat};
use moe_core::CounterRng;

/// Reads one choice.
#[derive(Debug)]
pub(super) struct AnswerReader {
    choice: usize,
    parser: Box<dyn AnswerParser>,
    /// Of calls, if there may be any.
    format: Option<ToolFormat>,
    parallel: bool,
    call_seed: u64,
    /// Calls that have begun.
    calls: usize,
    /// Whether what was read last belongs to a thought.
    in_thought: bool,
}

impl AnswerReader {
    pub(super) fn new(reading: &Reading, choice: usize, call_seed: u64) -> Self {
        let of_calls = |calls: &CallReading| {
            let CallReading { format, tools, or_form, .. } = calls;
            if *or_form { format.parser_or_form(tools) } else { format.parser(tools) }
        };
        let parser = match reading {
            Reading::Calls(calls) => of_calls(calls),
            Reading::Thought { opened, calls } => Box::new(ThoughtParser::new(*opened, calls.as_ref().map(of_calls))),
        };
        let format = reading.calls().map(|calls| calls.format);
        let parallel = reading.calls().is_some_and(|calls| calls.parallel);
        Self { choice, parser, format, parallel, call_seed, calls: 0, in_thought: false }
    }

    pub(super) fn has_called(&self) -> bool {
        self.calls > 0
    }

    /// Whether what was read last belongs to a thought: text of it, or what may become that.
    pub(super) fn in_thought(&self) -> bool {
        self.in_thought
    }

    /// The pieces of more text, at least one.
    pub(super) fn read(&mut self, text: &str, ended: bool) -> Vec<Piece> {
        let thought = self.parser.thinks();
        let mut parts = self.parser.push(text);
        if ended {
            parts.extend(self.parser.finish());
        }
        let tells = parts.iter().any(|part| matches!(part, AnswerPart::Reasoning(_)));
        self.in_thought = tells || thought && self.parser.thinks();
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
        match part {
            AnswerPart::Text(text) => Some(Piece { text, ..piece }),
            AnswerPart::Reasoning(reasoning) => Some(Piece { reasoning, ..piece }),
            AnswerPart::Call(name) => {
                self.calls += 1;
                let index = self.calls - 1;
                let id = self.format?.call_id(CounterRng::mix(self.call_seed, &[self.choice as u64, index as u64]));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thoughts_are_told_from_their_marks() {
        let format = ToolFormat::named("openai").expect("known");
        let reading = Reading::Calls(CallReading { format, tools: Vec::new(), parallel: false, or_form: false });
        let mut reader = AnswerReader::new(&reading, 0, 1);
        let tokens = [
            "<|channel|>",
            "analysis",
            "<|message|>",
            "Hm",
            ", <",
            "well",
            ".",
            "<|end|>",
            "<|start|>",
            "assistant",
            "<|channel|>",
            "final",
            "<|message|>",
            "Yes",
        ];
        let thoughts = tokens.map(|token| {
            reader.read(token, false);
            reader.in_thought()
        });
        let want = ["Hm", ", <", "well", "."];
        let got: Vec<&str> =
            tokens.iter().zip(thoughts).filter_map(|(token, thought)| thought.then_some(*token)).collect();
        assert_eq!(got, want);
    }
}
