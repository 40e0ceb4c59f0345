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
    /// 8 ranks on 4 emulated hosts: the routes of rows; as root.
    Hosts,
    /// The same: what of the gradients' way hides behind the backward pass; as root.
    Overlap,
}

/// Runs these parts; all of them if none is named.
pub(super) fn run(parts: &[Part], out: &Path) -> Result<()> {
    let wanted = |part: Part| parts.is_empty() || parts.contains(&part);
    if wanted(Part::Local) {
        local(out)?;
    }
    if wanted(Part::Hosts) {
        let (mut text, mut place) = on_hosts(Cluster::WIDE)?;
        routes(&mut text, &mut place)?;
        keep(&out.join("ranks-hosts.txt"), &text)?;
    }
    if wanted(Part::Overlap) {
        let (mut text, mut place) = on_hosts(Cluster::PAIR)?;
        overlap(&mut text, &mut place, out)?;
        keep(&out.join("ranks-overlap.txt"), &text)?;
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
const SEQ_LENGTH: u64 = 256;

/// What a step computes.
#[derive(Clone, Copy)]
struct Batch {
    micro_batches: u64,
    /// Of a micro-batch.
    sequences: u64,
}

impl Batch {
    /// Enough for 8 ranks.
    const EIGHT: Self = Self { micro_batches: 8, sequences: 2 };
    /// One pass for each of 2 ranks.
    const TWO: Self = Self { micro_batches: 2, sequences: 8 };

    const fn tokens(self) -> u64 {
        self.micro_batches * self.sequences * SEQ_LENGTH
    }
}

impl std::fmt::Display for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} micro-batches of {} x {SEQ_LENGTH} tokens", self.micro_batches, self.sequences)
    }
}

/// The same model for all: three layers of 8 experts beside a residual network.
fn arguments(batch: Batch, out: &Path, cache: &Path) -> Vec<String> {
    let tokens = (STEPS * batch.tokens()).to_string();
    let (micro, global) = (batch.sequences.to_string(), (batch.micro_batches * batch.sequences).to_string());
    let mut all: Vec<String> = [
        "--preset",
        "tiny-pr-moe",
        "--num-experts",
        "8,8,8",
        "--seq-length",
        &SEQ_LENGTH.to_string(),
        "--micro-batch-size",
        &micro,
        "--global-batch-size",
        &global,
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
fn measure(batch: Batch, out: &Path) -> Result<Measured> {
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
        step_ms: 1e3 * batch.tokens() as f64 / speed,
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
    fn next(&mut self, batch: Batch) -> (Vec<String>, PathBuf) {
        self.runs += 1;
        let out = self.folder.join(format!("run-{}", self.runs));
        (arguments(batch, &out, &self.folder.join("data-cache")), out)
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
        let (arguments, folder) = place.next(Batch::EIGHT);
        let mut command = Command::new(program());
        command.args(arguments).args(["--ranks", &ranks.to_string()]).args(layout);
        output(&mut command)?;
        row(&mut text, ranks, name, &measure(Batch::EIGHT, &folder)?);
    }
    keep(&out.join("ranks-local.txt"), &text)
}

/// How hosts are joined in all rows but those without a network to wait for: 100 us one way.
const DELAY: Duration = Duration::from_micros(100);

/// Ranks on emulated hosts.
#[derive(Clone, Copy)]
struct Cluster {
    hosts: usize,
    ranks_per_host: usize,
    /// Of each rank.
    threads: usize,
}

impl Cluster {
    /// More ranks than cores: what they send is what counts.
    const WIDE: Self = Self { hosts: 4, ranks_per_host: 2, threads: 2 };
    /// A core for each rank, or nothing could be computed while a message is under way.
    const PAIR: Self = Self { hosts: 2, ranks_per_host: 1, threads: 1 };

    const fn ranks(self) -> usize {
        self.hosts * self.ranks_per_host
    }
}

/// A network of so many Gbit/s; none stands for one that costs no time.
fn link(gbits: Option<f64>) -> Link {
    let delay = if gbits.is_some() { DELAY } else { Duration::ZERO };
    Link { delay, bits_per_second: gbits.map_or(1e15, |gbits| gbits * 1e9), packet: Duration::ZERO }
}

/// Makes ready for ranks on emulated hosts: the head of a table, and where its runs go.
fn on_hosts(cluster: Cluster) -> Result<(String, Place)> {
    let missing = super::parallel::missing_for_hosts();
    if !missing.is_empty() {
        bail!("emulated hosts need {}", missing.join("; "));
    }
    let features = ["--features", "moe-models/mpi"];
    shell::run(cargo(&["build", "--release", "--package", "moe-models", "--bin", "moe-train"]).args(features))?;
    let mut text = header()?;
    let Cluster { hosts, ranks_per_host, threads } = cluster;
    let _ = writeln!(
        text,
        "{hosts} hosts of {ranks_per_host} rank(s) of {threads} thread(s) under Open MPI, all on this machine's cores; the network between \
         hosts is emulated:\n{} us one way. Medians of {} steps after {WARM_UP}.",
        DELAY.as_micros(),
        STEPS - WARM_UP
    );
    Ok((text, Place::new()?))
}

/// One run over all hosts, and the folder of its traces.
fn run_on_hosts(
    place: &mut Place,
    cluster: Cluster,
    link: Link,
    batch: Batch,
    layout: &[&str],
) -> Result<(Measured, PathBuf)> {
    let hosts = Hosts::new(cluster.hosts, link, &root().join("target/hosts"))?;
    let (arguments, folder) = place.next(batch);
    let traces = folder.join("trace");
    let mut mpirun = hosts.mpirun(cluster.ranks_per_host)?;
    mpirun.args(["-x", &format!("RAYON_NUM_THREADS={}", cluster.threads)]);
    mpirun.arg(program()).args(arguments).args(layout).arg("--trace").arg(&traces);
    hosts.output(&mut mpirun)?;
    Ok((measure(batch, &folder)?, traces))
}

/// Experts within hosts and over them, by both routes.
fn routes(text: &mut String, place: &mut Place) -> Result<()> {
    let rows: [(&[&str], &str); 3] = [
        (&["--dp", "8", "--ep", "8", "--route", "flat"], "dp 8, ep 8, flat"),
        (&["--dp", "8", "--ep", "8", "--route", "hierarchical"], "dp 8, ep 8, hierarchical"),
        (&["--dp", "8", "--ep", "2"], "dp 8, ep 2 inside hosts"),
    ];
    for gbits in [1.0, 10.0] {
        let _ = write!(text, "\n{gbits} Gbit/s a host, out and in; {}\n{COLUMNS}", Batch::EIGHT);
        for (layout, name) in rows {
            let (measured, _) = run_on_hosts(place, Cluster::WIDE, link(Some(gbits)), Batch::EIGHT, layout)?;
            row(text, Cluster::WIDE.ranks(), name, &measured);
        }
    }
    Ok(())
}

/// What of the time that gradients need between hosts is seen in a step. A step over a network that costs no time has the same work,
/// the copies and the waiting for each other: what a step is longer over a real one is the time that nothing hides.
fn overlap(text: &mut String, place: &mut Place, out: &Path) -> Result<()> {
    const DURING: [&str; 6] = ["--dp", "2", "--ep", "1", "--bucket-size", "1MB"];
    const AFTER: [&str; 7] = ["--dp", "2", "--ep", "1", "--bucket-size", "1MB", "--no-overlap"];
    let (cluster, batch) = (Cluster::PAIR, Batch::TWO);
    let _ = write!(
        text,
        "\nGradients of all parameters over all ranks, after the backward pass and during it; {batch}\n{COLUMNS}"
    );
    let mut steps = Vec::new();
    for (gbits, at) in [(None, "no network"), (Some(1.0), "1 Gbit/s"), (Some(10.0), "10 Gbit/s")] {
        let (after, _) = run_on_hosts(place, cluster, link(gbits), batch, &AFTER)?;
        row(text, cluster.ranks(), &format!("after it, {at}"), &after);
        let (during, traces) = run_on_hosts(place, cluster, link(gbits), batch, &DURING)?;
        row(text, cluster.ranks(), &format!("during it, {at}"), &during);
        if gbits == Some(1.0) {
            draw(&traces.join("rank-0.json"), &out.join("ranks-overlap.svg"))?;
        }
        steps.push((at, after.step_ms, during.step_ms));
    }
    let [(_, _, free), others @ ..] = steps.as_slice() else { return Ok(()) };
    *text += "\nHidden: of what the network adds to a step when gradients travel after the backward pass, the share that is gone when they\n\
              travel during it.\n";
    for (at, after, during) in others {
        let (added, left) = (after - free, during - free);
        // Less than a tenth of a step is what steps differ by.
        let share = if added > 0.1 * free {
            format!("{:.0}% hidden", 1e2 * (1.0 - left / added))
        } else {
            "too little to tell".into()
        };
        let _ = writeln!(text, "{at:>10}: {added:.0} ms added after it, {left:.0} ms during it: {share}");
    }
    Ok(())
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
