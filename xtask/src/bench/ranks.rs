//! `cargo xtask bench ranks`: whole training steps over ranks: what more ranks cost on the same cores, what hierarchical
//! all-to-alls gain between hosts, and how long steps wait for gradients that travel during the backward pass or after it.

use super::{header, keep};
use crate::hosts::{Hosts, Link};
use crate::shell::{self, cargo, output, root};
use anyhow::{Context, Result, bail, ensure};
use plotters::prelude::*;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// 1 to 8 ranks that are threads of one process.
    Local,
    /// 8 ranks on 4 emulated hosts; as root.
    Hosts,
}

/// Runs these parts; all of them if none is named.
pub(super) fn run(parts: &[Part], out: &Path) -> Result<()> {
    let wanted = |part: Part| parts.is_empty() || parts.contains(&part);
    if wanted(Part::Local) {
        local(out)?;
    }
    if wanted(Part::Hosts) {
        hosts(out)?;
    }
    Ok(())
}

/// What is measured of a run.
struct Measured {
    step_ms: f64,
    tokens_per_second: f64,
    /// Of a step, over all ranks: rows, then gradients, each inside of nodes and between them.
    megabytes: [f64; 4],
    /// Of a step, on the rank where it was longest: waiting for rows; gradients under way; waiting for them.
    milliseconds: [f64; 3],
    loss: f64,
}

/// Steps of a run, and how many of them come before the measured ones.
const STEPS: u64 = 14;
const WARM_UP: u64 = 4;
const TOKENS: u64 = 16 * 256;

/// The same model and global batch for all: three layers of 8 experts beside a residual network, 8 micro-batches of 2 x 256 tokens.
fn arguments(out: &Path, cache: &Path) -> Vec<String> {
    let tokens = (STEPS * TOKENS).to_string();
    let mut all: Vec<String> = [
        "--preset",
        "tiny-pr-moe",
        "--num-experts",
        "8,8,8",
        "--seq-length",
        "256",
        "--micro-batch-size",
        "2",
        "--global-batch-size",
        "16",
        "--train-tokens",
        &tokens,
        "--log-interval",
        "1",
        "--eval-interval",
        "1000",
        "--eval-iters",
        "1",
        "--save-interval",
        "1000",
    ]
    .map(str::to_owned)
    .to_vec();
    for (flag, path) in [("--out", out), ("--data-cache", cache)] {
        all.extend([flag.to_owned(), path.to_string_lossy().into_owned()]);
    }
    all
}

/// The numbers in a run's `metrics.jsonl`.
fn measure(out: &Path) -> Result<Measured> {
    let path = out.join("metrics.jsonl");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let records = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let steps: Vec<&Value> = records.iter().filter(|r| r["step"].as_u64().is_some_and(|step| step > WARM_UP)).collect();
    ensure!(!steps.is_empty(), "{} has no step after {WARM_UP}", path.display());
    let median = |tag: &str| {
        let mut values: Vec<f64> = steps.iter().map(|record| record[tag].as_f64().unwrap_or(0.0)).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let speed = median("train/tokens_per_second");
    let levels = |tag: &str| ["intra_node", "inter_node"].map(|level| median(&format!("{tag}/{level}")));
    let ([a, b], [c, d]) = (levels("moe/a2a_bytes"), levels("train/gradient_bytes"));
    let rows: f64 = levels("moe/a2a_seconds").iter().sum();
    Ok(Measured {
        step_ms: 1e3 * TOKENS as f64 / speed,
        tokens_per_second: speed,
        megabytes: [a, b, c, d].map(|bytes| bytes / 1e6),
        milliseconds: [rows, median("train/gradient_seconds"), median("train/gradient_wait_seconds")].map(|s| 1e3 * s),
        loss: steps.last().and_then(|record| record["train/loss"].as_f64()).unwrap_or(f64::NAN),
    })
}

const COLUMNS: &str = "                                                        rows, MB         gradients, MB    wait for  gradients  wait for
ranks  layout                       step, ms  tokens/s   inside  between   inside  between   rows, ms   busy, ms   them, ms   loss
";

fn row(text: &mut String, ranks: usize, layout: &str, m: &Measured) {
    let [a, b, c, d] = m.megabytes;
    let [rows, busy, wait] = m.milliseconds;
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{ranks:>5}  {layout:<27} {:>9.1} {:>9.0} {a:>8.1} {b:>8.1} {c:>8.1} {d:>8.1} {rows:>10.1} {busy:>10.1} {wait:>10.1} {:>6.3}",
        m.step_ms, m.tokens_per_second, m.loss
    );
}

/// Where runs of one bench go.
struct Place {
    folder: PathBuf,
    runs: usize,
}

impl Place {
    fn new() -> Result<Self> {
        let folder = root().join("target/bench-ranks");
        if folder.exists() {
            std::fs::remove_dir_all(&folder)?;
        }
        std::fs::create_dir_all(&folder)?;
        Ok(Self { folder, runs: 0 })
    }

    /// Arguments of the next run, and where it writes.
    fn next(&mut self) -> (Vec<String>, PathBuf) {
        self.runs += 1;
        let out = self.folder.join(format!("run-{}", self.runs));
        (arguments(&out, &self.folder.join("data-cache")), out)
    }
}

fn program() -> PathBuf {
    root().join("target/release/moe-train")
}

/// Ranks that are threads of one process, on the cores there are.
fn local(out: &Path) -> Result<()> {
    shell::run(&mut cargo(&["build", "--release", "--package", "moe-models", "--bin", "moe-train"]))?;
    let mut place = Place::new()?;
    let mut text = header()?;
    text += "Ranks are threads of one process that share this machine's cores: more ranks cannot be faster, the table shows what\n\
             they cost. A step is 8 micro-batches of 2 x 256 tokens for any number of ranks; medians of 10 steps after 4.\n\n";
    text += COLUMNS;
    let layouts: [(usize, &[&str], &str); 8] = [
        (1, &[], "one rank"),
        (2, &["--dp", "2", "--ep", "1"], "dp 2"),
        (2, &["--dp", "2", "--ep", "2"], "dp 2, ep 2"),
        (4, &["--dp", "4", "--ep", "1"], "dp 4"),
        (4, &["--dp", "4", "--ep", "4"], "dp 4, ep 4"),
        (4, &["--dp", "4", "--ep", "4", "--zero", "2"], "dp 4, ep 4, zero 2"),
        (4, &["--tp", "2", "--ep", "4"], "dp 2 x tp 2, ep 4"),
        (8, &["--dp", "8", "--ep", "8"], "dp 8, ep 8"),
    ];
    for (ranks, layout, name) in layouts {
        let (arguments, folder) = place.next();
        let mut command = Command::new(program());
        command.args(arguments).args(["--ranks", &ranks.to_string()]).args(layout);
        output(&mut command)?;
        row(&mut text, ranks, name, &measure(&folder)?);
    }
    keep(&out.join("ranks-local.txt"), &text)
}

/// How hosts are joined in all rows: 100 us one way.
const DELAY: Duration = Duration::from_micros(100);
const HOSTS: usize = 4;
const RANKS_PER_HOST: usize = 2;

/// Ranks on emulated hosts, at several speeds of the network between them.
fn hosts(out: &Path) -> Result<()> {
    let missing = super::parallel::missing_for_hosts();
    if !missing.is_empty() {
        bail!("emulated hosts need {}", missing.join("; "));
    }
    let features = ["--features", "moe-models/mpi"];
    shell::run(cargo(&["build", "--release", "--package", "moe-models", "--bin", "moe-train"]).args(features))?;
    let mut place = Place::new()?;
    let mut text = header()?;
    let _ = writeln!(
        text,
        "{HOSTS} hosts of {RANKS_PER_HOST} ranks under Open MPI, all on this machine's cores; the network between hosts is emulated: {} us one \
         way.\nA step is 8 micro-batches of 2 x 256 tokens; medians of 10 steps after 4.",
        DELAY.as_micros()
    );
    let rows: [(&[&str], &str); 6] = [
        (&["--dp", "8", "--ep", "8", "--route", "flat"], "dp 8, ep 8, flat"),
        (&["--dp", "8", "--ep", "8", "--route", "hierarchical"], "dp 8, ep 8, hierarchical"),
        (&["--dp", "8", "--ep", "2"], "dp 8, ep 2 inside hosts"),
        (&["--dp", "8", "--ep", "1", "--bucket-size", "1MB", "--no-overlap"], "dp 8, no overlap"),
        (&["--dp", "8", "--ep", "1", "--bucket-size", "1MB"], "dp 8, overlap"),
        (&["--dp", "8", "--ep", "1", "--bucket-size", "1MB", "--zero", "1"], "dp 8, overlap, zero 1"),
    ];
    let mut trace = None;
    for gbits in [1.0, 10.0] {
        let _ = writeln!(text, "\n{gbits} Gbit/s a host, out and in\n{COLUMNS}");
        text.truncate(text.trim_end().len());
        text.push('\n');
        let link = Link { delay: DELAY, bits_per_second: gbits * 1e9, packet: Duration::ZERO };
        for (layout, name) in rows {
            let hosts = Hosts::new(HOSTS, link, &root().join("target/hosts"))?;
            let (arguments, folder) = place.next();
            let traces = folder.join("trace");
            let mut mpirun = hosts.mpirun(RANKS_PER_HOST)?;
            mpirun.arg(program()).args(arguments).args(layout).arg("--trace").arg(&traces);
            hosts.output(&mut mpirun)?;
            row(&mut text, HOSTS * RANKS_PER_HOST, name, &measure(&folder)?);
            if gbits == 1.0 && name == "dp 8, overlap" {
                trace = Some(traces.join("rank-0.json"));
            }
        }
    }
    if let Some(trace) = trace {
        draw(&trace, &out.join("ranks-overlap.svg"))?;
    }
    keep(&out.join("ranks-hosts.txt"), &text)
}

/// A span of a trace, milliseconds.
struct Span {
    name: String,
    track: u64,
    begin: f64,
    end: f64,
}

/// Draws the last whole step of a rank's trace: what it works on, and which buckets are under way.
fn draw(trace: &Path, out: &Path) -> Result<()> {
    let events: Vec<Value> = serde_json::from_slice(&std::fs::read(trace)?)?;
    let span = |event: &Value| {
        let begin = event["ts"].as_f64()? / 1e3;
        let (name, end) = (event["name"].as_str()?.to_owned(), begin + event["dur"].as_f64()? / 1e3);
        Some(Span { name, track: event["tid"].as_u64()?, begin, end })
    };
    let spans: Vec<Span> = events.iter().filter_map(span).collect();
    let forwards: Vec<f64> = spans.iter().filter(|s| s.name == "forward").map(|s| s.begin).collect();
    let [.., from, to] = forwards.as_slice() else { bail!("{} holds no two steps", trace.display()) };
    let (from, to) = (*from, *to);
    let area = SVGBackend::new(out, (1100, 330)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            "one step of rank 0: forward (blue), backward (green), waiting for gradients (red); buckets under way",
            ("sans-serif", 18),
        )
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(150)
        .build_cartesian_2d(0.0..to - from, 0.0..3.0)?;
    let tracks = ["work", "sums to their owners", "sums to all"];
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(4)
        .y_label_formatter(&|y: &f64| {
            let index = (3.0 - y) as usize;
            if y.fract() == 0.0 && index < 3 { tracks[index].to_owned() } else { String::new() }
        })
        .x_desc("ms")
        .draw()?;
    for Span { name, track, begin, end } in spans.iter().filter(|s| s.end > from && s.begin < to) {
        let top = 3.0 - *track as f64;
        let colour = match name.as_str() {
            "forward" => BLUE.mix(0.5),
            "backward" => GREEN.mix(0.5),
            "wait for gradients" => RED.mix(0.7),
            _ => BLACK.mix(0.25),
        };
        let rectangle = [(begin - from, top - 0.85), (end.min(to) - from, top - 0.15)];
        chart.draw_series([Rectangle::new(rectangle, colour.filled())])?;
    }
    Ok(area.present()?)
}
