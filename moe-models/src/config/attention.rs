//! [`AttentionConfig`]: the kinds of causal attention.

use super::{LinearConfig, LinearSplit, MOST, NormConfig, NormKind, RotaryConfig, below};
use crate::fields::Checked;
use crate::{Error, Result};
use moe_core::ops::KvShape;
use moe_core::{ParamInit, ParamSpec, SplitKind};

/// Causal attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AttentionConfig {
    /// Query heads that share key and value heads, or each have their own.
    GroupedQuery(GroupedQueryConfig),
    /// Keys and values of all heads from one short row of a token.
    Latent(LatentConfig),
}

/// Attention whose query heads share key and value heads, or each have their own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupedQueryConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Heads of the queries.
    pub num_heads: usize,
    /// Heads of the keys and values; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// How queries, keys and values are projected.
    pub projection: Projection,
    /// Whether the projections of queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// An RMSNorm of each head of queries and keys without a weight, after they have turned: what is added to the mean square.
    pub turned_norm: Option<f64>,
    /// A factor on the queries that grows with their position.
    pub temperature: Option<Temperature>,
    /// Whether each head has a sink (`sinks`): a learned logit more in the softmax's denominator.
    pub sinks: bool,
    /// Rotary positions; none if `None`.
    pub rotary: Option<RotaryConfig>,
    /// Most tokens that a query sees, itself included; all before it if `None`.
    pub window: Option<usize>,
    /// Tokens of a chunk, if a query sees only those of its own.
    pub chunk: Option<usize>,
    /// Factor on the product of a query and a key; `head_dim^-1/2` if `None`.
    pub scale: Option<f64>,
    /// Standard deviation of the initial projections.
    pub in_std: f64,
    /// The same of the output projection.
    pub out_std: f64,
}

/// Whether queries, keys and values come from one matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// `qkv_proj`: queries, keys and values of one width, so that a split over ranks cuts each of them alike.
    Fused,
    /// `q_proj`, `k_proj`, `v_proj`
    Separate,
}

/// An RMSNorm of queries and keys, before they turn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QkNorm {
    /// Added to the mean square.
    pub epsilon: f64,
    /// What has a norm.
    pub span: NormSpan,
}

/// A factor on the queries at position `p`: `1 + scale ln(1 + floor((p + 1) / floor))`.
///
/// # Source
/// Scalable-Softmax (2501.19399), as transformers 5.23 `models/llama4` has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// How fast it grows (`attn_scale`).
    pub scale: f64,
    /// Positions from one step to the next (`floor_scale`).
    pub floor: f64,
}

impl Temperature {
    /// The factor at a position.
    pub fn at(&self, position: u32) -> f64 {
        ((f64::from(position) + 1.0) / self.floor).floor().ln_1p() * self.scale + 1.0
    }
}

/// What of a token's queries or keys has one norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormSpan {
    /// Each head, all with the same weight (Qwen3).
    Head,
    /// All heads together (OLMoE).
    Heads,
}

impl GroupedQueryConfig {
    /// Columns of keys and of values.
    pub fn kv_width(&self) -> usize {
        self.kv_shape().width()
    }

    /// What a layer's cache keeps of a token.
    pub fn kv_shape(&self) -> KvShape {
        KvShape { num_kv_heads: self.num_kv_heads, head_dim: self.head_dim }
    }

    /// Columns of the queries.
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Twice the keys that a token of `seq_len` sees on average.
    fn attended_twice(&self, seq_len: usize) -> usize {
        match (self.window, self.chunk) {
            (Some(window), _) if window < seq_len => 2 * window - window * window / seq_len,
            (_, Some(chunk)) if chunk < seq_len => chunk,
            _ => seq_len,
        }
    }

    /// The projections with their names: one, or those of queries, keys and values.
    pub fn projections(&self) -> Vec<(&'static str, LinearConfig)> {
        let linear = |out_features, parts| LinearConfig {
            in_features: self.d_model,
            out_features,
            bias: self.qkv_bias,
            split: LinearSplit::Columns { parts },
            std: self.in_std,
        };
        match self.projection {
            Projection::Fused => vec![("qkv_proj", linear(self.q_width() + 2 * self.kv_width(), 3))],
            Projection::Separate => vec![
                ("q_proj", linear(self.q_width(), 1)),
                ("k_proj", linear(self.kv_width(), 1)),
                ("v_proj", linear(self.kv_width(), 1)),
            ],
        }
    }

    /// `o_proj`
    pub fn out(&self) -> LinearConfig {
        LinearConfig {
            in_features: self.q_width(),
            out_features: self.d_model,
            bias: self.out_bias,
            split: LinearSplit::Rows,
            std: self.out_std,
        }
    }

    /// The norms of queries (`q_norm`) and keys (`k_norm`).
    pub fn qk_norms(&self) -> Option<[NormConfig; 2]> {
        self.qk_norm.map(|QkNorm { epsilon, span }| {
            let widths = match span {
                NormSpan::Head => [self.head_dim; 2],
                NormSpan::Heads => [self.q_width(), self.kv_width()],
            };
            widths.map(|width| NormConfig { kind: NormKind::RmsNorm, width, epsilon })
        })
    }

    /// `sinks` `[num_heads]`
    pub fn sinks(&self) -> Option<ParamSpec> {
        let spec = || ParamSpec::new("sinks", &[self.num_heads], ParamInit::Normal(self.in_std));
        self.sinks.then(|| spec().split(SplitKind::Tensor, 0, 1))
    }

    fn params(&self) -> Vec<ParamSpec> {
        let mut params = Vec::new();
        for (name, linear) in self.projections() {
            params.extend(below(name, linear.params()));
        }
        params.extend(below("o_proj", self.out().params()));
        for (name, norm) in ["q_norm", "k_norm"].into_iter().zip(self.qk_norms().into_iter().flatten()) {
            params.extend(below(name, norm.params()));
        }
        params.extend(self.sinks());
        params
    }

    /// A rank's heads.
    fn on_rank(&self, ranks: usize) -> Result<Self> {
        for (name, heads) in [("num_heads", self.num_heads), ("num_kv_heads", self.num_kv_heads)] {
            if !heads.is_multiple_of(ranks) {
                return Err(Error::Config(format!("tp {ranks} must divide {name} {heads}")));
            }
        }
        if ranks > 1 && self.qk_norm.is_some_and(|norm| norm.span == NormSpan::Heads) {
            return Err(Error::Config(format!(
                "tp must be 1, got {ranks}: the norms of queries and keys span all heads of this model"
            )));
        }
        Ok(Self { num_heads: self.num_heads / ranks, num_kv_heads: self.num_kv_heads / ranks, ..*self })
    }

    fn validate(&self) -> Checked<()> {
        let (heads, kv_heads, dim) = (self.num_heads, self.num_kv_heads, self.head_dim);
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) || !(1..=MOST).contains(&dim) {
            return Err(format!(
                "num_kv_heads {kv_heads} must divide num_heads {heads}, and neither they nor head_dim {dim} may be 0"
            ));
        }
        if self.projection == Projection::Fused && kv_heads != heads {
            return Err(format!(
                "projection Fused needs as many num_kv_heads as num_heads, got {kv_heads} and {heads}; use Separate"
            ));
        }
        if self.window == Some(0) {
            return Err("window must be at least 1, got 0; leave it out to see all tokens".into());
        }
        if self.chunk == Some(0) {
            return Err("chunk must be at least 1, got 0; leave it out to see all tokens".into());
        }
        if let Some(Temperature { scale, floor }) = self.temperature
            && !(is_positive(floor) && scale >= 0.0 && scale.is_finite())
        {
            return Err(format!(
                "temperature must have a positive floor and a scale of 0 or more, got {floor} and {scale}"
            ));
        }
        if let Some(scale) = self.scale.filter(|scale| !is_positive(*scale)) {
            return Err(format!("scale must be a positive number, got {scale}"));
        }
        if let Some(rotary) = self.rotary {
            rotary.frequencies().map_err(|e| e.to_string())?;
        }
        if heads.saturating_mul(dim) > MOST {
            return Err(format!("{heads} heads of {dim} columns are more than {MOST}"));
        }
        Ok(())
    }
}

/// Multi-head latent attention: a token has one row of `kv_rank` columns, from which every head has its keys and values by a
/// matrix of its own, and one key of `rope_dim` columns that turns with its position, for all heads.
///
/// The matrices of the heads are multiplied with queries and results instead of keys and values (the absorbed form), so that
/// the row and the turned key are all that a cache keeps, and one computation serves prompts and single tokens.
///
/// # Source
/// DeepSeek-V2 (2405.04434), section 2.1 and appendix C; transformers 5.23 `models/deepseek_v3`, whose names these are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Heads.
    pub num_heads: usize,
    /// Columns that queries are made of (`q_lora_rank`); of the stream itself if `None`.
    pub q_rank: Option<usize>,
    /// Columns that keys and values are made of (`kv_lora_rank`).
    pub kv_rank: usize,
    /// Columns of a head's queries and keys that do not turn (`qk_nope_head_dim`).
    pub nope_dim: usize,
    /// Columns that turn (`qk_rope_head_dim`).
    pub rope_dim: usize,
    /// Columns of a head's values (`v_head_dim`).
    pub value_dim: usize,
    /// Whether the projections to `q_rank` and `kv_rank` columns and the output projection have a bias.
    pub bias: bool,
    /// Epsilon of the norms of the rows of `q_rank` and `kv_rank` columns.
    pub epsilon: f64,
    /// How the turning columns turn.
    pub rotary: RotaryConfig,
    /// Factor on the product of a query and a key.
    pub scale: f64,
    /// Standard deviation of the initial projections.
    pub std: f64,
}

impl LatentConfig {
    /// What a layer's cache keeps of a token: the row and the turned key, as one key head, which are the values too.
    pub fn kv_shape(&self) -> KvShape {
        KvShape { num_kv_heads: 1, head_dim: self.kv_rank + self.rope_dim }
    }

    /// Columns of a head's queries before they meet the matrices of the heads.
    pub fn head_dim(&self) -> usize {
        self.nope_dim + self.rope_dim
    }

    fn linear(&self, in_features: usize, out_features: usize, bias: bool) -> LinearConfig {
        LinearConfig { in_features, out_features, bias, split: LinearSplit::Whole, std: self.std }
    }

    /// `q_a_proj` and `q_b_proj`, or `q_proj` alone.
    pub fn queries(&self) -> Vec<(&'static str, LinearConfig)> {
        let width = self.num_heads * self.head_dim();
        match self.q_rank {
            None => vec![("q_proj", self.linear(self.d_model, width, false))],
            Some(rank) => vec![
                ("q_a_proj", self.linear(self.d_model, rank, self.bias)),
                ("q_b_proj", self.linear(rank, width, false)),
            ],
        }
    }

    /// `kv_a_proj_with_mqa`: the row and the key that turns.
    pub fn keys(&self) -> LinearConfig {
        self.linear(self.d_model, self.kv_rank + self.rope_dim, self.bias)
    }

    /// `kv_b_proj`: for each head the matrix of its keys and below it that of its values.
    pub fn heads(&self) -> LinearConfig {
        self.linear(self.kv_rank, self.num_heads * (self.nope_dim + self.value_dim), false)
    }

    /// `o_proj`
    pub fn out(&self) -> LinearConfig {
        self.linear(self.num_heads * self.value_dim, self.d_model, self.bias)
    }

    /// `q_a_layernorm`, `kv_a_layernorm`
    pub fn norm(&self, width: usize) -> NormConfig {
        NormConfig { kind: NormKind::RmsNorm, width, epsilon: self.epsilon }
    }

    fn params(&self) -> Vec<ParamSpec> {
        let mut params = Vec::new();
        for (name, linear) in self.queries() {
            params.extend(below(name, linear.params()));
            if name == "q_a_proj" {
                params.extend(below("q_a_layernorm", self.norm(linear.out_features).params()));
            }
        }
        params.extend(below("kv_a_proj_with_mqa", self.keys().params()));
        params.extend(below("kv_a_layernorm", self.norm(self.kv_rank).params()));
        params.extend(below("kv_b_proj", self.heads().params()));
        params.extend(below("o_proj", self.out().params()));
        params
    }

    fn on_rank(&self, ranks: usize) -> Result<Self> {
        match ranks {
            1 => Ok(*self),
            _ => Err(Error::Config(format!(
                "tp must be 1, got {ranks}: latent attention is not divided over ranks; experts are (ep, expert_slices)"
            ))),
        }
    }

    fn validate(&self) -> Checked<()> {
        let sizes = [
            ("num_heads", self.num_heads),
            ("q_rank", self.q_rank.unwrap_or(1)),
            ("kv_rank", self.kv_rank),
            ("nope_dim", self.nope_dim),
            ("rope_dim", self.rope_dim),
            ("value_dim", self.value_dim),
        ];
        if let Some((name, size)) = sizes.iter().find(|(_, size)| !(1..=MOST).contains(size)) {
            return Err(format!("{name} must be between 1 and {MOST}, got {size}"));
        }
        let widest = self.kv_rank.max(self.nope_dim + self.value_dim) + self.rope_dim;
        if self.num_heads.saturating_mul(widest) > MOST {
            return Err(format!("{} heads of {widest} columns are more than {MOST}", self.num_heads));
        }
        match is_positive(self.scale) {
            true => Ok(()),
            false => Err(format!("scale must be a positive number, got {}", self.scale)),
        }
    }
}

fn is_positive(number: f64) -> bool {
    number > 0.0 && number.is_finite()
}

impl AttentionConfig {
    /// Width of the residual stream.
    pub fn d_model(&self) -> usize {
        match self {
            Self::GroupedQuery(config) => config.d_model,
            Self::Latent(config) => config.d_model,
        }
    }

    /// What a layer's cache keeps of a token.
    pub fn kv_shape(&self) -> KvShape {
        match self {
            Self::GroupedQuery(config) => config.kv_shape(),
            Self::Latent(config) => config.kv_shape(),
        }
    }

    /// What a rank of so many that share it holds.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be divided so.
    pub fn on_rank(&self, ranks: usize) -> Result<Self> {
        Ok(match self {
            Self::GroupedQuery(config) => Self::GroupedQuery(config.on_rank(ranks)?),
            Self::Latent(config) => Self::Latent(config.on_rank(ranks)?),
        })
    }

    /// Multiply-adds of the matrix products of one token, without attention's own.
    pub fn products_per_token(&self) -> usize {
        match self {
            Self::GroupedQuery(config) => config.d_model * 2 * (config.q_width() + config.kv_width()),
            Self::Latent(config) => {
                let maps = config.queries().into_iter().map(|(_, linear)| linear);
                let maps = maps.chain([config.keys(), config.heads(), config.out()]);
                maps.map(|linear| linear.in_features * linear.out_features).sum()
            }
        }
    }

    /// Multiply-adds of the products with the keys and values of `seq_len` tokens, of one token on average.
    pub fn context_products_per_token(&self, seq_len: usize) -> usize {
        match self {
            Self::GroupedQuery(config) => config.q_width() * config.attended_twice(seq_len),
            Self::Latent(config) => config.num_heads * config.kv_shape().width() * seq_len,
        }
    }

    /// Columns of a token that a training pass keeps of queries, keys, values and results.
    pub fn kept_columns(&self) -> usize {
        match self {
            Self::GroupedQuery(config) => 2 * (config.q_width() + config.kv_width()),
            Self::Latent(config) => {
                let (row, heads) = (config.kv_shape().width(), config.num_heads);
                2 * row + heads * (2 * config.head_dim() + 2 * row + config.value_dim)
            }
        }
    }

    pub(super) fn params(&self) -> Vec<ParamSpec> {
        match self {
            Self::GroupedQuery(config) => config.params(),
            Self::Latent(config) => config.params(),
        }
    }

    /// The reason why no model can be so.
    pub(super) fn validate(&self) -> Checked<()> {
        match self {
            Self::GroupedQuery(config) => config.validate(),
            Self::Latent(config) => config.validate(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RotaryScaling;
    use crate::families::Family;
    use crate::gpt::GptConfig;
    use moe_core::ops::RotaryLayout;

    /// DeepSeek-V2-Lite's.
    fn latent(q_rank: Option<usize>) -> LatentConfig {
        LatentConfig {
            d_model: 2048,
            num_heads: 16,
            q_rank,
            kv_rank: 512,
            nope_dim: 128,
            rope_dim: 64,
            value_dim: 128,
            bias: false,
            epsilon: 1e-6,
            rotary: RotaryConfig {
                layout: RotaryLayout::Interleaved,
                rotary_dim: 64,
                theta: 1e4,
                scaling: RotaryScaling::None,
            },
            scale: 0.1,
            std: 0.02,
        }
    }

    /// By hand: queries, the row, the matrices of the heads, the output.
    #[test]
    fn latent_attention_costs_what_its_matrices_and_rows_are() {
        let whole = AttentionConfig::Latent(latent(None));
        assert_eq!(whole.products_per_token(), 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048);
        let low = AttentionConfig::Latent(latent(Some(1536)));
        let saved = 2048 * 3072 - (2048 * 1536 + 1536 * 3072);
        assert_eq!(whole.products_per_token() as isize - low.products_per_token() as isize, saved);
        let elements: usize = whole.params().iter().map(ParamSpec::elem_count).sum();
        assert_eq!(elements, whole.products_per_token() + 512, "and one norm");
        // The row before and after its norm; of each head a query, the same absorbed, its sum and its value.
        assert_eq!(whole.kept_columns(), 2 * 576 + 16 * (2 * 192 + 2 * 576 + 128));
        assert_eq!(whole.kv_shape().width(), 576);
    }

    /// Causal: half of what there is; the last of a window, and what a chunk has begun with.
    #[test]
    fn products_with_keys_and_values_know_how_far_a_token_sees() {
        let decoder = GptConfig::preset("tiny-dense").unwrap().decoder().unwrap();
        let AttentionConfig::GroupedQuery(whole) = decoder.layers[0].attention else { unreachable!() };
        let products =
            |config: GroupedQueryConfig| AttentionConfig::GroupedQuery(config).context_products_per_token(64);
        let width = whole.q_width();
        assert_eq!(products(whole), 64 * width);
        assert_eq!(products(GroupedQueryConfig { window: Some(16), ..whole }), (2 * 16 - 4) * width);
        assert_eq!(products(GroupedQueryConfig { window: Some(64), ..whole }), 64 * width);
        assert_eq!(products(GroupedQueryConfig { chunk: Some(16), ..whole }), 16 * width);
        assert_eq!(AttentionConfig::Latent(latent(None)).context_products_per_token(64), 16 * 576 * 64);
        let flops = 2 * (decoder.products_per_token() + decoder.layers.len() * width * decoder.max_seq_len);
        assert_eq!(decoder.flops_per_token(), flops);
    }

    #[test]
    fn impossible_latent_attention_is_refused() {
        let refused = |change: fn(&mut LatentConfig), part: &str| {
            let mut config = latent(Some(1536));
            change(&mut config);
            let reason = config.validate().unwrap_err();
            assert!(reason.contains(part), "{reason:?} should name {part:?}");
        };
        latent(Some(1536)).validate().unwrap();
        refused(|c| c.q_rank = Some(0), "q_rank must be between 1");
        refused(|c| c.value_dim = 0, "value_dim must be between 1");
        refused(|c| c.num_heads = 1 << 20, "heads of");
        refused(|c| c.scale = f64::NAN, "scale must be a positive number");
    }
}
