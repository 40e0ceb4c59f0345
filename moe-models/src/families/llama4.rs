//! Llama 4, text alone: one expert for each token, whose input its sigmoid weighs, and one that all see; layers that turn queries
//! and keys and see a chunk, and layers that do neither, whose scores grow sharper with the position.
//!
//! # Source
//! transformers 5.23 `models/llama4` (`Llama4ForCausalLM`).

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH, load_balance_coef, num_experts};
use super::published::Form;
use crate::config::{
    AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig, RotaryConfig, Temperature,
};
use crate::fields::{Checked, Fields};
use crate::hf::{Layout, NameTable, StackRule};
use moe_core::ops::RotaryLayout;
use moe_core::{BranchConfig, DroplessConfig, MoeConfig, RouterConfig, ScoreFunction, Weighs};
use serde_json::Value;

pub(super) const FORM: Form = Form {
    model_type: "llama4_text",
    names: NameTable::new(&[
        (".mlp.gate.", &[".feed_forward.router."]),
        (".mlp.", &[".feed_forward."]),
        ("fc_in.weight", &["gate_proj.weight", "up_proj.weight"]),
        ("fc_out.weight", &["down_proj.weight"]),
    ])
    .with_stacks(&[
        StackRule {
            here: ".mlp.experts.fc_in.weight",
            there: ".feed_forward.experts.gate_up_proj",
            layout: Layout::Columns,
        },
        StackRule {
            here: ".mlp.experts.fc_out.weight",
            there: ".feed_forward.experts.down_proj",
            layout: Layout::Columns,
        },
    ]),
    load_balance_coef: Some("router_aux_loss_coef"),
    read,
};

const CHUNKED: &str = "chunked_attention";
const FULL: &str = "full_attention";

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let backbone = Backbone::read(fields, &Defaults { rms_norm_eps: 1e-5, rope_theta: 500_000.0, ..Defaults::LLAMA })?;
    // How a program keeps keys and values.
    fields.skip(&["cache_implementation"]);
    fields.expect_none(&["router_jitter_noise", "for_llm_compressor"])?;
    let attention = attention(fields, &backbone)?;
    let experts = FeedForwardConfig::Moe(experts(fields, &backbone)?);
    let dense = FeedForwardConfig::Dense(backbone.mlp(fields.size("intermediate_size_mlp", MOST_WIDTH)?));
    let step = fields.size_or("interleave_moe_layer_step", 1, MOST)?;
    let moe_layers: Option<Vec<usize>> = fields.optional("moe_layers")?;
    let has_experts = |layer: usize| match &moe_layers {
        Some(layers) => layers.contains(&layer),
        None => (layer + 1).is_multiple_of(step),
    };
    Ok(backbone.decoder(|layer| LayerConfig {
        norm: backbone.norm(),
        attention: AttentionConfig::GroupedQuery(attention[layer]),
        feed_forward: if has_experts(layer) { experts } else { dense },
    }))
}

/// The attention of each layer.
fn attention(fields: &mut Fields, backbone: &Backbone) -> Checked<Vec<GroupedQueryConfig>> {
    let bias = fields.or("attention_bias", false)?;
    let plain = GroupedQueryConfig { qkv_bias: bias, out_bias: bias, ..backbone.attention() };
    let normed = fields.or("use_qk_norm", true)?.then_some(backbone.epsilon);
    let rotary = Some(RotaryConfig { layout: RotaryLayout::Interleaved, ..backbone.rotary });
    let turning = GroupedQueryConfig { turned_norm: normed, rotary, ..plain };
    let still = GroupedQueryConfig { temperature: temperature(fields)?, rotary: None, ..plain };
    let turns = turning_layers(fields, backbone.num_layers)?;
    let chunked = chunked_layers(fields, &turns)?;
    let size = fields.optional("attention_chunk_size")?;
    if size.is_none() && chunked.contains(&true) {
        return Err(format!("attention_chunk_size is missing, which layers of {CHUNKED:?} need"));
    }
    let layer = |(turns, chunked): (bool, bool)| GroupedQueryConfig {
        chunk: size.filter(|_| chunked),
        ..if turns { turning } else { still }
    };
    Ok(turns.into_iter().zip(chunked).map(layer).collect())
}

fn temperature(fields: &mut Fields) -> Checked<Option<Temperature>> {
    let temperature =
        Temperature { scale: fields.or("attn_scale", 0.1)?, floor: fields.positive_or("floor_scale", 8192.0)? };
    // Some files have a number in the place of a word.
    match fields.take("attn_temperature_tuning") {
        Value::Null | Value::Bool(true) => Ok(Some(temperature)),
        Value::Bool(false) => Ok(None),
        Value::Number(number) => Ok((number.as_f64() != Some(0.0)).then_some(temperature)),
        other => Err(format!("attn_temperature_tuning must be true or false, got {other}")),
    }
}

/// Which layers turn queries and keys: in `no_rope_layers` they are 1.
fn turning_layers(fields: &mut Fields, num_layers: usize) -> Checked<Vec<bool>> {
    let interval = fields.size_or("no_rope_layer_interval", 4, MOST)?;
    let listed: Vec<u8> = fields.or("no_rope_layers", Vec::new())?;
    if listed.is_empty() {
        return Ok((0..num_layers).map(|layer| !(layer + 1).is_multiple_of(interval)).collect());
    }
    if let Some(bad) = listed.iter().find(|turns| **turns > 1) {
        return Err(format!("no_rope_layers must be 0 or 1 for each layer, got {bad}"));
    }
    match listed.get(..num_layers) {
        Some(listed) => Ok(listed.iter().map(|turns| *turns == 1).collect()),
        None => Err(format!("no_rope_layers must have an entry for each of {num_layers} layers, got {}", listed.len())),
    }
}

/// Which layers see chunks: those that turn, where the file does not say.
fn chunked_layers(fields: &mut Fields, turns: &[bool]) -> Checked<Vec<bool>> {
    let Some(types) = fields.optional::<Vec<Value>>("layer_types")? else { return Ok(turns.to_vec()) };
    if let Some(kind) = types.iter().find(|kind| **kind != CHUNKED && **kind != FULL) {
        return Err(format!("layer_types must be {CHUNKED:?} or {FULL:?}, got {kind}; nothing else is implemented"));
    }
    match types.get(..turns.len()) {
        Some(types) => Ok(types.iter().map(|kind| kind == CHUNKED).collect()),
        None => Err(format!("layer_types must have an entry for each of {} layers, got {}", turns.len(), types.len())),
    }
}

fn experts(fields: &mut Fields, backbone: &Backbone) -> Checked<MoeConfig> {
    let width = fields.size("intermediate_size", MOST_WIDTH)?;
    let sizes = [num_experts(fields, "num_experts")?, width];
    fields.expect("num_experts_per_tok", &[Value::Null, 1.into()])?;
    let coef = load_balance_coef(fields, "router_aux_loss_coef", 0.001)?;
    let config = DroplessConfig { score_function: ScoreFunction::Sigmoid, ..DroplessConfig::softmax(1, false) };
    Ok(MoeConfig {
        router: RouterConfig::Dropless { config, selection_bias: false, bias: false, weighs: Weighs::Input },
        branch: BranchConfig::Shared { mlp: backbone.mlp(width), gate: false },
        ..backbone.experts(sizes, config, coef)
    })
}
