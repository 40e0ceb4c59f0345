//! The gate of an inference pass in one sweep: router logits, scores, the choice of experts, combine weights and the
//! token-to-row table, without one-hot masks and without gradients.
//!
//! Chooses what [`moe_core::DroplessRouter`] chooses, bit for bit: the logits are those of `KernelOps`, the scores are
//! computed with the operations that candle uses, in its order of additions (with AVX2). A block of tokens stays in the
//! cache from its logits to its weights.
//!
//! # Source
//! Paper section 5.4: the gating kernel and the dense token-to-expert table that replaces the sparse einsums.

mod choose;
#[cfg(test)]
mod tests;

use crate::buffer::with_scratch_f32;
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm_part};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Precision, Result, parallel};
use choose::Chooser;
use moe_core::{Capacity, DROPPED, DispatchTable, DroplessConfig, ExpertLoad};

/// A router for inference: gate weight, packed, and the rule of choice.
#[derive(Debug, Clone)]
pub struct FusedGate {
    isa: Isa,
    weight: PackedWeights,
    selection_bias: Option<Vec<f32>>,
    config: DroplessConfig,
    capacity: Option<Capacity>,
}

/// What a [`FusedGate`] decided.
///
/// A token with a NaN among its scores is routed like any other, and at least one of its combine weights is NaN, as is
/// [`moe_core::DroplessRouter`]'s: one lost token does not stop a batch, and its own output says so.
#[derive(Debug, Clone, PartialEq)]
pub struct Gated {
    /// Chosen experts, `[tokens, top_k]`, NaN first, then best first; [`DROPPED`] past the capacity.
    pub expert_ids: Vec<u32>,
    /// Factors of the combine, `[tokens, top_k]`, 0 where dropped (NaN stays NaN).
    pub combine_weights: Vec<f32>,
    /// Rows by expert, in token order inside an expert.
    pub table: DispatchTable,
    /// Demand and drops.
    pub load: ExpertLoad,
}

/// Most tokens whose logits one task holds: the packed weight is read once per task.
const MAX_BLOCK: usize = 96;
/// Fewest tokens of a task: fewer take as long.
const MIN_BLOCK: usize = 8;
/// Multiply-adds below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 18;

impl FusedGate {
    /// A gate with `weight` `[num_experts, d_model]`; `selection_bias` `[num_experts]` moves the choice and not the
    /// weights.
    ///
    /// # Errors
    /// [`Error::Argument`] if a size does not fit or this machine cannot run `isa`; [`Error::Moe`] if the settings do
    /// not fit the experts.
    pub fn new(
        isa: Isa,
        config: DroplessConfig,
        weight: &[f32],
        [num_experts, d_model]: [usize; 2],
        selection_bias: Option<&[f32]>,
    ) -> Result<Self> {
        if !isa.is_available() {
            return Err(Error::Argument(format!("isa must be one this machine can run, got {isa}")));
        }
        if num_experts == 0 || d_model == 0 || num_experts.checked_mul(d_model) != Some(weight.len()) {
            return Err(Error::Argument(format!(
                "weight must hold num_experts x d_model = {num_experts} x {d_model} values, at least one, got {}",
                weight.len()
            )));
        }
        if let Some(bias) = selection_bias.filter(|b| b.len() != num_experts) {
            return Err(Error::Argument(format!("selection_bias must have {num_experts} entries, got {}", bias.len())));
        }
        config.validate(num_experts)?;
        let operand = Operand::rows(weight, num_experts, d_model, d_model);
        Ok(Self {
            isa,
            weight: PackedWeights::new(isa, Precision::F32, &operand),
            selection_bias: selection_bias.map(<[f32]>::to_vec),
            config,
            capacity: None,
        })
    }

    /// The same with a limit on the rows of an expert, at its evaluation factor: tokens past it are dropped, the last
    /// first.
    ///
    /// # Errors
    /// [`Error::Argument`] if `top_k` is not 1; [`Error::Moe`] if the capacity is not valid.
    ///
    /// # Source
    /// DeepSpeed `top1gating` in evaluation, without random token selection, as [`moe_core::Top1Router`].
    pub fn with_capacity(mut self, capacity: Capacity) -> Result<Self> {
        if self.config.top_k != 1 {
            return Err(Error::Argument(format!(
                "top_k must be 1 for a gate with capacity, got {}",
                self.config.top_k
            )));
        }
        capacity.validate()?;
        self.capacity = Some(capacity);
        Ok(self)
    }

    /// Experts to choose from.
    pub fn num_experts(&self) -> usize {
        self.weight.shape()[0]
    }

    /// Experts per token.
    pub fn top_k(&self) -> usize {
        self.config.top_k
    }

    fn borrowed(&self) -> BorrowedGate<'_> {
        BorrowedGate {
            isa: self.isa,
            weight: &self.weight,
            selection_bias: self.selection_bias.as_deref(),
            config: &self.config,
            capacity: self.capacity,
        }
    }

    /// Decides for every token.
    ///
    /// # Shapes
    /// `tokens` `[tokens, d_model]`
    ///
    /// # Errors
    /// [`Error::Argument`] if `tokens` is not a whole number of rows.
    pub fn forward(&self, tokens: &[f32]) -> Result<Gated> {
        self.borrowed().forward(tokens)
    }

    /// Decides from router logits.
    ///
    /// # Shapes
    /// `logits` `[tokens, num_experts]`
    ///
    /// # Errors
    /// [`Error::Argument`] if `logits` is not a whole number of rows.
    pub fn forward_logits(&self, logits: &[f32]) -> Result<Gated> {
        let experts = self.num_experts();
        let count = rows_of("logits", logits, experts)?;
        // A score costs about as much as a few dozen multiply-adds.
        Ok(self.borrowed().decide(count, 32 * experts, |first, block| {
            block.copy_from_slice(&logits[first * experts..][..block.len()]);
        }))
    }
}

/// A [`FusedGate`] whose parts belong to others.
#[derive(Clone, Copy)]
pub(crate) struct BorrowedGate<'a> {
    pub(crate) isa: Isa,
    pub(crate) weight: &'a PackedWeights,
    pub(crate) selection_bias: Option<&'a [f32]>,
    pub(crate) config: &'a DroplessConfig,
    pub(crate) capacity: Option<Capacity>,
}

impl BorrowedGate<'_> {
    pub(crate) fn forward(&self, tokens: &[f32]) -> Result<Gated> {
        let [experts, width] = self.weight.shape();
        let count = rows_of("tokens", tokens, width)?;
        Ok(self.decide(count, experts * width, |first, logits| {
            let rows = logits.len() / experts;
            let group = Group {
                a: Operand::rows(&tokens[first * width..][..rows * width], rows, width, width),
                b: Weights::Packed(self.weight),
                start: Start::Zero,
                out_offset: 0,
                out_stride: experts,
            };
            // SAFETY: the logits belong to this task.
            unsafe { gemm_part(self.isa, Precision::F32, group, SharedMut::new(logits)) };
        }))
    }

    /// Blocks of tokens side by side: `fill` writes the logits of a block that starts at a token, then each token
    /// chooses.
    fn decide(&self, count: usize, work_per_token: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Gated {
        let (experts, top_k) = (self.weight.shape()[0], self.config.top_k);
        let block = count.div_ceil(rayon::current_num_threads()).clamp(MIN_BLOCK, MAX_BLOCK);
        let mut expert_ids = vec![0; count * top_k];
        let mut combine_weights = vec![0.0; count * top_k];
        let (ids, weights) = (SharedMut::new(&mut expert_ids), SharedMut::new(&mut combine_weights));
        parallel::for_each_if(count * work_per_token, LEAST_WORK, count.div_ceil(block), |task| {
            let first = task * block;
            let rows = block.min(count - first);
            // SAFETY: each task has tokens of its own.
            let (ids, weights) =
                unsafe { (ids.slice(first * top_k, rows * top_k), weights.slice(first * top_k, rows * top_k)) };
            let mut chooser = Chooser::new(self.config, self.selection_bias, experts);
            with_scratch_f32(rows * experts, |logits| {
                fill(first, logits);
                vectorize!(self.isa, (
                    chooser: &mut Chooser<'_> = &mut chooser,
                    logits: &mut [f32],
                    experts: usize,
                    ids: &mut [u32],
                    weights: &mut [f32],
                    top_k: usize,
                ) {
                    let each = ids.chunks_exact_mut(top_k).zip(weights.chunks_exact_mut(top_k));
                    for (scores, (ids, weights)) in logits.chunks_exact_mut(experts).zip(each) {
                        chooser.choose(scores, ids, weights);
                    }
                });
            });
        });
        self.arrange(count, expert_ids, combine_weights)
    }

    /// Drops what exceeds the capacity, and gives every choice that is left its row.
    fn arrange(&self, count: usize, mut expert_ids: Vec<u32>, mut combine_weights: Vec<f32>) -> Gated {
        let (experts, top_k) = (self.weight.shape()[0], self.config.top_k);
        let capacity = self.capacity.and_then(|c| c.rows(false, count, experts, top_k)).unwrap_or(usize::MAX);
        let mut load = ExpertLoad { tokens_per_expert: vec![0; experts], dropped: 0 };
        for (expert, weight) in expert_ids.iter_mut().zip(&mut combine_weights) {
            let demand = &mut load.tokens_per_expert[*expert as usize];
            *demand += 1;
            if *demand as usize > capacity {
                // As the routers' mask does it: NaN is not hidden.
                (*expert, *weight) = (DROPPED, *weight * 0.0);
                load.dropped += 1;
            }
        }
        let table = DispatchTable::from_expert_ids(count, top_k, experts, &expert_ids);
        Gated { expert_ids, combine_weights, table, load }
    }
}

fn rows_of(name: &str, values: &[f32], width: usize) -> Result<usize> {
    if !values.len().is_multiple_of(width) {
        return Err(Error::Argument(format!("{name} must be rows of {width} values, got {} values", values.len())));
    }
    Ok(values.len() / width)
}
