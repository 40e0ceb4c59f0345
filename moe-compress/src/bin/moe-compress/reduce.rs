//! `moe-compress prune` and `moe-compress merge`.

use crate::calibration::CalibrationArgs;
use crate::{Folders, sizes};
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use moe_compress::experts::{Budget, ExpertUse, Ranking, keep, measure, merge, prune};
use moe_models::gpt::Gpt;

#[derive(Debug, Args)]
pub(crate) struct ReduceArgs {
    #[command(flatten)]
    folders: Folders,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Share of the experts to keep.
    #[arg(long, value_name = "SHARE", required_unless_present = "keep_experts", conflicts_with = "keep_experts")]
    keep: Option<f64>,
    /// Let layers whose experts rank higher keep more: --keep is a share of all experts, not of each layer's.
    #[arg(long, requires = "keep")]
    across_layers: bool,
    /// How many experts to keep: one number for every layer with experts, or one for each such as 4,4,8.
    #[arg(long, value_name = "N[,N...]", value_delimiter = ',')]
    keep_experts: Vec<usize>,
    /// What experts are kept for.
    #[arg(long, value_enum, default_value = "saliency")]
    by: RankingArg,
    /// Of --by random [default: 1].
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RankingArg {
    /// The mean over an expert's tokens of its weight times the norm of its output (REAP).
    Saliency,
    /// The number of an expert's tokens.
    Frequency,
    /// Nothing: a control.
    Random,
}

impl ReduceArgs {
    pub(crate) fn prune(&self) -> Result<()> {
        let (model, _, kept) = self.choose()?;
        self.folders.save(&prune(&model, &kept)?)
    }

    pub(crate) fn merge(&self) -> Result<()> {
        let (model, usage, kept) = self.choose()?;
        self.folders.save(&merge(&model, &kept, &usage)?)
    }

    /// How many experts are kept of so many layers, and the flag that says so.
    fn budget(&self, layers: usize) -> (Budget, &'static str) {
        match (self.keep, self.keep_experts.as_slice()) {
            (Some(share), _) if self.across_layers => (Budget::ShareOfAll(share), "--keep"),
            (Some(share), _) => (Budget::Share(share), "--keep"),
            (None, [one]) => (Budget::Counts(vec![*one; layers]), "--keep-experts"),
            (None, counts) => (Budget::Counts(counts.to_vec()), "--keep-experts"),
        }
    }

    /// The model, what its experts do, and which are kept; printed.
    fn choose(&self) -> Result<(Gpt, Vec<ExpertUse>, Vec<Vec<usize>>)> {
        ensure!(
            self.by == RankingArg::Random || self.seed.is_none(),
            "--seed is of --by random, and has no effect on another ranking; drop it"
        );
        let model = self.folders.load()?;
        let layers = model.config().moe_layers();
        ensure!(!layers.is_empty(), "{} is a dense model, without experts to drop", self.folders.model.display());
        println!("{}: {}", self.folders.model.display(), sizes(model.config()));
        let (budget, flag) = self.budget(layers.len());
        let least = model.config().moe.as_ref().map_or(1, |moe| moe.top_k);
        budget.check(&layers, least).context(flag)?;
        let sources = self.calibration.sources(&self.folders.model, model.decoder_config())?;
        let usage = measure(model.decoder(), &self.calibration.batches(sources, model.decoder_config())?)?;
        let ranking = match self.by {
            RankingArg::Saliency => Ranking::Saliency,
            RankingArg::Frequency => Ranking::Frequency,
            RankingArg::Random => Ranking::Random { seed: self.seed.unwrap_or(1) },
        };
        let kept = keep(&usage, ranking, &budget, least)?;
        for (of, kept) in usage.iter().zip(&kept) {
            println!("layer {}", of.layer);
            for (expert, saliency) in of.saliencies().iter().enumerate() {
                let mark = if kept.contains(&expert) { "kept" } else { "" };
                println!("  expert {expert:>3}: {:>8} tokens, saliency {saliency:>9.4} {mark}", of.rows[expert]);
            }
        }
        Ok((model, usage, kept))
    }
}
