//! [`LayoutCost`]: what a layout costs each rank: memory, and bytes sent in a step. Pure arithmetic over sizes.

use crate::config::{FeedForwardConfig, LayerConfig};
use crate::params::ParamTable;
use crate::train::mesh::{ReduceConfig, Zero};
use crate::train::model::grad_group;
use crate::{DecoderConfig, Error, Precision, Result};
use moe_core::{BranchConfig, ParamSpec};
use moe_parallel::{ParallelDims, Placement};
use std::collections::BTreeMap;
use std::ops::{AddAssign, Range};

/// The run that is laid out.
#[derive(Debug, Clone)]
pub struct RunSize {
    /// The model.
    pub decoder: DecoderConfig,
    /// Models held beside it for inference alone, packed.
    pub beside: Vec<DecoderConfig>,
    /// What its products read.
    pub precision: Precision,
    /// Tokens per sequence.
    pub seq_len: usize,
    /// Sequences per pass.
    pub micro_batch_size: usize,
    /// Passes per step, over all ranks.
    pub micro_batches: usize,
}

/// Memory of one rank, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryBytes {
    /// Parameters, f32.
    pub parameters: usize,
    /// Parameters as products in bf16 read them.
    pub copies: usize,
    /// Gradients, f32; where they are divided, what is owned and the largest buckets under way.
    pub gradients: usize,
    /// Moments, f32.
    pub moments: usize,
    /// Models held beside the one that is trained.
    pub beside: usize,
    /// Messages of gradients or parameters under way, at most.
    pub messages: usize,
    /// What a pass keeps for its backward pass: an estimate.
    pub activations: usize,
}

impl MemoryBytes {
    /// All of it.
    pub fn total(&self) -> usize {
        self.state() + self.messages + self.activations
    }

    /// What stays from step to step.
    pub fn state(&self) -> usize {
        self.parameters + self.copies + self.gradients + self.moments + self.beside
    }
}

/// Bytes sent in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LevelBytes {
    /// To ranks of the same node.
    pub intra_node: usize,
    /// To other nodes.
    pub inter_node: usize,
}

impl AddAssign for LevelBytes {
    fn add_assign(&mut self, other: Self) {
        self.intra_node += other.intra_node;
        self.inter_node += other.inter_node;
    }
}

/// What one rank sends in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrafficBytes {
    /// Gradients, and sums or parameters on their way back.
    pub gradients: LevelBytes,
    /// Rows to experts and back, in both passes, for an even load.
    pub rows: LevelBytes,
    /// Parts of products that tensor groups add up.
    pub tensors: LevelBytes,
}

impl TrafficBytes {
    /// All of it.
    pub fn total(&self) -> LevelBytes {
        let mut total = self.gradients;
        total += self.rows;
        total += self.tensors;
        total
    }
}

/// What a layout costs one rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankCost {
    /// Elements of parameters.
    pub parameters: usize,
    /// For each number of experts that layers have: those held here.
    pub experts: Vec<(usize, Range<usize>)>,
    /// Multiplications with weights in the forward passes of a step, for an even load. Ranks of one tensor group all have the same
    /// rows, so that experts there work on them as often.
    pub work: usize,
    /// Memory.
    pub memory: MemoryBytes,
    /// Messages.
    pub traffic: TrafficBytes,
}

/// A layout with its price.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayoutCost {
    /// The layout.
    pub dims: ParallelDims,
    /// What is divided.
    pub zero: Zero,
    /// Of each rank.
    pub ranks: Vec<RankCost>,
}

const F32: usize = size_of::<f32>();
const BF16: usize = 2;

/// Where one rank stands, and what it sends to whom.
struct At<'a> {
    size: &'a RunSize,
    placement: Placement,
    ranks_per_node: usize,
    reduce: ReduceConfig,
}

impl LayoutCost {
    /// Of a run over these ranks.
    ///
    /// # Errors
    /// [`Error::Parallel`] for a layout there cannot be, [`Error::Config`] for one that the model's layers cannot have, naming the
    /// layer.
    pub fn new(size: &RunSize, dims: ParallelDims, ranks_per_node: usize, reduce: ReduceConfig) -> Result<Self> {
        dims.validate(dims.world_size())?;
        let table = size.decoder.params();
        size.decoder.check_tensor_ranks(dims.tp)?;
        let rank = |rank: usize| {
            let placement = Placement::new(dims, rank)?;
            let layers =
                [&size.decoder].into_iter().chain(&size.beside).flat_map(|decoder| decoder.layers.iter().enumerate());
            for (index, layer) in layers {
                layer.on_rank(&placement).map_err(|e| Error::Config(format!("layer {index}: {e}")))?;
            }
            Ok(At { size, placement, ranks_per_node, reduce }.cost(&table))
        };
        let ranks = (0..dims.world_size()).map(rank).collect::<Result<_>>()?;
        Ok(Self { dims, zero: reduce.zero, ranks })
    }

    /// Work of the rank that has most, for which the others wait.
    pub fn most_work(&self) -> usize {
        self.ranks.iter().map(|rank| rank.work).max().unwrap_or(0)
    }

    /// Memory of the rank that needs most.
    pub fn most_memory(&self) -> MemoryBytes {
        self.ranks.iter().map(|rank| rank.memory).max_by_key(MemoryBytes::total).unwrap_or_default()
    }

    /// What all ranks send in a step.
    pub fn traffic(&self) -> TrafficBytes {
        self.ranks.iter().fold(TrafficBytes::default(), |mut sum, rank| {
            sum.gradients += rank.traffic.gradients;
            sum.rows += rank.traffic.rows;
            sum.tensors += rank.traffic.tensors;
            sum
        })
    }
}

impl At<'_> {
    fn cost(&self, table: &ParamTable) -> RankCost {
        let held = |spec: &ParamSpec| self.placement.local_shape(spec).iter().product::<usize>();
        let mut groups: BTreeMap<String, (usize, Vec<usize>)> = BTreeMap::new();
        let (mut parameters, mut matrices, mut largest) = (0, 0, 0);
        for spec in table.specs() {
            let elements = held(spec);
            parameters += elements;
            largest = largest.max(elements);
            let of_expert = usize::from(spec.is_stacked());
            if spec.shape.len() - of_expert > 1 {
                matrices += elements;
            }
            let group = groups.entry(grad_group(spec)).or_insert_with(|| (0, self.gradient_group(spec)));
            group.0 += elements;
        }
        let owned: usize = groups.values().map(|(elements, ranks)| elements.div_ceil(ranks.len())).sum();
        let travels = groups.values().any(|(_, ranks)| ranks.len() > 1);
        let bucket = self.reduce.bucket_elements.max(largest).min(parameters);
        let memory = MemoryBytes {
            parameters: F32 * parameters,
            copies: if self.size.precision == Precision::Bf16 { BF16 * matrices } else { 0 },
            gradients: F32 * if self.reduce.zero == Zero::Gradients { owned + 2 * bucket } else { parameters },
            beside: self.size.beside.iter().map(|decoder| self.packed(&decoder.params())).sum(),
            moments: 2 * F32 * if self.reduce.zero == Zero::Off { parameters } else { owned },
            // One bucket being cut, others on their way out and in; of sums to all, those that have come as well.
            messages: if travels {
                F32 * (bucket + 3 * bucket.max(self.reduce.most_under_way.min(parameters)))
            } else {
                0
            },
            activations: self.activations(),
        };
        let mut counts: Vec<usize> =
            table.specs().iter().filter(|spec| spec.is_stacked()).map(|spec| spec.shape[0]).collect();
        counts.sort_unstable();
        counts.dedup();
        let experts = counts.into_iter().map(|count| (count, self.placement.experts(count))).collect();
        let traffic =
            TrafficBytes { gradients: self.gradients(groups.values()), rows: self.rows(), tensors: self.tensors() };
        RankCost { parameters, experts, work: self.work(table), memory, traffic }
    }

    /// Bytes of a model for inference alone.
    fn packed(&self, table: &ParamTable) -> usize {
        let bytes = |spec: &ParamSpec| {
            let is_matrix = spec.shape.len() - usize::from(spec.is_stacked()) > 1;
            let of_one = if is_matrix && self.size.precision == Precision::Bf16 { BF16 } else { F32 };
            of_one * self.placement.local_shape(spec).iter().product::<usize>()
        };
        table.specs().iter().map(bytes).sum()
    }

    /// Of a token, each dense matrix that is held, and one of a stack for each choice: an even load is as much as all tokens here.
    fn work(&self, table: &ParamTable) -> usize {
        let of_token = |spec: &ParamSpec| {
            let mut shape = self.placement.local_shape(spec);
            if spec.is_stacked() {
                shape.remove(0);
            }
            if shape.len() < 2 { 0 } else { shape.iter().product() }
        };
        let choices = |spec: &ParamSpec| if spec.is_stacked() { self.most_choices() } else { 1 };
        let of_token: usize = table.specs().iter().map(|spec| choices(spec) * of_token(spec)).sum();
        self.passes() * self.tokens() * of_token
    }

    /// Experts of a token in a layer, at most.
    fn most_choices(&self) -> usize {
        let layers = self.size.decoder.layers.iter().filter_map(|layer| layer.feed_forward.moe());
        layers.map(|moe| moe.router.top_k()).max().unwrap_or(1)
    }

    fn gradient_group(&self, spec: &ParamSpec) -> Vec<usize> {
        let (dims, rank) = (self.placement.dims(), self.placement.rank());
        if spec.is_stacked() { dims.experts(spec.shape[0]).replica_group(rank) } else { dims.data_group(rank) }
    }

    /// Passes of this rank in a step.
    fn passes(&self) -> usize {
        self.size.micro_batches.div_ceil(self.placement.dims().dp)
    }

    fn tokens(&self) -> usize {
        self.size.micro_batch_size * self.size.seq_len
    }

    /// `bytes` to each of the other ranks of a group.
    fn to_each(&self, ranks: &[usize], bytes: usize) -> LevelBytes {
        let (rank, node) = (self.placement.rank(), |rank: usize| rank / self.ranks_per_node);
        let mut sent = LevelBytes::default();
        for &peer in ranks.iter().filter(|&&peer| peer != rank) {
            if node(peer) == node(rank) {
                sent.intra_node += bytes;
            } else {
                sent.inter_node += bytes;
            }
        }
        sent
    }

    /// Parts of sums to their owners, after every pass if gradients are divided, and back once.
    fn gradients<'a>(&self, groups: impl Iterator<Item = &'a (usize, Vec<usize>)>) -> LevelBytes {
        let sums = if self.reduce.zero == Zero::Gradients { self.passes() } else { 1 };
        let mut sent = LevelBytes::default();
        for (elements, ranks) in groups {
            sent += self.to_each(ranks, elements.div_ceil(ranks.len()) * F32 * (sums + 1));
        }
        sent
    }

    /// To the experts and back, forward and backward; where experts are sliced, to all slices.
    fn rows(&self) -> LevelBytes {
        let (dims, rank) = (self.placement.dims(), self.placement.rank());
        let mut sent = LevelBytes::default();
        for moe in self.size.decoder.layers.iter().filter_map(|layer| layer.feed_forward.moe()) {
            let experts = dims.experts(moe.num_experts);
            let rows = self.tokens() * moe.router.top_k();
            let bytes = 4 * self.passes() * rows * self.size.decoder.d_model * F32;
            sent += self.to_each(&experts.expert_group(rank), bytes / experts.ep);
            sent += self.to_each(&experts.slice_group(rank), bytes);
        }
        sent
    }

    /// Each layer adds up after attention and after a dense or residual network, and their gradients before both.
    fn tensors(&self) -> LevelBytes {
        let (dims, rank) = (self.placement.dims(), self.placement.rank());
        let sums = |layer: &LayerConfig| {
            let dense = layer.feed_forward.moe().is_none_or(|moe| moe.branch != BranchConfig::None);
            2 + 2 * usize::from(dense)
        };
        let sums: usize = self.size.decoder.layers.iter().map(sums).sum();
        let values = self.tokens() * self.size.decoder.d_model;
        // A part to its owner and the sum of a part back; two ranks send each other everything at once.
        let to_each = if dims.tp == 2 { values } else { 2 * values.div_ceil(dims.tp) };
        self.to_each(&dims.tensor_group(rank), self.passes() * sums * to_each * F32)
    }

    /// Of one pass: for each layer the stream, its norms, the projections, and the inner values of its networks before and after
    /// their activation.
    fn activations(&self) -> usize {
        let (d_model, tp) = (self.size.decoder.d_model, self.placement.dims().tp);
        let of_layer = |layer: &LayerConfig| {
            let projections = layer.attention.kept_columns() / tp;
            let inner = match &layer.feed_forward {
                FeedForwardConfig::Dense(mlp) => 2 * mlp.d_ff / tp,
                FeedForwardConfig::Moe(moe) => {
                    let branch = match moe.branch {
                        BranchConfig::None => 0,
                        BranchConfig::Residual(mlp) | BranchConfig::Shared { mlp, .. } => mlp.d_ff / tp,
                    };
                    let slices = self.placement.dims().expert_slices;
                    2 * branch + moe.router.top_k() * (2 * moe.expert.d_ff / slices + 2 * d_model)
                }
            };
            6 * d_model + projections + inner
        };
        F32 * self.tokens() * self.size.decoder.layers.iter().map(of_layer).sum::<usize>()
    }
}
