//! [`Backbone`]: what published decoders of Llama's form have in common, read from the names that transformers gives it.

use crate::config::{
    DecoderConfig, GroupedQueryConfig, LayerConfig, MOST_LAYERS, Multipliers, NormConfig, NormKind, Projection,
    RotaryConfig, RotaryScaling, yarn_factor,
};
use crate::fields::{Checked, Fields};
use moe_core::ops::RotaryLayout;
use moe_core::{Activation, BranchConfig, DroplessConfig, MlpConfig, MoeConfig, RouterConfig, Weighs};
use serde_json::Value;

/// Most heads and experts; far above every published model, and small enough to size tables by.
pub(super) const MOST: usize = 1 << 16;
/// Most columns.
pub(super) const MOST_WIDTH: usize = 1 << 24;

/// What a family's files may leave out.
pub(super) struct Defaults {
    pub(super) rms_norm_eps: f64,
    pub(super) rope_theta: f64,
    /// Share of a head's columns that turn, for families whose files may say another.
    pub(super) partial_rotary_factor: Option<f64>,
    /// Columns of a head, for families whose files do not say so under `head_dim`.
    pub(super) head_dim: Option<usize>,
    /// What reads a `rope_type` that others do not have.
    pub(super) own_scaling: Option<OwnScaling>,
}

/// Reads the rest of the fields of a `rope_type` of a family's own.
pub(super) type OwnScaling = (&'static str, fn(&mut Fields) -> Checked<RotaryScaling>);

impl Defaults {
    /// Llama's.
    pub(super) const LLAMA: Self =
        Self { rms_norm_eps: 1e-6, rope_theta: 1e4, partial_rotary_factor: None, head_dim: None, own_scaling: None };
}

/// A norm, rotary positions and SwiGLU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backbone {
    pub(super) vocab_size: usize,
    pub(super) max_seq_len: usize,
    pub(super) d_model: usize,
    pub(super) num_layers: usize,
    pub(super) norm_kind: NormKind,
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) rotary: RotaryConfig,
    /// What DeepSeek multiplies scores with where YaRN stretches positions (`mscale_all_dim`).
    pub(super) score_factor: f64,
    pub(super) epsilon: f64,
    pub(super) std: f64,
    pub(super) tie_embeddings: bool,
    pub(super) eos_token_id: Option<u32>,
}

impl Backbone {
    /// Takes the fields that all have.
    pub(super) fn read(fields: &mut Fields, defaults: &Defaults) -> Checked<Self> {
        fields.expect("hidden_act", &["silu".into()])?;
        fields.expect_none(&["attention_dropout", "output_router_logits"])?;
        let vocab_size = fields.required("vocab_size")?;
        let max_seq_len = fields.required("max_position_embeddings")?;
        let d_model = fields.size("hidden_size", MOST_WIDTH)?;
        let num_heads = fields.size("num_attention_heads", MOST)?;
        let num_kv_heads = fields.size_or("num_key_value_heads", num_heads, MOST)?;
        let written = fields.optional("head_dim")?;
        let head_dim = match defaults.head_dim.or(written) {
            Some(dim) => dim,
            None if d_model.is_multiple_of(num_heads) => d_model / num_heads,
            None => return Err(format!("num_attention_heads {num_heads} must divide hidden_size {d_model}")),
        };
        if head_dim == 0 || head_dim > MOST || !usize::is_multiple_of(head_dim, 2) {
            return Err(format!("head_dim must be even and between 2 and {MOST}, got {head_dim}"));
        }
        let epsilon = fields.positive_or("rms_norm_eps", defaults.rms_norm_eps)?;
        let std = fields.positive_or("initializer_range", 0.02)?;
        let (rotary, score_factor) = rotary(fields, head_dim, max_seq_len, defaults)?;
        if epsilon >= 1.0 || std >= 1.0 {
            return Err(format!("rms_norm_eps {epsilon} and initializer_range {std} must be below 1"));
        }
        Ok(Self {
            vocab_size,
            max_seq_len,
            d_model,
            num_layers: fields.size("num_hidden_layers", MOST_LAYERS)?,
            norm_kind: NormKind::RmsNorm,
            num_heads,
            num_kv_heads,
            head_dim,
            rotary,
            score_factor,
            epsilon,
            std,
            tie_embeddings: fields.or("tie_word_embeddings", false)?,
            eos_token_id: eos_token_id(fields, vocab_size)?,
        })
    }

    pub(super) fn norm(&self) -> NormConfig {
        NormConfig { kind: self.norm_kind, width: self.d_model, epsilon: self.epsilon }
    }

    /// Without biases, norms of queries and keys, or a window.
    pub(super) fn attention(&self) -> GroupedQueryConfig {
        GroupedQueryConfig {
            d_model: self.d_model,
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            projection: Projection::Separate,
            qkv_bias: false,
            out_bias: false,
            qk_norm: None,
            turned_norm: None,
            temperature: None,
            sinks: false,
            rotary: Some(self.rotary),
            window: None,
            chunk: None,
            scale: None,
            in_std: self.std,
            out_std: self.std,
        }
    }

    pub(super) fn mlp(&self, d_ff: usize) -> MlpConfig {
        MlpConfig {
            d_model: self.d_model,
            d_ff,
            activation: Activation::SwiGlu,
            bias: false,
            in_std: self.std,
            out_std: self.std,
        }
    }

    /// Experts of inner width `d_ff` chosen by `router`, with nothing beside them.
    pub(super) fn experts(
        &self,
        [num_experts, d_ff]: [usize; 2],
        router: DroplessConfig,
        load_balance_coef: f64,
    ) -> MoeConfig {
        MoeConfig {
            num_experts,
            expert: self.mlp(d_ff),
            router: RouterConfig::Dropless {
                config: router,
                selection_bias: false,
                bias: false,
                weighs: Weighs::Outputs,
            },
            branch: BranchConfig::None,
            gate_bound: self.std * 3f64.sqrt(),
            load_balance_coef,
            router_z_coef: 0.0,
        }
    }

    /// The decoder whose layers `layer` makes.
    pub(super) fn decoder(&self, layer: impl Fn(usize) -> LayerConfig) -> DecoderConfig {
        DecoderConfig {
            vocab_size: self.vocab_size,
            max_seq_len: self.max_seq_len,
            d_model: self.d_model,
            layers: (0..self.num_layers).map(layer).collect(),
            norm: self.norm(),
            learned_positions: false,
            tie_embeddings: self.tie_embeddings,
            head_bias: false,
            init_std: self.std,
            eos_token_id: self.eos_token_id,
            multipliers: Multipliers::default(),
            attention_dropout: 0.0,
        }
    }
}

/// Experts, under the family's own `name`, or `num_local_experts` as some versions of transformers call them in every family.
pub(super) fn num_experts(fields: &mut Fields, name: &str) -> Checked<usize> {
    const ALSO: &str = "num_local_experts";
    match (fields.left().contains_key(name), fields.left().contains_key(ALSO)) {
        (true, true) => match (fields.size(name, MOST)?, fields.size(ALSO, MOST)?) {
            (a, b) if a == b => Ok(a),
            (a, b) => Err(format!("{name} {a} and {ALSO} {b} must be the same")),
        },
        (false, true) => fields.size(ALSO, MOST),
        _ => fields.size(name, MOST),
    }
}

/// The factor of the load-balance loss.
pub(super) fn load_balance_coef(fields: &mut Fields, name: &str, default: f64) -> Checked<f64> {
    let coef = fields.or(name, default)?;
    match (0.0..f64::INFINITY).contains(&coef) {
        true => Ok(coef),
        false => Err(format!("{name} must be 0 or more, got {coef}")),
    }
}

/// One token that ends a sequence; of several the first.
fn eos_token_id(fields: &mut Fields, vocab_size: usize) -> Checked<Option<u32>> {
    let ids: Vec<u32> = match fields.take("eos_token_id") {
        Value::Null => Vec::new(),
        Value::Array(ids) => serde_json::from_value(ids.into()).map_err(|e| format!("eos_token_id: {e}"))?,
        id => vec![serde_json::from_value(id).map_err(|e| format!("eos_token_id: {e}"))?],
    };
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(id) => Err(format!("eos_token_id {id} is outside the vocabulary of {vocab_size}")),
        None => Ok(ids.first().copied()),
    }
}

/// `rope_parameters`, or `rope_theta` and `rope_scaling` as files before transformers 5 have it.
fn rotary(
    fields: &mut Fields,
    head_dim: usize,
    max_seq_len: usize,
    defaults: &Defaults,
) -> Checked<(RotaryConfig, f64)> {
    let mut theta = fields.positive_or("rope_theta", defaults.rope_theta)?;
    let partial = partial_rotary_factor(fields, defaults.partial_rotary_factor, defaults)?;
    let (old, new) = (fields.take("rope_scaling"), fields.take("rope_parameters"));
    let (at, value) = match (old.is_null(), new.is_null()) {
        (false, false) => return Err("rope_scaling and rope_parameters must not both be there".into()),
        (false, true) => ("rope_scaling", old),
        _ => ("rope_parameters", new),
    };
    let (mut factor, mut scaling, mut score_factor) = (partial, RotaryScaling::None, 1.0);
    if !value.is_null() {
        let mut rope = Fields::of(&value, at)?;
        theta = rope.positive_or("rope_theta", theta)?;
        factor = partial_rotary_factor(&mut rope, partial, defaults)?;
        (scaling, score_factor) = rotary_scaling(&mut rope, max_seq_len, defaults)?;
        rope.finish()?;
    }
    let factor = factor.unwrap_or(1.0);
    let rotary_dim = (head_dim as f64 * factor) as usize;
    if !(factor > 0.0 && factor <= 1.0) || rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
        return Err(format!("partial_rotary_factor must leave an even number of the {head_dim} columns, got {factor}"));
    }
    Ok((RotaryConfig { layout: RotaryLayout::Halves, rotary_dim, theta, scaling }, score_factor))
}

/// The share of a head's columns that turn. Models of most families turn all of them in transformers, whatever a file says.
fn partial_rotary_factor(fields: &mut Fields, default: Option<f64>, defaults: &Defaults) -> Checked<Option<f64>> {
    const NAME: &str = "partial_rotary_factor";
    match defaults.partial_rotary_factor {
        Some(_) => Ok(fields.optional(NAME)?.or(default)),
        None => fields.expect(NAME, &[Value::Null, 1.into(), 1.0.into()]).map(|()| None),
    }
}

fn rotary_scaling(rope: &mut Fields, max_seq_len: usize, defaults: &Defaults) -> Checked<(RotaryScaling, f64)> {
    let (old, new) = (rope.optional::<String>("type")?, rope.optional::<String>("rope_type")?);
    let kind = new.or(old).unwrap_or_else(|| "default".into());
    let original = |rope: &mut Fields| rope.size_or("original_max_position_embeddings", max_seq_len, MOST_WIDTH);
    let mut score_factor = 1.0;
    if let Some((_, read)) = defaults.own_scaling.filter(|(name, _)| *name == kind) {
        return Ok((read(rope)?, score_factor));
    }
    let scaling = match kind.as_str() {
        "default" => RotaryScaling::None,
        "linear" => RotaryScaling::Linear { factor: rope.positive("factor")? },
        "llama3" => {
            let [factor, low_freq_factor, high_freq_factor] =
                ["factor", "low_freq_factor", "high_freq_factor"].map(|name| rope.positive(name));
            let (low_freq_factor, high_freq_factor) = (low_freq_factor?, high_freq_factor?);
            // Where they are the same there is a step between slow and fast.
            if low_freq_factor > high_freq_factor {
                return Err(format!("{}.low_freq_factor must not be above high_freq_factor", rope.at()));
            }
            RotaryScaling::Llama3 {
                factor: factor?,
                low_freq_factor,
                high_freq_factor,
                original_positions: original(rope)?,
            }
        }
        "yarn" => {
            let original_positions = original(rope)?;
            let factor = rope.positive_or("factor", max_seq_len as f64 / original_positions as f64)?;
            let mscale = |rope: &mut Fields, name| Checked::Ok(rope.optional::<f64>(name)?.filter(|m| *m != 0.0));
            let (up, down) = (mscale(rope, "mscale")?, mscale(rope, "mscale_all_dim")?);
            score_factor = down.map_or(1.0, |mscale| yarn_factor(factor, mscale).powi(2));
            let inferred = match (up, down) {
                (Some(up), Some(down)) => yarn_factor(factor, up) / yarn_factor(factor, down),
                _ => yarn_factor(factor, 1.0),
            };
            RotaryScaling::Yarn {
                factor,
                beta_fast: rope.positive_or("beta_fast", 32.0)?,
                beta_slow: rope.positive_or("beta_slow", 1.0)?,
                original_positions,
                truncate: rope.or("truncate", true)?,
                attention_factor: rope.positive_or("attention_factor", inferred)?,
            }
        }
        other => return Err(format!("{}.rope_type {other:?} is not implemented", rope.at())),
    };
    Ok((scaling, score_factor))
}
