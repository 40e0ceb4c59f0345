//! What training adds to the arguments about ranks.

use crate::cli::ranks::{RankArgs, no_effect};
use crate::train::launch::LayoutRequest;
use crate::train::{ReduceConfig, Zero};
use anyhow::Result;
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// Ranks that train.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Ranks")]
pub(crate) struct TrainRankArgs {
    #[command(flatten)]
    pub(crate) common: RankArgs,
    /// What is divided over replicas: 0 nothing, 1 moments, 2 gradients too (ZeRO). Whatever of these is not given is chosen: the
    /// layout that sends the fewest bytes between nodes, then has the least work on a rank, of those that fit in memory.
    #[arg(long, value_name = "STAGE", value_parser = clap::value_parser!(u8).range(0..=2))]
    zero: Option<u8>,
    /// Most memory of a rank, such as 6GB or 800MB, pages of mapped files not counted: a layout that needs more is refused before the run starts, and a run that
    /// comes to need more ends, with what was saved before.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub(crate) memory_budget: Option<usize>,
    /// Gradients that travel together, bytes.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    bucket_size: Option<usize>,
    /// Add up gradients after the backward pass instead of during it.
    #[arg(long)]
    no_overlap: bool,
    /// Folder for a trace of every rank (Chrome's format, for Perfetto): passes, waits, and gradients under way.
    #[arg(long, value_name = "DIR")]
    pub(crate) trace: Option<PathBuf>,
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

impl TrainRankArgs {
    pub(crate) fn request(&self) -> Result<LayoutRequest> {
        self.common.check_numbers()?;
        let zero = self.zero.map(Zero::try_from).transpose().map_err(anyhow::Error::msg)?;
        let RankArgs { dp, tp, ep, expert_slices, .. } = self.common;
        let expert_order = self.common.expert_order();
        Ok(LayoutRequest { dp, tp, ep, expert_slices, expert_order, zero, memory_budget: self.memory_budget })
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

    pub(crate) fn timeout(&self) -> Result<Duration> {
        self.common.timeout(COMM_TIMEOUT)
    }

    /// Refuses what would have no effect on one rank.
    pub(crate) fn check_one_rank(&self) -> Result<()> {
        self.common.check_one_rank()?;
        let given = [
            ("--bucket-size", self.bucket_size.is_some()),
            ("--no-overlap", self.no_overlap),
            ("--trace", self.trace.is_some()),
            ("--zero", self.zero.is_some_and(|stage| stage > 0)),
        ];
        given.iter().find(|(_, given)| *given).map_or(Ok(()), |(flag, _)| Err(no_effect(flag)))
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
