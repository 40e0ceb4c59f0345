//! A step against the number of experts, with a token's work the same: what grows should be the traffic of weights,
//! gradients and moments alone, which is counted and set apart.

use crate::measure::measure_apart;
use crate::models::{GROWTH, config, description};
use crate::options::Options;
use crate::rows::Row;
use anyhow::{Context, Result};
use moe_kernels::machine::Peaks;
use serde_json::json;

/// Bytes that a step moves for each parameter, at the least: the weight read forward, backward and by the optimizer, and
/// written; its gradient written, read for the norm, and read by the optimizer; two moments read and written.
const BYTES_PER_PARAMETER: usize = 4 * (4 + 3 + 4);

const COLUMNS: [&str; 10] = [
    "experts",
    "step, ms",
    "optimizer",
    "params, M",
    "moved, MB",
    "growing, MB",
    "traffic, ms",
    "rest, ms",
    "rest",
    "peak, MB",
];

/// Measures and prints the rows.
pub(crate) fn run(options: &Options) -> Result<()> {
    let before = Peaks::measure();
    let measure = |(name, experts)| Ok((name, experts, measure_apart(name, &Row::GROWTH, options.steps)?));
    let rows = GROWTH.into_iter().map(measure).collect::<Result<Vec<_>>>()?;
    let peaks = before.highest(Peaks::measure());
    let first = GROWTH[0].0;
    println!("\ngrowth: {}", description(first, &config(first).context("the first model is known")?));
    println!(
        "{}; moved: {BYTES_PER_PARAMETER} bytes of weights, gradients and moments for each parameter; growing: those of \
         experts;\ntraffic: their time at the {:.1} GB/s that memory is read at; rest: the step without it, and over the \
         first row's\n",
        Row::GROWTH.join(", "),
        peaks.read_gbps
    );
    println!("{}", COLUMNS.map(|column| format!("{column:>12}")).concat());
    let mut first_rest_ms = None;
    for (name, experts, outcome) in rows {
        let measured = match outcome {
            Ok(measured) => measured,
            Err(reason) => {
                println!("{experts:>12}  failed: {reason}");
                continue;
            }
        };
        let parameters = config(name).context("a model of the table is known")?.parameter_count().total;
        let [bytes, expert_bytes] = [parameters, measured.expert_parameters].map(|p| (p * BYTES_PER_PARAMETER) as f64);
        let traffic_ms = expert_bytes / peaks.read_gbps / 1e6;
        let rest_ms = measured.step_ms - traffic_ms;
        let rest = rest_ms / *first_rest_ms.get_or_insert(rest_ms);
        print!("{experts:>12}{:>12.1}{:>12.1}", measured.step_ms, measured.optimizer_ms);
        print!("{:>12.1}{:>12.0}{:>12.0}", parameters as f64 / 1e6, bytes / 1e6, expert_bytes / 1e6);
        println!("{traffic_ms:>12.1}{rest_ms:>12.1}{rest:>11.2}x{:>12.0}", measured.peak_mb);
        if options.json {
            let line = json!({
                "growth": experts, "step_ms": measured.step_ms, "best_ms": measured.best_ms,
                "forward_ms": measured.forward_ms, "backward_ms": measured.backward_ms,
                "optimizer_ms": measured.optimizer_ms, "parameters": parameters,
                "expert_parameters": measured.expert_parameters, "bytes": bytes, "expert_bytes": expert_bytes,
                "read_gbps": peaks.read_gbps, "traffic_ms": traffic_ms, "rest_ms": rest_ms, "rest": rest,
                "peak_mb": measured.peak_mb,
            });
            println!("json {line}");
        }
    }
    Ok(())
}
