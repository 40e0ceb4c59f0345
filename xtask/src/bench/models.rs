//! Whole models of published shapes and random weights: loading, prompts and decoding, ours beside other programs in one run.

use super::peers::Measured;
use crate::plot::{Curve, Panel, draw_panels};
use crate::shell::{cargo, output, root};
use anyhow::Result;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// A model of the bench.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// Qwen3-MoE, 1.78 B parameters: 4 layers of 64 experts, 8 of them for a token.
    Qwen3,
    /// 4 of the 16 layers of OLMoE-1B-7B: 64 experts, 8 of them for a token.
    Olmoe,
    /// 4 of the 27 layers of DeepSeek-V2-Lite: latent attention, 64 experts, 6 of them for a token and 2 for all.
    Deepseek,
}

impl Part {
    const ALL: [Self; 3] = [Self::Qwen3, Self::Olmoe, Self::Deepseek];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qwen3 => "qwen3-moe-1.8b",
            Self::Olmoe => "olmoe-4-layers",
            Self::Deepseek => "deepseek-v2-lite-4-layers",
        }
    }

    fn preset(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Qwen3 => ("qwen3-moe-1.8b", &[]),
            Self::Olmoe => ("olmoe-1b-7b", &["--set", "num_hidden_layers=4"]),
            Self::Deepseek => ("deepseek-v2-lite", &["--set", "num_hidden_layers=4"]),
        }
    }

    /// The folder of its weights, made by the first run that needs it.
    pub(super) fn folder(self) -> Result<PathBuf> {
        let dir = root().join("target/bench-models").join(self.name());
        if !dir.join("config.json").exists() {
            let (preset, settings) = self.preset();
            let mut init =
                cargo(&["run", "--quiet", "--release", "--package", "moe-models", "--bin", "moe-init", "--"]);
            let made = output(init.args(["--preset", preset, "--out"]).arg(&dir).args(settings))?;
            print!("{made}");
        }
        Ok(dir)
    }
}

/// In which forms weights are measured.
const FORMS: [&str; 3] = ["bf16", "int8", "int4"];

/// Ours and the peers' rows, one model after the other.
#[derive(Default)]
pub(super) struct Report(Vec<(&'static str, Measured)>);

impl Report {
    /// Measures these models, or all of them: form by form, ours and then the peers', since the memory's speed drifts on shared
    /// machines.
    pub(super) fn measure(parts: &[Part], venvs: &[PathBuf]) -> Result<Self> {
        let mut all = Vec::new();
        for part in if parts.is_empty() { &Part::ALL[..] } else { parts } {
            let folder = part.folder()?.display().to_string();
            for form in FORMS {
                let mut bench = cargo(&["bench", "--quiet", "--package", "moe-models", "--bench", "models", "--"]);
                let printed = output(bench.args([folder.as_str(), form]))?;
                // Where the folder lies says nothing to a reader.
                let printed = printed.replace(&folder, part.name());
                let arguments = [folder.clone(), form.to_owned()];
                all.push((
                    part.name(),
                    Measured::new(&printed, "moe-models/benches/models_peers.py", venvs, &arguments)?,
                ));
            }
        }
        Ok(Self(all))
    }

    /// Our tables, and ours against the best peer of the same model, case and form, or of bf16 where no peer has the form.
    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for (_, measured) in &self.0 {
            let _ = writeln!(text, "{}", measured.head().trim_end());
        }
        if self.0.iter().all(|(_, measured)| measured.peers.is_empty()) {
            return text;
        }
        let _ = writeln!(
            text,
            "\n{:<28}{:<6}{:<12}{:>10}{:>10}  {:<26}{:>7}{:>12}",
            "model", "form", "case", "tokens/s", "peer's", "best peer", "ratio", "peer's GB"
        );
        for (model, measured) in &self.0 {
            for row in &measured.ours {
                let Some(peer) = self.best_peer(model, row) else { continue };
                let word = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
                let number = |row: &Value, key: &str| row[key].as_f64().unwrap_or(f64::NAN);
                let (ours, theirs) = (number(row, "tokens_per_second"), number(peer, "tokens_per_second"));
                let _ = writeln!(
                    text,
                    "{model:<28}{:<6}{:<12}{ours:>10.1}{theirs:>10.1}  {:<26}{:>6.2}x{:>12.1}",
                    word(row, "form"),
                    word(row, "case"),
                    format!("{}, {}", word(peer, "peer"), word(peer, "form")),
                    ours / theirs,
                    number(peer, "peak_bytes") / 1e9
                );
            }
        }
        text
    }

    fn best_peer(&self, model: &str, row: &Value) -> Option<&Value> {
        let of_form = |form: &Value| {
            let all = self.0.iter().filter(|(name, _)| *name == model).flat_map(|(_, measured)| &measured.peers);
            let same = all.filter(|peer| peer["case"] == row["case"] && peer["form"] == *form);
            same.filter_map(|peer| Some((peer, peer["tokens_per_second"].as_f64()?)))
                .max_by(|a, b| a.1.total_cmp(&b.1))
                .map(|(peer, _)| peer)
        };
        of_form(&row["form"]).or_else(|| of_form(&"bf16".into()))
    }

    /// Tokens per second of one, eight and 32 sequences, a panel for each model and form.
    pub(super) fn draw(&self, out: &Path) -> Result<()> {
        let panel = |(model, measured): &(&str, Measured)| {
            let (mut curves, mut form): (Vec<Curve>, _) = (Vec::new(), "");
            for row in measured.ours.iter().chain(&measured.peers) {
                let sequences = match row["case"].as_str() {
                    Some("decode_b1") => 1.0,
                    Some("decode_b8") => 8.0,
                    Some("decode_b32") => 32.0,
                    _ => continue,
                };
                let Some(rate) = row["tokens_per_second"].as_f64() else { continue };
                form = row["form"].as_str().unwrap_or_default();
                let name = row["peer"].as_str().unwrap_or("ours");
                match curves.iter_mut().find(|curve| curve.name == name) {
                    Some(curve) => curve.points.push((sequences, rate)),
                    None => curves.push(Curve { name: name.to_owned(), points: vec![(sequences, rate)] }),
                }
            }
            Panel { title: format!("{model}, {form}"), curves }
        };
        draw_panels(&self.0.iter().map(panel).collect::<Vec<_>>(), ["sequences side by side", "tokens/s"], out)
    }

    /// Every row.
    pub(super) fn json(&self) -> Result<String> {
        let of = |(model, measured): &(&str, Measured)| serde_json::json!({ "model": model, "rows": measured.json() });
        Ok(serde_json::to_string_pretty(&self.0.iter().map(of).collect::<Vec<_>>())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(text: &str) -> Value {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn each_form_is_set_beside_the_best_peer_that_has_it() {
        let measured = |form: &str, peers: Vec<Value>| {
            let ours = row(&format!(r#"{{"case": "decode_b1", "form": "{form}", "tokens_per_second": 60.0}}"#));
            ("a", Measured { table: format!("table of {form}\n"), ours: vec![ours], peers, setup: vec![] })
        };
        let peer = |name: &str, form: &str, rate: f64| {
            let head = format!(r#"{{"peer": "{name}", "form": "{form}", "case": "decode_b1""#);
            row(&format!(r#"{head}, "tokens_per_second": {rate}, "peak_bytes": 4e9}}"#))
        };
        let report = Report(vec![
            measured("bf16", vec![peer("slow", "bf16", 20.0), peer("fast", "bf16", 30.0)]),
            measured("int8", vec![peer("integers", "int8", 40.0)]),
            measured("int4", vec![]),
        ]);
        let text = report.text();
        for part in ["table of int4", "fast, bf16", "2.00x", "integers, int8", "1.50x"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("slow") && text.matches("fast, bf16").count() == 2, "{text}");
        let out = std::env::temp_dir().join(format!("models-{}.svg", std::process::id()));
        report.draw(&out).unwrap();
        let svg = std::fs::read_to_string(&out).unwrap();
        assert!(["a, bf16", "a, int8", "integers"].iter().all(|part| svg.contains(part)));
        std::fs::remove_file(&out).unwrap();
    }
}
