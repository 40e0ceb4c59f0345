//! Which model to train: a preset, a `config.json` or a folder, of any family, with the overrides that matter.

use crate::families::{AnyFamily, Published};
use crate::gpt::{GptConfig, GptMoeConfig};
use crate::model::plain_family;
use crate::train::tokenizer::Vocabulary;
use crate::train::{FolderFiles, TokenizerChoice, tokenizer};
use crate::{Family, Model, ModelSource, ReadFamily};
use anyhow::{Context, Result, bail, ensure};
use candle_core::Device;
use clap::{Args, ValueEnum};
use moe_parallel::Mesh;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::Tokenizer;

const DEFAULT_PRESET: &str = "tiny-pr-moe";

/// Which model: a preset, a `config.json` or a folder, with overrides.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// A model by name: tiny-dense, tiny-moe, tiny-pyramid-moe, tiny-residual-moe, tiny-pr-moe or one of the paper's.
    #[arg(long, value_name = "NAME", conflicts_with = "model_config")]
    preset: Option<String>,
    /// A model of any family by its config.json, with fresh weights.
    #[arg(long, value_name = "FILE")]
    model_config: Option<PathBuf>,
    /// Start from the weights of this model folder of any family, with its tokenizer; flags may change what has no weights (routing,
    /// losses). Of those below, families that others publish (Mixtral, Qwen3-MoE, DeepSeek, ...) have --topk and --moe-loss-coeff;
    /// the rest stands in their config.json.
    #[arg(long, value_name = "DIR", visible_alias = "model", conflicts_with_all = ["preset", "model_config", "tokenizer", "vocab_size"])]
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
        self.preset.is_some()
            || self.model_config.is_some()
            || self.init_from.is_some()
            || self.topk.is_some()
            || self.moe_loss_coeff.is_some()
            || self.own_flags().any(|(_, given)| given)
    }

    /// Whether a preset, a file or a folder says what the model is.
    pub fn names_a_model(&self) -> bool {
        self.preset.is_some() || self.model_config.is_some() || self.init_from.is_some()
    }

    /// Whether a flag says what weights there are: widths, layers, heads, positions, experts, initial values. The others are of routing and
    /// losses.
    pub fn describes_weights(&self) -> bool {
        self.own_flags().any(|(flag, given)| given && !flag.starts_with("--moe-"))
    }

    /// The flags that only this project's own models have, and whether they are given.
    fn own_flags(&self) -> impl Iterator<Item = (&'static str, bool)> {
        [
            ("--hidden-size", self.hidden_size.is_some()),
            ("--ffn-hidden-size", self.ffn_hidden_size.is_some()),
            ("--num-layers", self.num_layers.is_some()),
            ("--num-heads", self.num_heads.is_some()),
            ("--max-position-embeddings", self.max_position_embeddings.is_some()),
            ("--init-method-std", self.init_method_std.is_some()),
            ("--num-experts", !self.num_experts.is_empty()),
            ("--expert-interval", self.expert_interval.is_some()),
            ("--mlp-type", self.mlp_type.is_some()),
            ("--moe-train-capacity-factor", self.moe_train_capacity_factor.is_some()),
            ("--moe-eval-capacity-factor", self.moe_eval_capacity_factor.is_some()),
            ("--moe-min-capacity", self.moe_min_capacity.is_some()),
        ]
        .into_iter()
    }

    /// The model asked for, of any family; fitted to the tokenizer, once there is one.
    ///
    /// # Errors
    /// If the arguments describe no model, or one that the tokenizer does not fit.
    pub fn family(&self, seq_length: Option<usize>, tokenizer: Option<&Tokenizer>) -> Result<AnyFamily> {
        Ok(match self.base()? {
            AnyFamily::Gpt(config) => {
                let mut config = self.overridden(config, seq_length)?;
                tokenizer.map_or(Ok(()), |tokenizer| self.fit_to(&mut config, tokenizer))?;
                AnyFamily::Gpt(config)
            }
            AnyFamily::Published(config) => AnyFamily::Published(self.published(&config, tokenizer)?),
        })
    }

    /// The model asked for where it has to be of this project's own; its vocabulary is still to be fitted to the tokenizer.
    ///
    /// # Errors
    /// As [`ModelArgs::family`].
    pub fn config(&self, seq_length: Option<usize>) -> Result<GptConfig> {
        match self.base()? {
            AnyFamily::Gpt(config) => self.overridden(config, seq_length),
            AnyFamily::Published(config) => {
                bail!("expected a model of this project's own (moe_gpt), got a {}", config.model_type())
            }
        }
    }

    /// `base` with what flags say otherwise; its longest sequence becomes `seq_length`, if that is given.
    ///
    /// # Errors
    /// If the flags make no model of it.
    pub fn changed(&self, base: GptConfig, seq_length: Option<usize>) -> Result<GptConfig> {
        self.overridden(base, seq_length)
    }

    fn base(&self) -> Result<AnyFamily> {
        if let Some(dir) = &self.init_from {
            ensure!(
                !dir.is_file(),
                "--init-from {} is a file (GGUF?); training starts from a folder of floats with config.json, tokenizer.json and \
                 .safetensors files, as the one that it was made of",
                dir.display()
            );
            return Ok(plain_family(&ModelSource::open(dir)?)?);
        }
        if let Some(path) = &self.model_config {
            return Ok(AnyFamily::read_file(path)?);
        }
        let name = self.preset.as_deref().unwrap_or(DEFAULT_PRESET);
        let config = GptConfig::preset(name).with_context(|| {
            let known: Vec<&str> = GptConfig::preset_names().collect();
            format!("unknown preset {name:?}; expected one of {}", known.join(", "))
        })?;
        Ok(AnyFamily::Gpt(config))
    }

    /// Whether a `config.json` describes the model.
    fn is_read(&self) -> bool {
        self.model_config.is_some() || self.init_from.is_some()
    }

    fn overridden(&self, mut config: GptConfig, seq_length: Option<usize>) -> Result<GptConfig> {
        self.override_sizes(&mut config, seq_length);
        self.override_experts(&mut config)?;
        config.validate()?;
        Ok(config)
    }

    /// A published model with what flags may change of it.
    fn published(&self, config: &Published, tokenizer: Option<&Tokenizer>) -> Result<Published> {
        let (kind, decoder) = (config.model_type(), config.decoder()?);
        if let Some((flag, _)) = self.own_flags().find(|(_, given)| *given) {
            bail!(
                "{flag} is for models of this project's own, and this one is a {kind}, whose config.json says all of it; drop {flag}"
            );
        }
        let router = [("--topk", self.topk.is_some()), ("--moe-loss-coeff", self.moe_loss_coeff.is_some())];
        if let (Some((flag, _)), true) = (router.iter().find(|(_, given)| *given), decoder.moe_layers().is_empty()) {
            bail!("the model is dense, so {flag} has no meaning; drop it");
        }
        let mut fields: Vec<(&str, Value)> = Vec::new();
        if let (Some(coef), Some(field)) = (self.moe_loss_coeff, config.load_balance_field()) {
            ensure!(coef.is_finite(), "--moe-loss-coeff must be a number of 0 or more, got {coef}");
            fields.push((field, coef.into()));
        }
        for field in ["num_experts_per_tok", "experts_per_token"] {
            // gpt-oss says it twice.
            if field == "num_experts_per_tok" || config.has_field(field) {
                fields.extend(self.topk.map(|top_k| (field, top_k.into())));
            }
        }
        if let Some(tokenizer) = tokenizer {
            tokenizer::check_fits(tokenizer, decoder.vocab_size)?;
            // Weights that are there already know how texts begin and end.
            if self.init_from.is_none() {
                let end = Vocabulary::from(&decoder).end_of_document(tokenizer)?;
                fields.extend([("bos_token_id", end.into()), ("eos_token_id", end.into())]);
            }
        }
        Ok(config.with(fields)?)
    }

    /// A model at the beginning of a run, or a rank's part of it: of the weights that the arguments name, or of fresh ones.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn initial<F: Family>(&self, shape: F, seed: u64, mesh: Option<Arc<Mesh>>) -> Result<Model<F>> {
        let Some(dir) = &self.init_from else {
            return Ok(match mesh {
                None => Model::new(shape, seed, &Device::Cpu)?,
                Some(mesh) => Model::new_over(shape, seed, mesh)?,
            });
        };
        let checkpoint = ModelSource::open(dir)?.checkpoint(&shape)?;
        Ok(match mesh {
            None => Model::from_checkpoint(shape, &checkpoint, &Device::Cpu)?,
            Some(mesh) => Model::from_checkpoint_over(shape, Arc::new(checkpoint), mesh)?,
        })
    }

    /// The folder whose weights a run begins with.
    pub fn init_from(&self) -> Option<&Path> {
        self.init_from.as_deref()
    }

    /// What a new run takes along beside its weights.
    pub(crate) fn folder_files(&self, tokenizer_json: String) -> Result<FolderFiles> {
        Ok(match &self.init_from {
            Some(dir) => FolderFiles::of_folder(tokenizer_json, dir)?,
            None => tokenizer_json.into(),
        })
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
        let length = if self.is_read() { None } else { seq_length };
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
        let of_experts = |flag: &str| flag.starts_with("--moe-") || ["--expert-interval", "--mlp-type"].contains(&flag);
        self.topk.is_some()
            || self.moe_loss_coeff.is_some()
            || self.own_flags().any(|(flag, given)| given && of_experts(flag))
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
    fn fit_to(&self, config: &mut GptConfig, tokenizer: &Tokenizer) -> Result<()> {
        if !self.is_read() {
            config.vocab_size = tokenizer::required_vocab_size(tokenizer);
        }
        tokenizer::check_fits(tokenizer, config.vocab_size)?;
        config.eos_token_id = Some(tokenizer::eos_id(tokenizer)?);
        Ok(config.validate()?)
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
