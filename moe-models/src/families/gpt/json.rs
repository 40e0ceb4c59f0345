//! The family's `config.json`: names that users know to ours and back. An unknown or missing field is an error.

use super::layers::decoder;
use super::{GptConfig, GptMoeConfig};
use crate::families::{Family, ReadFamily, parse};
use crate::hf::NameTable;
use crate::{DecoderConfig, Error, Result};
use candle_core::DType;
use moe_core::{Capacity, NoisyGate};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// What `config.json` calls the family.
pub(crate) const MODEL_TYPE: &str = "moe_gpt";
const ARCHITECTURE: &str = "MoeGptForCausalLM";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ConfigJson {
    architectures: Vec<String>,
    model_type: String,
    vocab_size: usize,
    max_position_embeddings: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    intermediate_size: usize,
    hidden_act: String,
    layer_norm_eps: f64,
    initializer_range: f64,
    tie_word_embeddings: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    bos_token_id: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eos_token_id: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    torch_dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    transformers_version: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    moe: Option<MoeJson>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MoeJson {
    num_experts: Vec<usize>,
    expert_interval: usize,
    mlp_type: MlpType,
    num_experts_per_tok: usize,
    #[serde(default)]
    train_capacity_factor: Option<f64>,
    #[serde(default)]
    eval_capacity_factor: Option<f64>,
    min_capacity: usize,
    use_rts: bool,
    #[serde(default)]
    noisy_gate_policy: Option<NoisyGate>,
    top2_2nd_expert_sampling: bool,
    router_aux_loss_coef: f64,
    router_z_loss_coef: f64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MlpType {
    Standard,
    Residual,
}

impl From<&GptConfig> for ConfigJson {
    fn from(c: &GptConfig) -> Self {
        Self {
            architectures: vec![ARCHITECTURE.into()],
            model_type: MODEL_TYPE.into(),
            vocab_size: c.vocab_size,
            max_position_embeddings: c.max_seq_len,
            hidden_size: c.d_model,
            num_hidden_layers: c.num_layers,
            num_attention_heads: c.num_heads,
            intermediate_size: c.d_ff,
            hidden_act: "gelu_pytorch_tanh".into(),
            layer_norm_eps: c.layer_norm_eps,
            initializer_range: c.init_std,
            tie_word_embeddings: true,
            bos_token_id: c.eos_token_id,
            eos_token_id: c.eos_token_id,
            dtype: None,
            torch_dtype: None,
            transformers_version: None,
            moe: c.moe.as_ref().map(|m| MoeJson {
                num_experts: m.num_experts.clone(),
                expert_interval: m.expert_interval,
                mlp_type: if m.residual { MlpType::Residual } else { MlpType::Standard },
                num_experts_per_tok: m.top_k,
                train_capacity_factor: m.capacity.train_factor,
                eval_capacity_factor: m.capacity.eval_factor,
                min_capacity: m.capacity.min_capacity,
                use_rts: m.use_rts,
                noisy_gate_policy: m.noisy_gate,
                top2_2nd_expert_sampling: m.sample_second_expert,
                router_aux_loss_coef: m.aux_loss_coef,
                router_z_loss_coef: m.z_loss_coef,
            }),
        }
    }
}

impl TryFrom<ConfigJson> for GptConfig {
    type Error = String;

    fn try_from(c: ConfigJson) -> std::result::Result<Self, String> {
        for (name, got, want) in
            [("model_type", &c.model_type, MODEL_TYPE), ("hidden_act", &c.hidden_act, "gelu_pytorch_tanh")]
        {
            if got != want {
                return Err(format!("{name} must be {want:?}, got {got:?}"));
            }
        }
        if !c.tie_word_embeddings {
            return Err("tie_word_embeddings must be true: this family's output is its embedding".into());
        }
        Ok(Self {
            vocab_size: c.vocab_size,
            max_seq_len: c.max_position_embeddings,
            d_model: c.hidden_size,
            num_layers: c.num_hidden_layers,
            num_heads: c.num_attention_heads,
            d_ff: c.intermediate_size,
            layer_norm_eps: c.layer_norm_eps,
            init_std: c.initializer_range,
            eos_token_id: c.eos_token_id,
            moe: c.moe.map(|m| GptMoeConfig {
                num_experts: m.num_experts,
                expert_interval: m.expert_interval,
                residual: matches!(m.mlp_type, MlpType::Residual),
                top_k: m.num_experts_per_tok,
                capacity: Capacity {
                    train_factor: m.train_capacity_factor,
                    eval_factor: m.eval_capacity_factor,
                    min_capacity: m.min_capacity,
                },
                use_rts: m.use_rts,
                noisy_gate: m.noisy_gate_policy,
                sample_second_expert: m.top2_2nd_expert_sampling,
                aux_loss_coef: m.router_aux_loss_coef,
                z_loss_coef: m.router_z_loss_coef,
            }),
        })
    }
}

impl Family for GptConfig {
    fn decoder(&self) -> Result<DecoderConfig> {
        self.validate()?;
        Ok(decoder(self))
    }

    /// Published as it is in memory, expert by expert.
    fn names(&self) -> NameTable {
        NameTable::new(&[])
    }

    fn generation_config(&self) -> Result<Value> {
        let mut json = json!({
            "do_sample": true, "temperature": 0.8, "top_p": 0.95, "max_length": self.max_seq_len,
        });
        if let Some(eos) = self.eos_token_id {
            json["bos_token_id"] = eos.into();
            json["eos_token_id"] = eos.into();
        }
        Ok(json)
    }

    fn to_json(&self, _: DType) -> Result<String> {
        serde_json::to_string_pretty(&ConfigJson::from(self)).map_err(|e| Error::Config(e.to_string()))
    }
}

impl ReadFamily for GptConfig {
    fn read(json: &[u8], path: &Path) -> Result<Self> {
        let config = Self::try_from(parse::<ConfigJson>(json, path)?).map_err(|reason| Error::format(path, reason))?;
        config.validate().map_err(|e| Error::format(path, e.to_string()))?;
        Ok(config)
    }
}
