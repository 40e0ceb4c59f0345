//! [`Published`]: a model as its authors publish it: a `config.json` that is kept word for word, and what it means.

use super::{Family, ReadFamily};
use crate::fields::{Checked, Fields};
use crate::hf::NameTable;
use crate::{DecoderConfig, Error, Result};
use candle_core::DType;
use serde_json::{Map, Value};
use std::path::Path;

/// A family of published models: how its `config.json` is read, and what its files call tensors.
#[derive(Debug)]
pub(super) struct Form {
    /// `model_type`
    pub(super) model_type: &'static str,
    /// The names of tensors in files.
    pub(super) names: NameTable,
    /// The field with the factor of the load-balance loss; none where no layer has experts.
    pub(super) load_balance_coef: Option<&'static str>,
    /// Takes every field that has a meaning here; what is left is refused.
    pub(super) read: fn(&mut Fields) -> Checked<DecoderConfig>,
}

/// All of them.
const FORMS: [&Form; 13] = [
    &super::deepseek::V2,
    &super::deepseek::V3,
    &super::glm4_moe::FORM,
    &super::gpt_oss::FORM,
    &super::granitemoe::FORM,
    &super::granitemoe::SHARED,
    &super::llama::FORM,
    &super::llama4::FORM,
    &super::mixtral::FORM,
    &super::olmoe::FORM,
    &super::phimoe::FORM,
    &super::qwen2_moe::FORM,
    &super::qwen3_moe::FORM,
];

/// Their names in `config.json`.
pub(super) fn model_types() -> impl Iterator<Item = &'static str> {
    FORMS.iter().map(|form| form.model_type)
}

/// The configuration of a published model.
#[derive(Debug, Clone)]
pub struct Published {
    form: &'static Form,
    json: Map<String, Value>,
    decoder: DecoderConfig,
}

/// Fields that say how a file came about, or what a program may do with it, and nothing about the model.
const KEPT: [&str; 12] = [
    "architectures",
    "transformers_version",
    "use_cache",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "pad_token_id",
    "_name_or_path",
    "_attn_implementation_autoset",
    "auto_map",
    "output_attentions",
    "output_hidden_states",
];

impl Published {
    fn checked(json: &[u8]) -> Checked<Self> {
        Self::of(&serde_json::from_slice(json).map_err(|e| e.to_string())?)
    }

    fn of(value: &Value) -> Checked<Self> {
        let mut fields = Fields::of(value, "")?;
        let json = fields.left().clone();
        let model_type: String = fields.required("model_type")?;
        let form = FORMS.iter().find(|form| form.model_type == model_type);
        let form = form.ok_or_else(|| format!("model_type {model_type:?} is not that of a published model"))?;
        fields.skip(&KEPT);
        let decoder = (form.read)(&mut fields)?;
        fields.finish()?;
        decoder.validate().map_err(|e| e.to_string())?;
        Ok(Self { form, json, decoder })
    }

    /// `model_type`
    pub fn model_type(&self) -> &'static str {
        self.form.model_type
    }

    /// The same with other values of fields of its `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub(crate) fn with(&self, fields: impl IntoIterator<Item = (&'static str, Value)>) -> Result<Self> {
        let mut json = self.json.clone();
        json.extend(fields.into_iter().map(|(name, value)| (name.to_owned(), value)));
        Self::of(&Value::Object(json)).map_err(Error::Config)
    }

    /// Whether its `config.json` has such a field.
    pub(crate) fn has_field(&self, name: &str) -> bool {
        self.json.contains_key(name)
    }

    /// The field with the factor of the load-balance loss, if layers have experts.
    pub(crate) fn load_balance_field(&self) -> Option<&'static str> {
        self.form.load_balance_coef
    }
}

impl ReadFamily for Published {
    fn read(json: &[u8], path: &Path) -> Result<Self> {
        Self::checked(json).map_err(|reason| Error::format(path, reason))
    }
}

impl Family for Published {
    fn decoder(&self) -> Result<DecoderConfig> {
        Ok(self.decoder.clone())
    }

    fn names(&self) -> NameTable {
        self.form.names
    }

    /// Layers after the last: those that predict further tokens (DeepSeek-V3, GLM-4.5), which take no part in the first. Frequencies of
    /// rotary positions, which old files have and the configuration says. An output layer where it is the embedding.
    fn is_extra(&self, name: &str) -> bool {
        if name.ends_with(".rotary_emb.inv_freq") || (self.decoder.tie_embeddings && name == "lm_head.weight") {
            return true;
        }
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
        layer.is_some_and(|layer| layer >= self.decoder.layers.len())
    }

    /// As the `config.json` says it, every end of several too, and nothing of how tokens are drawn.
    fn generation_config(&self) -> Result<Value> {
        let said = ["bos_token_id", "eos_token_id"].into_iter().filter_map(|name| self.json.get_key_value(name));
        Ok(said.filter(|(_, id)| !id.is_null()).map(|(name, id)| (name.clone(), id.clone())).collect())
    }

    fn to_json(&self, dtype: DType) -> Result<String> {
        let dtype = match dtype {
            DType::BF16 => "bfloat16",
            DType::F16 => "float16",
            _ => "float32",
        };
        let mut json = self.json.clone();
        json.shift_remove("torch_dtype");
        json.insert("dtype".into(), dtype.into());
        serde_json::to_string_pretty(&json).map_err(|e| Error::Config(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fixture(family: &str) -> Value {
        let path = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).join(family).join("config.json");
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn without(mut json: Value, names: &[&str]) -> Value {
        names.iter().for_each(|name| drop(json.as_object_mut().unwrap().remove(*name)));
        json
    }

    fn with(mut json: Value, fields: Value) -> Value {
        json.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        json
    }

    #[track_caller]
    fn same(a: &Value, b: &Value) {
        let [a, b] = [a, b].map(|json| format!("{:?}", Published::of(json).unwrap().decoder));
        assert_eq!(a, b);
    }

    /// The values of `DeepseekV2Config`, `DeepseekV3Config` and `Glm4MoeConfig` of transformers 5.23.
    #[test]
    fn what_files_of_deepseek_leave_out_is_what_transformers_has_there() {
        const LEFT_OUT: [&str; 5] =
            ["n_group", "topk_group", "routed_scaling_factor", "n_shared_experts", "first_k_dense_replace"];
        let v3 = with(fixture("deepseek_v3"), json!({ "n_routed_experts": 32, "num_hidden_layers": 5 }));
        let said = json!({
            "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_shared_experts": 1, "first_k_dense_replace": 3,
        });
        same(&without(v3.clone(), &LEFT_OUT), &with(v3, said));
        let glm = with(fixture("glm4_moe"), json!({ "num_hidden_layers": 5 }));
        let said = json!({
            "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "n_shared_experts": 1, "first_k_dense_replace": 1,
        });
        same(&without(glm.clone(), &LEFT_OUT), &with(glm, said));
        let v2 = fixture("deepseek_v2");
        let text = Published::of(&without(v2.clone(), &LEFT_OUT)).unwrap_err();
        assert!(text.contains("n_group is missing"), "{text}");
        let greedy = with(v2, json!({ "topk_method": "greedy" }));
        let said = json!({ "routed_scaling_factor": 1.0, "n_shared_experts": 2, "first_k_dense_replace": 0 });
        same(&without(greedy.clone(), &LEFT_OUT), &with(greedy, said));
    }

    #[test]
    fn a_window_that_gpt_oss_does_not_say_is_that_of_transformers() {
        let absent = without(fixture("gpt_oss"), &["sliding_window"]);
        same(&absent, &with(absent.clone(), json!({ "sliding_window": 128 })));
        let none = with(absent.clone(), json!({ "sliding_window": null }));
        assert!(!format!("{:?}", Published::of(&none).unwrap().decoder).contains("window: Some"));
    }

    #[test]
    fn columns_that_a_family_always_turns_cannot_be_left_alone() {
        for family in ["mixtral", "qwen3_moe", "llama", "deepseek_v3", "gpt_oss", "phimoe"] {
            let json = fixture(family);
            same(&json, &with(json.clone(), json!({ "partial_rotary_factor": 1.0 })));
            same(&json, &with(json.clone(), json!({ "partial_rotary_factor": 1 })));
            let text = Published::of(&with(json.clone(), json!({ "partial_rotary_factor": 0.5 }))).unwrap_err();
            assert!(text.contains("partial_rotary_factor must be null or 1"), "{family}: {text}");
            let mut inside = json;
            inside["rope_parameters"]["partial_rotary_factor"] = 0.5.into();
            let text = Published::of(&inside).unwrap_err();
            assert!(text.contains("rope_parameters.partial_rotary_factor must be"), "{family}: {text}");
        }
    }

    #[test]
    fn every_end_of_a_text_is_said_and_nothing_of_how_tokens_are_drawn() {
        let json = with(fixture("mixtral"), json!({ "eos_token_id": [2, 7], "bos_token_id": 1 }));
        let family = Published::of(&json).unwrap();
        assert_eq!(family.generation_config().unwrap(), json!({ "bos_token_id": 1, "eos_token_id": [2, 7] }));
        let json = with(json, json!({ "eos_token_id": null, "bos_token_id": null }));
        assert_eq!(Published::of(&json).unwrap().generation_config().unwrap(), json!({}));
    }

    #[test]
    fn tensors_that_the_configuration_says_already_are_left_out() {
        let json = fixture("mixtral");
        let [untied, tied] = [false, true].map(|tied| with(json.clone(), json!({ "tie_word_embeddings": tied })));
        let [untied, tied] = [untied, tied].map(|json| Published::of(&json).unwrap());
        for family in [&untied, &tied] {
            assert!(family.is_extra("model.layers.0.self_attn.rotary_emb.inv_freq"));
            assert!(!family.is_extra("model.embed_tokens.weight"));
        }
        assert!(tied.is_extra("lm_head.weight") && !untied.is_extra("lm_head.weight"));
    }

    /// Llama 4 Scout's.
    #[test]
    fn ten_million_positions_are_a_model() {
        Published::of(&with(fixture("llama4_text"), json!({ "max_position_embeddings": 10_485_760 }))).unwrap();
    }
}
