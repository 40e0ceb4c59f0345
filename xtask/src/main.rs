//! Every task of the workspace: `cargo xtask help` lists them. Drives cargo and the binaries, links none of the crates.

mod api;
mod bench;
mod ci;
mod golden;
mod hosts;
mod kill;
mod mpi;
mod plot;
mod repro;
mod shell;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Tasks of the workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run every test that needs nothing but this checkout.
    Test,
    /// Check format, lints and documentation, then run the tests.
    Ci {
        /// Leave the tests out.
        #[arg(long)]
        skip_tests: bool,
    },
    /// List the public interface of each crate in its `API.txt`.
    Api(api::Args),
    /// Measure layer forward and training step on this machine.
    Bench(bench::Args),
    /// Rebuild the tables and figures of the paper at a size for this machine.
    Repro(repro::Args),
    /// Regenerate the test fixtures that are made with Python.
    Golden(golden::Args),
    /// Run the MPI engine under `mpirun`, with ranks that stop, die and diverge.
    Mpi(mpi::Args),
    /// Run a program over MPI on emulated hosts: network namespaces of this machine, as root.
    Hosts(hosts::Args),
    /// Kill and stop ranks of training runs at random moments, and see that each goes on.
    Kill(kill::Args),
    /// Plot a run's losses from its `metrics.jsonl` as an SVG.
    Plot(plot::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Test => ci::test(),
        Task::Ci { skip_tests } => ci::run(skip_tests),
        Task::Api(args) => api::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Repro(args) => repro::run(&args),
        Task::Golden(args) => golden::run(&args),
        Task::Hosts(args) => hosts::run(&args),
        Task::Kill(args) => kill::run(&args),
        Task::Mpi(args) => mpi::run(&args),
        Task::Plot(args) => plot::run(&args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        <Cli as clap::CommandFactory>::command().debug_assert();
    }
}
