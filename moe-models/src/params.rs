//! [`ParamTable`]: every parameter of a model by name; [`ParamSource`]: where layers get their tensors from, as a backend of
//! candle's `VarBuilder`.

use crate::hf::Checkpoint;
use crate::integer_part::IntegerPart;
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use moe_core::{ParamSpec, StoredIntegers, StoredRows};
use moe_kernels::quantized::IntegerMatrix;
use moe_parallel::Placement;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

/// The parameters of a model, in the order of its forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamTable {
    specs: Vec<ParamSpec>,
    by_name: HashMap<String, usize>,
}

impl ParamTable {
    /// A table of these.
    pub(crate) fn new(specs: Vec<ParamSpec>) -> Self {
        let by_name = specs.iter().enumerate().map(|(index, spec)| (spec.name.clone(), index)).collect();
        Self { specs, by_name }
    }

    /// In the order of the forward pass.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// The parameter of this name; experts are stacked under one.
    pub fn get(&self, name: &str) -> Option<&ParamSpec> {
        self.by_name.get(name).map(|&index| &self.specs[index])
    }

    /// A parameter, or one expert of it by an index of its own.
    fn find(&self, name: &str) -> Option<(&ParamSpec, Option<usize>)> {
        if let Some(spec) = self.get(name) {
            return Some((spec, None));
        }
        let (prefix, rest) = name.rsplit_once("experts.")?;
        let (index, rest) = rest.split_once('.')?;
        let spec = self.get(&format!("{prefix}experts.{rest}")).filter(|spec| spec.is_stacked())?;
        Some((spec, Some(index.parse().ok()?)))
    }

    /// Elements over all ranks.
    pub fn elem_count(&self) -> usize {
        self.specs.iter().map(ParamSpec::elem_count).sum()
    }

    /// The same; `None` if that is more than a number holds, as of a configuration that has not been compared with any file.
    pub(crate) fn checked_elem_count(&self) -> Option<usize> {
        let elements =
            |spec: &ParamSpec| spec.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        self.specs.iter().try_fold(0usize, |sum, spec| sum.checked_add(elements(spec)?))
    }
}

/// What a [`ParamSource`] takes values from.
#[derive(Debug, Clone)]
enum Values {
    /// A run's variables, this rank's parts already.
    Variables(HashMap<String, Tensor>),
    /// The table's initial values.
    Initial { seed: u64 },
    /// Files, in memory or mapped.
    Files(Arc<Checkpoint>),
}

/// Gives each layer the tensor it asks for: this rank's part, for the shape of that part.
#[derive(Debug, Clone)]
pub struct ParamSource {
    table: Arc<ParamTable>,
    placement: Placement,
    values: Values,
    /// Matrices that are integers whatever `values` has in their place, by name, an expert's by its own.
    integers: Arc<HashMap<String, IntegerMatrix>>,
}

impl ParamSource {
    fn whole(table: Arc<ParamTable>, values: Values) -> Self {
        Self { table, placement: Placement::WHOLE, values, integers: Arc::default() }
    }

    /// The variables of a training run, with their gradients.
    pub fn variables(table: Arc<ParamTable>, variables: &[(String, Var)]) -> Self {
        Self::tensors(table, variables.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())))
    }

    /// The memory of the variables of a training run, without gradients.
    pub fn detached(table: Arc<ParamTable>, variables: &[(String, Var)]) -> Self {
        Self::tensors(table, variables.iter().map(|(name, var)| (name.clone(), var.detach())))
    }

    /// These very tensors: some with gradients, some without.
    pub(crate) fn tensors(table: Arc<ParamTable>, tensors: impl IntoIterator<Item = (String, Tensor)>) -> Self {
        Self::whole(table, Values::Variables(tensors.into_iter().collect()))
    }

    /// The initial values that `seed` draws: the same on every rank for the same element.
    pub fn initial(table: Arc<ParamTable>, seed: u64, placement: Placement) -> Self {
        Self::whole(table, Values::Initial { seed }).at(placement)
    }

    /// The tensors of a checkpoint.
    pub fn checkpoint(table: Arc<ParamTable>, checkpoint: Arc<Checkpoint>, placement: Placement) -> Self {
        Self::whole(table, Values::Files(checkpoint)).at(placement)
    }

    /// The same for a rank of a layout: variables are then that rank's parts.
    #[must_use]
    pub fn at(self, placement: Placement) -> Self {
        Self { placement, ..self }
    }

    /// The same with these matrices as integers, by name, an expert's by its own. Of all ranks' parameters only.
    #[must_use]
    pub(crate) fn with_integers(self, integers: HashMap<String, IntegerMatrix>) -> Self {
        debug_assert_eq!(self.placement, Placement::WHOLE);
        Self { integers: Arc::new(integers), ..self }
    }

    /// As candle's builder, f32.
    pub fn builder(self, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self), DType::F32, device.clone())
    }

    /// A rank's part of a parameter. Of a stack only the experts held here are made or read.
    ///
    /// # Errors
    /// If there is no such parameter, or its values cannot be read.
    pub fn part(&self, spec: &ParamSpec, device: &Device) -> Result<Tensor> {
        if !spec.is_stacked() {
            return self.fetch(&spec.name, device);
        }
        let held = self.placement.experts(spec.shape[0]).len();
        let expert = |index: usize| {
            let name = spec.expert_name(index);
            self.fetch(&name.ok_or_else(|| Error::Config(format!("{} has no experts", spec.name)))?, device)
        };
        Ok(Tensor::stack(&(0..held).map(expert).collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// A rank's part of the parameter `name`, or of one expert of it: experts are counted among those of this rank.
    fn fetch(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some((spec, expert)) = self.table.find(name) else {
            return Err(Error::Config(format!("the model has no parameter {name}")));
        };
        if let Some(matrix) = self.integers.get(name) {
            // Asked for as floats, as by latent attention, which takes its matrix apart: the values that the integers stand for.
            return Ok(Tensor::from_vec(matrix.dequantize(), &matrix.shape(), device)?);
        }
        let Some(index) = expert else {
            let whole = match &self.values {
                Values::Variables(tensors) => return variable(tensors, name),
                Values::Initial { seed } => spec.initial(*seed, device)?,
                Values::Files(files) => files.tensor(spec, device)?,
            };
            return Ok(self.placement.local(spec, whole)?);
        };
        let held = self.placement.experts(spec.shape[0]);
        let Some(global) = held.clone().nth(index) else {
            return Err(Error::Config(format!("{name} is not one of the {} experts held here", held.len())));
        };
        let whole = match &self.values {
            Values::Variables(tensors) => return Ok(variable(tensors, &spec.name)?.get(index)?),
            Values::Initial { seed } => spec.initial_expert(*seed, global, device)?,
            Values::Files(files) => files.expert(spec, global, device)?,
        };
        Ok(self.placement.local_expert(spec, whole)?)
    }
}

/// One of the two tensors of a matrix of integers.
#[derive(Clone, Copy)]
enum Stored {
    Integers,
    Scales,
}

/// Where a matrix of integers is.
enum IntegersAt<'a> {
    Given(&'a IntegerMatrix),
    Files { of: FileMatrix<'a>, part: IntegerPart },
}

/// A matrix in files: a parameter, or this expert of it.
#[derive(Clone, Copy)]
struct FileMatrix<'a> {
    files: &'a Checkpoint,
    spec: &'a ParamSpec,
    expert: Option<usize>,
}

impl ParamSource {
    /// The matrix of integers that `name` asks a tensor of, if it is given or the files hold it so.
    fn stored(&self, name: &str) -> Option<(IntegersAt<'_>, Stored)> {
        let (name, stored) = match name.strip_suffix(StoredIntegers::INTEGERS) {
            Some(name) => (name, Stored::Integers),
            None => (name.strip_suffix(StoredIntegers::SCALES)?, Stored::Scales),
        };
        if let Some(matrix) = self.integers.get(name) {
            return Some((IntegersAt::Given(matrix), stored));
        }
        let of = self.file_matrix(name)?;
        let part = IntegerPart::of(self.placement, of.spec, of.files.integer_format()?)?;
        of.files.holds_integers(of.spec, of.expert).then_some((IntegersAt::Files { of, part }, stored))
    }

    /// The matrix in files that a name stands for: experts are counted among those of this rank.
    fn file_matrix(&self, name: &str) -> Option<FileMatrix<'_>> {
        let Values::Files(files) = &self.values else { return None };
        let (spec, index) = self.table.find(name)?;
        let expert = match index {
            Some(index) => Some(self.placement.experts(spec.shape[0]).nth(index)?),
            None => None,
        };
        Some(FileMatrix { files, spec, expert })
    }

    /// Of which matrix in files a name asks for rows, and for which, if they can be had by themselves. None where ranks split matrices:
    /// they take their parts of whole ones.
    fn rows_of(&self, name: &str) -> Option<(FileMatrix<'_>, Range<usize>)> {
        let (matrix, rows) = StoredRows::parse(name)?;
        if self.integers.contains_key(matrix) {
            return None;
        }
        let of = self.file_matrix(matrix)?;
        let inner = of.spec.shape.len().saturating_sub(2);
        let is_whole = self.placement.local_shape(of.spec)[inner..] == of.spec.shape[inner..];
        (is_whole && of.files.has_rows(of.spec, of.expert)).then_some((of, rows))
    }

    fn fetch_stored(at: &IntegersAt<'_>, stored: Stored, device: &Device) -> Result<Tensor> {
        let shape = match at {
            IntegersAt::Given(matrix) => matrix.shape(),
            IntegersAt::Files { part, .. } => part.shape(),
        };
        match stored {
            Stored::Integers => {
                let integers = match at {
                    IntegersAt::Given(matrix) => matrix.integers().to_vec(),
                    IntegersAt::Files { of, part } => part.integers(of.files.integers_of(of.spec, of.expert)?),
                };
                let bytes = integers.into_iter().map(|q| (q as u8).wrapping_add(StoredIntegers::ZERO)).collect();
                Ok(Tensor::from_vec(bytes, &shape, device)?)
            }
            Stored::Scales => {
                let scales = match at {
                    IntegersAt::Given(matrix) => matrix.scales().to_vec(),
                    IntegersAt::Files { of, part } => part.scales(of.files.scales_of(of.spec, of.expert)?),
                };
                let groups = scales.len() / shape[0].max(1);
                Ok(Tensor::from_vec(scales, (shape[0], groups), device)?)
            }
        }
    }
}

fn variable(tensors: &HashMap<String, Tensor>, name: &str) -> Result<Tensor> {
    tensors.get(name).cloned().ok_or_else(|| Error::Config(format!("the run has no variable {name}")))
}

impl SimpleBackend for ParamSource {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if tensor.shape() != &shape {
            let got = tensor.dims();
            candle_core::bail!("{name} has shape {got:?} here, but a layer asks for {:?}", shape.dims());
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        if let Some((of, rows)) = self.rows_of(name) {
            return of.files.rows(of.spec, of.expert, rows).map_err(candle_core::Error::wrap);
        }
        let tensor = match self.stored(name) {
            Some((at, stored)) => Self::fetch_stored(&at, stored, device),
            None => self.fetch(name, device),
        };
        tensor.map_err(candle_core::Error::wrap)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.table.find(name).is_some() || self.stored(name).is_some() || self.rows_of(name).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::testing::values;
    use moe_core::{ParamInit, SplitKind};
    use moe_parallel::ParallelDims;

    fn table() -> Arc<ParamTable> {
        let normal = ParamInit::Normal(1.0);
        let plain = ParamSpec::new("qkv.weight", &[12, 5], normal).split(SplitKind::Tensor, 0, 3);
        let experts = ParamSpec::new("fc.weight", &[7, 4], normal).split(SplitKind::Tensor, 1, 1).stacked(5);
        Arc::new(ParamTable::new(vec![plain, experts.below("mlp"), ParamSpec::new("n.weight", &[3], normal)]))
    }

    /// Parts that do not divide: what all ranks hold is the whole, and every rank draws its part as one rank would.
    #[test]
    fn parts_of_all_ranks_make_the_whole() {
        let whole = ParamSource::initial(table(), 3, Placement::WHOLE).builder(&Device::Cpu);
        for ranks in [1, 2, 3] {
            let on = |dims: ParallelDims, rank| {
                let placement = Placement::new(dims, rank).unwrap();
                (placement, ParamSource::initial(table(), 3, placement).builder(&Device::Cpu))
            };
            let get = |placement: Placement, vb: &VarBuilder<'_>, index: usize| {
                let spec = table().specs()[index].clone();
                vb.get(placement.local_shape(&spec).as_slice(), &spec.name).unwrap()
            };
            // Dense matrices over a tensor group: each of the three parts is split by itself.
            let q_rows = |rank| {
                let (placement, vb) = on(ParallelDims::new(1, ranks, ranks, 1), rank);
                let qkv = get(placement, &vb, 0);
                qkv.narrow(0, 0, qkv.dim(0).unwrap() / 3).unwrap()
            };
            let q = whole.get((12, 5), "qkv.weight").unwrap().narrow(0, 0, 4).unwrap();
            let rows: Vec<Tensor> = (0..ranks).map(q_rows).collect();
            assert_eq!(values(&Tensor::cat(&rows, 0).unwrap()), values(&q), "{ranks} ranks");

            // Whole experts over ranks; then columns of each.
            let stack = whole.get((5, 7, 4), "mlp.experts.fc.weight").unwrap();
            for (dims, dim) in [(ParallelDims::new(ranks, 1, ranks, 1), 0), (ParallelDims::new(ranks, 1, 1, ranks), 2)]
            {
                let part = |rank| {
                    let (placement, vb) = on(dims, rank);
                    let held = get(placement, &vb, 1);
                    for expert in 0..held.dim(0).unwrap() {
                        let one = vb.get(&held.dims()[1..], &format!("mlp.experts.{expert}.fc.weight")).unwrap();
                        assert_eq!(values(&one), values(&held.get(expert).unwrap()));
                    }
                    held
                };
                let parts: Vec<Tensor> = (0..ranks).map(part).collect();
                assert_eq!(values(&Tensor::cat(&parts, dim).unwrap()), values(&stack), "{dims:?}");
            }
        }
    }

    #[test]
    fn unknown_names_and_other_shapes_are_refused() {
        let vb = ParamSource::initial(table(), 3, Placement::WHOLE).builder(&Device::Cpu);
        for (shape, name, part) in [
            (&[3][..], "m.weight", "no parameter m.weight"),
            (&[4], "n.weight", "asks for [4]"),
            (&[7, 4], "mlp.experts.5.fc.weight", "not one of the 5 experts"),
        ] {
            let text = vb.get(shape, name).unwrap_err().to_string();
            assert!(text.contains(part), "{text}");
        }
        assert!(!vb.contains_tensor("n.bias") && vb.contains_tensor("mlp.experts.0.fc.weight"));
    }
}
