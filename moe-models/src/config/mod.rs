//! [`DecoderConfig`]: what every layer of a decoder is made of. Plain data; a family's configuration becomes one.

mod attention;
mod rotary;

pub use attention::{AttentionConfig, GroupedQueryConfig, LatentConfig, NormSpan, Projection, QkNorm, Temperature};
pub(crate) use rotary::yarn_factor;
pub use rotary::{PairFactors, RotaryConfig, RotaryScaling};

use crate::params::ParamTable;
use crate::{Error, Result};
use candle_core::Tensor;
use moe_core::{BranchConfig, MlpConfig, MoeConfig, ParamInit, ParamSpec, SplitKind};
use moe_parallel::Placement;

/// A decoder-only language model.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Entries of the vocabulary, padding included.
    pub vocab_size: usize,
    /// The longest sequence.
    pub max_seq_len: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// From the first to the last.
    pub layers: Vec<LayerConfig>,
    /// The norm before the output layer.
    pub norm: NormConfig,
    /// Whether positions are learned and added to the embedding.
    pub learned_positions: bool,
    /// Whether the output layer is the embedding.
    pub tie_embeddings: bool,
    /// Whether the output layer, of its own, has a bias.
    pub head_bias: bool,
    /// Standard deviation of the initial embedding.
    pub init_std: f64,
    /// Token that separates and ends documents.
    pub eos_token_id: Option<u32>,
    /// Factors on what is computed.
    pub multipliers: Multipliers,
    /// Share of the attention's probabilities that training drops unless it is told otherwise ([`crate::Model::with_dropout`]).
    pub attention_dropout: f64,
}

/// Parameters of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParameterCount {
    /// All of them.
    pub total: usize,
    /// Those one token passes through, embeddings included.
    pub active: usize,
}

/// Factors on what is computed (Granite); 1 in most models.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Multipliers {
    /// On the embedding of a token.
    pub embedding: f64,
    /// On what each part of a layer adds to the residual stream.
    pub residual: f64,
    /// On what the output layer sees, and with it on the logits.
    pub output: f64,
}

impl Default for Multipliers {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, output: 1.0 }
    }
}

impl Multipliers {
    /// `x` times `factor`, without an operation where that is 1.
    pub(crate) fn apply(factor: f64, x: Tensor) -> Result<Tensor> {
        if factor == 1.0 { Ok(x) } else { Ok((x * factor)?) }
    }
}

/// One layer: attention and a feed-forward part, each behind a norm and added to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerConfig {
    /// The norms of both parts.
    pub norm: NormConfig,
    /// The first part.
    pub attention: AttentionConfig,
    /// The second part.
    pub feed_forward: FeedForwardConfig,
}

/// A norm over the last dimension.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormConfig {
    /// Its formula.
    pub kind: NormKind,
    /// Columns.
    pub width: usize,
    /// Added to the variance.
    pub epsilon: f64,
}

/// The formula of a norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Mean and variance, with weight and bias.
    LayerNorm,
    /// Root of the mean square, with weight.
    RmsNorm,
}

/// The part of a layer that looks at each token alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum FeedForwardConfig {
    /// One network for all tokens.
    Dense(MlpConfig),
    /// Routed experts.
    Moe(MoeConfig),
}

/// A linear map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinearConfig {
    /// Columns of the input.
    pub in_features: usize,
    /// Columns of the output.
    pub out_features: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// How ranks may split it.
    pub split: LinearSplit,
    /// Standard deviation of the initial weight.
    pub std: f64,
}

/// How ranks may split a linear map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinearSplit {
    /// Every rank holds all of it.
    Whole,
    /// Each rank computes columns of the output; `parts` equal parts of them are each split by themselves.
    Columns {
        /// 3 of `[q | k | v]`, else 1.
        parts: usize,
    },
    /// Each rank takes columns of the input, and the results are summed.
    Rows,
}

impl LinearConfig {
    /// `weight` `[out_features, in_features]`
    pub fn weight(&self) -> ParamSpec {
        let spec = ParamSpec::new("weight", &[self.out_features, self.in_features], ParamInit::Normal(self.std));
        match self.split {
            LinearSplit::Whole => spec,
            LinearSplit::Columns { parts } => spec.split(SplitKind::Tensor, 0, parts),
            LinearSplit::Rows => spec.split(SplitKind::Tensor, 1, 1),
        }
    }

    /// `bias` `[out_features]`
    pub fn bias(&self) -> Option<ParamSpec> {
        let spec = || ParamSpec::new("bias", &[self.out_features], ParamInit::Zeros);
        self.bias.then(|| match self.split {
            LinearSplit::Columns { parts } => spec().split(SplitKind::Tensor, 0, parts),
            LinearSplit::Whole | LinearSplit::Rows => spec(),
        })
    }

    /// All parameters.
    pub fn params(&self) -> Vec<ParamSpec> {
        [self.weight()].into_iter().chain(self.bias()).collect()
    }
}

impl NormConfig {
    /// `weight` `[width]`
    pub fn weight(&self) -> ParamSpec {
        ParamSpec::new("weight", &[self.width], ParamInit::Ones)
    }

    /// `bias` `[width]`
    pub fn bias(&self) -> Option<ParamSpec> {
        (self.kind == NormKind::LayerNorm).then(|| ParamSpec::new("bias", &[self.width], ParamInit::Zeros))
    }

    /// All parameters.
    pub fn params(&self) -> Vec<ParamSpec> {
        [self.weight()].into_iter().chain(self.bias()).collect()
    }
}

impl FeedForwardConfig {
    fn params(&self) -> Vec<ParamSpec> {
        match self {
            Self::Dense(mlp) => mlp.params(),
            Self::Moe(moe) => moe.params(),
        }
    }

    /// The experts, if there are any.
    pub fn moe(&self) -> Option<&MoeConfig> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(moe) => Some(moe),
        }
    }
}

impl LayerConfig {
    /// What a rank holds of this layer: its heads of the attention, its columns of the inner widths. Experts are counted over
    /// all ranks still.
    ///
    /// # Errors
    /// [`Error::Config`] if heads or columns cannot be split over so many ranks.
    pub fn on_rank(&self, placement: &Placement) -> Result<Self> {
        let (_, ranks) = placement.tensor();
        let attention = self.attention.on_rank(ranks)?;
        let feed_forward = match self.feed_forward {
            FeedForwardConfig::Dense(mlp) => FeedForwardConfig::Dense(placement.mlp(mlp)?),
            FeedForwardConfig::Moe(moe) => FeedForwardConfig::Moe(placement.moe(&moe)?),
        };
        Ok(Self { attention, feed_forward, ..*self })
    }

    fn params(&self) -> Vec<ParamSpec> {
        let parts = [
            ("input_layernorm", self.norm.params()),
            ("self_attn", self.attention.params()),
            ("post_attention_layernorm", self.norm.params()),
            ("mlp", self.feed_forward.params()),
        ];
        parts.into_iter().flat_map(|(name, params)| below(name, params)).collect()
    }
}

fn below(prefix: &str, params: Vec<ParamSpec>) -> Vec<ParamSpec> {
    params.into_iter().map(|spec| spec.below(prefix)).collect()
}

/// Refuses sizes no model has, before anything of that size is allocated.
const MOST: usize = 1 << 24;
/// Most layers.
pub(crate) const MOST_LAYERS: usize = 1 << 12;

impl DecoderConfig {
    /// Checks that the layers fit each other. A family checks its own values first and names them as its files do.
    ///
    /// # Errors
    /// [`Error::Config`] naming the layer and the value.
    pub fn validate(&self) -> Result<()> {
        let refuse = |text: String| Err(Error::Config(text));
        let sizes = [("vocab_size", self.vocab_size), ("max_seq_len", self.max_seq_len), ("d_model", self.d_model)];
        for (name, size) in sizes {
            if !(1..=MOST).contains(&size) {
                return refuse(format!("{name} must be between 1 and {MOST}, got {size}"));
            }
        }
        if self.layers.is_empty() || self.layers.len() > MOST_LAYERS {
            return refuse(format!("num_layers must be between 1 and {MOST_LAYERS}, got {}", self.layers.len()));
        }
        if self.head_bias && self.tie_embeddings {
            return refuse("an output layer that is the embedding has no bias; tie_embeddings must be false".into());
        }
        let Multipliers { embedding, residual, output } = self.multipliers;
        for (name, factor) in [("embedding", embedding), ("residual", residual), ("output", output)] {
            if !(factor.is_finite() && factor > 0.0) {
                return refuse(format!("multipliers.{name} must be a positive number, got {factor}"));
            }
        }
        for (index, layer) in self.layers.iter().enumerate() {
            layer.attention.validate().or_else(|reason| refuse(format!("layer {index}: {reason}")))?;
            let width = match &layer.feed_forward {
                FeedForwardConfig::Dense(mlp) => mlp.d_model,
                FeedForwardConfig::Moe(moe) => {
                    moe.validate().map_err(|e| Error::Config(format!("layer {index}: {e}")))?;
                    moe.expert.d_model
                }
            };
            for got in [width, layer.attention.d_model(), layer.norm.width] {
                if got != self.d_model {
                    return refuse(format!("layer {index} has width {got}, but d_model is {}", self.d_model));
                }
            }
        }
        Ok(())
    }

    /// `model.embed_tokens.weight`, `model.embed_positions.weight`: a table of `rows`.
    pub(crate) fn table(&self, rows: usize) -> ParamSpec {
        ParamSpec::new("weight", &[rows, self.d_model], ParamInit::Normal(self.init_std))
    }

    /// `model.embed_tokens.weight`
    pub(crate) fn embed_tokens(&self) -> ParamSpec {
        self.table(self.vocab_size).split(SplitKind::Tensor, 0, 1)
    }

    /// `lm_head`, if it is not the embedding.
    pub(crate) fn lm_head(&self) -> Option<ParamSpec> {
        (!self.tie_embeddings).then(|| self.embed_tokens())
    }

    /// `lm_head.bias`
    pub(crate) fn lm_head_bias(&self) -> Option<ParamSpec> {
        self.head_bias.then(|| ParamSpec::new("bias", &[self.vocab_size], ParamInit::Zeros))
    }

    /// Every parameter under its whole name, in the order of the forward pass.
    pub fn params(&self) -> ParamTable {
        let mut all = vec![self.embed_tokens().below("model.embed_tokens")];
        if self.learned_positions {
            all.push(self.table(self.max_seq_len).below("model.embed_positions"));
        }
        for (index, layer) in self.layers.iter().enumerate() {
            all.extend(below(&format!("model.layers.{index}"), layer.params()));
        }
        all.extend(below("model.norm", self.norm.params()));
        all.extend(self.lm_head().into_iter().chain(self.lm_head_bias()).map(|spec| spec.below("lm_head")));
        ParamTable::new(all)
    }

    /// Multiply-adds of the matrix products of one token, without attention's own.
    pub fn products_per_token(&self) -> usize {
        let mlp = |mlp: &MlpConfig| (mlp.activation.inputs() + 1) * mlp.d_model * mlp.d_ff;
        let layer = |layer: &LayerConfig| {
            let feed_forward = match &layer.feed_forward {
                FeedForwardConfig::Dense(dense) => mlp(dense),
                FeedForwardConfig::Moe(moe) => {
                    let branch = match &moe.branch {
                        BranchConfig::None => 0,
                        BranchConfig::Residual(fixed) | BranchConfig::Shared { mlp: fixed, .. } => mlp(fixed),
                    };
                    moe.num_experts * moe.expert.d_model + moe.router.top_k() * mlp(&moe.expert) + branch
                }
            };
            layer.attention.products_per_token() + feed_forward
        };
        self.layers.iter().map(layer).sum::<usize>() + self.vocab_size * self.d_model
    }

    /// Multiplications and additions of a forward pass per token, at full context: twice the weights that multiply, and the products
    /// of attention.
    pub fn flops_per_token(&self) -> usize {
        let context = |layer: &LayerConfig| layer.attention.context_products_per_token(self.max_seq_len);
        2 * (self.products_per_token() + self.layers.iter().map(context).sum::<usize>())
    }

    /// Parameters in all, and on one token's path.
    pub fn parameter_count(&self) -> ParameterCount {
        let idle = |moe: &MoeConfig| {
            let params = moe.params();
            let experts: usize = params.iter().filter(|spec| spec.is_stacked()).map(ParamSpec::elem_count).sum();
            experts / moe.num_experts * (moe.num_experts - moe.router.top_k())
        };
        let idle: usize = self.layers.iter().filter_map(|layer| layer.feed_forward.moe()).map(idle).sum();
        let total = self.params().elem_count();
        ParameterCount { total, active: total - idle }
    }

    /// Refuses a division of what lies outside the layers over `tp` ranks that share matrices.
    pub(crate) fn check_tensor_ranks(&self, tp: usize) -> Result<()> {
        if tp > 1 && self.head_bias {
            return Err(Error::Config(format!(
                "tp must be 1, got {tp}: an output layer with a bias (lm_head_bias) is not divided over ranks; experts are (ep, \
                 expert_slices)"
            )));
        }
        Ok(())
    }

    /// `(layer, num_experts)` of each MoE layer, in layer order.
    pub fn moe_layers(&self) -> Vec<(usize, usize)> {
        let experts = |(index, layer): (usize, &LayerConfig)| Some((index, layer.feed_forward.moe()?.num_experts));
        self.layers.iter().enumerate().filter_map(experts).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::{Family, gpt::GptConfig};

    #[track_caller]
    fn check(change: impl FnOnce(&mut GroupedQueryConfig), refusal: Option<&str>) {
        let mut config = GptConfig::preset("tiny-dense").unwrap().decoder().unwrap();
        let AttentionConfig::GroupedQuery(attention) = &mut config.layers[1].attention else { unreachable!() };
        change(attention);
        let text = config.validate().map_err(|e| e.to_string());
        match refusal {
            None => text.unwrap(),
            Some(part) => assert!(text.as_ref().is_err_and(|t| t.contains(part)), "{text:?} should name {part:?}"),
        }
    }

    #[test]
    fn impossible_attention_is_refused() {
        check(|_| {}, None);
        check(|a| a.num_kv_heads = 0, Some("layer 1: num_kv_heads 0 must divide"));
        check(|a| a.window = Some(0), Some("layer 1: window must be at least 1"));
        check(|a| a.scale = Some(0.0), Some("layer 1: scale must be a positive number"));
        check(|a| a.scale = Some(0.1), None);
        check(|a| a.d_model += 1, Some("layer 1 has width"));
    }

    /// Fused, the matrix is cut into three equal parts for the ranks, which keys and values of fewer heads are not.
    #[test]
    fn fewer_heads_of_keys_and_values_need_projections_of_their_own() {
        check(|a| a.num_kv_heads = a.num_heads / 2, Some("layer 1: projection Fused needs as many num_kv_heads"));
        check(|a| (a.num_kv_heads, a.projection) = (a.num_heads / 2, Projection::Separate), None);
    }
}
