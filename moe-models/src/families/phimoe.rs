//! PhiMoE: LayerNorm, biases in attention and perhaps at the output, and two experts that SparseMixer chooses, by draws in training.
//!
//! Its published models turn pairs of columns by factors of their own (LongRoPE): one set up to the length they were first trained
//! on, another beyond. With both a token's keys would depend on how long its sequence becomes, and so would every result before.
//! The set for the original length is the one here, as in transformers up to there, and that length is the longest sequence.
//!
//! # Source
//! transformers 5.23 `models/phimoe`; GRIN (2409.12136).

use super::backbone::{Backbone, Defaults, MOST_WIDTH, load_balance_coef, num_experts};
use super::mixtral;
use super::published::Form;
use crate::config::{
    AttentionConfig, DecoderConfig, FeedForwardConfig, GroupedQueryConfig, LayerConfig, NormKind, PairFactors,
    RotaryScaling,
};
use crate::fields::{Checked, Fields};
use moe_core::{DroplessConfig, MoeConfig, RouterConfig, SparseMixerConfig};

pub(super) const FORM: Form =
    Form { model_type: "phimoe", names: mixtral::NAMES, load_balance_coef: Some("router_aux_loss_coef"), read };

const DEFAULTS: Defaults =
    Defaults { rms_norm_eps: 1e-5, rope_theta: 1e6, own_scaling: Some(("longrope", long_rope)), ..Defaults::LLAMA };

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let original = original_positions(fields)?;
    let mut backbone = Backbone::read(fields, &DEFAULTS)?;
    backbone.norm_kind = NormKind::LayerNorm;
    match backbone.rotary.scaling {
        RotaryScaling::None => {}
        RotaryScaling::PerPair { .. } => {
            let original = original.ok_or("rope_parameters.original_max_position_embeddings is missing")?;
            backbone.max_seq_len = backbone.max_seq_len.min(original);
        }
        _ => return Err("rope_type must be default or longrope; nothing else is implemented for this family".into()),
    }
    fields.expect_none(&["hidden_dropout"])?;
    fields.expect("num_experts_per_tok", &[SparseMixerConfig::TOP_K.into()])?;
    let bias = fields.or("attention_bias", false)?;
    let attention = AttentionConfig::GroupedQuery(GroupedQueryConfig {
        qkv_bias: bias,
        out_bias: bias,
        window: fields.optional("sliding_window")?,
        ..backbone.attention()
    });
    let router = RouterConfig::SparseMixer(SparseMixerConfig {
        jitter_eps: fields.or("router_jitter_noise", 0.01)?,
        input_jitter: fields.or("input_jitter_noise", 0.0)?,
    });
    let sizes = [num_experts(fields, "num_experts")?, fields.size("intermediate_size", MOST_WIDTH)?];
    let coef = load_balance_coef(fields, "router_aux_loss_coef", 0.001)?;
    let experts = backbone.experts(sizes, DroplessConfig::softmax(SparseMixerConfig::TOP_K, true), coef);
    let feed_forward = FeedForwardConfig::Moe(MoeConfig { router, ..experts });
    let head_bias = fields.or("lm_head_bias", false)?;
    let layer = LayerConfig { norm: backbone.norm(), attention, feed_forward };
    Ok(DecoderConfig { head_bias, ..backbone.decoder(|_| layer) })
}

/// The length that a model was first trained on, which files have inside of `rope_parameters`, before transformers 5 of
/// `rope_scaling`, and some outside too.
fn original_positions(fields: &mut Fields) -> Checked<Option<usize>> {
    const NAME: &str = "original_max_position_embeddings";
    let outside: Option<usize> = fields.optional(NAME)?;
    let rope = ["rope_parameters", "rope_scaling"].into_iter().find_map(|name| fields.left().get(name)?.get(NAME));
    let inside = rope.and_then(|value| usize::try_from(value.as_u64()?).ok());
    match inside.or(outside) {
        Some(0) => Err(format!("{NAME} must be at least 1, got 0")),
        original => Ok(original),
    }
}

fn long_rope(rope: &mut Fields) -> Checked<RotaryScaling> {
    // The length is that of the longest sequence, and what is for longer ones is not used.
    rope.skip(&["original_max_position_embeddings", "long_mscale"]);
    let at = rope.at().to_owned();
    let pairs = |rope: &mut Fields, name: &str| {
        let factors: Vec<f64> = rope.required(name)?;
        PairFactors::new(&factors).map_err(|e| format!("{at}.{name}: {e}"))
    };
    pairs(rope, "long_factor")?;
    Ok(RotaryScaling::PerPair {
        factors: pairs(rope, "short_factor")?,
        attention_factor: rope.positive("short_mscale")?,
    })
}
