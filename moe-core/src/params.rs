//! [`ParamSpec`]: one parameter of a layer, described once: its name, whole shape, initial value, decay, and how ranks may
//! split it. Layers get their tensors through it; savers, optimizers and loaders read it.

use crate::{CounterRng, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::ops::Range;

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ParamInit {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal around 0 with this standard deviation.
    Normal(f64),
    /// Uniform in `±bound`.
    Uniform(f64),
}

impl ParamInit {
    /// The same for candle's own variables.
    pub fn hint(self) -> candle_nn::Init {
        match self {
            Self::Zeros => candle_nn::Init::Const(0.0),
            Self::Ones => candle_nn::Init::Const(1.0),
            Self::Normal(stdev) => candle_nn::Init::Randn { mean: 0.0, stdev },
            Self::Uniform(bound) => candle_nn::Init::Uniform { lo: -bound, up: bound },
        }
    }
}

/// Along what ranks split a dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SplitKind {
    /// Whole experts.
    Expert,
    /// Columns or rows of a matrix.
    Tensor,
}

/// A dimension that ranks may split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Split {
    /// Of the whole shape.
    pub dim: usize,
    /// Along what.
    pub kind: SplitKind,
    /// Equal parts of the dimension that are each split by themselves: 3 of `[q | k | v]`, 2 of `[gate | up]`.
    pub parts: usize,
}

/// One parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamSpec {
    /// Below the layer's prefix, or whole in a table; experts are stacked under one name.
    pub name: String,
    /// Over all ranks.
    pub shape: Vec<usize>,
    /// First value.
    pub init: ParamInit,
    /// Whether the optimizer decays it: matrices yes, biases and norms no.
    pub decay: bool,
    /// Whether gradients change it. What they do not change is no weight: files keep it in f32 whatever the weights are.
    pub trained: bool,
    /// Dimensions that ranks may split.
    pub splits: Vec<Split>,
}

/// What names of stacked experts have before what an expert's own parameters are called.
const EXPERTS: &str = "experts.";

impl ParamSpec {
    /// A parameter that no rank splits.
    ///
    /// # Source
    /// Megatron's optimizer groups: no decay on biases and 1-D parameters; stacked biases are biases.
    pub fn new(name: impl Into<String>, shape: &[usize], init: ParamInit) -> Self {
        let name = name.into();
        let decay = shape.len() >= 2 && !name.ends_with("bias");
        Self { name, shape: shape.to_vec(), init, decay, trained: true, splits: Vec::new() }
    }

    /// The same, which no gradient changes.
    #[must_use]
    pub fn untrained(self) -> Self {
        Self { decay: false, trained: false, ..self }
    }

    /// The same, split along `dim`.
    #[must_use]
    pub fn split(mut self, kind: SplitKind, dim: usize, parts: usize) -> Self {
        self.splits.push(Split { dim, kind, parts });
        self
    }

    /// The same parameter below `prefix`.
    #[must_use]
    pub fn below(self, prefix: &str) -> Self {
        Self { name: format!("{prefix}.{}", self.name), ..self }
    }

    /// One such parameter per expert, stacked.
    #[must_use]
    pub fn stacked(mut self, num_experts: usize) -> Self {
        self.shape.insert(0, num_experts);
        self.splits.iter_mut().for_each(|split| split.dim += 1);
        Self { name: format!("{EXPERTS}{}", self.name), ..self }.split(SplitKind::Expert, 0, 1)
    }

    /// Whether the first dimension counts experts.
    pub fn is_stacked(&self) -> bool {
        self.splits.iter().any(|split| split.kind == SplitKind::Expert)
    }

    /// The name under which expert `index` of a stack is found alone: `experts.fc_in.weight` to `experts.3.fc_in.weight`.
    pub fn expert_name(&self, index: usize) -> Option<String> {
        let at = self.name.rfind(EXPERTS).filter(|_| self.is_stacked())? + EXPERTS.len();
        Some(format!("{}{index}.{}", &self.name[..at], &self.name[at..]))
    }

    /// The tensor under `vb`; a stack may also lie there expert by expert.
    ///
    /// # Errors
    /// If it is missing or has another shape.
    pub fn get(&self, vb: &VarBuilder<'_>) -> Result<Tensor> {
        let single = self.expert_name(0).filter(|name| !vb.contains_tensor(&self.name) && vb.contains_tensor(name));
        if single.is_some() {
            let experts = (0..self.shape[0]).map(|index| self.get_expert(vb, index)).collect::<Result<Vec<_>>>()?;
            return Ok(Tensor::stack(&experts, 0)?);
        }
        Ok(vb.get_with_hints(self.shape.as_slice(), &self.name, self.init.hint())?)
    }

    /// One expert's tensor, alone if it lies there alone.
    ///
    /// # Errors
    /// As [`ParamSpec::get`].
    pub fn get_expert(&self, vb: &VarBuilder<'_>, index: usize) -> Result<Tensor> {
        match self.expert_name(index).filter(|name| vb.contains_tensor(name)) {
            Some(name) => Ok(vb.get(&self.shape[1..], &name)?),
            None => Ok(self.get(vb)?.get(index)?),
        }
    }

    /// Elements over all ranks.
    pub fn elem_count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Initial values, f32: a function of seed and name alone; experts of one stack have streams of their own, so that a
    /// rank holding some of them draws the same values.
    ///
    /// # Errors
    /// If the tensor cannot be made.
    pub fn initial(&self, seed: u64, device: &Device) -> Result<Tensor> {
        let stack = if self.is_stacked() { self.shape[0] } else { 1 };
        let each = self.elem_count() / stack.max(1);
        let values = (0..stack).flat_map(|index| self.initial_range(seed, index, 0..each)).collect();
        Ok(Tensor::from_vec::<_, f32>(values, self.shape.as_slice(), device)?)
    }

    /// Initial values of one expert of a stack.
    ///
    /// # Errors
    /// If the tensor cannot be made.
    pub fn initial_expert(&self, seed: u64, index: usize, device: &Device) -> Result<Tensor> {
        let shape = &self.shape[1..];
        Ok(Tensor::from_vec(self.initial_range(seed, index, 0..shape.iter().product()), shape, device)?)
    }

    /// The same of elements `range` alone, of expert `index` of a stack; of a parameter that is none, `index` is 0.
    pub fn initial_range(&self, seed: u64, index: usize, range: Range<usize>) -> Vec<f32> {
        let rng = || CounterRng::new(CounterRng::mix(seed, &[index as u64]), stream_of(&self.name));
        let first = range.start as u64;
        match self.init {
            ParamInit::Zeros => vec![0.0; range.len()],
            ParamInit::Ones => vec![1.0; range.len()],
            ParamInit::Normal(std) => {
                let mut rng = rng().skipping(4 * first);
                range.map(|_| (rng.normal_f64() * std) as f32).collect()
            }
            ParamInit::Uniform(bound) => {
                let mut rng = rng().skipping(2 * first);
                range.map(|_| ((2.0 * rng.uniform_f64() - 1.0) * bound) as f32).collect()
            }
        }
    }

    /// The dtype parameters are trained in.
    pub const DTYPE: DType = DType::F32;
}

/// FNV-1a: a stable number for a name.
fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
