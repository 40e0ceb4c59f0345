//! [`Embedding`]: a table of rows by id.

use crate::Result;
use candle_core::Tensor;
use candle_nn::VarBuilder;
use moe_core::{Ops, ParamSpec, Weight, WeightSource, WeightUse};
use std::sync::Arc;

/// Rows of tokens or of positions.
#[derive(Debug, Clone)]
pub struct Embedding {
    table: Weight,
    ops: Arc<dyn Ops>,
}

impl Embedding {
    /// The table `spec` under `vb`.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn new(spec: &ParamSpec, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        let table = ops.weight(&WeightSource::new(&vb, spec), WeightUse::Table)?;
        Ok(Self { table, ops })
    }

    /// `[ids, d_model]`
    ///
    /// # Errors
    /// If an id is outside the table.
    pub fn forward(&self, ids: &[u32]) -> Result<Tensor> {
        Ok(self.ops.embedding(&self.table, ids)?)
    }

    /// The table, for an output layer that is tied to it.
    pub fn table(&self) -> &Weight {
        &self.table
    }
}
