//! `moe-serve`: the command line of [`moe_serve`].

use clap::Parser;
use moe_serve::cli::{Cli, exit_code, init_logging};
use std::process::ExitCode;

fn main() -> ExitCode {
    init_logging();
    exit_code(Cli::parse().run())
}
