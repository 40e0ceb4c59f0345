//! What the family's configuration means for the layers of a decoder.

use super::{GptConfig, GptMoeConfig};
use crate::config::{
    AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig, Multipliers, NormConfig,
    NormKind, Projection,
};
use moe_core::{
    Activation, BranchConfig, DropPolicy, MlpConfig, MoeConfig, NoisyGate, RouterConfig, Top1Config, Top2Config,
    TopKConfig,
};

/// The decoder of a checked configuration.
///
/// # Source
/// Megatron-DeepSpeed: projections into the residual stream start smaller by `sqrt(2 num_layers)`; gates and coefficients
/// are PyTorch's default linear layers.
pub(super) fn decoder(config: &GptConfig) -> DecoderConfig {
    let norm = NormConfig { kind: NormKind::LayerNorm, width: config.d_model, epsilon: config.layer_norm_eps };
    let (in_std, out_std) = (config.init_std, config.init_std / (2.0 * config.num_layers as f64).sqrt());
    let attention = GroupedQueryConfig {
        d_model: config.d_model,
        num_heads: config.num_heads,
        num_kv_heads: config.num_heads,
        head_dim: config.d_model / config.num_heads,
        projection: Projection::Fused,
        qkv_bias: true,
        out_bias: true,
        qk_norm: None,
        turned_norm: None,
        temperature: None,
        sinks: false,
        rotary: None,
        window: None,
        chunk: None,
        scale: None,
        in_std,
        out_std,
    };
    let mlp = MlpConfig {
        d_model: config.d_model,
        d_ff: config.d_ff,
        activation: Activation::GeluTanh,
        bias: true,
        in_std,
        out_std,
    };
    let feed_forward = |layer| match (config.experts_of_layer(layer), &config.moe) {
        (Some(num_experts), Some(moe)) => FeedForwardConfig::Moe(experts(moe, num_experts, mlp)),
        _ => FeedForwardConfig::Dense(mlp),
    };
    let attention = AttentionConfig::GroupedQuery(attention);
    let layer = |index| LayerConfig { norm, attention, feed_forward: feed_forward(index) };
    DecoderConfig {
        vocab_size: config.vocab_size,
        max_seq_len: config.max_seq_len,
        d_model: config.d_model,
        layers: (0..config.num_layers).map(layer).collect(),
        norm,
        learned_positions: true,
        tie_embeddings: true,
        head_bias: false,
        init_std: config.init_std,
        eos_token_id: config.eos_token_id,
        multipliers: Multipliers::default(),
        attention_dropout: 0.0,
    }
}

fn experts(moe: &GptMoeConfig, num_experts: usize, mlp: MlpConfig) -> MoeConfig {
    let (capacity, jitter) = (moe.capacity, moe.noisy_gate == Some(NoisyGate::Jitter));
    MoeConfig {
        num_experts,
        expert: mlp,
        router: match moe.top_k {
            1 => RouterConfig::Top1(Top1Config { capacity, use_rts: moe.use_rts, noisy_gate: moe.noisy_gate }),
            2 => {
                let sample_second_expert = moe.sample_second_expert;
                RouterConfig::Top2(Top2Config { capacity, sample_second_expert, jitter })
            }
            top_k => RouterConfig::TopK(TopKConfig { top_k, capacity, drop_policy: DropPolicy::Probs, jitter }),
        },
        branch: if moe.residual { BranchConfig::Residual(mlp) } else { BranchConfig::None },
        gate_bound: 1.0 / (mlp.d_model as f64).sqrt(),
        load_balance_coef: moe.aux_loss_coef,
        router_z_coef: moe.z_loss_coef,
    }
}
