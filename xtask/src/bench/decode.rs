//! The report of the inference bench: its table, its rows and a picture.

use super::peers::split_output;
use crate::plot::{Curve, Panel, draw_panels};
use anyhow::Result;
use serde_json::Value;
use std::path::Path;

/// What one run printed.
pub(super) struct Report {
    rows: Vec<Value>,
    pub(super) text: String,
}

impl Report {
    pub(super) fn new(printed: &str) -> Result<Self> {
        let (rows, text) = split_output(printed)?;
        Ok(Self { rows, text })
    }

    fn curve(&self, name: &str, bench: &str, point: impl Fn(&Value) -> Option<(f64, f64)>) -> Curve {
        let points = self.rows.iter().filter(|row| row["bench"] == bench).filter_map(point).collect();
        Curve { name: name.into(), points }
    }

    /// Tokens per second over sequences, and the time of a token over the length of its sequence.
    pub(super) fn draw(&self, out: &Path) -> Result<()> {
        let number = |row: &Value, key: &str| row[key].as_f64();
        let many = self.curve("tokens/s over sequences", "decode", |row| {
            Some((number(row, "sequences")?, number(row, "tokens_per_second")?))
        });
        let token = self
            .curve("us a token", "context", |row| Some((number(row, "context")?, number(row, "token_seconds")? * 1e6)));
        let rest = self.curve("us without attention's reads", "context", |row| {
            let rest = number(row, "token_seconds")? - number(row, "attention_seconds")?;
            Some((number(row, "context")?, rest * 1e6))
        });
        let panels = [
            Panel { title: "sequences in one ragged pass".into(), curves: vec![many] },
            Panel { title: "one token more, by context".into(), curves: vec![token, rest] },
        ];
        draw_panels(&panels, ["sequences; context", "tokens/s; us"], out)
    }

    /// Every row.
    pub(super) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(&self.rows)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_axes_of_both_panels_have_numbers() {
        let mut printed = String::from("a table\n");
        for (sequences, rate) in [(1, 5068.0), (32, 13433.0)] {
            let row = serde_json::json!({"bench": "decode", "sequences": sequences, "tokens_per_second": rate});
            printed += &format!("json {row}\n");
        }
        for (context, token, attention) in [(16, 183e-6, 10e-6), (1024, 361e-6, 171e-6)] {
            let row = serde_json::json!({
                "bench": "context", "context": context, "token_seconds": token, "attention_seconds": attention,
            });
            printed += &format!("json {row}\n");
        }
        let report = Report::new(&printed).unwrap();
        assert_eq!(report.text.trim(), "a table");
        let out = std::env::temp_dir().join(format!("decode-{}.svg", std::process::id()));
        report.draw(&out).unwrap();
        let svg = std::fs::read_to_string(&out).unwrap();
        std::fs::remove_file(&out).unwrap();
        for label in ["10000", "200", "1000"] {
            assert!(svg.lines().any(|line| line.trim() == label), "{label} is not on an axis");
        }
    }
}
