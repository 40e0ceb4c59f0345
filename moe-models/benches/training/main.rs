//! Whole training steps of a GPT with experts: loss, gradients and AdamW, by the trainer's own code.
//!
//! The models of `peers.py`, in three sizes, and one size with more and more experts. Each row runs in a process of its
//! own with the allocator and the settings of `moe-train`. Prints a table for each part, and one JSON line per row with
//! `--json`; words choose parts and rows, `--steps N` how many steps count. Reads no data: tokens are random, so nothing
//! is learned. `cargo xtask bench training` keeps the output and sets peers beside it.

mod ceilings;
mod growth;
mod measure;
mod models;
mod options;
mod rows;
mod run;
mod table;

use anyhow::Result;
use models::{BATCH, SEQ_LEN};
use moe_kernels::{machine, select};
use moe_models::cli::allocator;
use options::Options;

/// That of `moe-train`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn print_head(steps: usize) {
    println!("machine: {}; kernels: {}", machine::name(), select::current());
    println!("step: {BATCH} sequences of {SEQ_LEN} random tokens; medians of {steps} after one warm-up");
    println!("batches: micro-batches, one after the other, x sequences of each");
    println!("backward includes adding up the gradients, optimizer their norm; peak: most memory of the row's process");
    println!("useful work: 6 x active weights that multiply + 6 x layers x length x d_model (causal attention);");
    println!("dropped tokens count as if computed; of peak: of the multipliers' rate for the type");
}

fn main() -> Result<()> {
    allocator::keep_freed_memory();
    let options = Options::read()?;
    if let Ok(name) = std::env::var(select::ENV) {
        select::force(name.parse()?)?;
    }
    if options.here {
        return measure::measure_here(&options.words, options.steps);
    }
    print_head(options.steps);
    for part in options.chosen_parts() {
        if part == options::GROWTH { growth::run(&options)? } else { table::run(part, &options)? }
    }
    Ok(())
}
