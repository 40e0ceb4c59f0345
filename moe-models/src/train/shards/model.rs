//! Models from checkpoints that ranks wrote together.

use super::index::tensors;
use super::reader::Reader;
use crate::{Model, ReadFamily, Result};
use candle_core::{Device, Tensor};
use moe_core::ParamSpec;
use moe_parallel::{Mesh, Placement};
use std::path::Path;
use std::sync::Arc;

impl<F: ReadFamily> Model<F> {
    /// A model, or one rank's part of it over `mesh`, from a checkpoint of any layout: nothing else of it is read. All ranks of
    /// `mesh` call this.
    ///
    /// # Errors
    /// As [`Reader::open`]; if the checkpoint is another model's.
    pub fn load_checkpoint(dir: &Path, mesh: Option<Arc<Mesh>>) -> Result<Self> {
        let family = F::read_file(&dir.join("config.json"))?;
        let reader = Reader::open(dir)?;
        reader.check_shapes(&tensors(family.decoder()?.params().specs(), |_| true))?;
        let value = |spec: &ParamSpec, placement: Placement| {
            let mut values = vec![0.0; placement.local_shape(spec).iter().product()];
            reader.read_weights(&placement.extents(spec), &mut values)?;
            Ok(Tensor::from_vec(values, placement.local_shape(spec), &Device::Cpu)?)
        };
        Self::of_parts(family, mesh, value)
    }
}
