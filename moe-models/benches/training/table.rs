//! The rows of one size beside the machine's ceilings measured before and after them.

use crate::ceilings::gflops;
use crate::measure::{Outcome, measure_apart};
use crate::models::{TOKENS, config, description, flops, json};
use crate::options::Options;
use crate::rows::Row;
use anyhow::{Context, Result};
use moe_kernels::Precision;
use moe_kernels::machine::Peaks;
use moe_models::gpt::GptConfig;
use serde_json::{Value, json};

/// Measures and prints the rows of the size of this name.
pub(crate) fn run(name: &str, options: &Options) -> Result<()> {
    let config = config(name).with_context(|| format!("there is no model {name:?}"))?;
    let before = Peaks::measure();
    let measure = |row: Row| Ok((row, measure_apart(name, &row.names(), options.steps)?));
    let rows = Row::chosen(&options.words).into_iter().map(measure).collect::<Result<Vec<_>>>()?;
    let peaks = before.highest(Peaks::measure());
    let [bf16, f32] = [Precision::Bf16, Precision::F32].map(|precision| gflops(precision, &peaks));
    println!("\n{}", description(name, &config));
    println!(
        "multipliers reach {:.0} GFLOP/s in bf16, {:.0} in f32; memory is read at {:.1} GB/s\n",
        bf16, f32, peaks.read_gbps
    );
    print_columns();
    for (row, outcome) in &rows {
        print(row, outcome, &config, &peaks);
    }
    if options.json {
        let model = json!({
            "model": json(name, &config), "flops": flops(&config),
            "peak_gflops": { "bf16": bf16, "f32": f32 }, "read_gbps": peaks.read_gbps,
        });
        println!("json {model}");
        for (row, outcome) in &rows {
            println!("json {}", line(name, row, outcome, &config));
        }
    }
    Ok(())
}

fn print_columns() {
    let [kind, router, batches, recompute] = Row::COLUMNS;
    print!("{kind:<6}{router:<10}{batches:<8}{recompute:<9}");
    for column in ["tokens/s", "best", "step, ms", "forward", "backward", "optimizer", "GFLOP/s", "of peak", "dropped"]
    {
        print!("{column:>10}");
    }
    println!("{:>10}", "peak, MB");
}

fn print(row: &Row, outcome: &Outcome, config: &GptConfig, peaks: &Peaks) {
    let [kind, router, batches, recompute] = row.names();
    print!("{kind:<6}{router:<10}{batches:<8}{recompute:<9}");
    let measured = match outcome {
        Ok(measured) => measured,
        Err(reason) => return println!("  failed: {reason}"),
    };
    print!("{:>10.0}{:>10.0}", per_second(measured.step_ms), per_second(measured.best_ms));
    for ms in [measured.step_ms, measured.forward_ms, measured.backward_ms, measured.optimizer_ms] {
        print!("{ms:>10.1}");
    }
    let rate = flops(config) / measured.step_ms / 1e6;
    print!("{rate:>10.1}{:>9.1}%{:>9.1}%", 100.0 * rate / gflops(row.precision.1, peaks), 100.0 * measured.drop_rate);
    println!("{:>10.0}", measured.peak_mb);
}

fn per_second(step_ms: f64) -> f64 {
    TOKENS / step_ms * 1e3
}

fn line(name: &str, row: &Row, outcome: &Outcome, config: &GptConfig) -> Value {
    let mut line = json!({ "size": name });
    for (column, name) in Row::COLUMNS.into_iter().zip(row.names()) {
        line[column] = name.into();
    }
    let measured = match outcome {
        Ok(measured) => measured,
        Err(reason) => {
            line["failed"] = reason.as_str().into();
            return line;
        }
    };
    let parameters = config.parameter_count();
    let numbers = [
        ("tokens_per_second", per_second(measured.step_ms)),
        ("best", per_second(measured.best_ms)),
        ("step_ms", measured.step_ms),
        ("forward_ms", measured.forward_ms),
        ("backward_ms", measured.backward_ms),
        ("optimizer_ms", measured.optimizer_ms),
        ("drop_rate", measured.drop_rate),
        ("peak_mb", measured.peak_mb),
    ];
    for (key, number) in numbers {
        line[key] = number.into();
    }
    line["parameters"] = parameters.total.into();
    line["active_parameters"] = parameters.active.into();
    line
}
