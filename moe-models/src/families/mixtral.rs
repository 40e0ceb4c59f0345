//! Mixtral: the experts are all that is in a layer beside attention; a token's weights are divided by their sum.
//!
//! # Source
//! transformers 5.23 `models/mixtral`; Mixtral of Experts (2401.04088).

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH, load_balance_coef, num_experts};
use super::published::Form;
use crate::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig};
use crate::fields::{Checked, Fields};
use crate::hf::NameTable;
use moe_core::DroplessConfig;

pub(super) const FORM: Form =
    Form { model_type: "mixtral", names: NAMES, load_balance_coef: Some("router_aux_loss_coef"), read };

/// The three matrices of an expert by their numbers.
pub(super) const NAMES: NameTable = NameTable::new(&[
    (".mlp.", &[".block_sparse_moe."]),
    ("fc_in.weight", &["w1.weight", "w3.weight"]),
    ("fc_out.weight", &["w2.weight"]),
]);

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let backbone = Backbone::read(fields, &Defaults { rms_norm_eps: 1e-5, rope_theta: 1e6, ..Defaults::LLAMA })?;
    fields.expect_none(&["router_jitter_noise"])?;
    let attention = GroupedQueryConfig { window: fields.optional("sliding_window")?, ..backbone.attention() };
    let sizes = [num_experts(fields, "num_experts")?, fields.size("intermediate_size", MOST_WIDTH)?];
    let router = DroplessConfig::softmax(fields.size("num_experts_per_tok", MOST)?, true);
    let coef = load_balance_coef(fields, "router_aux_loss_coef", 0.001)?;
    let feed_forward = FeedForwardConfig::Moe(backbone.experts(sizes, router, coef));
    Ok(backbone.decoder(|_| LayerConfig {
        norm: backbone.norm(),
        attention: AttentionConfig::GroupedQuery(attention),
        feed_forward,
    }))
}
