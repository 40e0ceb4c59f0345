//! `deepseek2`: DeepSeek-V2 and V3. Files of before April 2025 hold the matrices of latent attention's heads in one tensor, later ones
//! in two, and say the sizes of heads in other keys.

use super::{Description, common, experts};
use crate::fields::{Checked, Fields};
use crate::gguf::file::GgufFile;
use crate::gguf::tensors::{LatentHeads, Layout};
use serde_json::{Map, Value};

pub(super) fn read(fields: &mut Fields, file: &GgufFile) -> Checked<Description> {
    // 1: softmax, 2: sigmoid. Files of V2 may leave it out.
    let is_v3 = match fields.or("expert_gating_func", 0u32)? {
        0 | 1 => false,
        2 => true,
        other => return Err(format!("deepseek2.expert_gating_func must be 1 or 2, got {other}")),
    };
    let mut config = common(fields, file, if is_v3 { "deepseek_v3" } else { "deepseek_v2" })?;
    let heads = head_sizes(fields, &mut config)?;
    experts(fields, &mut config, "n_routed_experts")?;
    for (name, key) in [
        ("first_k_dense_replace", "leading_dense_block_count"),
        ("n_shared_experts", "expert_shared_count"),
        ("moe_intermediate_size", "expert_feed_forward_length"),
    ] {
        config.insert(name.into(), fields.required(key)?);
    }
    config.insert("norm_topk_prob".into(), fields.or("expert_weights_norm", false)?.into());
    // Without a factor, or with 0, weights are not multiplied.
    let scale = fields.or("expert_weights_scale", 1.0)?;
    config.insert("routed_scaling_factor".into(), if scale == 0.0 { 1.0 } else { scale }.into());
    let groups: u64 = fields.or("expert_group_count", 1)?;
    let top_groups: u64 = fields.or("expert_group_used_count", 1)?;
    // Also where there is one group: V3 has more where its configuration does not say it.
    let (groups, top_groups) = if groups > 1 { (groups, top_groups) } else { (1, 1) };
    config.insert("n_group".into(), groups.into());
    config.insert("topk_group".into(), top_groups.into());
    if !is_v3 {
        config.insert("topk_method".into(), if groups > 1 { "group_limited_greedy" } else { "greedy" }.into());
    }
    if let Some(factor) = fields.optional::<f64>("rope.scaling.yarn_log_multiplier")? {
        let scaling = config["rope_scaling"].as_object_mut().filter(|scaling| scaling["rope_type"] == "yarn");
        let scaling = scaling.ok_or("deepseek2.rope.scaling.yarn_log_multiplier needs a rope.scaling.type of yarn")?;
        // The file has a tenth of it, and nothing of the factor on cosines and sines, which is the same in all of these models.
        let mscale = (factor * 1e7).round() / 1e6;
        scaling.insert("mscale".into(), mscale.into());
        scaling.insert("mscale_all_dim".into(), mscale.into());
    }
    Ok(Description { config, layout: Layout { latent: Some(heads), ..Layout::default() } })
}

/// The columns of a head's parts.
fn head_sizes(fields: &mut Fields, config: &mut Map<String, Value>) -> Checked<LatentHeads> {
    let kv_rank: usize = fields.required("attention.kv_lora_rank")?;
    let rope_dim: usize = fields.required("rope.dimension_count")?;
    let (key, value): (usize, usize) =
        (fields.required("attention.key_length")?, fields.required("attention.value_length")?);
    // With these keys the others tell of what is cached of a token.
    let whole = (fields.optional("attention.key_length_mla")?, fields.optional("attention.value_length_mla")?);
    let (key_dim, value_dim) = match whole {
        (None, None) => (key, value),
        (Some(key_dim), Some(value_dim)) => {
            if (Some(key), value) != (kv_rank.checked_add(rope_dim), kv_rank) {
                return Err(format!(
                    "deepseek2.attention.key_length {key} and value_length {value} must be kv_lora_rank {kv_rank} with and without \
                     rope.dimension_count {rope_dim}"
                ));
            }
            (key_dim, value_dim)
        }
        _ => return Err("deepseek2.attention.key_length_mla and value_length_mla must be there together".into()),
    };
    let Some(nope_dim) = key_dim.checked_sub(rope_dim).filter(|dim| *dim > 0) else {
        return Err(format!("the key length {key_dim} must be above deepseek2.rope.dimension_count {rope_dim}"));
    };
    // The file says how often the keys are repeated in a cache of the one form or the other; the model has a key for each head.
    config.insert("num_key_value_heads".into(), config["num_attention_heads"].clone());
    for (name, size) in [
        ("kv_lora_rank", kv_rank),
        ("qk_nope_head_dim", nope_dim),
        ("qk_rope_head_dim", rope_dim),
        ("v_head_dim", value_dim),
    ] {
        config.insert(name.into(), size.into());
    }
    config.insert("q_lora_rank".into(), fields.take("attention.q_lora_rank"));
    let heads = config["num_attention_heads"].as_u64().and_then(|heads| usize::try_from(heads).ok());
    Ok(LatentHeads { heads: heads.ok_or("deepseek2.attention.head_count must be one number")?, nope_dim, value_dim })
}
