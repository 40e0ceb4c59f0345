//! Qwen2-MoE: projections of attention with biases, and beside the experts a shared one that a sigmoid gate scales.
//!
//! # Source
//! transformers 5.23 `models/qwen2_moe`; Qwen2 technical report (2407.10671).

use super::backbone::{Backbone, Defaults, MOST_WIDTH};
use super::published::Form;
use super::qwen3_moe::{NAMES, Sparse, refuse_windows};
use crate::config::{AttentionConfig, DecoderConfig, GroupedQueryConfig};
use crate::fields::{Checked, Fields};
use moe_core::BranchConfig;

pub(super) const FORM: Form =
    Form { model_type: "qwen2_moe", names: NAMES, load_balance_coef: Some("router_aux_loss_coef"), read };

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let backbone = Backbone::read(fields, &Defaults::LLAMA)?;
    refuse_windows(fields)?;
    let attention = GroupedQueryConfig { qkv_bias: fields.or("qkv_bias", true)?, ..backbone.attention() };
    let shared = backbone.mlp(fields.size("shared_expert_intermediate_size", MOST_WIDTH)?);
    let sparse = Sparse::read(fields, &backbone, BranchConfig::Shared { mlp: shared, gate: true })?;
    Ok(sparse.decoder(&backbone, AttentionConfig::GroupedQuery(attention)))
}
