//! [`ParamTable`]: every parameter of a model by name; [`ParamSource`]: where layers get their tensors from, as a backend of
//! candle's `VarBuilder`.

use crate::hf::Checkpoint;
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::VarBuilder;
use candle_nn::var_builder::SimpleBackend;
use moe_core::{ParamSpec, SplitKind};
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
}

/// Which part of every parameter a rank holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Coordinates {
    /// Rank and number of ranks that matrices are split over.
    pub tensor: (usize, usize),
    /// Rank and number of ranks that experts are spread over.
    pub expert: (usize, usize),
}

impl Coordinates {
    /// One rank that holds everything.
    pub const WHOLE: Self = Self { tensor: (0, 1), expert: (0, 1) };

    fn of(&self, kind: SplitKind) -> (usize, usize) {
        match kind {
            SplitKind::Expert => self.expert,
            SplitKind::Tensor => self.tensor,
        }
    }

    /// The part of `0..len` of a rank; the first parts are longer by one where `len` does not divide.
    pub fn range(len: usize, (rank, size): (usize, usize)) -> Range<usize> {
        let (least, longer) = (len / size, len % size);
        let start = rank * least + rank.min(longer);
        start..start + least + usize::from(rank < longer)
    }

    /// The shape of a rank's part.
    pub fn local_shape(&self, spec: &ParamSpec) -> Vec<usize> {
        let mut shape = spec.shape.clone();
        for split in &spec.splits {
            let part = Self::range(spec.shape[split.dim] / split.parts, self.of(split.kind));
            shape[split.dim] = part.len() * split.parts;
        }
        shape
    }

    /// The part of a whole tensor; for one expert of a stack, `skip` is 1: the dimension it lacks.
    fn part(&self, spec: &ParamSpec, mut whole: Tensor, skip: usize) -> candle_core::Result<Tensor> {
        for split in spec.splits.iter().filter(|split| split.dim >= skip) {
            let coordinates = self.of(split.kind);
            if coordinates.1 == 1 {
                continue;
            }
            let len = spec.shape[split.dim] / split.parts;
            let range = Self::range(len, coordinates);
            let dim = split.dim - skip;
            let parts = (0..split.parts)
                .map(|part| whole.narrow(dim, part * len + range.start, range.len()))
                .collect::<candle_core::Result<Vec<_>>>()?;
            whole = Tensor::cat(&parts, dim)?;
        }
        Ok(whole)
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
    coordinates: Coordinates,
    values: Values,
}

impl ParamSource {
    /// The variables of a training run, with their gradients.
    pub fn variables(table: Arc<ParamTable>, variables: &[(String, Var)]) -> Self {
        Self::tensors(table, variables.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())))
    }

    /// The memory of the variables of a training run, without gradients.
    pub fn detached(table: Arc<ParamTable>, variables: &[(String, Var)]) -> Self {
        Self::tensors(table, variables.iter().map(|(name, var)| (name.clone(), var.detach())))
    }

    fn tensors(table: Arc<ParamTable>, tensors: impl Iterator<Item = (String, Tensor)>) -> Self {
        Self { table, coordinates: Coordinates::WHOLE, values: Values::Variables(tensors.collect()) }
    }

    /// The initial values that `seed` draws: the same on every rank for the same element.
    pub fn initial(table: Arc<ParamTable>, seed: u64, coordinates: Coordinates) -> Self {
        Self { table, coordinates, values: Values::Initial { seed } }
    }

    /// The tensors of a checkpoint.
    pub fn checkpoint(table: Arc<ParamTable>, checkpoint: Arc<Checkpoint>, coordinates: Coordinates) -> Self {
        Self { table, coordinates, values: Values::Files(checkpoint) }
    }

    /// As candle's builder, f32.
    pub fn builder(self, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self), DType::F32, device.clone())
    }

    /// A rank's part of the parameter `name`, or of one expert of it: experts are counted among those of this rank.
    fn fetch(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some((spec, expert)) = self.table.find(name) else {
            return Err(Error::Config(format!("the model has no parameter {name}")));
        };
        let Some(index) = expert else {
            let whole = match &self.values {
                Values::Variables(tensors) => return variable(tensors, name),
                Values::Initial { seed } => spec.initial(*seed, device)?,
                Values::Files(files) => files.tensor(spec, device)?,
            };
            return Ok(self.coordinates.part(spec, whole, 0)?);
        };
        let held = Coordinates::range(spec.shape[0], self.coordinates.expert);
        let Some(global) = held.clone().nth(index) else {
            return Err(Error::Config(format!("{name} is not one of the {} experts held here", held.len())));
        };
        let whole = match &self.values {
            Values::Variables(tensors) => return Ok(variable(tensors, &spec.name)?.get(index)?),
            Values::Initial { seed } => spec.initial_expert(*seed, global, device)?,
            Values::Files(files) => files.expert(spec, global, device)?,
        };
        Ok(self.coordinates.part(spec, whole, 1)?)
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
        self.fetch(name, device).map_err(candle_core::Error::wrap)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.table.find(name).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::ParamInit;
    use moe_core::testing::values;

    fn table() -> Arc<ParamTable> {
        let normal = ParamInit::Normal(1.0);
        let plain = ParamSpec::new("qkv.weight", &[12, 5], normal).split(SplitKind::Tensor, 0, 3);
        let experts = ParamSpec::new("fc.weight", &[7, 4], normal).split(SplitKind::Tensor, 1, 1).stacked(5);
        Arc::new(ParamTable::new(vec![plain, experts.below("mlp"), ParamSpec::new("n.weight", &[3], normal)]))
    }

    /// Parts that do not divide: what all ranks hold is the whole, and every rank draws its part as one rank would.
    #[test]
    fn parts_of_all_ranks_make_the_whole() {
        let whole = ParamSource::initial(table(), 3, Coordinates::WHOLE).builder(&Device::Cpu);
        for ranks in [1, 2, 3] {
            let rank = |rank| {
                let coordinates = Coordinates { tensor: (rank, ranks), expert: (rank, ranks) };
                (coordinates, ParamSource::initial(table(), 3, coordinates).builder(&Device::Cpu))
            };
            let mut q_rows = Vec::new();
            let mut held = 0;
            for (coordinates, vb) in (0..ranks).map(rank) {
                let shapes: Vec<_> = table().specs().iter().map(|s| coordinates.local_shape(s)).collect();
                let qkv = vb.get(shapes[0].as_slice(), "qkv.weight").unwrap();
                q_rows.push(qkv.narrow(0, 0, shapes[0][0] / 3).unwrap());
                let stack = vb.get(shapes[1].as_slice(), "mlp.experts.fc.weight").unwrap();
                for expert in 0..shapes[1][0] {
                    let one = vb.get(&shapes[1][1..], &format!("mlp.experts.{expert}.fc.weight")).unwrap();
                    assert_eq!(values(&one), values(&stack.get(expert).unwrap()));
                    let all = whole.get((7, 4), &format!("mlp.experts.{}.fc.weight", held + expert)).unwrap();
                    let columns = Coordinates::range(4, coordinates.tensor);
                    assert_eq!(values(&one), values(&all.narrow(1, columns.start, columns.len()).unwrap()));
                }
                held += shapes[1][0];
            }
            let q = whole.get((12, 5), "qkv.weight").unwrap().narrow(0, 0, 4).unwrap();
            assert_eq!(values(&Tensor::cat(&q_rows, 0).unwrap()), values(&q), "{ranks} ranks");
            assert_eq!(held, 5);
        }
    }

    #[test]
    fn unknown_names_and_other_shapes_are_refused() {
        let vb = ParamSource::initial(table(), 3, Coordinates::WHOLE).builder(&Device::Cpu);
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
