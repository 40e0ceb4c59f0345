//! [`PackedMatrices`]: weights as the products read them, behind `moe-core`'s [`Weight`].

use crate::gemm::{Operand, PackedWeights, bf16_round};
use crate::{Error, Isa, Precision, Result};
use moe_core::{PackedWeight, Weight, WeightSource, WeightUse};
use std::any::Any;
use std::sync::{Arc, PoisonError, RwLock};

/// One matrix, or one per expert, packed.
#[derive(Debug)]
pub struct PackedMatrices {
    dims: Vec<usize>,
    precision: Precision,
    matrices: RwLock<Arc<Vec<PackedWeights>>>,
    /// Rows to look up, where rounding would have changed them.
    table: Option<Vec<f32>>,
}

impl PackedMatrices {
    /// Fetches matrix by matrix, so that the unpacked form is never whole in memory. Gates stay f32 whatever `precision` is.
    ///
    /// # Errors
    /// If the source has no such weight, or it is not f32 on the CPU after conversion.
    pub fn fetch(source: &WeightSource<'_>, purpose: WeightUse, isa: Isa, precision: Precision) -> Result<Self> {
        let dims = source.dims().to_vec();
        let precision = if purpose == WeightUse::Gate { Precision::F32 } else { precision };
        let mut table = None;
        let matrices = (0..source.num_matrices())
            .map(|index| {
                let values = f32_values(&source.matrix(index)?)?;
                let packed = pack(isa, precision, &values, &dims)?;
                let is_exact =
                    precision == Precision::F32 || values.iter().all(|v| v.to_bits() == bf16_round(*v).to_bits());
                if purpose == WeightUse::Table && !is_exact {
                    table = Some(values);
                }
                Ok(packed)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { dims, precision, matrices: RwLock::new(Arc::new(matrices)), table })
    }

    /// The packed form inside `weight`, if there is one.
    ///
    /// # Errors
    /// [`Error::Argument`] if another backend packed it.
    pub fn of(weight: &Weight) -> Result<Option<&Self>> {
        match weight {
            Weight::Tensor(_) => Ok(None),
            Weight::Packed(packed) => match packed.as_any().downcast_ref() {
                Some(packed) => Ok(Some(packed)),
                None => Err(Error::Argument(format!(
                    "a weight of shape {:?} is packed for another backend; use the operations it was made with",
                    packed.dims()
                ))),
            },
        }
    }

    /// All matrices as they are now.
    pub(crate) fn matrices(&self) -> Arc<Vec<PackedWeights>> {
        Arc::clone(&self.matrices.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces matrix `index` by the packed form of `values` `[out, in]`. Passes that already run go on with the old one.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such matrix or its size is another.
    pub fn rewrite(&self, index: usize, isa: Isa, values: &[f32]) -> Result<()> {
        let packed = pack(isa, self.precision, values, &self.dims)?;
        let mut matrices = self.matrices.write().unwrap_or_else(PoisonError::into_inner);
        let count = matrices.len();
        match Arc::make_mut(&mut matrices).get_mut(index) {
            Some(matrix) => *matrix = packed,
            None => return Err(Error::Argument(format!("matrix {index} is not one of the {count} of this weight"))),
        }
        Ok(())
    }

    /// Copies of the rows that `ids` name, `[ids, in]`.
    pub(crate) fn rows(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let &[rows, width] = self.dims.as_slice() else {
            return Err(Error::Argument(format!("a table must have two dimensions, got {:?}", self.dims)));
        };
        if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
            return Err(Error::Argument(format!("id {id} is outside the vocabulary of {rows}")));
        }
        let mut out = vec![0.0; ids.len() * width];
        let matrices = self.matrices();
        for (&id, into) in ids.iter().zip(out.chunks_exact_mut(width.max(1))) {
            match &self.table {
                Some(table) => into.copy_from_slice(&table[id as usize * width..][..width]),
                None => matrices[0].copy_row(id as usize, into),
            }
        }
        Ok(out)
    }
}

impl PackedWeight for PackedMatrices {
    fn dims(&self) -> &[usize] {
        &self.dims
    }

    fn bytes(&self) -> usize {
        let packed: usize = self.matrices().iter().map(PackedWeights::bytes).sum();
        packed + self.table.as_ref().map_or(0, |table| table.len() * size_of::<f32>())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn pack(isa: Isa, precision: Precision, values: &[f32], dims: &[usize]) -> Result<PackedWeights> {
    let &[.., out, inner] = dims else {
        return Err(Error::Argument(format!("a weight must have two or three dimensions, got {dims:?}")));
    };
    if values.len() != out * inner {
        return Err(Error::Argument(format!("a matrix [{out}, {inner}] cannot have {} values", values.len())));
    }
    Ok(PackedWeights::new(isa, precision, &Operand::rows(values, out, inner, inner)))
}

fn f32_values(tensor: &candle_core::Tensor) -> Result<Vec<f32>> {
    Ok(moe_core::ops::host::to_f32_vec(tensor)?)
}
