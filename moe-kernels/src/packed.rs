//! [`PackedMatrices`]: weights as the products read them, behind `moe-core`'s [`Weight`].

use crate::forms::PackedForms;
use crate::gemm::{PackedWeights, bf16_round};
use crate::quantized::{IntegerMatrix, QuantFormat};
use crate::stack::{PackedStack, WeightFormat};
use crate::{Error, Isa, Precision, Result};
use candle_core::DType;
use half::bf16;
use moe_core::ops::host::to_f32_vec;
use moe_core::{PackedWeight, StoredIntegers, Weight, WeightSource, WeightUse};
use std::any::Any;
use std::sync::{Arc, PoisonError, RwLock};

/// One matrix, or one per expert, packed.
#[derive(Debug)]
pub struct PackedMatrices {
    /// Of the parameter, with all prefixes.
    name: String,
    dims: Vec<usize>,
    format: WeightFormat,
    matrices: RwLock<Arc<PackedStack>>,
    /// Rows to look up, where the matrix has rounded them.
    table: Option<Rows>,
}

/// Rows that are looked up.
#[derive(Debug)]
enum Rows {
    F32(Vec<f32>),
    /// Where that is exact.
    Bf16(Vec<bf16>),
}

impl Rows {
    /// Those of a matrix in `format`, unless it has them as they are.
    fn beside(format: WeightFormat, values: Vec<f32>) -> Option<Self> {
        let is_bf16 = values.iter().all(|v| v.to_bits() == bf16_round(*v).to_bits());
        match format {
            WeightFormat::Float(Precision::F32) => None,
            WeightFormat::Float(Precision::Bf16) if is_bf16 => None,
            _ if is_bf16 => Some(Self::Bf16(values.into_iter().map(bf16::from_f32).collect())),
            _ => Some(Self::F32(values)),
        }
    }

    fn copy(&self, row: usize, to: &mut [f32]) {
        let range = row * to.len()..(row + 1) * to.len();
        match self {
            Self::F32(rows) => to.copy_from_slice(&rows[range]),
            Self::Bf16(rows) => to.iter_mut().zip(&rows[range]).for_each(|(to, v)| *to = v.to_f32()),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(rows) => size_of_val(rows.as_slice()),
            Self::Bf16(rows) => size_of_val(rows.as_slice()),
        }
    }
}

impl PackedMatrices {
    /// Fetches matrix by matrix, so that the unpacked form is never whole in memory: as the integers that the source holds, if
    /// `forms` says that it may, else packed in the form of `purpose`. Gates stay f32 in any case.
    ///
    /// # Errors
    /// If the source has no such weight, or it is not f32 on the CPU after conversion; [`Error::Argument`] for values that the
    /// form cannot hold.
    pub fn fetch(source: &WeightSource<'_>, purpose: WeightUse, isa: Isa, forms: &PackedForms) -> Result<Self> {
        if let Some(format) = forms.stored().filter(|_| purpose != WeightUse::Gate)
            && let Some(first) = source.integers(0)?
        {
            return Self::fetch_integers(source, first, format);
        }
        let (dims, format) = (source.dims().to_vec(), forms.of(purpose));
        let (mut matrices, mut table) = (PackedStack::new(format), None);
        for index in 0..source.num_matrices() {
            if Self::push_rows(&mut matrices, source, index, isa, purpose)? {
                continue;
            }
            let values = to_f32_vec(&source.matrix(index)?)?;
            pack(&mut matrices, isa, &values, &dims)?;
            if purpose == WeightUse::Table {
                table = Rows::beside(format, values);
            }
        }
        Ok(Self { name: source.name(), dims, format, matrices: RwLock::new(Arc::new(matrices)), table })
    }

    /// Packs matrix `index` some rows at a time, if the source has them so and nothing else is to be kept of it.
    fn push_rows(
        matrices: &mut PackedStack,
        source: &WeightSource<'_>,
        index: usize,
        isa: Isa,
        purpose: WeightUse,
    ) -> Result<bool> {
        let &[.., out, inner] = source.dims() else { return Ok(false) };
        let Some(first) = source.rows(index, 0..out.min(1))? else { return Ok(false) };
        let is_kept = match matrices.format() {
            WeightFormat::Float(Precision::F32) => true,
            WeightFormat::Float(Precision::Bf16) => first.dtype() == DType::BF16,
            WeightFormat::Quantized(_) => false,
        };
        if purpose == WeightUse::Table && !is_kept {
            // Its rows are looked up too, and have to stay as they are.
            return Ok(false);
        }
        matrices.push_rows(isa, [out, inner], |rows| match source.rows(index, rows)? {
            Some(rows) => Ok(to_f32_vec(&rows)?),
            None => {
                Err(Error::Argument(format!("{} has its first row alone, and others not", source.matrix_name(index))))
            }
        })?;
        Ok(true)
    }

    fn fetch_integers(source: &WeightSource<'_>, first: StoredIntegers, format: QuantFormat) -> Result<Self> {
        let dims = source.dims().to_vec();
        let rest = (1..source.num_matrices()).map(|index| match source.integers(index)? {
            Some(stored) => Ok(stored),
            None => Err(Error::Argument(format!(
                "matrix {index} of {} is not there as integers, as matrix 0 is; quantize all or none",
                source.spec().name
            ))),
        });
        let of_stored = |stored: Result<StoredIntegers>| integer_matrix(format, &stored?);
        let matrices = [Ok(first)].into_iter().chain(rest).map(of_stored).collect::<Result<Vec<_>>>()?;
        let matrices = RwLock::new(Arc::new(PackedStack::of_integers(format, matrices)));
        Ok(Self { name: source.name(), dims, format: format.into(), matrices, table: None })
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

    /// A parameter whose matrices are these; `None` if they are not of its shape.
    pub fn of_stack(name: impl Into<String>, dims: &[usize], matrices: PackedStack) -> Option<Self> {
        let (count, shape) = match *dims {
            [out, inner] => (1, [out, inner]),
            [count, out, inner] => (count, [out, inner]),
            _ => return None,
        };
        let fits = matrices.len() == count && (count == 0 || matrices.shape() == Some(shape));
        let (dims, format) = (dims.to_vec(), matrices.format());
        fits.then(|| Self { name: name.into(), dims, format, matrices: RwLock::new(Arc::new(matrices)), table: None })
    }

    /// The name of the parameter, with all prefixes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the matrices are kept.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Whether rows to look up lie beside the matrices.
    pub fn has_table(&self) -> bool {
        self.table.is_some()
    }

    /// All matrices as they are now.
    pub fn matrices(&self) -> Arc<PackedStack> {
        Arc::clone(&self.matrices.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Replaces matrix `index` by the packed form of `values` `[out, in]`. Passes that already run go on with the old one.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such matrix or its size is another.
    pub fn rewrite(&self, index: usize, isa: Isa, values: &[f32]) -> Result<()> {
        let mut packed = PackedStack::new(self.format);
        pack(&mut packed, isa, values, &self.dims)?;
        let mut matrices = self.matrices.write().unwrap_or_else(PoisonError::into_inner);
        let count = matrices.len();
        if index >= count {
            return Err(Error::Argument(format!("matrix {index} is not one of the {count} of this weight")));
        }
        match (Arc::make_mut(&mut matrices), packed) {
            (PackedStack::Float(_, all), PackedStack::Float(_, mut new)) => all[index] = new.remove(0),
            (PackedStack::Quantized(_, all), PackedStack::Quantized(_, mut new)) => all[index] = new.remove(0),
            _ => unreachable!("both are of the format of this weight"),
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
                Some(table) => table.copy(id as usize, into),
                None => matrices.copy_row(0, id as usize, into),
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
        self.matrices().bytes() + self.table.as_ref().map_or(0, Rows::bytes)
    }

    fn form(&self) -> String {
        self.format.to_string()
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The only matrix of a weight that must be of floats.
pub(crate) fn only_float(matrices: &PackedStack) -> Result<&PackedWeights> {
    match matrices {
        PackedStack::Float(_, all) if all.len() == 1 => Ok(&all[0]),
        PackedStack::Float(_, all) => Err(Error::Argument(format!("one matrix is needed here, got {}", all.len()))),
        PackedStack::Quantized(format, _) => Err(Error::Argument(format!(
            "this operation has no form for weights in {format}; keep the weight in f32 or bf16"
        ))),
    }
}

fn pack(matrices: &mut PackedStack, isa: Isa, values: &[f32], dims: &[usize]) -> Result<()> {
    let &[.., out, inner] = dims else {
        return Err(Error::Argument(format!("a weight must have two or three dimensions, got {dims:?}")));
    };
    if values.len() != out * inner {
        return Err(Error::Argument(format!("a matrix [{out}, {inner}] cannot have {} values", values.len())));
    }
    matrices.push(isa, values, [out, inner])
}

fn integer_matrix(format: QuantFormat, stored: &StoredIntegers) -> Result<IntegerMatrix> {
    let (out, inner) = stored.integers.dims2()?;
    let integers: Vec<u8> = stored.integers.flatten_all()?.to_vec1()?;
    let integers = integers.into_iter().map(|q| q.wrapping_sub(StoredIntegers::ZERO) as i8).collect();
    IntegerMatrix::new(format, [out, inner], integers, to_f32_vec(&stored.scales)?)
}
