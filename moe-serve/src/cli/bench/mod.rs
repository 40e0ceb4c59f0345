//! `moe-serve bench`: how fast a model is served. `offline` runs the engine alone, without text and HTTP; `online` is a client of a
//! server that runs.

mod client;
mod offline;
mod online;
mod percentiles;
mod phases;
mod workload;

use clap::Subcommand;

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// The engine alone: prompts and generated tokens per second for some numbers of sequences, and what of a step is the model's.
    Offline(offline::OfflineArgs),
    /// A client of a server that runs, at a rate, at a number of requests under way, or by a trace: throughput, goodput, times to the
    /// first token, between tokens and to the end.
    Online(online::OnlineArgs),
}

impl BenchCommand {
    /// Whether it listens to the process's spans itself.
    pub(super) fn listens(&self) -> bool {
        matches!(self, Self::Offline(args) if args.phases)
    }

    /// Measures and prints.
    ///
    /// # Errors
    /// Whatever stopped it, with what was being done.
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self::Offline(args) => args.run(),
            Self::Online(args) => args.run(),
        }
    }
}
