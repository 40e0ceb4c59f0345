//! gpt-oss: layers that see a window and layers that see all in turn, sinks in every softmax, biases everywhere, and experts whose
//! activation is bounded. Published weights of experts are MXFP4, which are read as the floats they stand for.
//!
//! # Source
//! transformers 5.23 `models/gpt_oss`; gpt-oss model card (2508.10925).

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH, load_balance_coef, num_experts};
use super::published::Form;
use crate::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig};
use crate::fields::{Checked, Fields};
use crate::hf::{Layout, NameTable, StackRule};
use moe_core::{Activation, DroplessConfig, MlpConfig, MoeConfig, RouterConfig, Weighs};
use serde_json::Value;

pub(super) const FORM: Form = Form {
    model_type: "gpt_oss",
    names: NameTable::new(&[(".mlp.gate.", &[".mlp.router."])]).with_stacks(&[
        StackRule {
            here: ".mlp.experts.fc_in.weight",
            there: ".mlp.experts.gate_up_proj",
            layout: Layout::AlternatingColumns,
        },
        StackRule {
            here: ".mlp.experts.fc_in.bias",
            there: ".mlp.experts.gate_up_proj_bias",
            layout: Layout::AlternatingRows,
        },
        StackRule { here: ".mlp.experts.fc_out.weight", there: ".mlp.experts.down_proj", layout: Layout::Columns },
        StackRule { here: ".mlp.experts.fc_out.bias", there: ".mlp.experts.down_proj_bias", layout: Layout::Rows },
    ]),
    load_balance_coef: Some("router_aux_loss_coef"),
    read,
};

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";
/// That of transformers where a file says none.
const WINDOW: usize = 128;

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    // Without either a model of transformers would stretch positions by figures that no file says.
    if !["rope_parameters", "rope_scaling"].iter().any(|name| fields.left().get(*name).is_some_and(|v| !v.is_null())) {
        return Err("rope_parameters is missing".into());
    }
    let backbone = Backbone::read(fields, &Defaults { rms_norm_eps: 1e-5, rope_theta: 150_000.0, ..Defaults::LLAMA })?;
    fields.expect("swiglu_alpha", &[Value::Null, Activation::SLOPE.into()])?;
    fields.expect("swiglu_limit", &[Value::Null, Activation::BOUND.into()])?;
    // The length before it is stretched, which rope_parameters have too.
    fields.skip(&["initial_context_length"]);
    let bias = fields.or("attention_bias", true)?;
    // Null is no window; where the field is absent there is one.
    let window = match fields.left().contains_key("sliding_window") {
        true => fields.optional("sliding_window")?,
        false => Some(WINDOW),
    };
    let full = GroupedQueryConfig { qkv_bias: bias, out_bias: bias, sinks: true, ..backbone.attention() };
    let windows = windows(fields, backbone.num_layers)?;
    let feed_forward = FeedForwardConfig::Moe(experts(fields, &backbone)?);
    Ok(backbone.decoder(|layer| LayerConfig {
        norm: backbone.norm(),
        attention: AttentionConfig::GroupedQuery(match windows[layer] {
            true => GroupedQueryConfig { window, ..full },
            false => full,
        }),
        feed_forward,
    }))
}

/// Whether each layer has a window: every second from the first on, where the file does not say.
fn windows(fields: &mut Fields, num_layers: usize) -> Checked<Vec<bool>> {
    let Some(types) = fields.optional::<Vec<Value>>("layer_types")? else {
        return Ok((0..num_layers).map(|layer| layer.is_multiple_of(2)).collect());
    };
    if let Some(kind) = types.iter().find(|kind| **kind != SLIDING && **kind != FULL) {
        return Err(format!("layer_types must be {SLIDING:?} or {FULL:?}, got {kind}; nothing else is implemented"));
    }
    match types.len() == num_layers {
        true => Ok(types.iter().map(|kind| kind == SLIDING).collect()),
        false => Err(format!("layer_types must have an entry for each of {num_layers} layers, got {}", types.len())),
    }
}

fn experts(fields: &mut Fields, backbone: &Backbone) -> Checked<MoeConfig> {
    let sizes = [num_experts(fields, "num_experts")?, fields.size("intermediate_size", MOST_WIDTH)?];
    let top_k = fields.size("num_experts_per_tok", MOST)?;
    fields.expect("experts_per_token", &[Value::Null, top_k.into()])?;
    let coef = load_balance_coef(fields, "router_aux_loss_coef", 0.001)?;
    // The softmax is over the chosen logits, which is that over all divided by the sum of what was chosen.
    let config = DroplessConfig::softmax(top_k, true);
    let plain = backbone.experts(sizes, config, coef);
    Ok(MoeConfig {
        expert: MlpConfig { activation: Activation::SwiGluBounded, bias: true, ..plain.expert },
        router: RouterConfig::Dropless { config, selection_bias: false, bias: true, weighs: Weighs::Outputs },
        ..plain
    })
}
