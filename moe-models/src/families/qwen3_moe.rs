//! Qwen3-MoE: RMSNorm, norms of query and key heads, shared key heads, rotary positions, SwiGLU experts chosen without drops.
//!
//! # Source
//! transformers 5.23 `models/qwen3_moe`; Qwen3 technical report (2505.09388).

use super::{Family, ReadFamily, parse};
use crate::config::{
    AttentionConfig, DecoderConfig, FeedForwardConfig, LayerConfig, MOST_LAYERS, NormConfig, NormKind, Projection,
    RotaryConfig,
};
use crate::hf::NameTable;
use crate::{Error, Result};
use candle_core::DType;
use moe_core::ops::RotaryLayout;
use moe_core::{Activation, BranchConfig, DroplessConfig, MlpConfig, MoeConfig, RouterConfig};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What `config.json` calls the family.
pub(super) const MODEL_TYPE: &str = "qwen3_moe";

/// Its `config.json`, by the names of the file. Fields that only say how the file came about are kept and written back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Qwen3MoeConfig {
    architectures: Option<Vec<String>>,
    model_type: String,
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense layer.
    pub intermediate_size: usize,
    /// Layers.
    pub num_hidden_layers: usize,
    /// Heads of the queries.
    pub num_attention_heads: usize,
    /// Heads of the keys and values.
    pub num_key_value_heads: usize,
    /// Width of a head; an even part of `hidden_size` if it is left out.
    #[serde(default)]
    pub head_dim: Option<usize>,
    hidden_act: String,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Standard deviation of the initial weights.
    #[serde(default = "default_initializer_range")]
    pub initializer_range: f64,
    /// Epsilon of every norm.
    #[serde(default = "default_rms_norm_eps")]
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies, as files before transformers 5 name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_theta: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rope_scaling: Option<serde_json::Value>,
    /// The same as files since transformers 5 name it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_parameters: Option<RopeParameters>,
    /// Whether the projections of attention have a bias.
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    attention_dropout: f64,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default)]
    sliding_window: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_window_layers: Option<usize>,
    /// Every how many layers has experts.
    #[serde(default = "one")]
    pub decoder_sparse_step: usize,
    /// Layers without experts whatever `decoder_sparse_step` says.
    #[serde(default)]
    pub mlp_only_layers: Vec<usize>,
    /// Inner width of an expert.
    pub moe_intermediate_size: usize,
    /// Experts per token.
    pub num_experts_per_tok: usize,
    /// Experts, as published files name them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_experts: Option<usize>,
    /// The same as transformers 5 names them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_local_experts: Option<usize>,
    /// Whether a token's weights are divided by their sum.
    #[serde(default)]
    pub norm_topk_prob: bool,
    /// Factor of the load-balance loss.
    #[serde(default = "default_aux_loss_coef")]
    pub router_aux_loss_coef: f64,
    #[serde(default)]
    output_router_logits: bool,
    /// Whether the output layer is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    #[serde(default)]
    bos_token_id: Option<u32>,
    /// Token that ends a sequence.
    #[serde(default)]
    pub eos_token_id: Option<u32>,
    #[serde(default)]
    pad_token_id: Option<u32>,
    #[serde(default)]
    use_cache: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    torch_dtype: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    transformers_version: Option<String>,
}

/// Rotary positions of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeParameters {
    /// Base of the frequencies.
    pub rope_theta: f64,
    rope_type: String,
}

fn one() -> usize {
    1
}

fn default_initializer_range() -> f64 {
    0.02
}

fn default_rms_norm_eps() -> f64 {
    1e-6
}

fn default_aux_loss_coef() -> f64 {
    0.001
}

/// Most heads and experts; far above every published model, and small enough to size tables by.
const MOST: usize = 1 << 16;

impl Qwen3MoeConfig {
    /// Refuses what is not implemented and what no model can be, naming the field.
    fn check(&self) -> std::result::Result<(), String> {
        let need = |ok: bool, text: &str| if ok { Ok(()) } else { Err(text.to_owned()) };
        if self.model_type != MODEL_TYPE {
            return Err(format!("model_type must be {MODEL_TYPE:?}, got {:?}", self.model_type));
        }
        if self.hidden_act != "silu" {
            return Err(format!("hidden_act must be \"silu\", got {:?}", self.hidden_act));
        }
        need(self.rope_scaling.is_none(), "rope_scaling is not implemented for this family; only null works")?;
        if let Some(rope) = self.rope_parameters.as_ref().filter(|rope| rope.rope_type != "default") {
            return Err(format!(
                "rope_parameters.rope_type {:?} is not implemented; only \"default\" is",
                rope.rope_type
            ));
        }
        need(self.attention_dropout == 0.0, "attention_dropout is not implemented; only 0 works")?;
        need(!self.use_sliding_window, "use_sliding_window is not implemented; only false works")?;
        need(!self.output_router_logits, "output_router_logits is not implemented; only false works")?;
        need(self.decoder_sparse_step >= 1, "decoder_sparse_step must be at least 1, got 0")?;
        let positive = |value: f64| value > 0.0 && value < 1.0;
        need(positive(self.rms_norm_eps), "rms_norm_eps must be between 0 and 1")?;
        need(positive(self.initializer_range), "initializer_range must be between 0 and 1")?;
        let theta = self.theta();
        need(theta.is_some_and(|theta| theta > 0.0 && theta.is_finite()), "rope_theta must be a positive number")?;
        let coef = self.router_aux_loss_coef;
        need(coef >= 0.0 && coef.is_finite(), "router_aux_loss_coef must be 0 or more")?;
        let sizes = [
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("num_experts", self.experts().unwrap_or(0)),
            ("num_experts_per_tok", self.num_experts_per_tok),
        ];
        for (name, size) in sizes {
            if !(1..=MOST).contains(&size) {
                return Err(format!("{name} must be between 1 and {MOST}, got {size}"));
            }
        }
        if !(1..=MOST_LAYERS).contains(&self.num_hidden_layers) {
            let got = self.num_hidden_layers;
            return Err(format!("num_hidden_layers must be between 1 and {MOST_LAYERS}, got {got}"));
        }
        if self.head_dim().is_none_or(|dim| dim == 0 || !dim.is_multiple_of(2)) {
            return Err(format!(
                "head_dim must be even and at least 2, or left out where num_attention_heads divides hidden_size, got {:?}",
                self.head_dim
            ));
        }
        for (name, size) in [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("moe_intermediate_size", self.moe_intermediate_size),
        ] {
            if !(1..=1 << 24).contains(&size) {
                return Err(format!("{name} must be between 1 and 16777216, got {size}"));
            }
        }
        if let Some(id) = self.eos_token_id.filter(|&id| id as usize >= self.vocab_size) {
            return Err(format!("eos_token_id {id} is outside the vocabulary of {}", self.vocab_size));
        }
        Ok(())
    }

    fn theta(&self) -> Option<f64> {
        self.rope_parameters.as_ref().map(|rope| rope.rope_theta).or(self.rope_theta)
    }

    fn experts(&self) -> Option<usize> {
        self.num_experts.or(self.num_local_experts)
    }

    fn head_dim(&self) -> Option<usize> {
        let heads = self.num_attention_heads;
        let even = || (heads > 0 && self.hidden_size.is_multiple_of(heads)).then(|| self.hidden_size / heads);
        self.head_dim.or_else(even)
    }

    fn is_moe(&self, layer: usize) -> bool {
        !self.mlp_only_layers.contains(&layer) && (layer + 1).is_multiple_of(self.decoder_sparse_step)
    }
}

impl Family for Qwen3MoeConfig {
    fn decoder(&self) -> Result<DecoderConfig> {
        self.check().map_err(Error::Config)?;
        let (head_dim, theta) = (self.head_dim().unwrap_or(0), self.theta().unwrap_or(0.0));
        let std = self.initializer_range;
        let norm = NormConfig { kind: NormKind::RmsNorm, width: self.hidden_size, epsilon: self.rms_norm_eps };
        let attention = AttentionConfig {
            d_model: self.hidden_size,
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads,
            head_dim,
            projection: Projection::Separate,
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            qk_norm: Some(self.rms_norm_eps),
            rotary: Some(RotaryConfig { layout: RotaryLayout::Halves, rotary_dim: head_dim, theta }),
            window: None,
            in_std: std,
            out_std: std,
        };
        let mlp = |d_ff| MlpConfig {
            d_model: self.hidden_size,
            d_ff,
            activation: Activation::SwiGlu,
            bias: false,
            in_std: std,
            out_std: std,
        };
        let policy = DroplessConfig::softmax(self.num_experts_per_tok, self.norm_topk_prob);
        let moe = MoeConfig {
            num_experts: self.experts().unwrap_or(0),
            expert: mlp(self.moe_intermediate_size),
            router: RouterConfig::Dropless { config: policy, selection_bias: false },
            branch: BranchConfig::None,
            gate_bound: std * 3f64.sqrt(),
            load_balance_coef: self.router_aux_loss_coef,
            router_z_coef: 0.0,
        };
        let feed_forward = |layer| match self.is_moe(layer) {
            true => FeedForwardConfig::Moe(moe),
            false => FeedForwardConfig::Dense(mlp(self.intermediate_size)),
        };
        let layer = |index| LayerConfig { norm, attention, feed_forward: feed_forward(index) };
        let config = DecoderConfig {
            vocab_size: self.vocab_size,
            max_seq_len: self.max_position_embeddings,
            d_model: self.hidden_size,
            layers: (0..self.num_hidden_layers).map(layer).collect(),
            norm,
            learned_positions: false,
            tie_embeddings: self.tie_word_embeddings,
            init_std: std,
            eos_token_id: self.eos_token_id,
        };
        config.validate()?;
        Ok(config)
    }

    fn names(&self) -> NameTable {
        NameTable(&[
            ("fc_in.weight", &["gate_proj.weight", "up_proj.weight"]),
            ("fc_out.weight", &["down_proj.weight"]),
        ])
    }

    fn to_json(&self, dtype: DType) -> Result<String> {
        let dtype = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        let written = Self { dtype: Some(dtype.into()), torch_dtype: None, ..self.clone() };
        serde_json::to_string_pretty(&written).map_err(|e| Error::Config(e.to_string()))
    }
}

impl ReadFamily for Qwen3MoeConfig {
    fn read(json: &[u8], path: &Path) -> Result<Self> {
        let config: Self = parse(json, path)?;
        config.decoder().map_err(|e| Error::format(path, e.to_string()))?;
        Ok(config)
    }
}
