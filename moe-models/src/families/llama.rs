//! Llama: one feed-forward network in every layer and no experts. Models of the same form call themselves so too (SmolLM2,
//! TinyLlama, and what others made of Meta's).
//!
//! # Source
//! transformers 5.23 `models/llama`; LLaMA (2302.13971), The Llama 3 Herd of Models (2407.21783).

use super::backbone::{Backbone, Defaults, MOST_WIDTH};
use super::published::Form;
use super::qwen3_moe;
use crate::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig};
use crate::fields::{Checked, Fields};

pub(super) const FORM: Form = Form { model_type: "llama", names: qwen3_moe::NAMES, load_balance_coef: None, read };

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let backbone = Backbone::read(fields, &Defaults::LLAMA)?;
    fields.expect_none(&["mlp_bias", "rope_interleaved"])?;
    // What those who trained it called it.
    fields.skip(&["is_llama_config"]);
    // How others divide the work.
    fields.skip(&["pretraining_tp"]);
    let bias = fields.or("attention_bias", false)?;
    let attention = GroupedQueryConfig { qkv_bias: bias, out_bias: bias, ..backbone.attention() };
    let mlp = backbone.mlp(fields.size("intermediate_size", MOST_WIDTH)?);
    Ok(backbone.decoder(|_| LayerConfig {
        norm: backbone.norm(),
        attention: AttentionConfig::GroupedQuery(attention),
        feed_forward: FeedForwardConfig::Dense(mlp),
    }))
}
