//! The models that are trained: three sizes, and one size with ever more experts.

use crate::rows::Named;
use anyhow::{Context, Result};
use candle_core::Device;
use moe_core::Capacity;
use moe_models::gpt::{Gpt, GptConfig, GptMoeConfig};
use serde_json::{Value, json};

pub(crate) const SEQ_LEN: usize = 256;
/// Sequences of a step.
pub(crate) const BATCH: usize = 8;
pub(crate) const TOKENS: f64 = (BATCH * SEQ_LEN) as f64;

pub(crate) const SIZES: [&str; 3] = ["small", "base", "large"];

/// Experts of each of two layers of the base size: a token's work is the same in all of them.
pub(crate) const GROWTH: [Named<usize>; 4] =
    [("experts-8", 8), ("experts-16", 16), ("experts-32", 32), ("experts-64", 64)];

/// The model of this name, with the paper's routing.
pub(crate) fn config(name: &str) -> Option<GptConfig> {
    match name {
        // What `moe-train` trains unless told otherwise: PR-MoE.
        "small" => Some(GptConfig { max_seq_len: SEQ_LEN, ..GptConfig::preset("tiny-pr-moe")? }),
        "base" => Some(base()),
        "large" => Some(GptConfig { d_model: 1024, num_heads: 16, d_ff: 4096, ..base() }),
        _ => {
            let (_, experts) = GROWTH.into_iter().find(|growth| growth.0 == name)?;
            let moe = GptMoeConfig { expert_interval: 4, ..GptMoeConfig::paper(vec![experts; 2], false) };
            Some(GptConfig { moe: Some(moe), ..base() })
        }
    }
}

fn base() -> GptConfig {
    GptConfig {
        vocab_size: 8192,
        max_seq_len: SEQ_LEN,
        d_model: 512,
        num_layers: 8,
        num_heads: 8,
        d_ff: 2048,
        layer_norm_eps: 1e-5,
        init_std: 0.02,
        eos_token_id: None,
        moe: Some(GptMoeConfig::paper(vec![16; 4], false)),
    }
}

/// Floating-point operations of a step that are of use: three times those of a forward pass.
pub(crate) fn flops(config: &GptConfig) -> f64 {
    3.0 * config.flops_per_token() as f64 * TOKENS
}

/// The model in words.
pub(crate) fn description(name: &str, config: &GptConfig) -> String {
    let parameters = config.parameter_count();
    let experts = config.moe.as_ref().map_or_else(String::new, |moe| {
        let counts: Vec<String> = moe.num_experts.iter().map(usize::to_string).collect();
        let branch = if moe.residual { " beside a residual network" } else { "" };
        format!(", {} with {} experts{branch}, top-1", counts.len(), counts.join(", "))
    });
    format!(
        "{name}: {} layers of {} and {}{experts}; {:.1} M parameters, {:.1} M active, embedding included; {:.1} MFLOP a token",
        config.num_layers,
        config.d_model,
        config.d_ff,
        parameters.total as f64 / 1e6,
        parameters.active as f64 / 1e6,
        flops(config) / TOKENS / 1e6
    )
}

/// The model as `peers.py` takes it.
pub(crate) fn json(name: &str, config: &GptConfig) -> Value {
    let moe = config.moe.as_ref();
    json!({
        "name": name, "vocab_size": config.vocab_size, "seq_len": SEQ_LEN, "batch": BATCH,
        "d_model": config.d_model, "num_layers": config.num_layers, "num_heads": config.num_heads,
        "d_ff": config.d_ff, "init_std": config.init_std,
        "num_experts": moe.map(|m| &m.num_experts), "expert_interval": moe.map(|m| m.expert_interval),
        "residual": moe.is_some_and(|m| m.residual), "aux_loss_coef": moe.map(|m| m.aux_loss_coef),
    })
}

/// An untrained model that routes about as evenly as a trained one: its positions start at 1.
///
/// With positions as small as tokens, what every token gets from the first feed-forward network outweighs what sets
/// tokens apart, and a few experts are asked for most of them: 44 % dropped at capacity factor 1.25.
pub(crate) fn random_model(name: &str, capacity: Capacity) -> Result<Gpt> {
    let mut config = config(name).with_context(|| format!("there is no model {name:?}"))?;
    let scale = 1.0 / config.init_std;
    if let Some(moe) = &mut config.moe {
        moe.capacity = capacity;
    }
    let model = Gpt::new(config, 1, &Device::Cpu)?;
    let positions = model.params().iter().find(|(name, _)| name == "model.embed_positions.weight");
    let (_, positions) = positions.context("the model has no positions")?;
    positions.set(&(positions.as_tensor() * scale)?)?;
    Ok(model)
}
