//! [`Attention`]: causal attention over whole sequences or over pages, of the kind that its configuration names.

mod grouped_query;
mod latent;

use crate::Result;
use crate::cache::PagedStep;
use crate::config::{AttentionConfig, RotaryConfig};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use grouped_query::GroupedQuery;
use latent::Latent;
use moe_core::ops::{Dropout, KvShape, PagedKv, RotaryTable};
use moe_core::{Ops, Weight};
use std::sync::Arc;

/// Causal attention.
#[derive(Debug)]
pub struct Attention {
    kind: Kind,
    kv_shape: KvShape,
}

#[derive(Debug)]
enum Kind {
    GroupedQuery(GroupedQuery),
    Latent(Latent),
}

/// Tables of angles, one for all layers that turn alike.
#[derive(Debug)]
pub struct Rotaries {
    max_positions: usize,
    tables: Vec<(RotaryConfig, usize, RotaryTable)>,
}

impl Rotaries {
    /// For sequences of up to `max_positions` tokens.
    pub fn new(max_positions: usize) -> Self {
        Self { max_positions, tables: Vec::new() }
    }

    fn get(&mut self, config: RotaryConfig, head_dim: usize) -> Result<RotaryTable> {
        if let Some((_, _, table)) = self.tables.iter().find(|(c, dim, _)| *c == config && *dim == head_dim) {
            return Ok(table.clone());
        }
        let table = config.table(head_dim, self.max_positions)?;
        self.tables.push((config, head_dim, table.clone()));
        Ok(table)
    }
}

impl Attention {
    /// The attention whose parameters lie under `vb`.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape.
    pub fn new(
        config: &AttentionConfig,
        vb: VarBuilder<'_>,
        ops: Arc<dyn Ops>,
        rotaries: &mut Rotaries,
    ) -> Result<Self> {
        let kind = match config {
            AttentionConfig::GroupedQuery(config) => Kind::GroupedQuery(GroupedQuery::new(config, vb, ops, rotaries)?),
            AttentionConfig::Latent(config) => Kind::Latent(Latent::new(config, vb, ops, rotaries)?),
        };
        Ok(Self { kind, kv_shape: config.kv_shape() })
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        match &self.kind {
            Kind::GroupedQuery(attention) => attention.weights(),
            Kind::Latent(attention) => attention.weights(),
        }
    }

    /// What a cache keeps of a token, on this rank.
    pub fn kv_shape(&self) -> KvShape {
        self.kv_shape
    }

    /// Whole sequences of `seq_len` tokens, one after the other; `dropout` is of the probabilities.
    ///
    /// # Shapes
    /// `[batch * seq_len, d_model]` to the same
    ///
    /// # Errors
    /// If a shape does not fit.
    pub fn forward(&self, x: &Tensor, seq_len: usize, dropout: Option<Dropout>) -> Result<Tensor> {
        match &self.kind {
            Kind::GroupedQuery(attention) => attention.forward(x, seq_len, dropout),
            Kind::Latent(attention) => attention.forward(x, seq_len, dropout),
        }
    }

    /// The new tokens of a ragged batch, whose keys and values go into `pages`.
    ///
    /// # Shapes
    /// `[new tokens, d_model]` to the same
    ///
    /// # Errors
    /// If a shape does not fit.
    pub fn forward_paged(&self, x: &Tensor, step: &PagedStep, pages: PagedKv<'_>) -> Result<Tensor> {
        match &self.kind {
            Kind::GroupedQuery(attention) => attention.forward_paged(x, step, pages),
            Kind::Latent(attention) => attention.forward_paged(x, step, pages),
        }
    }
}
