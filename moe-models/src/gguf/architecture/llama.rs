//! `llama`: Llama and what has its form, and, with experts, Mixtral.

use super::{Description, common, experts, head_dim};
use crate::config::{RotaryConfig, RotaryScaling};
use crate::fields::{Checked, Fields};
use crate::gguf::ROPE_FREQS;
use crate::gguf::file::GgufFile;
use crate::gguf::tensors::Layout;
use moe_core::ops::RotaryLayout;
use serde_json::{Map, Value, json};

pub(super) fn read(fields: &mut Fields, file: &GgufFile) -> Checked<Description> {
    let has_experts = fields.left().get("expert_count").is_some_and(|count| *count != 0);
    let mut config = common(fields, file, if has_experts { "mixtral" } else { "llama" })?;
    head_dim(fields, &mut config)?;
    if has_experts {
        experts(fields, &mut config, "num_local_experts")?;
        config.insert("sliding_window".into(), fields.take("attention.sliding_window"));
    } else {
        fields.expect_none(&["expert_count", "expert_used_count"])?;
        config.insert("attention_bias".into(), file.tensor("blk.0.attn_q.bias").is_some().into());
    }
    let reads_rope_freqs = file.tensor(ROPE_FREQS).is_some();
    if reads_rope_freqs {
        config["rope_scaling"] = llama3_scaling(&config, file)?;
    }
    let heads = |name: &str| config[name].as_u64().and_then(|heads| usize::try_from(heads).ok());
    let queries = heads("num_attention_heads").ok_or("llama.attention.head_count must be one number")?;
    let layout = Layout {
        reads_rope_freqs,
        neighbours_turn: Some([queries, heads("num_key_value_heads").unwrap_or(queries)]),
        ..Layout::default()
    };
    Ok(Description { config, layout })
}

/// Factors by which frequencies are divided, in the place of the numbers they were computed from. Those of Llama 3.1 and later are
/// recognized: what the largest of them is, slow frequencies are divided by, and the rest is the same in all of these models.
fn llama3_scaling(config: &Map<String, Value>, file: &GgufFile) -> Checked<Value> {
    let Some(tensor) = file.tensor(ROPE_FREQS) else { return Ok(Value::Null) };
    let factors = tensor.form.values(file.data(tensor));
    let factor = factors.iter().fold(1f64, |most, &factor| most.max(factor.into()));
    let scaling = json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW,
        "high_freq_factor": HIGH,
        "original_max_position_embeddings": ORIGINAL,
    });
    let plain = RotaryConfig {
        layout: RotaryLayout::Halves,
        rotary_dim: 2 * factors.len(),
        theta: config["rope_theta"].as_f64().unwrap_or(0.0),
        scaling: RotaryScaling::None,
    };
    let stretched = RotaryConfig {
        scaling: RotaryScaling::Llama3 {
            factor,
            low_freq_factor: LOW,
            high_freq_factor: HIGH,
            original_positions: ORIGINAL,
        },
        ..plain
    };
    let [plain, stretched] = [plain, stretched].map(|rotary| rotary.frequencies().map_err(|e| e.to_string()));
    let is_it =
        plain?.iter().zip(stretched?).zip(&factors).all(|((plain, stretched), &factor)| {
            (plain / stretched - f64::from(factor)).abs() <= 1e-4 * f64::from(factor)
        });
    match is_it && config["rope_scaling"].is_null() && config["head_dim"] == 2 * factors.len() {
        true => Ok(scaling),
        false => {
            Err(format!("tensor {ROPE_FREQS} has other factors than those of Llama 3.1; nothing else is implemented"))
        }
    }
}

const LOW: f64 = 1.0;
const HIGH: f64 = 4.0;
const ORIGINAL: usize = 8192;
