//! `moe-train`: trains a model of any family on text files. Reads arguments; everything else is
//! `moe_models::cli::train`.

use clap::Parser;
use moe_models::cli::allocator;
use moe_models::cli::train::{self, EXIT_STATUS, Plain, TrainArgs};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Train a language model on text: a new dense, MoE, Pyramid, Residual or PR-MoE, or one of any family that a folder holds.
///
/// Without any argument it trains `tiny-pr-moe` on a small excerpt that is part of the program.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXIT_STATUS)]
struct Args {
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    train::main(&Args::parse().train, || Ok(Plain))
}
