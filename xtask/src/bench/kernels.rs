//! Our rows of the kernel bench beside those of other programs, measured in the same run.

use super::peers::Measured;
use crate::plot::{Curve, Panel, draw_panels};
use anyhow::{Context, Result};
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Our products and the peers'.
#[derive(Default)]
pub(super) struct Comparison(Measured);

impl Comparison {
    /// Reads our bench's output and runs the peers of each environment on the same shapes.
    pub(super) fn new(printed: &str, venvs: &[PathBuf], shapes: &[String]) -> Result<Self> {
        Ok(Self(Measured::new(printed, "moe-kernels/benches/peers.py", venvs, shapes)?))
    }

    /// Puts another shape's rows behind these.
    pub(super) fn add(&mut self, Self(other): Self) {
        let all = &mut self.0;
        // Machine and column names stand above the first shape.
        let head = if all.table.is_empty() { 0 } else { 2 };
        all.table.extend(other.table.split_inclusive('\n').skip(head));
        all.ours.extend(other.ours);
        all.peers.extend(other.peers);
        all.setup.extend(other.setup.into_iter().filter(|s| !all.setup.contains(s)).collect::<Vec<_>>());
    }

    /// The fastest peer on the work of one of our rows: its name and seconds.
    fn best_peer(&self, row: &Value) -> Option<(&str, f64)> {
        let same = |peer: &&Value| ["shape", "type", "tokens"].iter().all(|key| peer[*key] == row[*key]);
        let named =
            self.0.peers.iter().filter(same).filter_map(|p| Some((p["peer"].as_str()?, p["seconds"].as_f64()?)));
        named.min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// The bench's table, and ours against the best peer.
    pub(super) fn text(&self) -> String {
        let mut text = self.0.head();
        if !self.0.peers.is_empty() {
            let _ = writeln!(
                text,
                "{:<10}{:<6}{:>7}{:>11}{:>12}  {:<18}{:>9}",
                "shape", "type", "tokens", "ours, ms", "best, ms", "peer", "ratio"
            );
        }
        for row in &self.0.ours {
            let (Some((peer, theirs)), Some(seconds)) = (self.best_peer(row), row["seconds"].as_f64()) else {
                continue;
            };
            let word = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
            let _ = writeln!(
                text,
                "{:<10}{:<6}{:>7}{:>11.3}{:>12.3}  {peer:<18}{:>8.2}x",
                word("shape"),
                word("type"),
                row["tokens"],
                seconds * 1e3,
                theirs * 1e3,
                theirs / seconds
            );
        }
        text
    }

    /// Tokens per second over tokens, one panel per shape: our types and every peer.
    pub(super) fn draw(&self, out: &Path) -> Result<()> {
        let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let mut panels: Vec<Panel> = Vec::new();
        for row in self.0.ours.iter().chain(&self.0.peers) {
            let (Some(tokens), Some(seconds)) = (row["tokens"].as_f64(), row["seconds"].as_f64()) else { continue };
            let (shape, kind) = (text(row, "shape"), text(row, "type"));
            let name = row["peer"].as_str().map_or(format!("ours, {kind}"), |peer| format!("{peer}, {kind}"));
            let panel = match panels.iter().position(|p| p.title == shape) {
                Some(at) => &mut panels[at],
                None => {
                    panels.push(Panel { title: shape, curves: Vec::new() });
                    panels.last_mut().context("a panel was just added")?
                }
            };
            match panel.curves.iter_mut().find(|c| c.name == name) {
                Some(curve) => curve.points.push((tokens, tokens / seconds)),
                None => panel.curves.push(Curve { name, points: vec![(tokens, tokens / seconds)] }),
            }
        }
        draw_panels(&panels, ["tokens in a call", "tokens/s"], out)
    }

    /// Every row.
    pub(super) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(&self.0.json())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_peer_of_the_same_work_is_found() {
        let row = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let comparison = Comparison(Measured {
            table: "table\n".into(),
            ours: vec![row(r#"{"shape": "a", "type": "bf16", "tokens": 4, "seconds": 0.001}"#)],
            peers: vec![
                row(r#"{"peer": "slow", "shape": "a", "type": "bf16", "tokens": 4, "seconds": 0.004}"#),
                row(r#"{"peer": "fast", "shape": "a", "type": "bf16", "tokens": 4, "seconds": 0.002}"#),
                row(r#"{"peer": "other work", "shape": "a", "type": "f32", "tokens": 4, "seconds": 0.0001}"#),
            ],
            setup: vec![],
        });
        let text = comparison.text();
        assert!(text.starts_with("table\n") && text.contains("fast") && text.contains("2.00x"), "{text}");
        assert!(!text.contains("slow") && !text.contains("other work"), "{text}");
        assert_eq!(row(&comparison.json().unwrap())["peers"].as_array().unwrap().len(), 3);
    }

    #[test]
    fn shapes_follow_one_another_under_one_head() {
        let of = |shape: &str| {
            Comparison::new(&format!("machine\ncolumns\n{shape} row\njson {{\"shape\": \"{shape}\"}}\n"), &[], &[])
                .unwrap()
        };
        let mut all = Comparison::default();
        all.add(of("a"));
        all.add(of("b"));
        assert_eq!((all.text().as_str(), all.0.ours.len()), ("machine\ncolumns\na row\nb row\n", 2));
    }
}
