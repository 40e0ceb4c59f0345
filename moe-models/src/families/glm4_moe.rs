//! GLM-4.5: half of each head turns; the first layers are dense, the others have experts that a sigmoid with a bias chooses, by
//! groups of them, and shared ones beside.
//!
//! # Source
//! transformers 5.23 `models/glm4_moe`; GLM-4.5 (2508.06471); the router is DeepSeek-V3's (2412.19437).

use super::backbone::{Backbone, Defaults};
use super::deepseek::{Absent, NAMES, Selection, SparseAfterDense};
use super::published::Form;
use crate::config::{AttentionConfig, DecoderConfig, GroupedQueryConfig, NormSpan, QkNorm};
use crate::fields::{Checked, Fields};

pub(super) const FORM: Form =
    Form { model_type: "glm4_moe", names: NAMES, load_balance_coef: Some("aux_loss_alpha"), read };

/// What transformers has where a file does not say it.
const ABSENT: Absent = Absent { scale: 1.0, groups: Some([1, 1]), shared_experts: 1, dense_layers: 1 };

fn read(fields: &mut Fields) -> Checked<DecoderConfig> {
    let defaults = Defaults { rms_norm_eps: 1e-5, partial_rotary_factor: Some(0.5), ..Defaults::LLAMA };
    let backbone = Backbone::read(fields, &defaults)?;
    fields.skip(&["num_nextn_predict_layers", "num_mtp_layers"]);
    let head_norm = QkNorm { epsilon: backbone.epsilon, span: NormSpan::Head };
    let attention = GroupedQueryConfig {
        qkv_bias: fields.or("attention_bias", false)?,
        qk_norm: fields.or("use_qk_norm", false)?.then_some(head_norm),
        ..backbone.attention()
    };
    Ok(SparseAfterDense::read(fields, &backbone, Selection::BiasedSigmoid, &ABSENT)?
        .decoder(&backbone, AttentionConfig::GroupedQuery(attention)))
}
