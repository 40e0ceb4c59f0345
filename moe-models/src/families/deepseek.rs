//! DeepSeek-V2 and V3: latent attention; dense layers first, then many small experts, which V2 chooses by a softmax, by groups of them
//! if it is told so, and V3 by a sigmoid with a bias; shared ones beside.
//!
//! # Source
//! transformers 5.23 `models/deepseek_v2`, `models/deepseek_v3`; DeepSeek-V2 (2405.04434), DeepSeek-V3 (2412.19437).

use super::backbone::{Backbone, Defaults, MOST, MOST_WIDTH, load_balance_coef, num_experts};
use super::published::Form;
use crate::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, LatentConfig, LayerConfig, RotaryConfig};
use crate::fields::{Checked, Fields};
use crate::hf::NameTable;
use moe_core::ops::RotaryLayout;
use moe_core::{BranchConfig, DroplessConfig, GroupScore, MoeConfig, RouterConfig, ScoreFunction, Weighs};
use serde_json::Value;

pub(super) const V2: Form =
    Form { model_type: "deepseek_v2", names: NAMES, load_balance_coef: Some("aux_loss_alpha"), read: read_v2 };
pub(super) const V3: Form =
    Form { model_type: "deepseek_v3", names: NAMES, load_balance_coef: Some("aux_loss_alpha"), read: read_v3 };

/// Their names.
pub(super) const NAMES: NameTable = NameTable::new(&[
    ("fc_in.weight", &["gate_proj.weight", "up_proj.weight"]),
    ("fc_out.weight", &["down_proj.weight"]),
    ("shared_expert.", &["shared_experts."]),
    ("gate.selection_bias", &["gate.e_score_correction_bias"]),
]);

/// What a configuration is in transformers where a file does not say it.
pub(super) struct Absent {
    /// `routed_scaling_factor`
    pub(super) scale: f64,
    /// `n_group` and `topk_group`; none if they must be there.
    pub(super) groups: Option<[usize; 2]>,
    /// `n_shared_experts`
    pub(super) shared_experts: usize,
    /// `first_k_dense_replace`
    pub(super) dense_layers: usize,
}

const ABSENT_V2: Absent = Absent { scale: 1.0, groups: None, shared_experts: 2, dense_layers: 0 };
const ABSENT_V3: Absent = Absent { scale: 2.5, groups: Some([8, 4]), shared_experts: 1, dense_layers: 3 };

fn read_v2(fields: &mut Fields) -> Checked<DecoderConfig> {
    fields.expect("scoring_func", &[Value::Null, "softmax".into()])?;
    fields.expect_none(&["mlp_bias"])?;
    let selection = match fields.or("topk_method", "greedy".to_owned())?.as_str() {
        "greedy" => {
            fields.skip(&["n_group", "topk_group"]);
            Selection::Softmax
        }
        "group_limited_greedy" => Selection::GroupedSoftmax,
        other => return Err(format!("topk_method must be greedy or group_limited_greedy, got {other:?}")),
    };
    read(fields, selection, RotaryLayout::Interleaved, &ABSENT_V2)
}

fn read_v3(fields: &mut Fields) -> Checked<DecoderConfig> {
    fields.expect("scoring_func", &[Value::Null, "sigmoid".into()])?;
    fields.expect("topk_method", &[Value::Null, "noaux_tc".into()])?;
    fields.skip(&["num_nextn_predict_layers", "num_mtp_layers"]);
    let layout = if fields.or("rope_interleave", true)? { RotaryLayout::Interleaved } else { RotaryLayout::Halves };
    read(fields, Selection::BiasedSigmoid, layout, &ABSENT_V3)
}

fn read(fields: &mut Fields, selection: Selection, layout: RotaryLayout, absent: &Absent) -> Checked<DecoderConfig> {
    let rope_dim = fields.size("qk_rope_head_dim", MOST)?;
    let backbone = Backbone::read(fields, &Defaults { head_dim: Some(rope_dim), ..Defaults::LLAMA })?;
    // How others divide the work, and how often layers have experts: always, in every published model.
    fields.skip(&["pretraining_tp", "ep_size", "qk_head_dim"]);
    fields.expect("moe_layer_freq", &[Value::Null, 1.into()])?;
    let nope_dim = fields.size("qk_nope_head_dim", MOST)?;
    let q_rank = match fields.optional("q_lora_rank")? {
        Some(rank) if (1..=MOST_WIDTH).contains(&rank) => Some(rank),
        Some(rank) => return Err(format!("q_lora_rank must be between 1 and {MOST_WIDTH}, or null, got {rank}")),
        None => None,
    };
    let attention = AttentionConfig::Latent(LatentConfig {
        d_model: backbone.d_model,
        num_heads: backbone.num_heads,
        q_rank,
        kv_rank: fields.size("kv_lora_rank", MOST_WIDTH)?,
        nope_dim,
        rope_dim,
        value_dim: fields.size("v_head_dim", MOST)?,
        bias: fields.or("attention_bias", false)?,
        // Whatever the file says of the other norms.
        epsilon: 1e-6,
        rotary: RotaryConfig { layout, ..backbone.rotary },
        scale: backbone.score_factor / ((nope_dim + rope_dim) as f64).sqrt(),
        std: backbone.std,
    });
    Ok(SparseAfterDense::read(fields, &backbone, selection, absent)?.decoder(&backbone, attention))
}

/// How experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Selection {
    /// V2 `greedy`.
    Softmax,
    /// V2 `group_limited_greedy`.
    GroupedSoftmax,
    /// V3 `noaux_tc`.
    BiasedSigmoid,
}

impl Selection {
    fn router(self, fields: &mut Fields, absent: &Absent) -> Checked<DroplessConfig> {
        let normalizes = self == Self::BiasedSigmoid;
        let normalize = fields.or("norm_topk_prob", normalizes)?;
        if normalize && !normalizes {
            return Err("norm_topk_prob must be false with softmax scores; nothing else is implemented".into());
        }
        let plain = DroplessConfig {
            scale: fields.positive_or("routed_scaling_factor", absent.scale)?,
            sequence_loss: fields.or("seq_aux", false)?,
            ..DroplessConfig::softmax(fields.size("num_experts_per_tok", MOST)?, normalize)
        };
        if self == Self::Softmax {
            return Ok(plain);
        }
        let (num_groups, top_groups) = match absent.groups {
            Some([all, top]) => (fields.size_or("n_group", all, MOST)?, fields.size_or("topk_group", top, MOST)?),
            None => (fields.size("n_group", MOST)?, fields.size("topk_group", MOST)?),
        };
        let (score_function, group_score) = match self {
            Self::BiasedSigmoid => (ScoreFunction::Sigmoid, GroupScore::TopTwoSum),
            _ => (ScoreFunction::Softmax, GroupScore::Max),
        };
        Ok(DroplessConfig { score_function, num_groups, top_groups, group_score, ..plain })
    }
}

/// The layers: the first ones dense, the others with routed and shared experts.
pub(super) struct SparseAfterDense {
    dense_layers: usize,
    dense: FeedForwardConfig,
    sparse: FeedForwardConfig,
}

impl SparseAfterDense {
    pub(super) fn read(
        fields: &mut Fields,
        backbone: &Backbone,
        selection: Selection,
        absent: &Absent,
    ) -> Checked<Self> {
        let width = fields.size("moe_intermediate_size", MOST_WIDTH)?;
        let shared = fields.or("n_shared_experts", absent.shared_experts)?;
        let router = selection.router(fields, absent)?;
        let sizes = [num_experts(fields, "n_routed_experts")?, width];
        let coef = load_balance_coef(fields, "aux_loss_alpha", 0.001)?;
        let experts = MoeConfig {
            router: RouterConfig::Dropless {
                config: router,
                selection_bias: selection == Selection::BiasedSigmoid,
                bias: false,
                weighs: Weighs::Outputs,
            },
            branch: match shared {
                0 => BranchConfig::None,
                _ => BranchConfig::Shared { mlp: backbone.mlp(width.saturating_mul(shared)), gate: false },
            },
            ..backbone.experts(sizes, router, coef)
        };
        Ok(Self {
            dense_layers: fields.or("first_k_dense_replace", absent.dense_layers)?,
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
