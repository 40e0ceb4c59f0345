//! [`GptConfig`]: the shape of a model, its checks, and the arithmetic of its size and cost.

use super::layers::decoder;
use crate::config::{MOST_LAYERS, ParameterCount};
use crate::{Error, Result};
use moe_core::{Capacity, NoisyGate};

/// A decoder of the paper's family: dense, MoE, Pyramid, Residual or PR-MoE.
#[derive(Debug, Clone, PartialEq)]
pub struct GptConfig {
    /// Vocabulary, padding included.
    pub vocab_size: usize,
    /// Learned positions: the longest sequence.
    pub max_seq_len: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Attention heads; must divide `d_model`.
    pub num_heads: usize,
    /// Inner width of a feed-forward network and of each expert.
    pub d_ff: usize,
    /// Epsilon of every LayerNorm.
    pub layer_norm_eps: f64,
    /// Standard deviation of the initial weights.
    pub init_std: f64,
    /// Token that separates and ends documents.
    pub eos_token_id: Option<u32>,
    /// The mixture of experts; `None` for a dense model.
    pub moe: Option<GptMoeConfig>,
}

/// The mixture-of-experts part of a [`GptConfig`].
#[derive(Debug, Clone, PartialEq)]
pub struct GptMoeConfig {
    /// Experts of each MoE layer, from the first to the last; equal counts are a standard MoE, growing ones a Pyramid.
    pub num_experts: Vec<usize>,
    /// Layer `n`, counted from 1, is MoE when `expert_interval` divides `n`.
    pub expert_interval: usize,
    /// Keep the feed-forward network beside the experts (Residual-MoE).
    pub residual: bool,
    /// Experts per token: 1 and 2 use DeepSpeed's own policies for them, more its top-k.
    pub top_k: usize,
    /// Rows an expert takes.
    pub capacity: Capacity,
    /// Random token selection (top-1).
    pub use_rts: bool,
    /// Noise on the gate in training.
    pub noisy_gate: Option<NoisyGate>,
    /// Draw the second expert with noise (top-2).
    pub sample_second_expert: bool,
    /// Factor of the load-balance loss in the training loss.
    pub aux_loss_coef: f64,
    /// Factor of the router z-loss in the training loss.
    pub z_loss_coef: f64,
}

impl GptMoeConfig {
    /// The paper's training settings for these experts: top-1, capacity 1.0, RTS, coefficient 0.01, every second layer.
    pub fn paper(num_experts: Vec<usize>, residual: bool) -> Self {
        Self {
            num_experts,
            expert_interval: 2,
            residual,
            top_k: 1,
            capacity: Capacity::DEEPSPEED,
            use_rts: true,
            noisy_gate: None,
            sample_second_expert: true,
            aux_loss_coef: 0.01,
            z_loss_coef: 0.0,
        }
    }
}

fn need(ok: bool, message: impl FnOnce() -> String) -> Result<()> {
    if ok { Ok(()) } else { Err(Error::Config(message())) }
}

impl GptConfig {
    /// Checks every value; a model is only built from a checked configuration.
    ///
    /// # Errors
    /// [`Error::Config`] naming the value and what to change.
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_seq_len),
            ("hidden_size", self.d_model),
            ("num_attention_heads", self.num_heads),
            ("intermediate_size", self.d_ff),
        ];
        let layers = self.num_layers;
        need((1..=MOST_LAYERS).contains(&layers), || {
            format!("num_hidden_layers must be between 1 and {MOST_LAYERS}, got {layers}")
        })?;
        for (name, size) in sizes {
            need((1..=1 << 24).contains(&size), || format!("{name} must be between 1 and 16777216, got {size}"))?;
        }
        need(self.d_model.is_multiple_of(self.num_heads), || {
            format!("num_attention_heads {} must divide hidden_size {}", self.num_heads, self.d_model)
        })?;
        for (name, value) in [("layer_norm_eps", self.layer_norm_eps), ("initializer_range", self.init_std)] {
            need(value > 0.0 && value < 1.0, || format!("{name} must be between 0 and 1, got {value}"))?;
        }
        need(self.eos_token_id.is_none_or(|id| (id as usize) < self.vocab_size), || {
            format!("eos_token_id {:?} is outside the vocabulary of {}", self.eos_token_id, self.vocab_size)
        })?;
        self.moe.as_ref().map_or(Ok(()), |moe| self.validate_moe(moe))
    }

    fn validate_moe(&self, moe: &GptMoeConfig) -> Result<()> {
        need(moe.expert_interval >= 1, || "expert_interval must be at least 1, got 0".into())?;
        let layers = self.num_layers / moe.expert_interval;
        need(layers >= 1 && moe.num_experts.len() == layers, || {
            format!(
                "num_experts must have one entry for each of the {layers} MoE layers ({} layers, expert_interval {}), \
                 got {:?}",
                self.num_layers, moe.expert_interval, moe.num_experts
            )
        })?;
        for &experts in &moe.num_experts {
            need((1..=1 << 16).contains(&experts), || {
                format!("num_experts must be between 1 and 65536 in every MoE layer, got {:?}", moe.num_experts)
            })?;
            need((1..=experts).contains(&moe.top_k), || {
                format!("num_experts_per_tok must be between 1 and the {experts} experts, got {}", moe.top_k)
            })?;
        }
        need(moe.noisy_gate != Some(NoisyGate::RSample) || moe.top_k == 1, || {
            format!("noisy_gate_policy RSample works with num_experts_per_tok 1 only, got {}", moe.top_k)
        })?;
        for (name, value) in [("router_aux_loss_coef", moe.aux_loss_coef), ("router_z_loss_coef", moe.z_loss_coef)] {
            need(value >= 0.0 && value.is_finite(), || format!("{name} must be 0 or more, got {value}"))?;
        }
        Ok(moe.capacity.validate()?)
    }

    /// Experts of layer `layer`, counted from 0; `None` for a dense layer.
    pub fn experts_of_layer(&self, layer: usize) -> Option<usize> {
        let moe = self.moe.as_ref()?;
        let is_moe = (layer + 1).is_multiple_of(moe.expert_interval);
        is_moe.then(|| moe.num_experts.get(layer / moe.expert_interval).copied()).flatten()
    }

    /// Layers with experts, counted from 0, with their expert counts.
    pub fn moe_layers(&self) -> Vec<(usize, usize)> {
        (0..self.num_layers).filter_map(|l| self.experts_of_layer(l).map(|e| (l, e))).collect()
    }

    /// Parameters in all, and on one token's path, of a checked configuration.
    pub fn parameter_count(&self) -> ParameterCount {
        decoder(self).parameter_count()
    }

    /// Multiplications and additions of a forward pass per token, at full context, of a checked configuration.
    pub fn flops_per_token(&self) -> usize {
        decoder(self).flops_per_token()
    }
}
