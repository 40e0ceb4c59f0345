//! `cargo xtask bench parallel`: all-to-alls over many ranks. Counted in their plans, timed over hosts that are network
//! namespaces of this machine, timed on a cluster that is simulated.

use super::{header, keep};
use crate::shell::{cargo, output};
use anyhow::Result;
use std::path::Path;

#[derive(clap::Args)]
#[command(next_help_heading = "With `parallel`")]
pub(super) struct Settings {
    /// Only this part; without it, all that this machine has the programs for.
    #[arg(value_enum)]
    part: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// With `parallel`: messages and bytes of a rank, from 8 to 1024 ranks.
    Counts,
}

impl Settings {
    /// Whether anything was said that only `parallel` knows.
    pub(super) fn is_given(&self) -> bool {
        self.part.is_some()
    }
}

const PACKAGE: [&str; 3] = ["--release", "--package", "moe-parallel"];

fn counts(out: &Path) -> Result<()> {
    let table = output(cargo(&["run", "--quiet"]).args(PACKAGE).args(["--example", "counts"]))?;
    keep(&out.join("parallel-counts.txt"), &(header()? + &table))
}

pub(super) fn run(settings: &Settings, out: &Path) -> Result<()> {
    match settings.part {
        Some(Part::Counts) | None => counts(out),
    }
}
