//! [`Latent`]: multi-head latent attention in its absorbed form.
//!
//! With `c` the normed row of a token and `k` its turned key, head `h` of a query `q = [q_nope | q_rope]` sees
//!
//! ```text
//! score = q_nope (K_h c) + q_rope k = (K_h^T q_nope | q_rope) (c | k)       value = V_h c
//! ```
//!
//! so that all heads share one key `(c | k)`, which is the value too; `V_h` comes after the weighted sum.

use super::Rotaries;
use crate::Result;
use crate::blocks::{Linear, Norm};
use crate::cache::PagedStep;
use crate::config::LatentConfig;
use candle_core::{DType, Tensor};
use candle_nn::VarBuilder;
use moe_core::ops::{AttentionShape, Dropout, HeadDropout, PagedKv, Positions, RotaryTable, check_sequences};
use moe_core::{Ops, ParamInit, ParamSpec, Weight, WeightSource, WeightUse};
use std::collections::HashMap;
use std::sync::Arc;
use tracing::debug_span;

/// Multi-head latent attention.
#[derive(Debug)]
pub(super) struct Latent {
    queries: Queries,
    /// To `(c | k)`.
    keys: Linear,
    keys_norm: Norm,
    heads: Heads,
    out: Linear,
    rotary: RotaryTable,
    config: LatentConfig,
    ops: Arc<dyn Ops>,
}

/// What makes queries.
#[derive(Debug)]
enum Queries {
    Whole(Linear),
    /// Through few columns and a norm of them.
    Low(Linear, Norm, Linear),
}

/// The matrices of the heads.
#[derive(Debug)]
enum Heads {
    /// `kv_b_proj` as it is; it may change from pass to pass.
    Stored(Weight),
    /// Those of keys, transposed, and those of values, in the form that is multiplied with.
    Packed([Weight; 2]),
}

impl Latent {
    pub(super) fn new(
        config: &LatentConfig,
        vb: VarBuilder<'_>,
        ops: Arc<dyn Ops>,
        rotaries: &mut Rotaries,
    ) -> Result<Self> {
        let linear = |(name, linear): (&str, _)| Linear::new(&linear, vb.pp(name), Arc::clone(&ops));
        let norm = |name: &str, width| Norm::new(&config.norm(width), vb.pp(name), Arc::clone(&ops));
        let queries = match config.queries().as_slice() {
            [low, high] => Queries::Low(linear(*low)?, norm("q_a_layernorm", low.1.out_features)?, linear(*high)?),
            all => Queries::Whole(linear(all[0])?),
        };
        Ok(Self {
            queries,
            keys: linear(("kv_a_proj_with_mqa", config.keys()))?,
            keys_norm: norm("kv_a_layernorm", config.kv_rank)?,
            heads: Heads::new(config, &vb.pp("kv_b_proj"), &*ops)?,
            out: linear(("o_proj", config.out()))?,
            rotary: rotaries.get(config.rotary, config.rope_dim)?,
            config: *config,
            ops: Arc::clone(&ops),
        })
    }

    pub(super) fn weights(&self) -> Vec<&Weight> {
        let queries = match &self.queries {
            Queries::Whole(map) => vec![map],
            Queries::Low(low, _, high) => vec![low, high],
        };
        let heads = match &self.heads {
            Heads::Stored(weight) => std::slice::from_ref(weight),
            Heads::Packed(weights) => weights,
        };
        queries.into_iter().chain([&self.keys, &self.out]).map(Linear::weight).chain(heads).collect()
    }

    fn shape(&self) -> AttentionShape {
        AttentionShape { scale: Some(self.config.scale as f32), ..AttentionShape::new(self.config.num_heads, 1) }
    }

    /// Of `[tokens, heads, in]` each head's rows times its matrix `[out, in]`: `[tokens, heads, out]`.
    fn by_head(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let (tokens, heads, width) = x.dims3()?;
        let offsets: Vec<usize> = (0..=heads).map(|head| head * tokens).collect();
        let rows = x.transpose(0, 1)?.contiguous()?.reshape((heads * tokens, width))?;
        let rows = self.ops.grouped_linear(&rows, weight, None, &offsets)?;
        let out = rows.dim(1)?;
        Ok(rows.reshape((heads, tokens, out))?.transpose(0, 1)?.contiguous()?)
    }

    /// Queries `[tokens, heads * (kv_rank + rope_dim)]` and the keys `[tokens, kv_rank + rope_dim]` that all heads share.
    fn queries_and_keys(&self, x: &Tensor, positions: Positions<'_>, matrices: &Weight) -> Result<[Tensor; 2]> {
        let LatentConfig { num_heads, kv_rank, nope_dim, rope_dim, .. } = self.config;
        let layout = self.config.rotary.layout;
        let tokens = x.dim(0)?;
        let q = match &self.queries {
            Queries::Whole(map) => map.forward(x)?,
            Queries::Low(low, norm, high) => high.forward(&norm.forward(&low.forward(x)?)?)?,
        };
        let q = q.reshape((tokens, num_heads, nope_dim + rope_dim))?;
        let absorbed = self.by_head(&q.narrow(2, 0, nope_dim)?, matrices)?;
        let turned = q.narrow(2, nope_dim, rope_dim)?.contiguous()?.reshape((tokens, num_heads * rope_dim))?;
        let turn =
            |rows: &Tensor| debug_span!("rotary").in_scope(|| self.ops.rotary(rows, &self.rotary, layout, positions));
        let turned = turn(&turned)?;
        let turned = turned.reshape((tokens, num_heads, rope_dim))?;
        let queries = Tensor::cat(&[&absorbed, &turned], 2)?.reshape((tokens, num_heads * (kv_rank + rope_dim)))?;

        let row = self.keys.forward(x)?;
        let latent = self.keys_norm.forward(&row.narrow(1, 0, kv_rank)?.contiguous()?)?;
        let key = row.narrow(1, kv_rank, rope_dim)?.contiguous()?;
        let key = turn(&key)?;
        Ok([queries, Tensor::cat(&[&latent, &key], 1)?])
    }

    /// Of the weighted sums of keys `[tokens, heads * (kv_rank + rope_dim)]` the result.
    fn results(&self, sums: &Tensor, matrices: &Weight) -> Result<Tensor> {
        let LatentConfig { num_heads, kv_rank, rope_dim, value_dim, .. } = self.config;
        let tokens = sums.dim(0)?;
        let latent = sums.reshape((tokens, num_heads, kv_rank + rope_dim))?.narrow(2, 0, kv_rank)?;
        let values = self.by_head(&latent, matrices)?;
        self.out.forward(&values.reshape((tokens, num_heads * value_dim))?)
    }

    pub(super) fn forward(&self, x: &Tensor, seq_len: usize, dropout: Option<Dropout>) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        check_sequences(tokens, seq_len)?;
        let positions: Vec<u32> = (0..tokens).map(|token| (token % seq_len) as u32).collect();
        let [of_keys, of_values] = self.heads.matrices(&self.config)?;
        let [q, k] = self.queries_and_keys(x, Positions::Each(&positions), &of_keys)?;
        let sums = match dropout.map(HeadDropout::of_all) {
            Some(dropout) => self.ops.attention_dropped([&q, &k, &k], self.shape(), seq_len, dropout)?,
            None => self.ops.attention(&q, &k, &k, self.shape(), seq_len)?,
        };
        self.results(&sums, &of_values)
    }

    pub(super) fn forward_paged(&self, x: &Tensor, step: &PagedStep, pages: PagedKv<'_>) -> Result<Tensor> {
        let [of_keys, of_values] = self.heads.matrices(&self.config)?;
        let [q, k] = self.queries_and_keys(x, Positions::Each(&step.positions), &of_keys)?;
        self.ops.write_pages(pages, &k, &k, &step.slots)?;
        let sums = self.ops.paged_attention(&q, pages, &step.sequences(), self.shape())?;
        self.results(&sums, &of_values)
    }
}

impl Heads {
    fn new(config: &LatentConfig, vb: &VarBuilder<'_>, ops: &dyn Ops) -> Result<Self> {
        let stored = config.heads().weight().get(vb)?;
        let [of_keys, of_values] = cut(config, &stored)?;
        Ok(match packed(of_keys, ops)? {
            Weight::Tensor(_) => Self::Stored(stored.into()),
            of_keys => Self::Packed([of_keys, packed(of_values, ops)?]),
        })
    }

    /// Those of keys `[heads, kv_rank, nope_dim]` and those of values `[heads, value_dim, kv_rank]`.
    fn matrices(&self, config: &LatentConfig) -> Result<[Weight; 2]> {
        Ok(match self {
            Self::Stored(stored) => cut(config, stored.tensor()?)?.map(Weight::Tensor),
            Self::Packed(weights) => weights.clone(),
        })
    }
}

/// The two kinds of matrices in `kv_b_proj`.
fn cut(config: &LatentConfig, stored: &Tensor) -> Result<[Tensor; 2]> {
    let LatentConfig { num_heads, kv_rank, nope_dim, value_dim, .. } = *config;
    let stored = stored.reshape((num_heads, nope_dim + value_dim, kv_rank))?;
    let of_keys = stored.narrow(1, 0, nope_dim)?.transpose(1, 2)?.contiguous()?;
    Ok([of_keys, stored.narrow(1, nope_dim, value_dim)?.contiguous()?])
}

/// A stack of matrices in the form that `ops` multiplies with; a tensor still if that is one.
fn packed(stack: Tensor, ops: &dyn Ops) -> Result<Weight> {
    let (heads, out, inner) = stack.dims3()?;
    let spec = ParamSpec::new("weight", &[out, inner], ParamInit::Zeros).stacked(heads);
    let device = stack.device().clone();
    let vb = VarBuilder::from_tensors(HashMap::from([(spec.name.clone(), stack)]), DType::F32, &device);
    Ok(ops.weight(&WeightSource::new(&vb, &spec), WeightUse::Product)?)
}
