//! From the metadata of a GGUF file to the `config.json` that the same model has in a folder, which its family reads: a file of each
//! architecture, and what all say in the same keys ([`common`]). A key that is not taken is refused by its name.

mod deepseek2;
mod gpt_oss;
mod llama;
mod olmoe;
mod qwen;

use super::file::GgufFile;
use super::tensors::Layout;
use crate::fields::{Checked, Fields};
use serde_json::{Map, Value, json};

/// What a file's metadata comes to.
#[derive(Debug)]
pub(super) struct Description {
    /// A `config.json`.
    pub(super) config: Map<String, Value>,
    pub(super) layout: Layout,
}

/// How one architecture is read: its keys, without the name before them, and the file for what only tensors show.
type Read = fn(&mut Fields, &GgufFile) -> Checked<Description>;

/// All that are read, by `general.architecture`.
const ARCHITECTURES: [(&str, Read); 6] = [
    ("deepseek2", deepseek2::read),
    ("gpt-oss", gpt_oss::read),
    ("llama", llama::read),
    ("olmoe", olmoe::read),
    ("qwen2moe", qwen::read_qwen2_moe),
    ("qwen3moe", qwen::read_qwen3_moe),
];

/// Reads the metadata of a model.
pub(super) fn describe(file: &GgufFile) -> Checked<Description> {
    check_kind(file)?;
    let name = file.text("general.architecture")?.ok_or("general.architecture is missing")?;
    let Some((_, read)) = ARCHITECTURES.iter().find(|(known, _)| *known == name) else {
        let known: Vec<&str> = ARCHITECTURES.iter().map(|(name, _)| *name).collect();
        return Err(format!("general.architecture {name:?} is not one of {}", known.join(", ")));
    };
    let mut fields = file.fields(name)?;
    let mut described = read(&mut fields, file)?;
    fields.finish()?;
    if let Some(id) = file.count("tokenizer.ggml.eos_token_id")? {
        described.config.insert("eos_token_id".into(), id.into());
    }
    Ok(described)
}

/// Refuses files that are not one whole model. What else is under `general` says how the file came about; keys of other beginnings
/// belong to whoever wrote them.
fn check_kind(file: &GgufFile) -> Checked<()> {
    match file.text("general.type")? {
        None | Some("model") => {}
        Some(other) => {
            return Err(format!("general.type must be \"model\", got {other:?}; nothing else is implemented"));
        }
    }
    match file.count("split.count")? {
        None | Some(0 | 1) => {}
        Some(count) => {
            return Err(format!(
                "split.count: this is one of {count} files; merge them first (llama-gguf-split --merge)"
            ));
        }
    }
    let quantized = file.tensors().values().any(|tensor| tensor.form.is_quantized());
    match file.count("general.quantization_version")? {
        None | Some(2) => Ok(()),
        Some(_) if !quantized => Ok(()),
        Some(version) => Err(format!("general.quantization_version must be 2, got {version}; quantize it again")),
    }
}

/// What every architecture says in the same keys, as a `config.json` of `model_type`. Columns of a head that turn are not
/// among it: [`head_dim`].
fn common(fields: &mut Fields, file: &GgufFile, model_type: &str) -> Checked<Map<String, Value>> {
    let rows = |name: &str| file.tensor(name).map(|tensor| tensor.shape[0]);
    let vocab_size = rows("token_embd.weight").ok_or("tensor token_embd.weight is missing")?;
    fields.expect("vocab_size", &[Value::Null, vocab_size.into()])?;
    fields.expect("attention.causal", &[Value::Null, true.into()])?;
    fields.expect_none(&["nextn_predict_layers"])?;
    let mut config = Map::new();
    for (name, key) in [
        ("max_position_embeddings", "context_length"),
        ("hidden_size", "embedding_length"),
        ("num_hidden_layers", "block_count"),
        ("num_attention_heads", "attention.head_count"),
        ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ] {
        config.insert(name.into(), fields.required(key)?);
    }
    for (name, key) in
        [("intermediate_size", "feed_forward_length"), ("num_key_value_heads", "attention.head_count_kv")]
    {
        config.insert(name.into(), fields.take(key));
    }
    config.insert("model_type".into(), model_type.into());
    config.insert("vocab_size".into(), vocab_size.into());
    config.insert("hidden_act".into(), "silu".into());
    config.insert("tie_word_embeddings".into(), rows("output.weight").is_none().into());
    config.insert("rope_theta".into(), fields.positive_or("rope.freq_base", 1e4)?.into());
    config.insert("rope_scaling".into(), rope_scaling(fields)?);
    Ok(config)
}

/// The columns of a head, all of which turn. Without a key they are those of the stream divided by the heads.
fn head_dim(fields: &mut Fields, config: &mut Map<String, Value>) -> Checked<()> {
    let [width, heads] = ["hidden_size", "num_attention_heads"].map(|name| config[name].as_u64().unwrap_or(0));
    let divided = width.checked_div(heads).unwrap_or(0);
    let dim: u64 = fields.or("attention.key_length", divided)?;
    fields.expect("attention.value_length", &[Value::Null, dim.into()])?;
    fields.expect("rope.dimension_count", &[Value::Null, dim.into()])?;
    config.insert("head_dim".into(), dim.into());
    Ok(())
}

/// How positions are stretched.
fn rope_scaling(fields: &mut Fields) -> Checked<Value> {
    // Said of how a model came about.
    fields.skip(&["rope.scaling.finetuned"]);
    fields.expect("rope.scaling.attn_factor", &[Value::Null, 1.0.into()])?;
    fields.expect("rope.scaling.yarn_attn_factor", &[Value::Null, 1.0.into()])?;
    fields.expect("rope.scaling.yarn_ext_factor", &[Value::Null, 1.0.into()])?;
    let kind = fields.or("rope.scaling.type", "none".to_owned())?;
    let mut scaling = match kind.as_str() {
        "none" => return Ok(Value::Null),
        "linear" => json!({ "rope_type": "linear" }),
        "yarn" => json!({
            "rope_type": "yarn",
            "original_max_position_embeddings": fields.required::<u64>("rope.scaling.original_context_length")?,
            "beta_fast": fields.optional::<f64>("rope.scaling.yarn_beta_fast")?,
            "beta_slow": fields.optional::<f64>("rope.scaling.yarn_beta_slow")?,
        }),
        other => return Err(format!("rope.scaling.type must be none, linear or yarn, got {other:?}")),
    };
    scaling["factor"] = fields.positive("rope.scaling.factor")?.into();
    Ok(scaling)
}

/// Experts and how many of them a token goes to.
fn experts(fields: &mut Fields, config: &mut Map<String, Value>, name: &str) -> Checked<()> {
    config.insert(name.into(), fields.required("expert_count")?);
    config.insert("num_experts_per_tok".into(), fields.required("expert_used_count")?);
    Ok(())
}

/// Whether a token's weights are divided by their sum: files that do not say it mean what the architecture always does.
fn normalized(fields: &mut Fields, config: &mut Map<String, Value>, always: bool) -> Checked<()> {
    let normalized = fields.or("expert_weights_norm", always)?;
    config.insert("norm_topk_prob".into(), normalized.into());
    fields.expect("expert_weights_scale", &[Value::Null, 0.0.into(), 1.0.into()])?;
    // 1: softmax, before the choice.
    fields.expect("expert_gating_func", &[Value::Null, 0.into(), 1.into()])?;
    Ok(())
}
