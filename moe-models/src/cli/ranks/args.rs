//! Who the ranks of a program are, how they are laid out, and how they exchange.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use moe_parallel::all_to_all::{Route, RouteChoice};
use moe_parallel::dims::ExpertOrder;
use moe_parallel::{Coordination, ExchangeConfig, ParallelDims};
use std::time::Duration;

/// Without any of these, and not started by a launcher, a program has one rank.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Ranks")]
pub struct RankArgs {
    /// Ranks as threads of this process, whatever launcher has started it. Otherwise ranks are the processes that torchrun,
    /// deepspeed, mpirun, srun or an indexed job of Kubernetes has started, in this order.
    #[arg(long, value_name = "N")]
    pub(super) ranks: Option<usize>,
    /// What carries messages between processes: MPI where this program has it and mpirun has started it, else TCP.
    #[arg(long, value_enum)]
    pub(super) engine: Option<EngineArg>,
    /// Data-parallel replicas of the dense layers.
    #[arg(long, value_name = "N")]
    pub(crate) dp: Option<usize>,
    /// Ranks that share each dense matrix (tensor slicing).
    #[arg(long, value_name = "N")]
    pub(crate) tp: Option<usize>,
    /// Ranks that share the experts of a layer; a layer with fewer experts uses fewer.
    #[arg(long, value_name = "N")]
    pub(crate) ep: Option<usize>,
    /// Ranks that share the matrices of each expert [default: 1].
    #[arg(long, value_name = "N")]
    pub(crate) expert_slices: Option<usize>,
    /// Ranks on a machine [default: what the launcher says, else all].
    #[arg(long, value_name = "N")]
    pub(crate) ranks_per_node: Option<usize>,
    /// The way of rows between nodes. [default: flat for runs that train, auto for servers]
    #[arg(long, value_enum)]
    route: Option<RouteArg>,
    /// What tensor groups, which have the same rows, do about it.
    #[arg(long, value_enum)]
    coordination: Option<CoordinationArg>,
    /// Seconds after which a rank that does not answer ends all.
    /// [default: 600 for runs that train, 30 for servers]
    #[arg(long, value_name = "SECONDS")]
    comm_timeout: Option<f64>,
    /// How often a program whose rank has died or got stuck goes on with the ranks that are left, in a layout that is possible for
    /// them: a run that trains from its newest checkpoint, a server with its model loaded anew.
    #[arg(long, value_name = "N", default_value = "0")]
    pub(crate) max_restarts: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum EngineArg {
    Mpi,
    Tcp,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RouteArg {
    /// From every rank to every rank.
    Flat,
    /// Inside nodes, then between them.
    Hierarchical,
    /// Whichever of both is faster for as many rows, as is measured at the start.
    Auto,
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

impl RankArgs {
    /// Refuses numbers of ranks that are none.
    ///
    /// # Errors
    /// Naming the flag.
    pub(crate) fn check_numbers(&self) -> Result<()> {
        let Self { dp, tp, ep, expert_slices, ranks_per_node, .. } = *self;
        let numbers = [("--dp", dp), ("--tp", tp), ("--ep", ep), ("--expert-slices", expert_slices)];
        for (name, value) in numbers.into_iter().chain([("--ranks-per-node", ranks_per_node)]) {
            if value == Some(0) {
                bail!("{name} must be at least 1");
            }
        }
        Ok(())
    }

    /// The order of expert groups that the coordination needs.
    pub(crate) fn expert_order(&self) -> Option<ExpertOrder> {
        match self.coordination {
            Some(CoordinationArg::Destination) => Some(ExpertOrder::Consecutive),
            Some(CoordinationArg::Tokens) => Some(ExpertOrder::WithinTensor),
            Some(CoordinationArg::None) | None => None,
        }
    }

    /// How a server of `size` ranks is laid out where nothing else is said: experts over all ranks, sequences divided over as many
    /// replicas of the dense layers as `--tp` leaves.
    ///
    /// # Errors
    /// If a layout of so many ranks is impossible, naming the flag.
    pub fn serving_dims(&self, size: usize) -> Result<ParallelDims> {
        self.check_numbers()?;
        let (tp, slices) = (self.tp.unwrap_or(1), self.expert_slices.unwrap_or(1));
        let dims = ParallelDims::new(
            self.dp.unwrap_or((size / tp).max(1)),
            tp,
            self.ep.unwrap_or((size / slices).max(1)),
            slices,
        );
        let dims = ParallelDims { expert_order: self.expert_order().unwrap_or(dims.expert_order), ..dims };
        dims.validate(size)?;
        self.check_layout(&dims)?;
        Ok(dims)
    }

    /// How the ranks that are left of a server go on: as was asked for, else with as much of it as so few can have.
    ///
    /// # Errors
    /// As [`RankArgs::serving_dims`].
    pub fn dims_of_the_left(&self, size: usize) -> Result<ParallelDims> {
        // The numbers asked for were for more ranks.
        let spread = Self { dp: None, ep: None, ..self.clone() };
        let least = Self { tp: None, expert_slices: None, coordination: None, ..spread.clone() };
        self.serving_dims(size).or_else(|error| {
            tracing::warn!("{error:#}; another layout is chosen for the ranks that are left");
            spread.serving_dims(size).or_else(|_| least.serving_dims(size))
        })
    }

    /// The way of rows to experts; `otherwise` the route where nothing is said.
    pub fn exchange(&self, otherwise: RouteChoice) -> ExchangeConfig {
        let default = ExchangeConfig::default();
        ExchangeConfig {
            route: match self.route {
                None => otherwise,
                Some(RouteArg::Flat) => Route::Flat.into(),
                Some(RouteArg::Hierarchical) => Route::Hierarchical.into(),
                Some(RouteArg::Auto) => RouteChoice::BySize,
            },
            coordination: match self.coordination {
                None => default.coordination,
                Some(CoordinationArg::None) => Coordination::None,
                Some(CoordinationArg::Destination) => Coordination::ByDestination,
                Some(CoordinationArg::Tokens) => Coordination::ByTokens,
            },
        }
    }

    /// Consecutive ranks on a machine, if they were given.
    pub fn ranks_per_node(&self) -> Option<usize> {
        self.ranks_per_node
    }

    /// How often a fault is followed by a start with the ranks that are left.
    pub fn max_restarts(&self) -> usize {
        self.max_restarts
    }

    /// Refuses what would have no effect in this layout.
    pub(crate) fn check_layout(&self, dims: &ParallelDims) -> Result<()> {
        if dims.tp == 1 && self.coordination.is_some() {
            bail!("--coordination has no effect without tensor groups: add --tp, or drop --coordination");
        }
        Ok(())
    }

    /// The deadline of every exchange; `otherwise` seconds where nothing is said.
    ///
    /// # Errors
    /// For a time that is none.
    pub fn timeout(&self, otherwise: f64) -> Result<Duration> {
        let seconds = self.comm_timeout.unwrap_or(otherwise);
        match Duration::try_from_secs_f64(seconds) {
            Ok(timeout) if !timeout.is_zero() => Ok(timeout),
            _ => bail!("--comm-timeout must be a number of seconds above 0, got {seconds}"),
        }
    }

    /// Refuses what would have no effect on one rank.
    ///
    /// # Errors
    /// Naming the flag.
    pub fn check_one_rank(&self) -> Result<()> {
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
            ("--comm-timeout", self.comm_timeout.is_some()),
            ("--max-restarts", self.max_restarts > 0),
        ];
        given.iter().find(|(_, given)| *given).map_or(Ok(()), |(flag, _)| Err(no_effect(flag)))
    }
}

/// A flag that is for several ranks.
pub(crate) fn no_effect(flag: &str) -> anyhow::Error {
    anyhow::anyhow!(
        "{flag} has no effect on one rank: start more with --ranks N, mpirun -n N or torchrun, or drop {flag}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        ranks: RankArgs,
    }

    #[test]
    fn fewer_ranks_keep_what_they_can_of_a_layout() {
        for (flags, size, want) in [
            (&[][..], 3, (3, 1, 3, 1)),
            (&["--ep", "4"], 4, (4, 1, 4, 1)),
            (&["--ep", "4"], 3, (3, 1, 3, 1)),
            (&["--dp", "2", "--tp", "2"], 2, (1, 2, 2, 1)),
            // That way needs as many ranks of each tensor index as share the experts.
            (&["--dp", "2", "--tp", "2", "--coordination", "tokens"], 2, (2, 1, 2, 1)),
            (&["--tp", "2", "--coordination", "tokens"], 3, (3, 1, 3, 1)),
            (&["--expert-slices", "2"], 3, (3, 1, 3, 1)),
            (&["--tp", "2"], 1, (1, 1, 1, 1)),
        ] {
            let args = Cli::try_parse_from(std::iter::once(&"serve").chain(flags)).expect("flags").ranks;
            let ParallelDims { dp, tp, ep, expert_slices, .. } = args.dims_of_the_left(size).expect("a layout");
            assert_eq!((dp, tp, ep, expert_slices), want, "{flags:?} on {size}");
        }
    }
}
