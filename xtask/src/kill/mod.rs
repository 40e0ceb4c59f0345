//! `cargo xtask kill`: processes of ranks that are killed or stopped for good at random moments, in training ([`training`]) and in
//! serving ([`serving`]).

mod job;
mod serving;
mod training;

pub(crate) use job::free_port;

use anyhow::Result;
use std::path::PathBuf;

/// Options of `cargo xtask kill`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What carries messages between ranks.
    #[arg(value_enum, default_value = "tcp")]
    engine: Engine,
    /// Servers instead of training runs.
    #[arg(long)]
    serving: bool,
    /// Servers that may go on once without the ranks that are gone, with `--max-restarts 1`: how many answer again.
    #[arg(long, requires = "serving")]
    restarts: bool,
    /// Runs for each signal; of servers, for each signal, moment and kind of rank [default: 50, of servers 20].
    #[arg(long)]
    times: Option<u64>,
    /// What is sent: KILL ends a rank, STOP leaves it there for good.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Signal::Kill, Signal::Stop])]
    signals: Vec<Signal>,
    /// Of servers: which ranks get it.
    #[arg(long, requires = "serving", value_enum, value_delimiter = ',', default_values_t = [Victim::Follower, Victim::First])]
    victims: Vec<Victim>,
    /// Of the first run; the others follow.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run with the Open MPI installed here, which has to be one the `mpicc` on the PATH is compatible with. From version 5 on ranks
    /// outlive the death of another.
    #[arg(long)]
    prefix: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Engine {
    /// Processes with torchrun's variables.
    Tcp,
    /// Processes of `mpirun`.
    Mpi,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "UPPER")]
enum Signal {
    Kill,
    Stop,
}

/// Which rank of a server a signal is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Victim {
    /// Any but rank 0.
    Follower,
    /// Rank 0, which listens.
    First,
}

impl Victim {
    fn name(self) -> &'static str {
        match self {
            Self::Follower => "follower",
            Self::First => "rank 0",
        }
    }
}

impl Signal {
    /// As `kill` names it.
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "KILL",
            Self::Stop => "STOP",
        }
    }
}

/// Runs everything and prints a table.
pub(crate) fn run(args: &Args) -> Result<()> {
    match args.serving {
        true => serving::run(args),
        false => training::run(args),
    }
}
