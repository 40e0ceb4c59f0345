//! `moe-distill`: trains a student that follows a teacher. Reads arguments; everything else is `moe_models::cli::train` and
//! `moe_compress`.

mod args;
mod recipe;

use args::DistillArgs;
use clap::{CommandFactory, FromArgMatches, Parser};
use moe_models::cli::allocator;
use moe_models::cli::train::{self, EXIT_STATUS, TrainArgs};
use recipe::Distilling;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Train a student that follows a teacher (Mixture-of-Students).
///
/// Unless flags describe it, the student is the teacher without an eighth of its layers. What `--resume` continues keeps the settings
/// it was started with.
#[derive(Debug, Parser)]
#[command(version, about, after_help = EXIT_STATUS)]
struct Args {
    #[command(flatten)]
    distill: DistillArgs,
    #[command(flatten)]
    train: TrainArgs,
}

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    let command = Args::command().mut_arg("out", |out| out.default_value("runs/moe-distill"));
    let args = Args::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit());
    train::main(&args.train, || Distilling::new(&args.distill, &args.train))
}
