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

    /// Layers after the last: those that predict further tokens (DeepSeek-V3, GLM-4.5), which take no part in the first.
    fn is_extra(&self, name: &str) -> bool {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')?.0.parse::<usize>().ok());
        layer.is_some_and(|layer| layer >= self.decoder.layers.len())
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
