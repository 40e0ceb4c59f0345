//! `moe-import`: makes a model folder of a checkpoint of Megatron-DeepSpeed. Reads arguments; everything else is
//! `moe_models::cli::import`.

use clap::Parser;
use moe_models::cli::exit_code;
use moe_models::cli::import::ImportArgs;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    import: ImportArgs,
}

fn main() -> ExitCode {
    exit_code(|| Args::parse().import.run())
}
