//! Qwen2-MoE: projections of attention with biases, and beside the experts a shared one that a sigmoid gate scales.
//!
//! # Source
//! transformers 5.23 `models/qwen2_moe`; Qwen2 technical report (2407.10671).

use super::backbone::{Backbone, Defaults, MOST_WIDTH};
use super::published::Form;
use super::qwen3_moe;
use crate::config::{AttentionConfig, DecoderConfig, GroupedQueryConfig};
use crate::fields::{Checked, Fields};
use moe_core::{BranchConfig, MoeConfig};

pub(super) const FORM: Form = Form { model_type: "qwen2_moe", names: qwen3_moe::NAMES, read };

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let backbone = Backbone::read(fields, &Defaults::LLAMA)?;
    qwen3_moe::refuse_windows(fields)?;
    let attention = GroupedQueryConfig { qkv_bias: fields.or("qkv_bias", true)?, ..backbone.attention() };
    let shared = backbone.mlp(fields.size("shared_expert_intermediate_size", MOST_WIDTH)?);
    let sparse = qwen3_moe::Sparse::read(fields, &backbone)?;
    let experts = MoeConfig { branch: BranchConfig::Shared { mlp: shared, gate: true }, ..sparse.experts };
    Ok(sparse.with_experts(experts).decoder(&backbone, AttentionConfig::GroupedQuery(attention)))
}
