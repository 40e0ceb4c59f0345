//! Arguments about ranks: who they are, how they are laid out, and how they exchange.

use crate::train::launch::LayoutRequest;
use crate::train::{ReduceConfig, Zero};
use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use moe_parallel::all_to_all::Route;
use moe_parallel::dims::ExpertOrder;
use moe_parallel::{Coordination, ExchangeConfig, ParallelDims};
use std::path::PathBuf;
use std::time::Duration;

/// Without any of these, and not started by a launcher, a run has one rank.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct RankArgs {
    /// Ranks as threads of this process, whatever launcher has started it. Otherwise ranks are the processes that torchrun,
    /// deepspeed, mpirun, srun or an indexed job of Kubernetes has started, in this order.
    #[arg(long, value_name = "N")]
    pub(crate) ranks: Option<usize>,
    /// What carries messages between processes: MPI where this program has it and mpirun has started it, else TCP.
    #[arg(long, value_enum)]
    pub(crate) engine: Option<EngineArg>,
    /// Data-parallel replicas of the dense layers.
    #[arg(long, value_name = "N")]
    dp: Option<usize>,
    /// Ranks that share each dense matrix (tensor slicing).
    #[arg(long, value_name = "N")]
    tp: Option<usize>,
    /// Ranks that share the experts of a layer; a layer with fewer experts uses fewer.
    #[arg(long, value_name = "N")]
    ep: Option<usize>,
    /// Ranks that share the matrices of each expert [default: 1].
    #[arg(long, value_name = "N")]
    expert_slices: Option<usize>,
    /// What is divided over replicas: 0 nothing, 1 moments, 2 gradients too (ZeRO). Whatever of these is not given is chosen: the
    /// layout that sends the fewest bytes between nodes, then has the least work on a rank, of those that fit in memory.
    #[arg(long, value_name = "STAGE", value_parser = clap::value_parser!(u8).range(0..=2))]
    zero: Option<u8>,
    /// Most memory of a rank, such as 6GB or 800MB: a layout that needs more is refused before the run starts, and a run that
    /// comes to need more ends, with what was saved before.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) memory_budget: Option<usize>,
    /// Ranks on a machine [default: what the launcher says, else all].
    #[arg(long, value_name = "N")]
    pub(crate) ranks_per_node: Option<usize>,
    /// The way of rows between nodes.
    #[arg(long, value_enum)]
    route: Option<RouteArg>,
    /// What tensor groups, which have the same rows, do about it.
    #[arg(long, value_enum)]
    coordination: Option<CoordinationArg>,
    /// Gradients that travel together, bytes.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    bucket_size: Option<usize>,
    /// Add up gradients after the backward pass instead of during it.
    #[arg(long)]
    no_overlap: bool,
    /// Folder for a trace of every rank (Chrome's format, for Perfetto): passes, waits, and gradients under way.
    #[arg(long, value_name = "DIR")]
    pub(crate) trace: Option<PathBuf>,
    /// Seconds after which a rank that does not answer ends the run.
    /// [default: 600]
    #[arg(long, value_name = "SECONDS")]
    comm_timeout: Option<f64>,
    /// How often a run whose rank has died or got stuck goes on from its newest checkpoint with the ranks that are left, in a
    /// layout that is possible for them.
    #[arg(long, value_name = "N", default_value = "0")]
    pub(crate) max_restarts: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum EngineArg {
    Mpi,
    Tcp,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RouteArg {
    /// From every rank to every rank.
    Flat,
    /// Inside nodes, then between them.
    Hierarchical,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CoordinationArg {
    /// Nothing: each sends all rows.
    None,
    /// Each sends to the experts on ranks of its own tensor index.
    Destination,
    /// Each sends a part of every expert's rows.
    Tokens,
}

/// Seconds.
const COMM_TIMEOUT: f64 = 600.0;

/// `800MB`, `1.5GiB`, `4096`.
fn bytes(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" | "k" => 1e3,
        "mb" | "m" => 1e6,
        "gb" | "g" => 1e9,
        "kib" => f64::from(1 << 10),
        "mib" => f64::from(1 << 20),
        "gib" => f64::from(1 << 30),
        _ => return Err(format!("unknown unit {unit:?}; expected KB, MB, GB, KiB, MiB or GiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    let bytes = number * factor;
    if (1.0..1e18).contains(&bytes) { Ok(bytes as usize) } else { Err(format!("{text:?} is not a possible size")) }
}

impl RankArgs {
    pub(crate) fn request(&self) -> Result<LayoutRequest> {
        let zero = self.zero.map(Zero::try_from).transpose().map_err(anyhow::Error::msg)?;
        let Self { dp, tp, ep, expert_slices, memory_budget, ranks_per_node, .. } = *self;
        let numbers = [("--dp", dp), ("--tp", tp), ("--ep", ep), ("--expert-slices", expert_slices)];
        for (name, value) in numbers.into_iter().chain([("--ranks-per-node", ranks_per_node)]) {
            if value == Some(0) {
                bail!("{name} must be at least 1");
            }
        }
        let expert_order = match self.coordination {
            Some(CoordinationArg::Destination) => Some(ExpertOrder::Consecutive),
            Some(CoordinationArg::Tokens) => Some(ExpertOrder::WithinTensor),
            Some(CoordinationArg::None) | None => None,
        };
        Ok(LayoutRequest { dp, tp, ep, expert_slices, expert_order, zero, memory_budget })
    }

    pub(crate) fn reduce(&self) -> ReduceConfig {
        let default = ReduceConfig::default();
        let elements = self.bucket_size.map(|bytes| (bytes / size_of::<f32>()).max(1));
        ReduceConfig {
            bucket_elements: elements.unwrap_or(default.bucket_elements),
            most_under_way: 2 * elements.unwrap_or(default.bucket_elements),
            overlap: !self.no_overlap,
            ..default
        }
    }

    pub(crate) fn exchange(&self) -> ExchangeConfig {
        let default = ExchangeConfig::default();
        ExchangeConfig {
            route: match self.route {
                None => default.route,
                Some(RouteArg::Flat) => Route::Flat,
                Some(RouteArg::Hierarchical) => Route::Hierarchical,
            },
            coordination: match self.coordination {
                None => default.coordination,
                Some(CoordinationArg::None) => Coordination::None,
                Some(CoordinationArg::Destination) => Coordination::ByDestination,
                Some(CoordinationArg::Tokens) => Coordination::ByTokens,
            },
        }
    }

    /// Refuses what would have no effect in this layout.
    pub(crate) fn check_layout(&self, dims: &ParallelDims) -> Result<()> {
        if dims.tp == 1 && self.coordination.is_some() {
            bail!("--coordination has no effect without tensor groups: add --tp, or drop --coordination");
        }
        Ok(())
    }

    pub(crate) fn timeout(&self) -> Result<Duration> {
        let seconds = self.comm_timeout.unwrap_or(COMM_TIMEOUT);
        match Duration::try_from_secs_f64(seconds) {
            Ok(timeout) if !timeout.is_zero() => Ok(timeout),
            _ => bail!("--comm-timeout must be a number of seconds above 0, got {seconds}"),
        }
    }

    /// Refuses what would have no effect on one rank.
    pub(crate) fn check_one_rank(&self) -> Result<()> {
        let above_one = |value: Option<usize>| value.is_some_and(|value| value > 1);
        let given = [
            ("--dp", above_one(self.dp)),
            ("--tp", above_one(self.tp)),
            ("--ep", above_one(self.ep)),
            ("--expert-slices", above_one(self.expert_slices)),
            ("--engine", self.engine.is_some()),
            ("--route", self.route.is_some()),
            ("--coordination", self.coordination.is_some()),
            ("--ranks-per-node", above_one(self.ranks_per_node)),
            ("--bucket-size", self.bucket_size.is_some()),
            ("--no-overlap", self.no_overlap),
            ("--comm-timeout", self.comm_timeout.is_some()),
            ("--trace", self.trace.is_some()),
            ("--max-restarts", self.max_restarts > 0),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((flag, _)) => bail!(
                "{flag} has no effect on one rank: start more with --ranks N, mpirun -n N or torchrun, or drop {flag}"
            ),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_units() {
        for (text, want) in [("4096", 4096), ("1.5 GB", 1_500_000_000), ("800mb", 800_000_000), ("2GiB", 2 << 30)] {
            assert_eq!(bytes(text), Ok(want), "{text}");
        }
        for text in ["", "GB", "1 TB of", "-1", "0", "1e400"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
