//! `moe-serve`: the command line of [`moe_serve`].

use clap::Parser;
use moe_serve::cli::{Cli, init_logging};

fn main() -> anyhow::Result<()> {
    init_logging();
    Cli::parse().run()
}
