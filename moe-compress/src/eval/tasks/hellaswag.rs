//! HellaSwag: which of four endings follows.

use super::{Task, fields};
use crate::eval::{Item, Metric, python};

pub(super) const TASK: Task =
    Task { name: "hellaswag", file: "hellaswag.validation", metrics: &[Metric::Acc, Metric::AccNorm], parse };

#[derive(serde::Deserialize)]
struct Line {
    activity_label: String,
    ctx_a: String,
    ctx_b: String,
    endings: Vec<String>,
    label: usize,
}

fn parse(line: &str) -> Result<Item, String> {
    let Line { activity_label, ctx_a, ctx_b, endings, label } = fields(line)?;
    let context = clean(&format!("{activity_label}: {ctx_a} {}", python::capitalize(&ctx_b)));
    let endings: Vec<String> = endings.iter().map(|ending| clean(ending)).collect();
    Item::choice(&context, &endings, label)
}

/// Without what the texts' source has left in brackets.
fn clean(text: &str) -> String {
    without_brackets(&python::strip(text).replace(" [title]", ". ")).replace("  ", " ")
}

/// Without each `[` up to the next `]` of its line.
fn without_brackets(text: &str) -> String {
    let (mut kept, mut rest) = (String::new(), text);
    while let Some(open) = rest.find('[') {
        let (before, bracket) = rest.split_at(open);
        kept.push_str(before);
        rest = match bracket.find([']', '\n']) {
            Some(end) if bracket[end..].starts_with(']') => &bracket[end + 1..],
            _ => {
                kept.push('[');
                &bracket[1..]
            }
        };
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_go_and_titles_become_sentences() {
        for (text, want) in [
            (" How to whistle [title] Wet your lips. [step] Blow.  ", "How to whistle. Wet your lips. Blow."),
            ("a [b [c] d] e", "a d] e"),
            ("open [ and\nnext] line", "open [ and\nnext] line"),
            ("three   spaces", "three  spaces"),
        ] {
            assert_eq!(clean(text), want, "{text}");
        }
    }
}
