//! `moe-generate`: `moe-serve generate` under its own name.

use clap::Parser;
use moe_serve::cli::{GenerateArgs, exit_code, init_logging};
use std::process::ExitCode;

/// Continues a prompt in the terminal.
#[derive(Debug, Parser)]
#[command(name = "moe-generate", version)]
struct Cli {
    #[command(flatten)]
    args: GenerateArgs,
}

fn main() -> ExitCode {
    init_logging();
    exit_code(Cli::parse().args.run())
}
