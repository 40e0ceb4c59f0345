//! `cargo xtask bench training`: training steps of three sizes beside other programs in the same run, and a step against
//! the number of experts.

mod growth;
mod peers;
mod section;

use super::peers::split_output;
use super::{header, keep};
use crate::shell::{cargo, output};
use anyhow::{Context, Result};
use peers::Environment;
use section::Section;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What `training` alone knows.
#[derive(clap::Args)]
#[command(next_help_heading = "With `training`")]
pub(super) struct Measurement {
    /// Steps that count, after one that does not.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    steps: Option<u16>,
    /// After this a row of a peer is given up.
    #[arg(long, value_name = "SECONDS")]
    peer_limit: Option<u64>,
}

/// Two cores take a minute for what takes longest, the code that `torch.compile` makes, unless something is wrong.
const PEER_LIMIT_SECONDS: u64 = 600;

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// The built-in model of `moe-train`.
    Small,
    /// 155.6 M parameters.
    Base,
    /// 0.6 B parameters.
    Large,
    /// The base size with 8 to 64 experts in two layers.
    Growth,
}

impl Part {
    const ALL: [Self; 4] = [Self::Small, Self::Base, Self::Large, Self::Growth];

    fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Base => "base",
            Self::Large => "large",
            Self::Growth => "growth",
        }
    }
}

impl Measurement {
    pub(super) fn is_given(&self) -> bool {
        self.steps.is_some() || self.peer_limit.is_some()
    }
}

/// What is measured so far.
#[derive(Default)]
struct Report {
    /// The machine, and what the columns mean.
    head: String,
    sections: Vec<Section>,
    /// The table of [`Part::Growth`], and its rows.
    growth: (String, Vec<Value>),
    setup: Vec<Value>,
}

impl Report {
    /// Takes what our bench printed for one part.
    fn add(&mut self, part: Part, printed: &str) -> Result<()> {
        let (mut rows, text) = split_output(printed)?;
        let (head, table) = text.split_once("\n\n").context("the bench printed no table")?;
        head.clone_into(&mut self.head);
        if part == Part::Growth {
            self.growth = (table.to_owned(), rows);
        } else {
            let model = rows.iter().position(|row| row["model"].is_object()).context("the bench named no model")?;
            let model = rows.remove(model);
            self.sections.push(Section { table: table.to_owned(), model, ours: rows, peers: Vec::new() });
        }
        Ok(())
    }

    fn text(&self) -> String {
        let setup = self.setup.iter().map(|setup| format!("peers: {setup}\n")).collect::<String>();
        let sections: String = self.sections.iter().map(|section| format!("\n{}", section.text())).collect();
        let (growth, rows) = &self.growth;
        let growth = if rows.is_empty() { String::new() } else { format!("\n{growth}") };
        format!("{}\n{setup}{sections}{growth}", self.head)
    }

    fn json(&self) -> Result<String> {
        let all = |of: fn(&Section) -> Vec<Value>| self.sections.iter().flat_map(of).collect::<Vec<_>>();
        let report = serde_json::json!({
            "models": all(|s| vec![s.model.clone()]), "ours": all(|s| s.ours.clone()),
            "peers": all(|s| s.peers.clone()), "setup": self.setup, "ratios": all(Section::ratios_json),
            "growth": self.growth.1,
        });
        Ok(serde_json::to_string_pretty(&report)?)
    }
}

/// Part by part, ours and then the peers': the memory's speed drifts on shared machines.
pub(super) fn run(parts: &[Part], measurement: &Measurement, venvs: &[PathBuf], out: &Path) -> Result<()> {
    let environments = venvs.iter().map(|venv| Environment::new(venv)).collect::<Result<Vec<_>>>()?;
    let limit = Duration::from_secs(measurement.peer_limit.unwrap_or(PEER_LIMIT_SECONDS));
    let steps = measurement.steps.map_or_else(Vec::new, |steps| vec!["--steps".into(), steps.to_string()]);
    let mut report = Report { setup: environments.iter().map(|e| e.setup.clone()).collect(), ..Report::default() };
    for part in Part::ALL.into_iter().filter(|part| parts.is_empty() || parts.contains(part)) {
        let bench = ["bench", "--quiet", "--package", "moe-models", "--bench", "training", "--", "--json", part.name()];
        report.add(part, &output(cargo(&bench).args(&steps))?)?;
        if part == Part::Growth {
            growth::draw(&report.growth.1, &out.join("training-growth.svg"))?;
        } else if let Some(section) = report.sections.last_mut() {
            for environment in &environments {
                section.peers.extend(environment.measure(&section.model["model"], &steps, limit)?);
            }
        }
        // A run takes long: one that is cut short leaves the parts that it has done.
        std::fs::write(out.join("training.json"), report.json()?)?;
        std::fs::write(out.join("training.txt"), header()? + &report.text())?;
    }
    keep(&out.join("training.txt"), &(header()? + &report.text()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_one_another_under_one_head_with_growth_behind_them() {
        let size = |name: &str| {
            let model = serde_json::json!({"model": {"name": name}, "flops": 1e9});
            let row = serde_json::json!({"size": name, "type": "bf16"});
            format!("machine\ncolumns\n\n{name}: layers\n\nrow of {name}\njson {model}\njson {row}\n")
        };
        let mut report = Report::default();
        report.add(Part::Growth, "machine\ncolumns\n\ngrowth: layers\n\nrow\njson {\"growth\": 8}\n").unwrap();
        report.add(Part::Small, &size("small")).unwrap();
        report.add(Part::Base, &size("base")).unwrap();
        assert_eq!(
            report.text(),
            "machine\ncolumns\n\nsmall: layers\n\nrow of small\n\nbase: layers\n\nrow of base\n\ngrowth: layers\n\nrow\n"
        );
        let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        let lengths = ["models", "ours", "peers", "growth"].map(|key| json[key].as_array().unwrap().len());
        assert_eq!(lengths, [2, 2, 0, 1]);
        assert!(report.add(Part::Base, "machine\n").is_err());
    }
}
