//! `moe-generate`: `moe-serve generate` under its own name.

use clap::Parser;
use moe_serve::cli::{GenerateArgs, init_logging};

/// Continues a prompt in the terminal.
#[derive(Debug, Parser)]
#[command(name = "moe-generate", version)]
struct Cli {
    #[command(flatten)]
    args: GenerateArgs,
}

fn main() -> anyhow::Result<()> {
    init_logging();
    Cli::parse().args.run()
}
