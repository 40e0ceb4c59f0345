//! [`Item`]: one question of a task, and how its outcome is judged; [`TaskFile`]: a file with one item a line.

use super::metrics::{Metric, argmax};
use super::python;
use super::request::Request;
use super::scorer::LogLikelihood;
use crate::{Error, Result};
use lzma_rust2::XzReader;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// One question of a task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A text whose end is to be predicted.
    Cloze(Request),
    /// One of several continuations, or contexts, is right.
    Choice {
        /// One for each choice.
        requests: Vec<Request>,
        /// Characters of each choice.
        chars: Vec<usize>,
        /// The right one.
        label: usize,
    },
    /// Any of the answers is right, if it is greedy at every token.
    AnyGreedy(Vec<Request>),
    /// An answer is generated and compared.
    Answer {
        /// What is continued.
        prompt: String,
        /// Right answers.
        accepted: Vec<String>,
    },
}

impl Item {
    /// Choices after one context.
    ///
    /// # Errors
    /// A text that says so, if `label` is none of them.
    pub(super) fn choice(context: &str, choices: &[String], label: usize) -> std::result::Result<Self, String> {
        let requests = choices.iter().map(|choice| Request::spaced(context, choice)).collect();
        Self::choice_of(requests, choices, label)
    }

    /// Requests that stand for `choices`.
    pub(super) fn choice_of(
        requests: Vec<Request>,
        choices: &[String],
        label: usize,
    ) -> std::result::Result<Self, String> {
        if label >= choices.len() {
            return Err(format!("label {label} is none of the {} choices, which count from 0", choices.len()));
        }
        Ok(Self::Choice { requests, chars: choices.iter().map(|choice| python::len(choice)).collect(), label })
    }

    /// What is scored of it.
    pub fn requests(&self) -> &[Request] {
        match self {
            Self::Cloze(request) => std::slice::from_ref(request),
            Self::Choice { requests, .. } | Self::AnyGreedy(requests) => requests,
            Self::Answer { .. } => &[],
        }
    }

    /// What is generated after, if it is that kind of item.
    pub fn prompt(&self) -> Option<&str> {
        match self {
            Self::Answer { prompt, .. } => Some(prompt),
            _ => None,
        }
    }

    /// What guessing would score, where that is a number.
    pub fn chance(&self) -> Option<f64> {
        match self {
            Self::Choice { requests, .. } => Some(1.0 / requests.len() as f64),
            _ => None,
        }
    }

    /// The value of each metric that this kind of item has, from the log-likelihoods of its requests and the text after its
    /// prompt.
    pub fn values(&self, scores: &[LogLikelihood], answer: &str) -> Vec<(Metric, f64)> {
        match self {
            Self::Cloze(_) => scores
                .iter()
                .flat_map(|s| [(Metric::Perplexity, s.logprob), (Metric::Acc, truth(s.is_greedy))])
                .collect(),
            Self::Choice { chars, label, .. } => {
                let sums: Vec<f64> = scores.iter().map(|score| score.logprob).collect();
                let per_char: Vec<f64> = sums.iter().zip(chars).map(|(sum, &chars)| sum / chars as f64).collect();
                let right = |values: &[f64]| truth(argmax(values) == *label);
                vec![(Metric::Acc, right(&sums)), (Metric::AccNorm, right(&per_char))]
            }
            Self::AnyGreedy(_) => vec![(Metric::ExactMatch, truth(scores.iter().any(|score| score.is_greedy)))],
            Self::Answer { accepted, .. } => {
                let answer = comparable(python::strip(answer));
                vec![(Metric::ExactMatch, truth(accepted.iter().any(|right| comparable(right) == answer)))]
            }
        }
    }
}

fn truth(is_true: bool) -> f64 {
    f64::from(u8::from(is_true))
}

/// In small letters and without ASCII's punctuation.
fn comparable(text: &str) -> String {
    text.to_lowercase().replace(|c: char| c.is_ascii_punctuation(), "")
}

/// A `.jsonl` or `.jsonl.xz` file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskFile(PathBuf);

impl TaskFile {
    /// `NAME.jsonl` or `NAME.jsonl.xz` in `dir`.
    ///
    /// # Errors
    /// [`Error::Argument`] with both names if neither is there.
    pub fn find(dir: &Path, name: &str) -> Result<Self> {
        let candidates = ["jsonl", "jsonl.xz"].map(|ending| dir.join(format!("{name}.{ending}")));
        candidates.iter().find(|path| path.is_file()).map(|path| Self(path.clone())).ok_or_else(|| {
            let dir = dir.display();
            Error::Argument(format!(
                "{dir}: holds neither {name}.jsonl nor {name}.jsonl.xz; give the folder of the tasks"
            ))
        })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Reads the first `limit` items, or all; blank lines are skipped.
    ///
    /// # Errors
    /// If the file cannot be read or holds no item; with its line's number, one that `parse` refuses.
    pub fn read(
        &self,
        limit: Option<usize>,
        parse: impl Fn(&str) -> std::result::Result<Item, String>,
    ) -> Result<Vec<Item>> {
        let path = &self.0;
        let file = File::open(path).map_err(|e| moe_models::Error::io(path, e))?;
        let bytes: Box<dyn Read> = match path.extension().is_some_and(|ending| ending == "xz") {
            true => Box::new(XzReader::new(BufReader::new(file), true)),
            false => Box::new(file),
        };
        let mut items = Vec::new();
        for (number, line) in BufReader::new(bytes).lines().enumerate() {
            if limit.is_some_and(|limit| items.len() >= limit) {
                break;
            }
            let refused = |reason: String| moe_models::Error::format(path, format!("line {}: {reason}", number + 1));
            let line = line.map_err(|e| refused(e.to_string()))?;
            if !line.trim().is_empty() {
                items.push(parse(&line).map_err(refused)?);
            }
        }
        if items.is_empty() {
            return Err(moe_models::Error::format(path, "holds no items; expected one JSON object per line").into());
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(logprob: f64, is_greedy: bool) -> LogLikelihood {
        LogLikelihood { logprob, is_greedy }
    }

    #[test]
    fn a_cloze_is_right_where_all_is_greedy() {
        let item = Item::Cloze(Request::spaced("a", "b"));
        assert_eq!(item.values(&[score(-2.5, true)], ""), [(Metric::Perplexity, -2.5), (Metric::Acc, 1.0)]);
        assert_eq!(item.values(&[score(-2.5, false)], "")[1], (Metric::Acc, 0.0));
        assert_eq!(item.chance(), None);
    }

    #[test]
    fn choices_by_sum_and_by_character() {
        let choices = ["tea".to_owned(), "crème brûlée".to_owned()];
        let item = Item::choice("Question", &choices, 1).unwrap();
        // By characters, -6 / 12 is more than -3 / 3.
        assert_eq!(
            item.values(&[score(-3.0, true), score(-6.0, false)], ""),
            [(Metric::Acc, 0.0), (Metric::AccNorm, 1.0)]
        );
        // -13.5 / 12 is less than -3 / 3; over its 15 bytes it would be more.
        assert_eq!(item.values(&[score(-3.0, true), score(-13.5, false)], "")[1], (Metric::AccNorm, 0.0));
        assert_eq!(item.chance(), Some(0.5));
        assert!(Item::choice("Question", &choices, 2).unwrap_err().contains("label 2"));
    }

    #[test]
    fn one_greedy_answer_is_enough() {
        let item = Item::AnyGreedy(vec![Request::spaced("q", "a"), Request::spaced("q", "b")]);
        assert_eq!(item.values(&[score(-9.0, false), score(-1.0, true)], ""), [(Metric::ExactMatch, 1.0)]);
        assert_eq!(item.values(&[score(-9.0, false), score(-1.0, false)], ""), [(Metric::ExactMatch, 0.0)]);
    }

    #[test]
    fn answers_are_compared_without_case_and_punctuation() {
        let item = Item::Answer { prompt: "q".into(), accepted: vec!["St. Mary's".into(), "Ärger".into()] };
        for (answer, right) in [(" st marys ", 1.0), ("ST. MARY'S", 1.0), ("ärger", 1.0), ("st  marys", 0.0), ("", 0.0)]
        {
            assert_eq!(item.values(&[], answer), [(Metric::ExactMatch, right)], "{answer}");
        }
    }
}
