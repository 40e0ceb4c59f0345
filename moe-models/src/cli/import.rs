//! `moe-import`: a model folder of a checkpoint of Megatron-DeepSpeed.

use crate::cli::DtypeArg;
use crate::deepspeed::{Import, gpt2_tokenizer, import};
use crate::train::tokenizer;
use anyhow::{Result, bail};
use serde_json::{Map, Value};
use std::path::PathBuf;
use tokenizers::Tokenizer;

/// Make a model folder of a checkpoint of Megatron-DeepSpeed: a GPT, dense or with experts (MoE, Pyramid-, Residual-, PR-MoE).
///
/// Tensor slices are put together, and every expert gets its place, whatever the ranks that trained it. The arguments of Megatron that
/// the checkpoint holds say what the model is; those below that are named after them are for checkpoints that hold none.
#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// Folder with a file `latest` in it, or that of one checkpoint (with `mp_rank_00_model_states.pt`).
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// The checkpoint, instead of the latest: `global_step1000`.
    #[arg(long, value_name = "NAME")]
    tag: Option<String>,
    /// New folder to write.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The tokenizer as a tokenizer.json.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vocab_file", "merge_file"])]
    tokenizer: Option<PathBuf>,
    /// GPT-2's tokenizer: its vocab.json.
    #[arg(long, value_name = "FILE", requires = "merge_file")]
    vocab_file: Option<PathBuf>,
    /// GPT-2's tokenizer: its merges.txt.
    #[arg(long, value_name = "FILE", requires = "vocab_file")]
    merge_file: Option<PathBuf>,
    /// Number format of the weights: the checkpoint's if not given, or f32 if it has several.
    #[arg(long, value_enum)]
    dtype: Option<DtypeArg>,
    /// Attention heads.
    #[arg(long, value_name = "N")]
    num_attention_heads: Option<usize>,
    /// How rows of queries, keys and values lie: 0 to 3; Megatron has written 3 since 2021.
    #[arg(long, value_name = "VERSION", value_parser = finite)]
    checkpoint_version: Option<f64>,
    /// Experts per token.
    #[arg(long, value_name = "K")]
    topk: Option<usize>,
    /// Epsilon of every LayerNorm [default: 1e-5].
    #[arg(long, value_name = "EPS", value_parser = finite)]
    layernorm_epsilon: Option<f64>,
    /// Capacity factor of experts in training [default: 1].
    #[arg(long, value_name = "FACTOR", value_parser = finite)]
    moe_train_capacity_factor: Option<f64>,
    /// Capacity factor of experts in evaluation as DeepSpeed has it [default: 1]. Serving drops nothing.
    #[arg(long, value_name = "FACTOR", value_parser = finite)]
    moe_eval_capacity_factor: Option<f64>,
    /// Rows that every expert takes at least [default: 4].
    #[arg(long, value_name = "ROWS")]
    moe_min_capacity: Option<usize>,
    /// Factor of the load-balance loss in training [default: 0.1].
    #[arg(long, value_name = "FACTOR", value_parser = finite)]
    moe_loss_coeff: Option<f64>,
}

fn finite(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|value: &f64| value.is_finite()).ok_or_else(|| "must be a number".into())
}

impl ImportArgs {
    /// Writes the folder, and says what it holds.
    ///
    /// # Errors
    /// As [`import`]; if no tokenizer is given.
    pub fn run(&self) -> Result<()> {
        let (tokenizer, arguments) = (self.read_tokenizer()?, self.arguments());
        let imported = import(
            &Import {
                from: &self.from,
                tag: self.tag.as_deref(),
                arguments: &arguments,
                dtype: self.dtype.map(Into::into),
                tokenizer: &tokenizer,
            },
            &self.out,
        )?;
        let config = &imported.config;
        let experts = match &config.moe {
            None => "dense".to_owned(),
            Some(moe) => format!("experts {:?}{}", moe.num_experts, if moe.residual { ", residual" } else { "" }),
        };
        println!(
            "{}: {} parameters in {:?}, {} layers, {experts}, of {} tensor slices",
            self.out.display(),
            config.parameter_count().total,
            imported.dtype,
            config.num_layers,
            imported.slices
        );
        Ok(())
    }

    fn read_tokenizer(&self) -> Result<Tokenizer> {
        match (&self.tokenizer, &self.vocab_file, &self.merge_file) {
            (Some(path), ..) => Ok(tokenizer::load(path)?),
            (None, Some(vocab), Some(merges)) => Ok(gpt2_tokenizer(vocab, merges)?),
            _ => bail!("give the tokenizer of the model: --tokenizer, or --vocab-file and --merge-file"),
        }
    }

    /// By the names that Megatron saves them under.
    fn arguments(&self) -> Map<String, Value> {
        let count = |value: Option<usize>| value.map(Value::from);
        let number = |value: Option<f64>| value.map(Value::from);
        let all = [
            ("num_attention_heads", count(self.num_attention_heads)),
            ("checkpoint_version", number(self.checkpoint_version)),
            ("topk", count(self.topk)),
            ("layernorm_epsilon", number(self.layernorm_epsilon)),
            ("moe_train_capacity_factor", number(self.moe_train_capacity_factor)),
            ("moe_eval_capacity_factor", number(self.moe_eval_capacity_factor)),
            ("moe_min_capacity", count(self.moe_min_capacity)),
            ("moe_loss_coeff", number(self.moe_loss_coeff)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}
