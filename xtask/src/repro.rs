//! `cargo xtask repro <id>`: rebuilds a table of the paper from `xtask/repro/<id>.toml`, prints what was published, ours,
//! and every difference in setup.

use crate::plot::{self, Curve, draw};
use crate::shell::{cargo, command, root, run as run_command};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which one: a file name of `xtask/repro` without its ending.
    id: String,
    /// Train on these sources instead of the excerpt in the repository (as `moe-train --data`). Repeatable.
    #[arg(long)]
    data: Vec<String>,
    /// Validate on these (as `moe-train --valid`). Repeatable.
    #[arg(long)]
    valid: Vec<String>,
    /// Tokens of each run, instead of the configured ones.
    #[arg(long)]
    train_tokens: Option<u64>,
    /// Where runs and results go; finished runs found there are not run again.
    #[arg(long, default_value = "runs/repro")]
    out: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Experiment {
    title: String,
    published: String,
    differences: String,
    seeds: Vec<u64>,
    train_tokens: u64,
    flags: Vec<String>,
    model: Vec<Model>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    name: String,
    flags: Vec<String>,
}

/// What `moe-train` writes about its model.
#[derive(Deserialize)]
struct ModelSummary {
    total_parameters: u64,
    active_parameters: u64,
    flops_per_token: u64,
}

/// One line of the result.
#[derive(Serialize)]
struct Row {
    name: String,
    bits_per_byte: Vec<f64>,
    mean: f64,
    /// Sample standard deviation over the seeds.
    deviation: f64,
    total_parameters: u64,
    active_parameters: u64,
    flops_per_token: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let path = root().join(format!("xtask/repro/{}.toml", args.id));
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("no experiment {:?}: cannot read {}", args.id, path.display()))?;
    let experiment: Experiment = toml::from_str(&text).with_context(|| format!("{}", path.display()))?;
    run_command(&mut cargo(&["build", "--release", "--package", "moe-models", "--bin", "moe-train"]))?;
    let out = root().join(&args.out).join(&args.id);
    let mut rows = Vec::new();
    let mut curves = Vec::new();
    for model in &experiment.model {
        let runs = experiment
            .seeds
            .iter()
            .map(|&seed| train(args, &experiment, model, seed, &out))
            .collect::<Result<Vec<_>>>()?;
        rows.push(row(model, &runs)?);
        curves.push(Curve { name: model.name.clone(), ..plot::read_curve(&runs[0], "valid/bits_per_byte")? });
    }
    let table = table(&experiment, &rows);
    println!("{table}");
    std::fs::write(out.join("table.md"), &table)?;
    std::fs::write(out.join("table.json"), serde_json::to_string_pretty(&rows)?)?;
    draw(&curves, "validation bits per byte, first seed", &out.join("curves.svg"))?;
    println!("results in {}", out.display());
    Ok(())
}

/// Trains one model with one seed, unless its folder holds the finished run; returns the folder.
fn train(args: &Args, experiment: &Experiment, model: &Model, seed: u64, out: &Path) -> Result<PathBuf> {
    let folder = out.join(format!("{}-seed{seed}", model.name.replace('/', "-")));
    let done = folder.join("done");
    if done.exists() {
        return Ok(folder);
    }
    let mut flags = experiment.flags.clone();
    flags.extend(model.flags.iter().cloned());
    let tokens = args.train_tokens.unwrap_or(experiment.train_tokens).to_string();
    let folder_name = folder.to_string_lossy().into_owned();
    for (flag, value) in [("--train-tokens", &tokens), ("--seed", &seed.to_string()), ("--out", &folder_name)] {
        flags.extend([flag.to_owned(), value.clone()]);
    }
    for (flag, sources) in [("--data", &args.data), ("--valid", &args.valid)] {
        flags.extend(sources.iter().flat_map(|source| [flag.to_owned(), source.clone()]));
    }
    flags.push("--resume".into());
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    run_command(&mut command("target/release/moe-train", &flags))?;
    std::fs::write(done, "")?;
    Ok(folder)
}

fn row(model: &Model, runs: &[PathBuf]) -> Result<Row> {
    let bits_per_byte = runs
        .iter()
        .map(|run| {
            let curve = plot::read_curve(run, "valid/bits_per_byte")?;
            Ok(curve.points[curve.points.len() - 1].1)
        })
        .collect::<Result<Vec<f64>>>()?;
    ensure!(!bits_per_byte.is_empty(), "the experiment has no seeds");
    let summary = runs[0].join("model_summary.json");
    let summary: ModelSummary = serde_json::from_str(
        &std::fs::read_to_string(&summary).with_context(|| format!("cannot read {}", summary.display()))?,
    )?;
    let count = bits_per_byte.len() as f64;
    let mean = bits_per_byte.iter().sum::<f64>() / count;
    let squares: f64 = bits_per_byte.iter().map(|b| (b - mean).powi(2)).sum();
    Ok(Row {
        name: model.name.clone(),
        mean,
        deviation: (squares / (count - 1.0).max(1.0)).sqrt(),
        bits_per_byte,
        total_parameters: summary.total_parameters,
        active_parameters: summary.active_parameters,
        flops_per_token: summary.flops_per_token,
    })
}

fn table(experiment: &Experiment, rows: &[Row]) -> String {
    let mut out = format!("## {}\n\n", experiment.title);
    out +=
        "| model | valid bits per byte, mean ± deviation | seeds | parameters | active | MFLOP per token, forward |\n";
    out += "|---|---|---|---|---|---|\n";
    for row in rows {
        let seeds: Vec<String> = row.bits_per_byte.iter().map(|b| format!("{b:.4}")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "| {} | {:.4} ± {:.4} | {} | {:.2} M | {:.2} M | {:.2} |",
            row.name,
            row.mean,
            row.deviation,
            seeds.join(", "),
            row.total_parameters as f64 / 1e6,
            row.active_parameters as f64 / 1e6,
            row.flops_per_token as f64 / 1e6,
        );
    }
    let _ = write!(
        out,
        "\nPublished: {}\nDifferences of setup: {}",
        experiment.published.trim(),
        experiment.differences.trim()
    );
    out
}
