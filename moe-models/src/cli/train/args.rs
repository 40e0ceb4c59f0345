//! Command-line arguments, and how they override a [`TrainConfig`].

use super::model_args::ModelArgs;
use super::rank_args::TrainRankArgs;
use crate::Recompute;
use crate::cli::{DtypeArg, PrecisionArg};
use crate::train::{Blend, TrainConfig};
use anyhow::{Result, bail};
use clap::ValueEnum;
use std::path::PathBuf;

/// What programs that train end with, for their help.
pub const EXIT_STATUS: &str = "\
Exit status:
  0    done, or stopped by Ctrl-C or SIGTERM after saving the run; --resume continues it
  1    an error, told in the last line
  2    arguments that cannot be used
  130  ended at once, with what was saved before: by a signal while no step was under way, as while text is prepared,
       or by a second signal";

/// What every program that trains can be told.
#[derive(Debug, clap::Args)]
pub struct TrainArgs {
    /// Training text: a .txt or .jsonl file (also .xz) or a folder of them, with an optional weight. Repeatable.
    #[arg(long, value_name = "PATH[=WEIGHT]")]
    data: Vec<String>,
    /// Validation text, as --data but without weights. Without it the tail of each training source is held out.
    #[arg(long, value_name = "PATH")]
    valid: Vec<String>,
    /// Folder for the tokens of the text, which later runs with the same text and tokenizer find there; runs may share one
    /// [default: data-cache in --out].
    #[arg(long, value_name = "DIR")]
    data_cache: Option<String>,
    /// Share of each training source: equal (or its weight), or in proportion to its tokens.
    #[arg(long, value_enum)]
    blend: Option<BlendArg>,
    /// Fraction of each training source held out when there is no --valid.
    #[arg(long)]
    valid_fraction: Option<f64>,
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub(crate) ranks: TrainRankArgs,
    /// Settings file (.toml or .json) with the fields of the checkpoint's "config"; flags override it.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Folder for checkpoints and metrics.
    #[arg(long, value_name = "DIR", default_value = "runs/moe-train")]
    pub out: PathBuf,
    /// Continue from the newest checkpoint in --out, if there is one.
    #[arg(long)]
    pub resume: bool,
    /// Tokens to train on.
    #[arg(long)]
    train_tokens: Option<u64>,
    /// Tokens per sequence [default: as many as the model allows].
    #[arg(long)]
    seq_length: Option<usize>,
    /// Sequences per forward and backward pass.
    #[arg(long)]
    micro_batch_size: Option<usize>,
    /// Sequences per optimizer step; a multiple of --micro-batch-size.
    #[arg(long)]
    global_batch_size: Option<usize>,
    /// What the matrix products read; weights and sums are f32 in either case.
    #[arg(long, value_enum)]
    precision: Option<PrecisionArg>,
    /// What a step computes again in its backward pass to save memory: nothing, every layer, or the feed-forward part of layers
    /// with experts; never changes the result.
    #[arg(long, value_enum)]
    recompute: Option<RecomputeArg>,
    /// Probability of dropping an attention probability, in training only [default: what the model's config.json says].
    #[arg(long)]
    attention_dropout: Option<f64>,
    /// Probability of dropping an element of the embedding, or of what a part of a layer adds, in training only.
    #[arg(long)]
    hidden_dropout: Option<f64>,
    /// Largest learning rate.
    #[arg(long)]
    lr: Option<f64>,
    /// Final learning rate.
    #[arg(long)]
    min_lr: Option<f64>,
    /// Tokens of linear warm-up.
    #[arg(long)]
    lr_warmup_tokens: Option<u64>,
    /// Tokens at which the cosine decay ends.
    #[arg(long)]
    lr_decay_tokens: Option<u64>,
    /// Decoupled weight decay, not on biases and norms.
    #[arg(long)]
    weight_decay: Option<f64>,
    /// Largest global gradient norm; 0 turns clipping off.
    #[arg(long)]
    clip_grad: Option<f64>,
    /// How far a step moves the biases by which routers choose experts, towards those with less than the mean load, in families that
    /// have such biases (DeepSeek-V3, whose authors took 0.001, and GLM-4.5) [default: 0].
    #[arg(long, value_name = "SPEED")]
    bias_update_speed: Option<f64>,
    /// Seed of every random draw.
    #[arg(long)]
    seed: Option<u64>,
    /// Steps between validations.
    #[arg(long)]
    eval_interval: Option<u64>,
    /// Validate before the first step too; a run that is resumed after it does not.
    #[arg(long)]
    eval_on_start: bool,
    /// Micro-batches evaluated per validation source; 0 evaluates all of it.
    #[arg(long)]
    eval_iters: Option<usize>,
    /// Steps between checkpoints.
    #[arg(long)]
    save_interval: Option<u64>,
    /// Newest checkpoints kept, besides the best.
    #[arg(long)]
    keep_last: Option<usize>,
    /// Steps between metrics records.
    #[arg(long)]
    log_interval: Option<u64>,
    /// End after a step that is a multiple of this, saved, as Ctrl-C would: for jobs that have limited time.
    #[arg(long, value_name = "STEPS", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) exit_interval: Option<u64>,
    /// Instead of training, print the loss of this model folder on the --valid text. Of the settings only --config,
    /// --data-cache (tokens are held in memory without it), --seq-length, --micro-batch-size, --eval-iters and
    /// --precision have a meaning then.
    #[arg(long, value_name = "DIR", conflicts_with_all = TRAINING_ONLY)]
    pub(crate) evaluate: Option<PathBuf>,
    /// When done, write a model folder for serving here.
    #[arg(long, value_name = "DIR")]
    pub(crate) export: Option<PathBuf>,
    /// Number format of the exported weights.
    #[arg(long, value_enum, default_value = "bf16", requires = "export")]
    pub(crate) export_dtype: DtypeArg,
    /// Export the best checkpoint instead of the last.
    #[arg(long, requires = "export")]
    pub(crate) export_best: bool,
}

/// What `--evaluate` would ignore. `ModelArgs` is the group of all flags that describe a model.
const TRAINING_ONLY: [&str; 28] = [
    "exit_interval",
    "ModelArgs",
    "RankArgs",
    "TrainRankArgs",
    "data",
    "blend",
    "valid_fraction",
    "out",
    "resume",
    "train_tokens",
    "global_batch_size",
    "recompute",
    "attention_dropout",
    "hidden_dropout",
    "lr",
    "min_lr",
    "lr_warmup_tokens",
    "lr_decay_tokens",
    "weight_decay",
    "clip_grad",
    "bias_update_speed",
    "seed",
    "eval_interval",
    "eval_on_start",
    "save_interval",
    "keep_last",
    "log_interval",
    "export",
];

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BlendArg {
    Equal,
    Tokens,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RecomputeArg {
    None,
    Block,
    Moe,
}

impl From<RecomputeArg> for Recompute {
    fn from(recompute: RecomputeArg) -> Self {
        match recompute {
            RecomputeArg::None => Self::None,
            RecomputeArg::Block => Self::Block,
            RecomputeArg::Moe => Self::Moe,
        }
    }
}

fn set<T: Copy>(target: &mut T, given: Option<T>) {
    if let Some(value) = given {
        *target = value;
    }
}

impl TrainArgs {
    /// Refuses flags that would have no effect with the settings `config`, which already hold the flags. A held-out
    /// fraction beside validation text is told of only: recipes carry one for whatever text they are given.
    pub(crate) fn check_all_used(&self, config: &TrainConfig) -> Result<()> {
        if let (Some(fraction), false) = (self.valid_fraction, config.valid.is_empty()) {
            let named = config.valid.join(", ");
            eprintln!(
                "nothing is held out: validation text is named ({named}), so --valid-fraction {fraction} has no effect"
            );
        }
        let validates = !config.valid.is_empty() || config.valid_fraction > 0.0;
        let needs_validation = [
            ("--export-best", self.export_best),
            ("--eval-interval", self.eval_interval.is_some()),
            ("--eval-on-start", self.eval_on_start),
            ("--eval-iters", self.eval_iters.is_some()),
        ];
        if let Some((flag, _)) = needs_validation.iter().find(|(_, given)| *given && !validates) {
            bail!(
                "{flag} has no effect without validation; give --valid, raise valid_fraction above 0, or drop {flag}"
            );
        }
        Ok(())
    }

    /// Whether a model folder is to be evaluated, and nothing trained.
    pub fn evaluates(&self) -> bool {
        self.evaluate.is_some()
    }

    /// `config` with every given flag in place of its setting.
    pub(crate) fn apply_to(&self, mut config: TrainConfig) -> TrainConfig {
        if !self.data.is_empty() {
            config.data.clone_from(&self.data);
        }
        if !self.valid.is_empty() {
            config.valid.clone_from(&self.valid);
        }
        config.data_cache = self.data_cache.clone().or(config.data_cache);
        set(
            &mut config.blend,
            self.blend.map(|b| match b {
                BlendArg::Equal => Blend::Equal,
                BlendArg::Tokens => Blend::Tokens,
            }),
        );
        config.seq_length = self.seq_length.or(config.seq_length);
        config.min_lr = self.min_lr.or(config.min_lr);
        config.lr_warmup_tokens = self.lr_warmup_tokens.or(config.lr_warmup_tokens);
        config.lr_decay_tokens = self.lr_decay_tokens.or(config.lr_decay_tokens);
        set(&mut config.valid_fraction, self.valid_fraction);
        set(&mut config.train_tokens, self.train_tokens);
        set(&mut config.micro_batch_size, self.micro_batch_size);
        set(&mut config.global_batch_size, self.global_batch_size);
        set(&mut config.precision, self.precision.map(Into::into));
        set(&mut config.recompute, self.recompute.map(Into::into));
        config.attention_dropout = self.attention_dropout.or(config.attention_dropout);
        set(&mut config.hidden_dropout, self.hidden_dropout);
        set(&mut config.lr, self.lr);
        set(&mut config.weight_decay, self.weight_decay);
        set(&mut config.clip_grad, self.clip_grad);
        set(&mut config.bias_update_speed, self.bias_update_speed);
        set(&mut config.seed, self.seed);
        set(&mut config.eval_interval, self.eval_interval);
        config.eval_on_start |= self.eval_on_start;
        set(&mut config.eval_iters, self.eval_iters);
        set(&mut config.save_interval, self.save_interval);
        set(&mut config.keep_last, self.keep_last);
        set(&mut config.log_interval, self.log_interval);
        config
    }
}
