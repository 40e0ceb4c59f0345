//! Qwen3-MoE: norms of each head of queries and keys, experts in every n-th layer.
//!
//! # Source
//! transformers 5.23 `models/qwen3_moe`; Qwen3 technical report (2505.09388).

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH, load_balance_coef, num_experts};
use super::published::Form;
use crate::config::{
    AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig, NormSpan, QkNorm,
};
use crate::fields::{Checked, Fields};
use crate::hf::NameTable;
use moe_core::{BranchConfig, DroplessConfig, MlpConfig, MoeConfig};
use serde_json::Value;

pub(super) const FORM: Form =
    Form { model_type: "qwen3_moe", names: NAMES, load_balance_coef: Some("router_aux_loss_coef"), read };

/// Gate, up and down of every network.
pub(super) const NAMES: NameTable = NameTable::new(&[
    ("fc_in.weight", &["gate_proj.weight", "up_proj.weight"]),
    ("fc_out.weight", &["down_proj.weight"]),
]);

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let backbone = Backbone::read(fields, &Defaults::LLAMA)?;
    refuse_windows(fields)?;
    // Fields of some published files, which say what is so in any case.
    fields.expect_none(&["qkv_bias", "shared_expert_intermediate_size"])?;
    fields.expect("use_qk_norm", &[Value::Null, true.into()])?;
    let bias = fields.or("attention_bias", false)?;
    let attention = GroupedQueryConfig {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm { epsilon: backbone.epsilon, span: NormSpan::Head }),
        ..backbone.attention()
    };
    Ok(Sparse::read(fields, &backbone, BranchConfig::None)?
        .decoder(&backbone, AttentionConfig::GroupedQuery(attention)))
}

/// Windows are off in every published model of Qwen2-MoE and Qwen3-MoE, whatever length is written beside that.
pub(super) fn refuse_windows(fields: &mut Fields) -> Checked<()> {
    fields.expect_none(&["use_sliding_window"])?;
    fields.skip(&["sliding_window", "max_window_layers"]);
    let types: Vec<Value> = fields.or("layer_types", Vec::new())?;
    match types.iter().find(|kind| **kind != "full_attention") {
        Some(kind) => {
            Err(format!("layer_types must all be \"full_attention\", got {kind}; nothing else is implemented"))
        }
        None => Ok(()),
    }
}

/// Qwen's layers: experts in every `decoder_sparse_step`-th but for `mlp_only_layers`.
pub(super) struct Sparse {
    step: usize,
    dense_layers: Vec<usize>,
    dense: MlpConfig,
    experts: MoeConfig,
}

impl Sparse {
    /// With `branch` beside the experts.
    pub(super) fn read(fields: &mut Fields, backbone: &Backbone, branch: BranchConfig) -> Checked<Self> {
        let sizes = [num_experts(fields, "num_experts")?, fields.size("moe_intermediate_size", MOST_WIDTH)?];
        let router =
            DroplessConfig::softmax(fields.size("num_experts_per_tok", MOST)?, fields.or("norm_topk_prob", false)?);
        let coef = load_balance_coef(fields, "router_aux_loss_coef", 0.001)?;
        Ok(Self {
            step: fields.size_or("decoder_sparse_step", 1, MOST)?,
            dense_layers: fields.or("mlp_only_layers", Vec::new())?,
            dense: backbone.mlp(fields.size("intermediate_size", MOST_WIDTH)?),
            experts: MoeConfig { branch, ..backbone.experts(sizes, router, coef) },
        })
    }

    pub(super) fn decoder(&self, backbone: &Backbone, attention: AttentionConfig) -> DecoderConfig {
        let is_moe = |layer: usize| !self.dense_layers.contains(&layer) && (layer + 1).is_multiple_of(self.step);
        backbone.decoder(|layer| LayerConfig {
            norm: backbone.norm(),
            attention,
            feed_forward: match is_moe(layer) {
                true => FeedForwardConfig::Moe(self.experts),
                false => FeedForwardConfig::Dense(self.dense),
            },
        })
    }
}
