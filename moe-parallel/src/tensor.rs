//! [`RankOps`]: a backend's operations on one rank of a tensor group. Layers stay as they are: a matrix that ranks split is
//! wrapped when it is fetched, and its products do what the split asks for.
//!
//! ```text
//! by columns   every rank has the input; each computes columns of the output      backward: sum of the input's gradients
//! by rows      each rank has columns of the input; the outputs are summed         backward: nothing
//! ```
//!
//! # Source
//! Megatron-LM (1909.08053) section 3: the conjugate operators f and g.

use crate::Result;
use crate::comm::{Collectives, Communicator, Element, Reduction, Site};
use crate::dims::part;
use crate::exchanged::{by_dtype, exchanged, with_values};
use candle_core::{Device, Tensor, WithDType};
use moe_core::ops::{
    AttentionShape, Choices, DecoderOps, Distillation, DistilledLoss, Dropout, HeadDropout, KvShape, LossOps, MoeOps,
    PagedKv, PagedSequence, PartStatistics, Positions, RotaryLayout, RotaryTable, SoftTargets, StudentOutput,
    VocabularyPart, VocabularyParts, WeightOps, mlp_stepwise, parts_per_expert,
};
use moe_core::{
    Activation, DispatchTable, DroplessConfig, MlpWeights, Ops, PackedWeight, SplitKind, Weight, WeightSource,
    WeightUse,
};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

fn reduced<T: Element + WithDType>(comm: &dyn Communicator, site: Site, x: &Tensor, how: Reduction) -> Result<Vec<T>> {
    with_values::<T, _>(x, |values| comm.all_reduce(site, values, how))
}

/// The same tensor on every rank of a group; its gradient is the sum of theirs.
///
/// # Errors
/// [`crate::Error::Fault`] in the backward pass.
pub fn copy_to_group(comm: &Arc<dyn Communicator>, site: Site, x: &Tensor) -> Result<Tensor> {
    if comm.size() == 1 || !x.track_op() {
        return Ok(x.clone());
    }
    let (comm, site) = (Arc::clone(comm), site.backward());
    by_dtype!(x.dtype(), T => {
        let same = with_values::<T, _>(x, |values| Ok(values.to_vec()))?;
        exchanged("copy_to_group", x, (same, x.shape()), move |grad| {
            Ok(Tensor::from_vec(reduced::<T>(&*comm, site, grad, Reduction::Sum)?, grad.shape(), grad.device())?)
        })
    })
}

/// The sum of a group's tensors, in rank order, on every rank; its gradient is every term's.
///
/// # Errors
/// [`crate::Error::Fault`].
pub fn sum_over_group(comm: &Arc<dyn Communicator>, site: Site, x: &Tensor) -> Result<Tensor> {
    if comm.size() == 1 {
        return Ok(x.clone());
    }
    by_dtype!(x.dtype(), T => {
        let sum = reduced::<T>(&**comm, site, x, Reduction::Sum)?;
        exchanged("sum_over_group", x, (sum, x.shape()), |grad| Ok(grad.clone()))
    })
}

/// A group's ranks as the parts of a vocabulary, in rank order.
#[derive(Debug)]
struct VocabularyRanks {
    comm: Arc<dyn Communicator>,
    site: Site,
}

impl VocabularyParts for VocabularyRanks {
    fn gather(&self, own: &[PartStatistics]) -> moe_core::Result<Vec<Vec<PartStatistics>>> {
        let values: Vec<f64> = own.iter().flat_map(|of| [of.max, of.sum, of.target]).collect();
        let all = self.comm.all_gather(self.site, &values)?;
        let read = |of: &[f64]| PartStatistics { max: of[0], sum: of[1], target: of[2] };
        Ok(all.chunks(values.len().max(1)).map(|part| part.chunks_exact(3).map(read).collect()).collect())
    }
}

/// How a matrix is split.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Split {
    Columns,
    Rows,
    /// Rows of a table or columns of the output layer: these entries of a vocabulary.
    Vocabulary {
        held: Range<usize>,
        size: usize,
    },
}

/// A part of a matrix, in the backend's own form.
#[derive(Debug)]
struct SplitWeight {
    part: Weight,
    split: Split,
}

impl PackedWeight for SplitWeight {
    fn dims(&self) -> &[usize] {
        self.part.dims()
    }
    fn bytes(&self) -> usize {
        self.part.bytes()
    }
    fn form(&self) -> String {
        self.part.form()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn split_of(weight: &Weight) -> Option<&SplitWeight> {
    match weight {
        Weight::Packed(packed) => packed.as_any().downcast_ref(),
        Weight::Tensor(_) => None,
    }
}

/// A backend on one rank.
#[derive(Debug)]
pub struct RankOps {
    inner: Arc<dyn Ops>,
    tensor: Arc<dyn Communicator>,
    /// Ranks that share each expert, if experts are sliced.
    slices: Option<Arc<dyn Communicator>>,
    site: Site,
}

impl RankOps {
    /// The operations `inner` for a rank of the tensor group `tensor`, and of the group `slices` if experts are sliced; `site`
    /// is named in errors.
    pub fn new(
        inner: Arc<dyn Ops>,
        tensor: Arc<dyn Communicator>,
        slices: Option<Arc<dyn Communicator>>,
        site: Site,
    ) -> Self {
        Self { inner, tensor, slices, site }
    }

    fn product(&self, x: &Tensor, split: &SplitWeight, bias: Option<&Tensor>) -> Result<Tensor> {
        match &split.split {
            Split::Columns => {
                let x = copy_to_group(&self.tensor, self.site, x)?;
                Ok(self.inner.linear(&x, &split.part, bias)?)
            }
            Split::Rows => {
                let sum = sum_over_group(&self.tensor, self.site, &self.inner.linear(x, &split.part, None)?)?;
                match bias {
                    Some(bias) => Ok(sum.broadcast_add(bias)?),
                    None => Ok(sum),
                }
            }
            Split::Vocabulary { size, .. } => {
                let x = copy_to_group(&self.tensor, self.site, x)?;
                let columns = self.inner.linear(&x, &split.part, bias)?;
                by_dtype!(columns.dtype(), T => self.all_columns::<T>(&columns, *size))
            }
        }
    }

    /// Columns of every rank side by side, `[.., size]`. Without a gradient: training takes the loss, not the logits.
    fn all_columns<T: Element + WithDType>(&self, own: &Tensor, size: usize) -> Result<Tensor> {
        let ranks = self.tensor.size();
        let leading = &own.dims()[..own.rank() - 1];
        let rows: usize = leading.iter().product();
        let width = |rank: usize| part(size, rank, ranks).len();
        let counts: Vec<usize> = (0..ranks).map(|rank| rows * width(rank)).collect();
        let gathering = with_values::<T, _>(own, |own| self.tensor.start_all_gather_v(self.site, own, &counts))?;
        let parts = gathering.wait_parts()?;
        let mut all = Vec::with_capacity(rows * size);
        for row in 0..rows {
            for (rank, part) in parts.iter().enumerate() {
                all.extend_from_slice(&part[row * width(rank)..][..width(rank)]);
            }
        }
        Ok(Tensor::from_vec(all, [leading, &[size]].concat(), own.device())?)
    }

    /// Rows of a table, of which each rank holds some.
    fn lookup(&self, table: &Weight, held: &Range<usize>, size: usize, ids: &[u32]) -> Result<Tensor> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= size) {
            return Err(crate::Error::Argument(format!("id {id} is outside the table of {size} rows")));
        }
        let here = |id: u32| held.contains(&(id as usize));
        let local: Vec<u32> = ids.iter().map(|&id| if here(id) { id - held.start as u32 } else { 0 }).collect();
        let mask: Vec<f32> = ids.iter().map(|&id| f32::from(u8::from(here(id)))).collect();
        let rows = self.inner.embedding(table, &local)?;
        let mask = Tensor::from_vec(mask, (ids.len(), 1), rows.device())?.to_dtype(rows.dtype())?;
        sum_over_group(&self.tensor, self.site, &rows.broadcast_mul(&mask)?)
    }

    /// The loss over a vocabulary of which each rank has columns; the logits of one rank are never those of another.
    ///
    /// # Source
    /// Megatron-LM `_VocabParallelCrossEntropy`. Differs: one exchange per block of tokens instead of three for all.
    fn loss(&self, hidden: &Tensor, part: &Weight, targets: &[u32], of: VocabularyPart) -> Result<Tensor> {
        let hidden = copy_to_group(&self.tensor, self.site, hidden)?;
        Ok(self.inner.linear_cross_entropy_part(&hidden, part, targets, &of)?)
    }

    /// Where the heads of this rank stand among those of the group, of which each rank has as many.
    fn own_heads(&self, dropout: HeadDropout, num_heads: usize) -> HeadDropout {
        HeadDropout { first_head: dropout.first_head + self.tensor.rank() * num_heads, ..dropout }
    }

    /// Sliced experts: each rank computes with its columns of the inner width, and the results are summed.
    fn sliced_experts(
        &self,
        comm: &Arc<dyn Communicator>,
        rows: &Tensor,
        weights: &MlpWeights,
        activation: Activation,
        offsets: &[usize],
    ) -> Result<Tensor> {
        let rows = copy_to_group(comm, self.site, rows)?;
        let without = MlpWeights { fc_out_bias: None, ..weights.clone() };
        let sum = sum_over_group(comm, self.site, &self.inner.experts(&rows, &without, activation, offsets)?)?;
        let Some(bias) = &weights.fc_out_bias else { return Ok(sum) };
        if sum.elem_count() == 0 {
            // candle leaves sums of nothing out of the graph, and the bias would have no gradient; a part of no rows has zeros.
            return Ok(Tensor::cat(&[&sum, &bias.narrow(0, 0, 0)?], 0)?);
        }
        let parts = parts_per_expert(offsets, bias.dim(0)?).unwrap_or(1);
        let experts = offsets
            .windows(2)
            .enumerate()
            .flat_map(|(group, pair)| std::iter::repeat_n((group / parts) as u32, pair[1] - pair[0]));
        let experts = Tensor::from_iter(experts, bias.device())?;
        Ok((sum + bias.index_select(&experts, 0)?)?)
    }
}

impl WeightOps for RankOps {
    fn weight(&self, source: &WeightSource<'_>, purpose: WeightUse) -> moe_core::Result<Weight> {
        let spec = source.spec();
        let along = spec.splits.iter().find(|split| split.kind == SplitKind::Tensor);
        let Some(along) = along.filter(|_| self.tensor.size() > 1 && !spec.is_stacked()) else {
            return self.inner.weight(source, purpose);
        };
        let split = match (purpose, along.dim) {
            (WeightUse::Table | WeightUse::Output, 0) => {
                let size = spec.shape[0];
                let held = part(size, self.tensor.rank(), self.tensor.size());
                let mut local = spec.clone();
                local.shape[0] = held.len();
                let part = self.inner.weight(&source.of(&local), purpose)?;
                return Ok(Weight::Packed(Arc::new(SplitWeight { part, split: Split::Vocabulary { held, size } })));
            }
            (_, 0) => Split::Columns,
            _ => Split::Rows,
        };
        Ok(Weight::Packed(Arc::new(SplitWeight { part: self.inner.weight(source, purpose)?, split })))
    }
}

impl Ops for RankOps {
    fn mlp(&self, x: &Tensor, weights: &MlpWeights, activation: Activation) -> moe_core::Result<Tensor> {
        match [&weights.fc_in, &weights.fc_out].map(split_of) {
            [None, None] => self.inner.mlp(x, weights, activation),
            _ => mlp_stepwise(self, x, weights, activation),
        }
    }
}

impl MoeOps for RankOps {
    fn gate(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> moe_core::Result<Tensor> {
        self.inner.gate(x, weight, bias)
    }

    fn choose(
        &self,
        tokens: &Tensor,
        weight: &Weight,
        selection_bias: Option<&Tensor>,
        config: &DroplessConfig,
    ) -> moe_core::Result<Option<Choices>> {
        self.inner.choose(tokens, weight, selection_bias, config)
    }

    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> moe_core::Result<Tensor> {
        self.inner.permute(tokens, table)
    }

    fn unpermute(&self, rows: &Tensor, weights: &Tensor, table: &Arc<DispatchTable>) -> moe_core::Result<Tensor> {
        self.inner.unpermute(rows, weights, table)
    }

    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> moe_core::Result<Tensor> {
        self.inner.grouped_linear(rows, weight, bias, offsets)
    }

    fn activation(&self, activation: Activation, x: &Tensor) -> moe_core::Result<Tensor> {
        self.inner.activation(activation, x)
    }

    fn mix(&self, a: &Tensor, b: &Tensor, logits: &Tensor) -> moe_core::Result<Tensor> {
        self.inner.mix(a, b, logits)
    }

    fn experts(
        &self,
        rows: &Tensor,
        weights: &MlpWeights,
        activation: Activation,
        offsets: &[usize],
    ) -> moe_core::Result<Tensor> {
        match &self.slices {
            Some(comm) => Ok(self.sliced_experts(comm, rows, weights, activation, offsets)?),
            None => self.inner.experts(rows, weights, activation, offsets),
        }
    }
}

impl DecoderOps for RankOps {
    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> moe_core::Result<Tensor> {
        match split_of(weight) {
            Some(split) => Ok(self.product(x, split, bias)?),
            None => self.inner.linear(x, weight, bias),
        }
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> moe_core::Result<Tensor> {
        self.inner.add(a, b)
    }

    fn add_norm(
        &self,
        x: &Tensor,
        delta: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> moe_core::Result<[Tensor; 2]> {
        self.inner.add_norm(x, delta, weight, bias, epsilon)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> moe_core::Result<Tensor> {
        self.inner.layer_norm(x, weight, bias, epsilon)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f64) -> moe_core::Result<Tensor> {
        self.inner.rms_norm(x, weight, epsilon)
    }

    fn for_heads(&self, parameter: &Tensor) -> moe_core::Result<Tensor> {
        Ok(copy_to_group(&self.tensor, self.site, &self.inner.for_heads(parameter)?)?)
    }

    fn rotary(
        &self,
        x: &Tensor,
        table: &RotaryTable,
        layout: RotaryLayout,
        positions: Positions<'_>,
    ) -> moe_core::Result<Tensor> {
        self.inner.rotary(x, table, layout, positions)
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
    ) -> moe_core::Result<Tensor> {
        self.inner.attention(q, k, v, shape, seq_len)
    }

    fn attention_with_sinks(
        &self,
        qkv: [&Tensor; 3],
        sinks: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
        dropout: Option<HeadDropout>,
    ) -> moe_core::Result<Tensor> {
        let dropout = dropout.map(|dropout| self.own_heads(dropout, shape.num_heads));
        self.inner.attention_with_sinks(qkv, sinks, shape, seq_len, dropout)
    }

    fn attention_fused(&self, qkv: &Tensor, num_heads: usize, seq_len: usize) -> moe_core::Result<Tensor> {
        self.inner.attention_fused(qkv, num_heads, seq_len)
    }

    fn attention_dropped(
        &self,
        qkv: [&Tensor; 3],
        shape: AttentionShape,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> moe_core::Result<Tensor> {
        self.inner.attention_dropped(qkv, shape, seq_len, self.own_heads(dropout, shape.num_heads))
    }

    fn attention_fused_dropped(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> moe_core::Result<Tensor> {
        self.inner.attention_fused_dropped(qkv, num_heads, seq_len, self.own_heads(dropout, num_heads))
    }

    /// Every rank of the group has the whole of `x`, and the same mask.
    fn dropout(&self, x: &Tensor, dropout: Dropout) -> moe_core::Result<Tensor> {
        self.inner.dropout(x, dropout)
    }

    fn new_pages(
        &self,
        num_blocks: usize,
        block_size: usize,
        shape: KvShape,
        device: &Device,
    ) -> moe_core::Result<[Tensor; 2]> {
        self.inner.new_pages(num_blocks, block_size, shape, device)
    }

    fn write_pages(&self, pool: PagedKv<'_>, keys: &Tensor, values: &Tensor, slots: &[u32]) -> moe_core::Result<()> {
        self.inner.write_pages(pool, keys, values, slots)
    }

    fn paged_attention(
        &self,
        queries: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> moe_core::Result<Tensor> {
        self.inner.paged_attention(queries, pool, sequences, shape)
    }

    fn paged_attention_with_sinks(
        &self,
        queries: &Tensor,
        sinks: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> moe_core::Result<Tensor> {
        self.inner.paged_attention_with_sinks(queries, sinks, pool, sequences, shape)
    }

    /// Ranks wait for each other inside of `body`, so no thread is kept awake.
    fn chain(&self, _: usize, body: &mut dyn FnMut()) {
        body();
    }

    fn embedding(&self, table: &Weight, ids: &[u32]) -> moe_core::Result<Tensor> {
        match split_of(table) {
            Some(SplitWeight { split: Split::Vocabulary { held, size }, part }) => {
                Ok(self.lookup(part, held, *size, ids)?)
            }
            _ => self.inner.embedding(table, ids),
        }
    }
}

impl LossOps for RankOps {
    fn linear_cross_entropy(&self, hidden: &Tensor, weight: &Weight, targets: &[u32]) -> moe_core::Result<Tensor> {
        match split_of(weight) {
            Some(SplitWeight { split: Split::Vocabulary { held, size }, part }) => {
                let parts = Arc::new(VocabularyRanks { comm: Arc::clone(&self.tensor), site: self.site });
                let of = VocabularyPart { held: held.clone(), size: *size, parts };
                of.check(hidden.dims(), part.dims(), targets)?;
                Ok(self.loss(hidden, part, targets, of)?)
            }
            _ => self.inner.linear_cross_entropy(hidden, weight, targets),
        }
    }

    fn linear_cross_entropy_part(
        &self,
        hidden: &Tensor,
        weight: &Weight,
        targets: &[u32],
        part: &VocabularyPart,
    ) -> moe_core::Result<Tensor> {
        self.inner.linear_cross_entropy_part(hidden, weight, targets, part)
    }

    fn linear_distillation(
        &self,
        student: StudentOutput<'_>,
        soft: SoftTargets<'_>,
        how: Distillation,
    ) -> moe_core::Result<DistilledLoss> {
        let Some(SplitWeight { split: Split::Vocabulary { held, size }, part }) = split_of(student.weight) else {
            return self.inner.linear_distillation(student, soft, how);
        };
        let soft = match soft {
            SoftTargets::Layer { hidden, weight } => {
                SoftTargets::Layer { hidden, weight: same_part(weight, held, *size)? }
            }
            named @ SoftTargets::TopK { .. } => named,
        };
        let parts = Arc::new(VocabularyRanks { comm: Arc::clone(&self.tensor), site: self.site });
        let of = VocabularyPart { held: held.clone(), size: *size, parts };
        // Before the ranks meet: a sum over them in the backward pass is not begun for what does not fit.
        StudentOutput { weight: part, part: Some(&of), ..student }.check(&soft)?;
        let hidden = copy_to_group(&self.tensor, self.site, student.hidden)?;
        let student = StudentOutput { hidden: &hidden, weight: part, part: Some(&of), ..student };
        self.inner.linear_distillation(student, soft, how)
    }
}

/// The part of a teacher's output layer whose entries are those of the student's.
fn same_part<'a>(weight: &'a Weight, held: &Range<usize>, size: usize) -> moe_core::Result<&'a Weight> {
    match split_of(weight) {
        Some(SplitWeight { split: Split::Vocabulary { held: of, size: all }, part }) if of == held && *all == size => {
            Ok(part)
        }
        _ => Err(moe_core::Error::Input(format!(
            "the student's output layer has entries {}..{} of {size} on this rank, and the teacher's is not split so; spread the \
             teacher over the same ranks",
            held.start, held.end
        ))),
    }
}
