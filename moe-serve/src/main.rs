//! `moe-serve`: the command line of [`moe_serve`].

use clap::Parser;
use moe_serve::cli::{Cli, exit_code};
use std::process::ExitCode;

/// A step frees the tensors that the next one asks for again; the system's allocator returns large ones to the kernel each time.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.init_logging();
    exit_code(cli.run())
}
