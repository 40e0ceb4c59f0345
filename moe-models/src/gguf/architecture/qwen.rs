//! `qwen2moe` and `qwen3moe`: Qwen2-MoE and Qwen3-MoE.

use super::{Description, common, experts, head_dim, normalized};
use crate::fields::{Checked, Fields};
use crate::gguf::file::GgufFile;
use crate::gguf::tensors::Layout;
use serde_json::{Map, Value};

pub(super) fn read_qwen2_moe(fields: &mut Fields, file: &GgufFile) -> Checked<Description> {
    let (mut config, has_bias) = read(fields, file, "qwen2_moe", false)?;
    config.insert("qkv_bias".into(), has_bias.into());
    config.insert("shared_expert_intermediate_size".into(), fields.required("expert_shared_feed_forward_length")?);
    Ok(Description { config, layout: Layout::default() })
}

pub(super) fn read_qwen3_moe(fields: &mut Fields, file: &GgufFile) -> Checked<Description> {
    let (mut config, has_bias) = read(fields, file, "qwen3_moe", true)?;
    config.insert("attention_bias".into(), has_bias.into());
    fields.expect_none(&["expert_shared_feed_forward_length"])?;
    Ok(Description { config, layout: Layout::default() })
}

fn read(
    fields: &mut Fields,
    file: &GgufFile,
    model_type: &str,
    normalizes: bool,
) -> Checked<(Map<String, Value>, bool)> {
    let mut config = common(fields, file, model_type)?;
    head_dim(fields, &mut config)?;
    experts(fields, &mut config, "num_experts")?;
    normalized(fields, &mut config, normalizes)?;
    config.insert("moe_intermediate_size".into(), fields.required("expert_feed_forward_length")?);
    Ok((config, file.tensor("blk.0.attn_q.bias").is_some()))
}
