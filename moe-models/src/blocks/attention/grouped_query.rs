//! [`GroupedQuery`]: projections, norms of heads, rotary positions and the attention itself.

use super::Rotaries;
use crate::Result;
use crate::blocks::{Linear, Norm};
use crate::cache::PagedStep;
use crate::config::{GroupedQueryConfig, NormSpan, Projection};
use candle_core::{D, DType, Tensor};
use candle_nn::VarBuilder;
use moe_core::ops::{AttentionShape, Dropout, HeadDropout, PagedKv, Positions, RotaryTable, check_sequences};
use moe_core::{Ops, Weight};
use std::sync::Arc;
use tracing::debug_span;

/// Attention whose query heads share key and value heads, or each have their own.
#[derive(Debug)]
pub(super) struct GroupedQuery {
    projections: Vec<Linear>,
    out: Linear,
    /// Of queries and keys.
    qk_norms: Option<[Norm; 2]>,
    /// Ones, where queries and keys have a norm without a weight once they have turned.
    ones: Option<Tensor>,
    /// One of each head.
    sinks: Option<Tensor>,
    rotary: Option<RotaryTable>,
    config: GroupedQueryConfig,
    ops: Arc<dyn Ops>,
}

impl GroupedQuery {
    pub(super) fn new(
        config: &GroupedQueryConfig,
        vb: VarBuilder<'_>,
        ops: Arc<dyn Ops>,
        rotaries: &mut Rotaries,
    ) -> Result<Self> {
        let linear = |(name, linear): (&str, _)| Linear::new(&linear, vb.pp(name), Arc::clone(&ops));
        let norm = |name: &str, norm| Norm::new(&norm, vb.pp(name), Arc::clone(&ops));
        let qk_norms = match config.qk_norms() {
            Some([q, k]) => Some([norm("q_norm", q)?, norm("k_norm", k)?]),
            None => None,
        };
        Ok(Self {
            projections: config.projections().into_iter().map(linear).collect::<Result<_>>()?,
            out: linear(("o_proj", config.out()))?,
            qk_norms,
            ones: config.turned_norm.map(|_| Tensor::ones(config.head_dim, DType::F32, vb.device())).transpose()?,
            sinks: config.sinks().map(|spec| spec.get(&vb)).transpose()?,
            rotary: config.rotary.map(|rotary| rotaries.get(rotary, config.head_dim)).transpose()?,
            config: *config,
            ops: Arc::clone(&ops),
        })
    }

    pub(super) fn weights(&self) -> Vec<&Weight> {
        self.projections.iter().chain([&self.out]).map(Linear::weight).collect()
    }

    fn shape(&self) -> AttentionShape {
        AttentionShape {
            window: self.config.window,
            chunk: self.config.chunk,
            scale: self.config.scale.map(|scale| scale as f32),
            ..AttentionShape::new(self.config.num_heads, self.config.num_kv_heads)
        }
    }

    /// Queries, keys and values of `[tokens, d_model]`, ready to be multiplied.
    fn qkv(&self, x: &Tensor, positions: &[u32]) -> Result<[Tensor; 3]> {
        let (q_width, kv_width) = (self.config.q_width(), self.config.kv_width());
        let [mut q, mut k, v] = match self.projections.as_slice() {
            [q, k, v] => [q.forward(x)?, k.forward(x)?, v.forward(x)?],
            all => {
                let qkv = all[0].forward(x)?;
                let part = |start, width| qkv.narrow(D::Minus1, start, width);
                [part(0, q_width)?, part(q_width, kv_width)?, part(q_width + kv_width, kv_width)?]
            }
        };
        if let (Some([q_norm, k_norm]), Some(config)) = (&self.qk_norms, self.config.qk_norm) {
            (q, k) = match config.span {
                NormSpan::Head => (q_norm.forward_heads(&q)?, k_norm.forward_heads(&k)?),
                NormSpan::Heads => (q_norm.forward(&q)?, k_norm.forward(&k)?),
            };
        }
        if let (Some(table), Some(rotary)) = (&self.rotary, self.config.rotary) {
            let _rotary = debug_span!("rotary").entered();
            q = self.ops.rotary(&q, table, rotary.layout, Positions::Each(positions))?;
            k = self.ops.rotary(&k, table, rotary.layout, Positions::Each(positions))?;
        }
        if let (Some(ones), Some(epsilon)) = (&self.ones, self.config.turned_norm) {
            let _norm = debug_span!("norm").entered();
            let normed = |x: Tensor| -> Result<Tensor> {
                let heads = x.reshape(((), self.config.head_dim))?;
                Ok(self.ops.rms_norm(&heads, &ones.to_dtype(x.dtype())?, epsilon)?.reshape(x.shape())?)
            };
            (q, k) = (normed(q)?, normed(k)?);
        }
        if let Some(temperature) = self.config.temperature {
            let factors = positions.iter().map(|&position| temperature.at(position) as f32);
            let factors = Tensor::from_iter(factors, q.device())?.unsqueeze(1)?.to_dtype(q.dtype())?;
            q = q.broadcast_mul(&factors)?;
        }
        Ok([q, k, v])
    }

    pub(super) fn forward(&self, x: &Tensor, seq_len: usize, dropout: Option<Dropout>) -> Result<Tensor> {
        let tokens = x.dim(0)?;
        check_sequences(tokens, seq_len)?;
        let plain = self.qk_norms.is_none()
            && self.rotary.is_none()
            && self.config.window.is_none()
            && self.config.chunk.is_none()
            && self.config.turned_norm.is_none()
            && self.config.temperature.is_none()
            && self.sinks.is_none()
            && self.config.scale.is_none();
        let attended = if self.config.projection == Projection::Fused
            && plain
            && self.config.num_heads == self.config.num_kv_heads
        {
            let qkv = self.projections[0].forward(x)?;
            match dropout.map(HeadDropout::of_all) {
                Some(dropout) => self.ops.attention_fused_dropped(&qkv, self.config.num_heads, seq_len, dropout)?,
                None => self.ops.attention_fused(&qkv, self.config.num_heads, seq_len)?,
            }
        } else {
            let positions: Vec<u32> = (0..tokens).map(|token| (token % seq_len) as u32).collect();
            let [q, k, v] = self.qkv(x, &positions)?;
            match (&self.sinks, dropout.map(HeadDropout::of_all)) {
                (Some(sinks), dropout) => {
                    self.ops.attention_with_sinks([&q, &k, &v], sinks, self.shape(), seq_len, dropout)?
                }
                (None, Some(dropout)) => self.ops.attention_dropped([&q, &k, &v], self.shape(), seq_len, dropout)?,
                (None, None) => self.ops.attention(&q, &k, &v, self.shape(), seq_len)?,
            }
        };
        self.out.forward(&attended)
    }

    pub(super) fn forward_paged(&self, x: &Tensor, step: &PagedStep, pages: PagedKv<'_>) -> Result<Tensor> {
        let [q, k, v] = debug_span!("qkv").in_scope(|| self.qkv(x, &step.positions))?;
        debug_span!("write_pages").in_scope(|| self.ops.write_pages(pages, &k, &v, &step.slots))?;
        let attended = debug_span!("read_pages").in_scope(|| match &self.sinks {
            Some(sinks) => self.ops.paged_attention_with_sinks(&q, sinks, pages, &step.sequences(), self.shape()),
            None => self.ops.paged_attention(&q, pages, &step.sequences(), self.shape()),
        })?;
        self.out.forward(&attended)
    }
}
