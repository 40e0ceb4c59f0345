//! Granite-MoE: factors on the embedding, on what each part of a layer adds, on scores and on logits; the experts of a layer lie in
//! one tensor, and with `granitemoeshared` a further one sees every token.
//!
//! # Source
//! transformers 5.23 `models/granitemoe`, `models/granitemoeshared`.

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH, load_balance_coef, num_experts};
use super::published::Form;
use crate::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig, Multipliers};
use crate::fields::{Checked, Fields};
use crate::hf::{Layout, NameTable, StackRule};
use moe_core::{BranchConfig, DroplessConfig, MoeConfig};

pub(super) const FORM: Form = Form {
    model_type: "granitemoe",
    names: NAMES,
    load_balance_coef: Some("router_aux_loss_coef"),
    read: |fields| read(fields, |_, _| Ok(BranchConfig::None)),
};

pub(super) const SHARED: Form = Form {
    model_type: "granitemoeshared",
    names: NAMES,
    load_balance_coef: Some("router_aux_loss_coef"),
    read: |fields| read(fields, shared),
};

const NAMES: NameTable = NameTable::new(&[
    (".mlp.shared_expert.fc_in.", &[".shared_mlp.input_linear."]),
    (".mlp.shared_expert.fc_out.", &[".shared_mlp.output_linear."]),
    (".mlp.gate.", &[".block_sparse_moe.router.layer."]),
])
.with_stacks(&[
    StackRule {
        here: ".mlp.experts.fc_in.weight",
        there: ".block_sparse_moe.input_linear.weight",
        layout: Layout::Rows,
    },
    StackRule {
        here: ".mlp.experts.fc_out.weight",
        there: ".block_sparse_moe.output_linear.weight",
        layout: Layout::Rows,
    },
]);

/// The network beside the experts, if it has a width.
fn shared(fields: &mut Fields, backbone: &Backbone) -> Checked<BranchConfig> {
    match fields.or("shared_intermediate_size", 0)? {
        0 => Ok(BranchConfig::None),
        width if width > MOST_WIDTH => {
            Err(format!("shared_intermediate_size must be at most {MOST_WIDTH}, got {width}"))
        }
        width => Ok(BranchConfig::Shared { mlp: backbone.mlp(width), gate: false }),
    }
}

fn read(
    fields: &mut Fields,
    branch: impl FnOnce(&mut Fields, &Backbone) -> Checked<BranchConfig>,
) -> Checked<DecoderConfig> {
    // Published models were trained with some.
    let attention_dropout = fields.or("attention_dropout", 0.0)?;
    let backbone = Backbone::read(fields, &Defaults::LLAMA)?;
    let bias = fields.or("attention_bias", false)?;
    let attention = AttentionConfig::GroupedQuery(GroupedQueryConfig {
        qkv_bias: bias,
        out_bias: bias,
        scale: Some(fields.positive_or("attention_multiplier", 1.0)?),
        ..backbone.attention()
    });
    let sizes = [num_experts(fields, "num_experts")?, fields.size("intermediate_size", MOST_WIDTH)?];
    // The softmax is over the chosen logits, which is that over all divided by the sum of what was chosen.
    let router = DroplessConfig::softmax(fields.size("num_experts_per_tok", MOST)?, true);
    let coef = load_balance_coef(fields, "router_aux_loss_coef", 0.001)?;
    let branch = branch(fields, &backbone)?;
    let feed_forward = FeedForwardConfig::Moe(MoeConfig { branch, ..backbone.experts(sizes, router, coef) });
    let multipliers = Multipliers {
        embedding: fields.positive_or("embedding_multiplier", 1.0)?,
        residual: fields.positive_or("residual_multiplier", 1.0)?,
        output: 1.0 / fields.positive_or("logits_scaling", 1.0)?,
    };
    let layer = LayerConfig { norm: backbone.norm(), attention, feed_forward };
    Ok(DecoderConfig { multipliers, attention_dropout, ..backbone.decoder(|_| layer) })
}
