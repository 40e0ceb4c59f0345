//! `gpt-oss`: gpt-oss. Which layers have a window is not said: every second, from the first on.

use super::{Description, common, experts, head_dim};
use crate::fields::{Checked, Fields};
use crate::gguf::file::GgufFile;
use crate::gguf::tensors::Layout;
use serde_json::Value;

pub(super) fn read(fields: &mut Fields, file: &GgufFile) -> Checked<Description> {
    let mut config = common(fields, file, "gpt_oss")?;
    head_dim(fields, &mut config)?;
    experts(fields, &mut config, "num_local_experts")?;
    // 3: softmax of the chosen logits.
    fields.expect("expert_gating_func", &[Value::Null, 3.into()])?;
    fields.expect("expert_weights_scale", &[Value::Null, 0.0.into(), 1.0.into()])?;
    fields.expect("attention.sliding_window_pattern", &[Value::Null, 2.into()])?;
    fields.expect("rope.freq_base_swa", &[Value::Null, config["rope_theta"].clone()])?;
    config.insert("intermediate_size".into(), fields.required("expert_feed_forward_length")?);
    config.insert("sliding_window".into(), fields.required("attention.sliding_window")?);
    config.insert("attention_bias".into(), file.tensor("blk.0.attn_q.bias").is_some().into());
    match config["rope_scaling"].as_object_mut().filter(|scaling| scaling["rope_type"] == "yarn") {
        // The model was trained with bounds between stretched and other frequencies that are not rounded; files do not say it.
        Some(scaling) => drop(scaling.insert("truncate".into(), false.into())),
        None => return Err("gpt-oss.rope.scaling.type must be yarn; nothing else is implemented".into()),
    }
    Ok(Description { config, layout: Layout { norm_after_attention: true, ..Layout::default() } })
}
