//! `moe-init`: writes a model folder of initial weights. Reads arguments; everything else is `moe_models::cli::init`.

use clap::Parser;
use moe_models::cli::exit_code;
use moe_models::cli::init::InitArgs;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    #[command(flatten)]
    init: InitArgs,
}

fn main() -> ExitCode {
    exit_code(|| Args::parse().init.run())
}
