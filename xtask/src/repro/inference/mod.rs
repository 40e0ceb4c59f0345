//! `cargo xtask repro inference`: the paper's claims about serving, in the form that fits one machine of two cores. Ranks are
//! processes on emulated hosts.
//!
//! What is measured is kept as JSON, and the report is made of that alone: whether a claim shows is computed, not written.

mod claims;
mod data;
mod formulation;
mod kinds;
mod models;
mod place;
mod routes;
mod training;

use crate::plot::{Panel, draw_panels};
use crate::shell::{self, command, output, root};
use anyhow::{Context, Result};
use data::Data;
use place::{Place, Size};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Narrower models, fewer ranks and steps, to see that all is well; the figures say nothing.
    #[arg(long)]
    smoke: bool,
    /// Make the report of what was measured before, and measure nothing.
    #[arg(long)]
    report: bool,
    /// Where measurements and the report go [default: xtask/results/inference, with --smoke runs/repro/inference-smoke].
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl Args {
    fn size(&self) -> Size {
        if self.smoke {
            return Size { narrow: 32, seconds: 0.5, smoke: true };
        }
        Size { narrow: 16, seconds: 4.0, smoke: false }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let default = if args.smoke { "runs/repro/inference-smoke" } else { "xtask/results/inference" };
    let out = root().join(args.out.clone().unwrap_or_else(|| default.into()));
    std::fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    let file = out.join("measured.json");
    if !args.report {
        write(&file, &(serde_json::to_string_pretty(&measure(args.size())?)? + "\n"))?;
    }
    report(&Data::read(&file)?, &out)
}

const ROUNDS: usize = 2;

/// The load of the last minute.
fn load() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").context("cannot read /proc/loadavg")?;
    let first = text.split(' ').next().and_then(|word| word.parse().ok());
    first.context("/proc/loadavg has no number")
}

/// The priority of this program, which those that it starts have too.
fn nice() -> Result<i64> {
    let text = std::fs::read_to_string("/proc/self/stat").context("cannot read /proc/self/stat")?;
    // Behind the name, which may hold anything.
    let words = text.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(16)?.parse().ok());
    words.context("/proc/self/stat has no nice value")
}

fn measure(size: Size) -> Result<Data> {
    let begun = Instant::now();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut data = Data {
        commit: shell::commit()?,
        machine: shell::machine(),
        cores: std::thread::available_parallelism().map_or(1, usize::from),
        compiler: output(&mut command("rustc", &["--version"]))?.trim().to_owned(),
        command: format!("cargo xtask {}", arguments.join(" ")),
        minutes: 0.0,
        load: [load()?; 2],
        nice: nice()?,
        narrow: size.narrow,
        smoke: size.smoke,
        delay_us: place::DELAY.as_micros() as u64,
        steps: Vec::new(),
        training: Vec::new(),
    };
    let place = Place::new(size)?;
    // Others may use the machine too: everything is measured at two times, far from each other.
    for _ in 0..if size.smoke { 1 } else { ROUNDS } {
        for part in [formulation::run, kinds::run, routes::run] {
            data.steps.extend(part(&place)?);
        }
    }
    data.load[1] = load()?;
    data.training = training::run(&place)?;
    data.minutes = begun.elapsed().as_secs_f64() / 60.0;
    Ok(data)
}

/// What differs from the paper's experiments in all parts.
fn set_up(data: &Data) -> String {
    format!(
        "- Ranks are processes of one thread each, at most two on a host; hosts are network namespaces of this machine, {} us from each \
         other one way, with lines as fast as each table says. All ranks share {} cores: beyond that many a rank waits while others \
         compute, so that a step on more ranks cannot take less time, and all-to-alls include that waiting. The paper's ranks are A100 \
         GPUs with a network of their own.\n\
         - Messages travel over TCP; the paper's over NCCL and SCCL.\n\
         - Models are {} times narrower. Their weights are random, so tokens choose experts as no trained model does; what the original \
         drops tells how unevenly. Products read bf16.\n\
         - The baseline is the original's formulation (one-hot einsums, every expert padded to its capacity, one flat all-to-all of all \
         rows) over this project's own products, attention and network, not PyTorch: what Python and its kernels add is not in it. \
         Its experts have a capacity of at least 4 rows of a rank (the layer's default) or 1 (its inference module's). Both compute \
         what ours does but for what they drop, which is checked before anything is timed.\n\
         - Each sequence has 128 tokens and gets one; times are means over ranks and over the faster half of the steps, all forms in \
         turns; of several such measurements the fastest counts (`measured.json` has all).\n",
        data.delay_us, data.cores, data.narrow,
    )
}

fn text(data: &Data) -> String {
    let mut text = String::from("# Inference\n\n");
    let Data { machine, commit, compiler, command, minutes, load: [before, after], nice, .. } = data;
    let _ = write!(
        text,
        "Made by `cargo xtask repro inference` of `measured.json` alone.\n\n```text\nmachine: {machine}\ncommit: {commit}\ncompiler: \
         {compiler}\ncommand: {command}\ntime: {minutes:.1} minutes\nload of the machine: {before:.1} before, {after:.1} at the end; \
         nice {nice}\n```\n"
    );
    if data.smoke {
        text += "\nThis is a smoke run: its figures say nothing.\n";
    }
    text += "\n## What shows\n\nBeside each figure the span of all measurements of the same thing; what one of them would confirm and \
             another not is not told apart.\n\n";
    let claims = [formulation::claims(data), kinds::claims(data), training::claims(data), routes::claims(data)];
    text += &claims::table(&claims.into_iter().flatten().collect::<Vec<_>>());
    text += "\n## What is different\n\n";
    text += &set_up(data);
    text += &formulation::section(data);
    text += "\n![the original's formulation and ours](formulation.svg)\n";
    text += &kinds::section(data);
    text += "\n![kinds of models](kinds.svg)\n";
    text += &training::section(data);
    text += &routes::section(data);
    text
}

fn report(data: &Data, out: &Path) -> Result<()> {
    let draw = |panels: &[Panel], name: &str| draw_panels(panels, ["ranks", ""], &out.join(name));
    draw(&formulation::panels(data), "formulation.svg")?;
    draw(&kinds::panels(data), "kinds.svg")?;
    let text = text(data);
    write(&out.join("report.md"), &text)?;
    println!("{text}\nin {}", out.display());
    Ok(())
}

/// Never leaves half a file.
fn write(path: &Path, text: &str) -> Result<()> {
    let unfinished = path.with_extension("unfinished");
    std::fs::write(&unfinished, text).with_context(|| format!("cannot write {}", unfinished.display()))?;
    Ok(std::fs::rename(unfinished, path)?)
}

#[cfg(test)]
mod tests {
    use super::data::Part;
    use super::data::tests::{data, step};
    use super::*;

    #[test]
    fn a_report_is_made_of_what_was_kept() {
        let dir = std::env::temp_dir().join(format!("repro-inference-report-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut steps = Vec::new();
        for ranks in [1, 2] {
            steps.extend(["ours", "original, capacity 1"].map(|form| step(Part::Formulation, form, ranks)));
            steps.push(step(Part::Kinds, "ours", ranks));
        }
        let kept = serde_json::to_string(&data(steps)).unwrap();
        write(&dir.join("measured.json"), &kept).unwrap();
        let args = Args { smoke: true, report: true, out: Some(dir.clone()) };
        run(&args).unwrap();
        let text = std::fs::read_to_string(dir.join("report.md")).unwrap();
        for part in
            ["commit: abc", "## What shows", "does not show here", "not measured", "(formulation.svg)", "(kinds.svg)"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        for picture in ["formulation.svg", "kinds.svg"] {
            assert!(std::fs::read_to_string(dir.join(picture)).unwrap().contains("ranks"), "{picture}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
        assert!(run(&args).unwrap_err().to_string().contains("measured.json"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
