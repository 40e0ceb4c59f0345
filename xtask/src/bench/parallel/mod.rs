//! `cargo xtask bench parallel`: all-to-alls over many ranks. Counted in their plans, timed over hosts that are network
//! namespaces of this machine, timed on a cluster that is simulated.

mod hosts;
mod rows;
mod simulated;

use super::{header, keep};
use crate::shell::{cargo, output};
use anyhow::{Result, bail};
use std::path::Path;
use std::process::Command;

/// What `parallel` alone knows.
#[derive(clap::Args)]
#[command(next_help_heading = "With `parallel`")]
pub(super) struct Settings {
    #[command(flatten)]
    hosts: hosts::Network,
    #[command(flatten)]
    simulated: simulated::Cluster,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Part {
    /// Messages and bytes of a rank, from 8 to 1024 ranks.
    Counts,
    /// Exchanges over 2 to 4 emulated hosts, beside MPI's own; as root.
    Hosts,
    /// Exchanges of 16 to 128 ranks on a simulated cluster.
    Simulated,
}

impl Part {
    const ALL: [Self; 3] = [Self::Counts, Self::Hosts, Self::Simulated];

    fn name(self) -> &'static str {
        match self {
            Self::Counts => "counts",
            Self::Hosts => "hosts",
            Self::Simulated => "simulated",
        }
    }

    /// What this machine lacks for it.
    fn missing(self) -> Vec<String> {
        match self {
            Self::Counts => Vec::new(),
            Self::Hosts => hosts::missing(),
            Self::Simulated => simulated::missing(),
        }
    }
}

/// What emulated hosts lack on this machine.
pub(super) fn missing_for_hosts() -> Vec<String> {
    hosts::missing()
}

/// The programs of these that are not here, with the packages of Debian's that have them.
fn missing_programs(programs: &[(&str, &str)]) -> Vec<String> {
    let missing = programs.iter().filter(|(program, _)| Command::new(program).arg("--version").output().is_err());
    missing.map(|(program, package)| format!("`{program}` (apt-get install {package})")).collect()
}

/// What the bindings to an MPI are made with.
fn missing_libclang() -> Option<String> {
    let listed = Command::new("/sbin/ldconfig").arg("-p").output();
    let listed = listed.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("libclang"));
    let found = listed || std::env::var_os("LIBCLANG_PATH").is_some();
    (!found).then(|| "`libclang` (apt-get install libclang-dev, or set LIBCLANG_PATH)".into())
}

/// Builds an example of `moe-parallel`.
fn build(example: &str, configure: impl FnOnce(&mut Command) -> &mut Command) -> Result<()> {
    let mut build =
        cargo(&["build", "--release", "--package", "moe-parallel", "--features", "mpi", "--example", example]);
    crate::shell::run(configure(&mut build))
}

fn counts(out: &Path) -> Result<()> {
    let run = ["run", "--quiet", "--release", "--package", "moe-parallel", "--example", "counts"];
    keep(&out.join("parallel-counts.txt"), &(header()? + &output(&mut cargo(&run))?))
}

/// Runs these parts; without any, all that this machine has the programs for.
pub(super) fn run(parts: &[Part], settings: &Settings, out: &Path) -> Result<()> {
    for part in Part::ALL.into_iter().filter(|part| parts.is_empty() || parts.contains(part)) {
        let missing = part.missing().join("; ");
        if !missing.is_empty() {
            let text = format!("`bench parallel {}` needs what is not here: {missing}", part.name());
            if !parts.is_empty() {
                bail!(text);
            }
            eprintln!("left out: {text}");
            continue;
        }
        match part {
            Part::Counts => counts(out)?,
            Part::Hosts => hosts::run(&settings.hosts, out)?,
            Part::Simulated => simulated::run(&settings.simulated, out)?,
        }
    }
    Ok(())
}
