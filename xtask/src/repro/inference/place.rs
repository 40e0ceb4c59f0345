//! [`Place`]: programs that are built, folders of the models, and token steps run over emulated hosts.

use super::data::{Part, Step};
use super::models::{ALL, Model};
use crate::bench::split_output;
use crate::hosts::{Hosts, Link};
use crate::shell::{self, cargo, root};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// Between hosts, one way.
pub(super) const DELAY: Duration = Duration::from_micros(50);
/// Of the rank at which the others arrive.
const PORT: &str = "29555";

/// How large everything is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    /// How many times narrower than the paper's models.
    pub(super) narrow: usize,
    /// Time for the steps of a run.
    pub(super) seconds: f64,
    /// Nothing to conclude from.
    pub(super) smoke: bool,
}

/// Hosts with as many ranks each.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cluster {
    pub(super) hosts: usize,
    pub(super) ranks_per_host: usize,
}

impl Cluster {
    pub(super) const fn new(hosts: usize, ranks_per_host: usize) -> Self {
        Self { hosts, ranks_per_host }
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
    pub(super) size: Size,
}

impl Place {
    /// Builds the programs and writes the models.
    ///
    /// # Errors
    /// If this machine lacks something, which is then named; if a program fails.
    pub(super) fn new(size: Size) -> Result<Self> {
        Hosts::check()?;
        let programs = ["--bin", "moe-init", "--bin", "moe-train", "--example", "inference"];
        shell::run(cargo(&["build", "--release", "--package", "moe-models"]).args(programs))?;
        let folder = root().join("target/repro-inference");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let place = Self { folder, size };
        for (index, model) in ALL.iter().enumerate() {
            let config = place.folder.join(format!("config-{index}.json"));
            fs::write(&config, model.config(size.narrow).to_string())?;
            let mut init = Command::new(place.program("moe-init"));
            init.arg("--config").arg(config).arg("--out").arg(place.model(model)?);
            if index > 0 {
                // The first one has trained it.
                init.arg("--tokenizer").arg(place.tokenizer()?);
            }
            shell::run(&mut init)?;
        }
        Ok(place)
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        root().join("target/release").join(name)
    }

    /// Where a model lies.
    fn model(&self, model: &Model) -> Result<PathBuf> {
        let index = ALL.iter().position(|known| known.name == model.name).context("no such model")?;
        Ok(self.folder.join(format!("model-{index}")))
    }

    /// Of all models.
    pub(super) fn tokenizer(&self) -> Result<PathBuf> {
        Ok(self.model(ALL[0])?.join("tokenizer.json"))
    }

    /// Where a run may write.
    pub(super) fn run_folder(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Token steps of a model over hosts whose lines have so many Gbit/s, with these flags: one for each form.
    ///
    /// # Errors
    /// If the ranks fail.
    pub(super) fn steps(
        &self,
        part: Part,
        model: &Model,
        cluster: Cluster,
        gbits: f64,
        flags: &[&str],
    ) -> Result<Vec<Step>> {
        let link = Link { delay: DELAY, bits_per_second: gbits * 1e9, packet: Duration::ZERO };
        let hosts = Hosts::new(cluster.hosts, link, &root().join("target/hosts"))?;
        let mut run = hosts.mpirun(cluster.ranks_per_host)?;
        // A rank computes on one core, as a rank of the paper's on one GPU.
        run.args(["-x", "RAYON_NUM_THREADS=1", "-x", &format!("MASTER_ADDR={}", hosts.first_address())]);
        run.args(["-x", &format!("MASTER_PORT={PORT}")]);
        run.arg(self.program("examples/inference")).arg("--model").arg(self.model(model)?);
        run.args(["--seconds", &self.size.seconds.to_string()]).args(flags);
        let (rows, _) = split_output(&hosts.output(&mut run)?)?;
        ensure!(!rows.is_empty(), "the ranks of {} have measured nothing", model.name);
        let step = |mut row: serde_json::Value| {
            row["part"] = serde_json::to_value(part)?;
            row["model"] = model.name.into();
            row["hosts"] = cluster.hosts.into();
            row["gbits"] = gbits.into();
            Ok(serde_json::from_value(row)?)
        };
        rows.into_iter().map(step).collect()
    }
}

impl Drop for Place {
    /// Gigabytes of weights that draw anew.
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            eprintln!("warning: {} is left: {error}", self.folder.display());
        }
    }
}
