//! The grammar of an answer that may call and need not: text that is free, and calls that are held to their schemas.
//!
//! A parser of lexemes takes the longest one, so text and the mark that ends it are one lexeme where the mark is text too. Where it is
//! a special token, no text holds it.

use super::form::{Before, Form, quoted};
use crate::text::chat::Tool;

/// Any text; `SAID` is text in which no call begins.
const TERMINALS: &str = "ANY: /(.|\\n)*/\nWHITE: /\\s*/\n";

impl Form {
    /// Text, up to `count` calls, or text and then calls, in llguidance's variant of Lark.
    pub(super) fn free_grammar(
        &self,
        tools: &[Tool],
        count: usize,
        special_id: impl Fn(&str) -> Option<u32>,
    ) -> String {
        let own = match self.before {
            Before::Text(marks) => self.after_text(marks, tools, &special_id),
            Before::Nothing(marks) => {
                let begins = format!("WHITE {} ANY", quoted(&self.before_name[..1]));
                format!("start: SAID | calls\n{}", said(&[Some(begins), holding(marks, &special_id)]))
            }
            Before::Lines => self.after_lines(tools),
            Before::Messages => self.after_messages(&special_id),
        };
        [&own, TERMINALS, &self.calls(tools, count, &special_id)].concat()
    }

    fn after_text(&self, marks: &[&str], tools: &[Tool], special_id: &impl Fn(&str) -> Option<u32>) -> String {
        let Some(mark) = marks.first() else { return "start: SAID\nSAID: ANY\n".to_owned() };
        let literal = |text: &str| self.literal(text, special_id);
        let after_mark = |text: &str| literal(text.strip_prefix(mark).unwrap_or(text));
        let first = if self.begin.is_empty() {
            // The first call has said its mark.
            let first = |(i, tool)| format!("{} tail_{i}", after_mark(&self.head(tool)));
            tools.iter().enumerate().map(first).collect::<Vec<_>>().join(" | ")
        } else {
            format!("{} call", after_mark(self.begin))
        };
        let (lead, terminal) = said_through(mark, "LEAD", special_id);
        let said = said(&[holding(marks, special_id)]);
        format!("start: SAID | {lead} first further\nfirst: {first}\n{terminal}{said}")
    }

    fn after_lines(&self, tools: &[Tool]) -> String {
        let heads: Vec<String> = tools.iter().map(|tool| quoted(&(self.head(tool) + "{"))).collect();
        let first: Vec<String> = (0..tools.len()).map(|i| format!("LEAD_{i} tail_{i}")).collect();
        let lead = |(i, tool)| format!("LEAD_{i}: (SAID & (ANY \"\\n\"))? WHITE {}\n", quoted(&self.head(tool)));
        let leads: String = tools.iter().enumerate().map(lead).collect();
        let begins = format!("(ANY \"\\n\")? WHITE ({}) ANY", heads.join(" | "));
        format!("start: SAID | first further\nfirst: {}\n{leads}{}", first.join(" | "), said(&[Some(begins)]))
    }

    /// Thoughts and remarks, each a message; then the last one, or a call.
    fn after_messages(&self, special_id: &impl Fn(&str) -> Option<u32>) -> String {
        let literal = |text: &str| self.literal(text, special_id);
        let (other, terminal) = said_through("<|end|>", "OTHER", special_id);
        format!(
            "start: other{{0,16}} (last | calls)\nother: ({} | {}) {other} {}\nlast: {} SAID\n{terminal}{}",
            literal("<|channel|>analysis<|message|>"),
            literal("<|channel|>commentary<|message|>"),
            literal("<|start|>assistant"),
            literal("<|channel|>final<|message|>"),
            said(&[holding(self.markers, special_id)])
        )
    }
}

/// Text that none of `parts`, expressions of Lark, matches as a whole.
fn said(parts: &[Option<String>]) -> String {
    let not: String = parts.iter().flatten().map(|part| format!(" & ~({part})")).collect();
    format!("SAID: ANY{not}\n")
}

/// Any text with one of those `marks` in it that are no special tokens.
fn holding(marks: &[&str], special_id: &impl Fn(&str) -> Option<u32>) -> Option<String> {
    let marks: Vec<String> = marks.iter().filter(|mark| special_id(mark).is_none()).map(|mark| quoted(mark)).collect();
    (!marks.is_empty()).then(|| format!("ANY ({}) ANY", marks.join(" | ")))
}

/// Text and the mark after it, and the terminal `name` if that needs one.
fn said_through(mark: &str, name: &str, special_id: &impl Fn(&str) -> Option<u32>) -> (String, String) {
    match special_id(mark) {
        Some(id) => (format!("SAID? <[{id}]>"), String::new()),
        None => (name.to_owned(), format!("{name}: SAID {}\n", quoted(mark))),
    }
}
