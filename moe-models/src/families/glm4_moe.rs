//! GLM-4.5: half of each head turns; the first layers are dense, the others have experts that a sigmoid with a bias chooses, by
//! groups of them, and shared ones beside.
//!
//! # Source
//! transformers 5.23 `models/glm4_moe`; GLM-4.5 (2508.06471); the router is DeepSeek-V3's (2412.19437).

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH};
use super::published::Form;
use crate::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, LayerConfig, NormSpan, QkNorm};
use crate::fields::{Checked, Fields};
use crate::hf::NameTable;
use moe_core::{BranchConfig, DroplessConfig, GroupScore, MoeConfig, RouterConfig, ScoreFunction};

pub(super) const FORM: Form = Form { model_type: "glm4_moe", names: NAMES, read };

/// DeepSeek's names.
pub(super) const NAMES: NameTable = NameTable(&[
    ("fc_in.weight", &["gate_proj.weight", "up_proj.weight"]),
    ("fc_out.weight", &["down_proj.weight"]),
    ("shared_expert.", &["shared_experts."]),
    ("gate.selection_bias", &["gate.e_score_correction_bias"]),
]);

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let defaults = Defaults { rms_norm_eps: 1e-5, partial_rotary_factor: 0.5, ..Defaults::LLAMA };
    let backbone = Backbone::read(fields, &defaults)?;
    fields.skip(&["num_nextn_predict_layers", "num_mtp_layers"]);
    let head_norm = QkNorm { epsilon: backbone.epsilon, span: NormSpan::Head };
    let attention = AttentionConfig {
        qkv_bias: fields.or("attention_bias", false)?,
        qk_norm: fields.or("use_qk_norm", false)?.then_some(head_norm),
        ..backbone.attention()
    };
    Ok(SparseAfterDense::read(fields, &backbone)?.decoder(&backbone, attention))
}

/// DeepSeek's layers: the first ones dense, the others with routed and shared experts.
pub(super) struct SparseAfterDense {
    dense_layers: usize,
    dense: FeedForwardConfig,
    sparse: FeedForwardConfig,
}

impl SparseAfterDense {
    /// With DeepSeek-V3's router.
    pub(super) fn read(fields: &mut Fields, backbone: &Backbone) -> Checked<Self> {
        let width = fields.size("moe_intermediate_size", MOST_WIDTH)?;
        let shared = fields.or("n_shared_experts", 1usize)?;
        let router = DroplessConfig {
            score_function: ScoreFunction::Sigmoid,
            scale: fields.positive_or("routed_scaling_factor", 1.0)?,
            num_groups: fields.size_or("n_group", 1, MOST)?,
            top_groups: fields.size_or("topk_group", 1, MOST)?,
            group_score: GroupScore::TopTwoSum,
            ..DroplessConfig::softmax(fields.size("num_experts_per_tok", MOST)?, fields.or("norm_topk_prob", true)?)
        };
        let num_experts = match fields.optional("num_local_experts")? {
            Some(count) => count,
            None => fields.size("n_routed_experts", MOST)?,
        };
        let experts = MoeConfig {
            router: RouterConfig::Dropless { config: router, selection_bias: true },
            branch: match shared {
                0 => BranchConfig::None,
                _ => BranchConfig::Shared { mlp: backbone.mlp(width.saturating_mul(shared)), gate: false },
            },
            ..backbone.experts(fields, [num_experts, width], router)?
        };
        Ok(Self {
            dense_layers: fields.or("first_k_dense_replace", 1)?,
            dense: FeedForwardConfig::Dense(backbone.mlp(fields.size("intermediate_size", MOST_WIDTH)?)),
            sparse: FeedForwardConfig::Moe(experts),
        })
    }

    pub(super) fn decoder(&self, backbone: &Backbone, attention: AttentionConfig) -> DecoderConfig {
        backbone.decoder(|layer| LayerConfig {
            norm: backbone.norm(),
            attention,
            feed_forward: if layer < self.dense_layers { self.dense } else { self.sparse },
        })
    }
}
