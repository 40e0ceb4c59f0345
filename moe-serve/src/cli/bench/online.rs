//! A client of a server that runs: many requests, and how long they took.

use super::client::{Outcome, Target};
use super::percentiles::Percentiles;
use super::workload::{Planned, TraceScale, drawn, traced};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Whom to ask, and what.
#[derive(Debug, Clone, clap::Args)]
pub struct OnlineArgs {
    /// The server, of this project or any other that is OpenAI-compatible and takes token ids as prompts.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
    /// The model's name; by default the first one of the server.
    #[arg(long)]
    model: Option<String>,
    /// The server's key; or MOE_SERVE_API_KEY.
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
    /// Requests in all.
    #[arg(long, value_name = "N", default_value_t = 100)]
    num_requests: usize,
    /// Requests per second, arriving at random (Poisson); without it all come at once, or as a trace says.
    #[arg(long, value_name = "RATE", conflicts_with = "trace")]
    request_rate: Option<f64>,
    /// Requests under way at one time; others wait, and their wait counts.
    #[arg(long, value_name = "N")]
    concurrency: Option<usize>,
    /// Tokens of each prompt, drawn at random.
    #[arg(long, value_name = "N", default_value_t = 64)]
    input_len: usize,
    /// Tokens of each answer.
    #[arg(long, value_name = "N", default_value_t = 64)]
    output_len: usize,
    /// Arrivals and lengths of a trace: Azure's CSV or Mooncake's JSON lines, also .xz.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_len", "output_len"])]
    trace: Option<PathBuf>,
    /// Divides the trace's lengths.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "trace")]
    trace_shrink: usize,
    /// Tokens of a prompt and its answer, at most; a trace's prompts are cut.
    #[arg(long, value_name = "N", default_value_t = 4096, requires = "trace")]
    max_len: usize,
    /// The trace's time runs so much faster.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, requires = "trace")]
    trace_speed: f64,
    /// Milliseconds to the first token that a good request may take.
    #[arg(long, value_name = "MS")]
    good_ttft_ms: Option<f64>,
    /// Milliseconds for each further token that a good request may take.
    #[arg(long, value_name = "MS")]
    good_tpot_ms: Option<f64>,
    /// Seed of what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Where the figures go as JSON too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What all requests came to.
#[derive(Default)]
struct Totals {
    /// By what they were answered.
    ends: BTreeMap<String, usize>,
    done: Vec<Outcome>,
    seconds: f64,
}

impl OnlineArgs {
    /// Sends all requests and prints what they took.
    ///
    /// # Errors
    /// If the server cannot be found, or a file not be read or written.
    pub(super) fn run(self) -> Result<()> {
        let runtime = tokio::runtime::Runtime::new().context("starting the network's threads")?;
        let planned = self.planned()?;
        let key = self.api_key.clone().or_else(|| std::env::var("MOE_SERVE_API_KEY").ok());
        let (target, totals) = runtime.block_on(async {
            let target = Target::find(&self.url, self.model.clone(), key).await?;
            let totals = send_all(&target, planned, self.concurrency).await;
            anyhow::Ok((target, totals))
        })?;
        let report = self.report(&target, &totals);
        self.print(&report)?;
        if let Some(path) = &self.json {
            std::fs::write(path, format!("{report:#}\n")).with_context(|| format!("writing {}", path.display()))?;
        }
        ensure!(!totals.done.is_empty(), "no request was answered: {}", report["requests"]);
        Ok(())
    }

    fn planned(&self) -> Result<Vec<Planned>> {
        ensure!(self.request_rate.is_none_or(|rate| rate > 0.0), "--request-rate must be above 0");
        ensure!(self.concurrency != Some(0), "--concurrency must be at least 1");
        let Some(trace) = &self.trace else {
            ensure!(self.input_len > 0 && self.output_len > 0, "--input-len and --output-len must be at least 1");
            return Ok(drawn(self.num_requests, self.input_len, self.output_len, self.request_rate, self.seed));
        };
        ensure!(self.trace_speed > 0.0, "--trace-speed must be above 0");
        ensure!(
            self.trace_shrink > 0 && self.max_len > 1,
            "--trace-shrink must be at least 1, and --max-len at least 2"
        );
        let (count, shrink, max_len, speed) = (self.num_requests, self.trace_shrink, self.max_len, self.trace_speed);
        traced(trace, TraceScale { count, shrink, max_len, speed }, self.seed)
    }

    fn report(&self, target: &Target, totals: &Totals) -> Value {
        let seconds = totals.seconds.max(f64::EPSILON);
        let sum = |of: fn(&Outcome) -> usize| totals.done.iter().map(of).sum::<usize>();
        let (prompt, output) = (sum(|o| o.prompt_tokens), sum(|o| o.output_tokens));
        let ms = |times: Vec<f64>| {
            let mean = times.iter().sum::<f64>() / times.len().max(1) as f64;
            let times = Percentiles::new(times);
            json!({"mean": 1e3 * mean, "p50": 1e3 * times.at(50.0), "p90": 1e3 * times.at(90.0), "p99": 1e3 * times.at(99.0)})
        };
        let of = |time: fn(&Outcome) -> Option<f64>| totals.done.iter().filter_map(time).collect::<Vec<f64>>();
        let gaps = totals.done.iter().flat_map(|o| o.pieces.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()));
        let is_good = |o: &&Outcome| {
            let within =
                |limit: Option<f64>, time: Option<f64>| limit.is_none_or(|ms| time.is_none_or(|time| 1e3 * time <= ms));
            !o.pieces.is_empty() && within(self.good_ttft_ms, ttft(o)) && within(self.good_tpot_ms, tpot(o))
        };
        json!({
            "url": self.url,
            "model": target.model,
            "seconds": totals.seconds,
            "requests": totals.ends,
            "requests_per_s": totals.done.len() as f64 / seconds,
            "goodput_requests_per_s": totals.done.iter().filter(is_good).count() as f64 / seconds,
            "output_tokens_per_s": output as f64 / seconds,
            "total_tokens_per_s": (prompt + output) as f64 / seconds,
            "prompt_tokens": prompt,
            "cached_tokens": sum(|o| o.cached_tokens),
            "output_tokens": output,
            "ttft_ms": ms(of(ttft)),
            "tpot_ms": ms(of(tpot)),
            "itl_ms": ms(gaps.collect()),
            "e2e_ms": ms(of(|o| Some(o.total.as_secs_f64()))),
        })
    }

    fn print(&self, report: &Value) -> Result<()> {
        let mut out = std::io::stdout();
        writeln!(
            out,
            "{} at {}: {} in {:.1} s",
            report["model"],
            self.url,
            report["requests"],
            report["seconds"].as_f64().unwrap_or(0.0)
        )?;
        for name in ["requests_per_s", "goodput_requests_per_s", "output_tokens_per_s", "total_tokens_per_s"] {
            writeln!(out, "{name:>24} {:>12.2}", report[name].as_f64().unwrap_or(0.0))?;
        }
        for name in ["prompt_tokens", "cached_tokens", "output_tokens"] {
            writeln!(out, "{name:>24} {:>12}", report[name])?;
        }
        writeln!(out, "{:>24} {:>12} {:>12} {:>12} {:>12}", "", "mean", "p50", "p90", "p99")?;
        for name in ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"] {
            let at = |key: &str| report[name][key].as_f64().unwrap_or(0.0);
            writeln!(
                out,
                "{name:>24} {:>12.2} {:>12.2} {:>12.2} {:>12.2}",
                at("mean"),
                at("p50"),
                at("p90"),
                at("p99")
            )?;
        }
        Ok(())
    }
}

/// To the first token.
fn ttft(outcome: &Outcome) -> Option<f64> {
    outcome.pieces.first().map(std::time::Duration::as_secs_f64)
}

/// For each token after the first.
fn tpot(outcome: &Outcome) -> Option<f64> {
    let (first, last) = (outcome.pieces.first()?, outcome.pieces.last()?);
    (outcome.output_tokens > 1).then(|| (*last - *first).as_secs_f64() / (outcome.output_tokens - 1) as f64)
}

/// Sends every request at its time, so many at most at once.
async fn send_all(target: &Target, planned: Vec<Planned>, concurrency: Option<usize>) -> Totals {
    let slots = Arc::new(Semaphore::new(concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let begun = Instant::now();
    let mut requests = JoinSet::new();
    for Planned { at, prompt, output_len } in planned {
        let (target, slots) = (target.clone(), Arc::clone(&slots));
        requests.spawn(async move {
            let due = begun + at;
            tokio::time::sleep_until(due.into()).await;
            // The semaphore is never closed.
            let _slot = slots.acquire().await;
            target.complete(&prompt, output_len, due).await
        });
    }
    let mut totals = Totals::default();
    while let Some(ended) = requests.join_next().await {
        let end = match ended {
            Ok(Ok(outcome)) if outcome.status.is_success() => {
                totals.done.push(outcome);
                "200".to_owned()
            }
            Ok(Ok(outcome)) => outcome.status.as_u16().to_string(),
            Ok(Err(error)) => {
                tracing::debug!("{error:#}");
                "broken".to_owned()
            }
            Err(_) => "panicked".to_owned(),
        };
        *totals.ends.entry(end).or_default() += 1;
    }
    totals.seconds = begun.elapsed().as_secs_f64();
    totals
}
