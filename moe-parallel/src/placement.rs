//! [`Placement`]: which part of every parameter a rank holds. Pure.

use crate::dims::{ParallelDims, part};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_core::{BranchConfig, MlpConfig, MoeConfig, ParamSpec, Split, SplitKind};
use std::collections::HashMap;
use std::ops::Range;

/// A rank of a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    dims: ParallelDims,
    rank: usize,
}

impl Placement {
    /// One rank that holds everything.
    pub const WHOLE: Self = Self { dims: ParallelDims::SINGLE, rank: 0 };

    /// Rank `rank` of a layout.
    ///
    /// # Errors
    /// [`Error::Layout`] if the layout is impossible or has no such rank.
    pub fn new(dims: ParallelDims, rank: usize) -> Result<Self> {
        dims.validate(dims.world_size())?;
        if rank >= dims.world_size() {
            let world = dims.world_size();
            return Err(Error::Layout(format!("rank {rank} is not one of the {world} ranks of this layout")));
        }
        Ok(Self { dims, rank })
    }

    /// The layout.
    pub fn dims(&self) -> ParallelDims {
        self.dims
    }

    /// The rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Which of how many parts of a dense matrix.
    pub fn tensor(&self) -> (usize, usize) {
        (self.dims.dense(self.rank).tp_rank, self.dims.tp)
    }

    /// Which of how many shares of a layer's experts.
    pub fn expert(&self, num_experts: usize) -> (usize, usize) {
        let experts = self.dims.experts(num_experts);
        (experts.coordinates(self.rank).ep_rank, experts.ep)
    }

    /// Which of how many parts of each expert.
    pub fn slice(&self, num_experts: usize) -> (usize, usize) {
        let experts = self.dims.experts(num_experts);
        (experts.coordinates(self.rank).slice, experts.slices)
    }

    /// Which of how many parts along one dimension of a parameter: matrices of experts are sliced, others are split in their
    /// tensor group.
    fn along(&self, spec: &ParamSpec, split: &Split) -> (usize, usize) {
        match split.kind {
            SplitKind::Expert => self.expert(spec.shape[split.dim]),
            SplitKind::Tensor if spec.is_stacked() => self.slice(spec.shape[0]),
            SplitKind::Tensor => self.tensor(),
        }
    }

    /// The indices along a split dimension that are held here: a range of each of its equal parts.
    pub(crate) fn ranges(&self, spec: &ParamSpec, split: &Split) -> Vec<Range<usize>> {
        let (index, parts) = self.along(spec, split);
        // One rank has all, also what equal parts would leave.
        let pieces = if parts == 1 { 1 } else { split.parts };
        let len = spec.shape[split.dim] / pieces;
        let own = part(len, index, parts);
        (0..pieces).map(|piece| piece * len + own.start..piece * len + own.end).collect()
    }

    /// The indices along dimension `dim` of a parameter that are held here, in their order: all where no rank splits it.
    pub fn held(&self, spec: &ParamSpec, dim: usize) -> Vec<Range<usize>> {
        match spec.splits.iter().find(|split| split.dim == dim) {
            Some(split) => self.ranges(spec, split),
            None => std::iter::once(0..spec.shape.get(dim).copied().unwrap_or(0)).collect(),
        }
    }

    /// The experts of a stack that are held here.
    pub fn experts(&self, num_experts: usize) -> Range<usize> {
        let (index, parts) = self.expert(num_experts);
        part(num_experts, index, parts)
    }

    /// What a rank holds of a dense network: its columns of the inner width.
    ///
    /// # Errors
    /// [`Error::Layout`] if there are fewer columns than ranks.
    pub fn mlp(&self, config: MlpConfig) -> Result<MlpConfig> {
        inner_part(config, "tp", self.tensor())
    }

    /// What a rank holds of an MoE layer: its columns of each expert and of the network beside them. Experts are counted over
    /// all ranks still.
    ///
    /// # Errors
    /// [`Error::Layout`] if there are fewer columns than ranks.
    pub fn moe(&self, config: &MoeConfig) -> Result<MoeConfig> {
        let branch = match config.branch {
            BranchConfig::None => BranchConfig::None,
            BranchConfig::Residual(mlp) => BranchConfig::Residual(self.mlp(mlp)?),
            BranchConfig::Shared { mlp, gate } => BranchConfig::Shared { mlp: self.mlp(mlp)?, gate },
        };
        let expert = inner_part(config.expert, "expert_slices", self.slice(config.num_experts))?;
        Ok(MoeConfig { expert, branch, ..*config })
    }

    /// The shape of this rank's part.
    pub fn local_shape(&self, spec: &ParamSpec) -> Vec<usize> {
        let mut shape = spec.shape.clone();
        for split in &spec.splits {
            shape[split.dim] = self.ranges(spec, split).iter().map(Range::len).sum();
        }
        shape
    }

    /// This rank's part of a whole parameter.
    ///
    /// # Errors
    /// If the tensor has another shape.
    pub fn local(&self, spec: &ParamSpec, whole: Tensor) -> Result<Tensor> {
        self.cut(spec, whole, 0)
    }

    /// This rank's part of one expert of a stack, which lacks the first dimension.
    ///
    /// # Errors
    /// If the tensor has another shape.
    pub fn local_expert(&self, spec: &ParamSpec, whole: Tensor) -> Result<Tensor> {
        self.cut(spec, whole, 1)
    }

    /// This rank's part of the initial values of `specs` by name: the values one rank would draw, at the same places.
    ///
    /// # Errors
    /// If a tensor cannot be made.
    pub fn initial(&self, specs: &[ParamSpec], seed: u64, device: &Device) -> Result<HashMap<String, Tensor>> {
        let part = |spec: &ParamSpec| Ok((spec.name.clone(), self.local(spec, spec.initial(seed, device)?)?));
        specs.iter().map(part).collect()
    }

    fn cut(&self, spec: &ParamSpec, mut whole: Tensor, skip: usize) -> Result<Tensor> {
        for split in spec.splits.iter().filter(|split| split.dim >= skip) {
            let (ranges, dim) = (self.ranges(spec, split), split.dim - skip);
            let narrow = |range: &Range<usize>| whole.narrow(dim, range.start, range.len());
            let pieces = ranges.iter().map(narrow).collect::<candle_core::Result<Vec<_>>>()?;
            whole = Tensor::cat(&pieces, dim)?;
        }
        Ok(whole)
    }
}

fn inner_part(config: MlpConfig, name: &str, (index, parts): (usize, usize)) -> Result<MlpConfig> {
    match part(config.d_ff, index, parts).len() {
        0 => Err(Error::Layout(format!("{name} {parts} is more than the {} columns of d_ff", config.d_ff))),
        d_ff => Ok(MlpConfig { d_ff, ..config }),
    }
}
