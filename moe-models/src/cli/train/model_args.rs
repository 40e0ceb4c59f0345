//! Which model to train: a preset or a `config.json`, with the overrides that matter, mapped to a [`GptConfig`].

use crate::ReadFamily;
use crate::gpt::{GptConfig, GptMoeConfig};
use crate::train::{TokenizerChoice, tokenizer};
use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

const DEFAULT_PRESET: &str = "tiny-pr-moe";

/// Which model: a preset or a `config.json`, with overrides.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A model by name: tiny-dense, tiny-moe, tiny-pyramid-moe, tiny-residual-moe, tiny-pr-moe or one of the paper's.
    #[arg(long, value_name = "NAME", conflicts_with = "model_config")]
    preset: Option<String>,
    /// A model by its config.json.
    #[arg(long, value_name = "FILE")]
    model_config: Option<PathBuf>,
    /// Start from the weights of this model folder, with its tokenizer; flags may change what has no weights (routing, losses).
    #[arg(long, value_name = "DIR", conflicts_with_all = ["preset", "model_config", "tokenizer", "vocab_size"])]
    init_from: Option<PathBuf>,
    /// Width of the residual stream; the feed-forward width becomes four times it unless given.
    #[arg(long)]
    hidden_size: Option<usize>,
    /// Inner width of a feed-forward network and of each expert.
    #[arg(long)]
    ffn_hidden_size: Option<usize>,
    /// Transformer layers.
    #[arg(long)]
    num_layers: Option<usize>,
    /// Attention heads.
    #[arg(long, alias = "num-attention-heads")]
    num_heads: Option<usize>,
    /// Longest sequence of the model; --seq-length unless given.
    #[arg(long)]
    max_position_embeddings: Option<usize>,
    /// Standard deviation of the initial weights.
    #[arg(long)]
    init_method_std: Option<f64>,
    /// Experts: one number for every MoE layer, or one per MoE layer such as 4,4,8.
    #[arg(long, value_delimiter = ',', value_name = "N[,N...]")]
    num_experts: Vec<usize>,
    /// Every n-th layer is an MoE layer.
    #[arg(long)]
    expert_interval: Option<usize>,
    /// standard: experts only; residual: experts beside a feed-forward network.
    #[arg(long, value_enum)]
    mlp_type: Option<MlpType>,
    /// Experts per token.
    #[arg(long)]
    topk: Option<usize>,
    /// Factor of the load-balance loss.
    #[arg(long)]
    moe_loss_coeff: Option<f64>,
    /// Rows an expert takes in training, over the even share.
    #[arg(long)]
    moe_train_capacity_factor: Option<f64>,
    /// Rows an expert takes in evaluation, over the even share.
    #[arg(long)]
    moe_eval_capacity_factor: Option<f64>,
    /// Least rows an expert takes.
    #[arg(long)]
    moe_min_capacity: Option<usize>,
    /// An existing tokenizer.json.
    #[arg(long, value_name = "FILE", conflicts_with = "vocab_size")]
    tokenizer: Option<PathBuf>,
    /// Train a byte-level BPE of this many entries on the training text (default: the model's vocabulary).
    #[arg(long)]
    vocab_size: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MlpType {
    Standard,
    Residual,
}

impl ModelArgs {
    /// Whether any flag says something about the model's shape.
    pub fn is_given(&self) -> bool {
        let sizes = [self.hidden_size, self.ffn_hidden_size, self.num_layers, self.num_heads, self.topk];
        let more = [self.expert_interval, self.max_position_embeddings, self.moe_min_capacity];
        let numbers =
            [self.init_method_std, self.moe_loss_coeff, self.moe_train_capacity_factor, self.moe_eval_capacity_factor];
        self.preset.is_some()
            || self.model_config.is_some()
            || self.init_from.is_some()
            || sizes.iter().chain(&more).any(Option::is_some)
            || numbers.iter().any(Option::is_some)
            || !self.num_experts.is_empty()
            || self.mlp_type.is_some()
    }

    /// The model asked for; its vocabulary is still to be fitted to the tokenizer.
    pub fn config(&self, seq_length: Option<usize>) -> Result<GptConfig> {
        let mut config = self.base()?;
        self.override_sizes(&mut config, seq_length);
        self.override_experts(&mut config)?;
        config.validate()?;
        Ok(config)
    }

    fn base(&self) -> Result<GptConfig> {
        if let Some(path) = self.config_file() {
            return Ok(GptConfig::read_file(&path)?);
        }
        let name = self.preset.as_deref().unwrap_or(DEFAULT_PRESET);
        GptConfig::preset(name).with_context(|| {
            let known: Vec<&str> = GptConfig::preset_names().collect();
            format!("unknown preset {name:?}; expected one of {}", known.join(", "))
        })
    }

    /// The `config.json` that describes the model, if one does.
    fn config_file(&self) -> Option<PathBuf> {
        self.model_config.clone().or_else(|| Some(self.init_from.as_ref()?.join("config.json")))
    }

    /// The model folder whose weights a run starts from, if it does from any.
    pub fn init_from(&self) -> Option<&Path> {
        self.init_from.as_deref()
    }

    fn override_sizes(&self, config: &mut GptConfig, seq_length: Option<usize>) {
        if let Some(size) = self.hidden_size {
            config.d_model = size;
            config.d_ff = 4 * size;
        }
        config.d_ff = self.ffn_hidden_size.unwrap_or(config.d_ff);
        config.num_layers = self.num_layers.unwrap_or(config.num_layers);
        config.num_heads = self.num_heads.unwrap_or(config.num_heads);
        config.init_std = self.init_method_std.unwrap_or(config.init_std);
        // Positions past the training length would never be trained, so a preset takes the length as its own.
        let length = if self.config_file().is_none() { seq_length } else { None };
        config.max_seq_len = self.max_position_embeddings.or(length).unwrap_or(config.max_seq_len);
    }

    fn override_experts(&self, config: &mut GptConfig) -> Result<()> {
        if config.moe.is_none() {
            ensure!(
                !self.num_experts.is_empty() || !self.has_expert_flags(),
                "the model is dense, so expert flags have no meaning; add --num-experts or choose an MoE preset"
            );
            if self.num_experts.is_empty() {
                return Ok(());
            }
        }
        let layers = config.num_layers;
        let moe = config.moe.get_or_insert_with(|| GptMoeConfig::paper(self.num_experts.clone(), false));
        moe.expert_interval = self.expert_interval.unwrap_or(moe.expert_interval);
        let moe_layers = layers / moe.expert_interval.max(1);
        moe.num_experts = match self.num_experts.as_slice() {
            [] => stretch(&moe.num_experts, moe_layers),
            [one] => vec![*one; moe_layers],
            given => given.to_vec(),
        };
        moe.residual = self.mlp_type.map_or(moe.residual, |t| t == MlpType::Residual);
        moe.top_k = self.topk.unwrap_or(moe.top_k);
        moe.aux_loss_coef = self.moe_loss_coeff.unwrap_or(moe.aux_loss_coef);
        moe.capacity.train_factor = self.moe_train_capacity_factor.or(moe.capacity.train_factor);
        moe.capacity.eval_factor = self.moe_eval_capacity_factor.or(moe.capacity.eval_factor);
        moe.capacity.min_capacity = self.moe_min_capacity.unwrap_or(moe.capacity.min_capacity);
        Ok(())
    }

    fn has_expert_flags(&self) -> bool {
        let numbers = [self.moe_loss_coeff, self.moe_train_capacity_factor, self.moe_eval_capacity_factor];
        let sizes = [self.expert_interval, self.topk, self.moe_min_capacity];
        self.mlp_type.is_some() || numbers.iter().any(Option::is_some) || sizes.iter().any(Option::is_some)
    }

    /// Whether any flag says something about the tokenizer.
    pub fn asks_for_tokenizer(&self) -> bool {
        self.tokenizer.is_some() || self.vocab_size.is_some()
    }

    /// Where the tokenizer comes from, for a model of `vocab_size`.
    pub fn tokenizer_choice(&self, vocab_size: usize) -> TokenizerChoice {
        let of_folder = self.init_from.as_ref().map(|dir| dir.join("tokenizer.json"));
        match self.tokenizer.clone().or(of_folder) {
            Some(path) => TokenizerChoice::File(path),
            None => TokenizerChoice::Train { vocab_size: self.vocab_size.unwrap_or(vocab_size) },
        }
    }

    /// Refuses flags that ask a resumed run for another tokenizer than its own, `tokenizer`: its text would have other ids.
    pub(crate) fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<()> {
        if let Some(path) = &self.tokenizer {
            let same = tokenizer::to_json(&tokenizer::load(path)?)? == tokenizer::to_json(tokenizer)?;
            let path = path.display();
            ensure!(
                same,
                "--tokenizer {path} is not the saved run's; drop --tokenizer or start a new run in another --out"
            );
        }
        let (asked, saved) = (self.vocab_size, tokenizer.get_vocab_size(true));
        ensure!(
            asked.is_none_or(|size| size == saved),
            "--vocab-size {} differs from the {saved} entries of the saved run's tokenizer; drop --vocab-size or start a new run in another --out",
            asked.unwrap_or_default()
        );
        Ok(())
    }

    /// Gives a preset the tokenizer's vocabulary; a `config.json` keeps its own, which must be large enough.
    pub(crate) fn fit_to(&self, config: &mut GptConfig, tokenizer: &Tokenizer) -> Result<()> {
        if self.config_file().is_none() {
            config.vocab_size = tokenizer::required_vocab_size(tokenizer);
        }
        tokenizer::check_fits(tokenizer, config.vocab_size)?;
        config.eos_token_id = Some(tokenizer::eos_id(tokenizer)?);
        Ok(())
    }
}

/// The preset's expert counts for another number of MoE layers: its first count for all but the last two layers, its
/// last count for those, as the paper's pyramids are built.
fn stretch(counts: &[usize], layers: usize) -> Vec<usize> {
    let (Some(&first), Some(&last)) = (counts.first(), counts.last()) else { return Vec::new() };
    if counts.len() == layers {
        return counts.to_vec();
    }
    (0..layers).map(|layer| if layer + 2 < layers { first } else { last }).collect()
}
