//! OLMoE: one norm over all heads of the queries, one over those of the keys; 64 small experts in every layer.
//!
//! # Source
//! transformers 5.23 `models/olmoe`; OLMoE (2409.02060).

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH, load_balance_coef, num_experts};
use super::published::Form;
use super::qwen3_moe;
use crate::config::{
    AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig, NormSpan, QkNorm,
};
use crate::fields::{Checked, Fields};
use moe_core::DroplessConfig;

pub(super) const FORM: Form =
    Form { model_type: "olmoe", names: qwen3_moe::NAMES, load_balance_coef: Some("router_aux_loss_coef"), read };

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let backbone = Backbone::read(fields, &Defaults { rms_norm_eps: 1e-5, ..Defaults::LLAMA })?;
    fields.expect_none(&["clip_qkv"])?;
    let bias = fields.or("attention_bias", false)?;
    let attention = GroupedQueryConfig {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm { epsilon: backbone.epsilon, span: NormSpan::Heads }),
        ..backbone.attention()
    };
    let sizes = [num_experts(fields, "num_experts")?, fields.size("intermediate_size", MOST_WIDTH)?];
    let router =
        DroplessConfig::softmax(fields.size("num_experts_per_tok", MOST)?, fields.or("norm_topk_prob", false)?);
    let coef = load_balance_coef(fields, "router_aux_loss_coef", 0.01)?;
    let feed_forward = FeedForwardConfig::Moe(backbone.experts(sizes, router, coef));
    Ok(backbone.decoder(|_| LayerConfig {
        norm: backbone.norm(),
        attention: AttentionConfig::GroupedQuery(attention),
        feed_forward,
    }))
}
