//! From routing to rows and back: the token-to-row table, the [`Dispatcher`] trait and its single-rank implementation.

use crate::ops::{CandleOps, MoeOps};
use crate::{DROPPED, Result, Routing};
use candle_core::Tensor;
use std::sync::Arc;

/// Which row carries which token's copy to which expert: the table that replaces the one-hot masks of the original code.
///
/// Rows are grouped by expert, and in slot order inside an expert:
///
/// ```text
/// token order   t0:e1  t1:e0  t2:e1  t3:dropped
/// row order     e0: t1 | e1: t0 t2            expert_offsets = [0, 1, 3]
/// ```
///
/// # Source
/// Paper section 5.4: the dense token-to-expert table built with a prefix sum.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DispatchTable {
    /// Tokens routed.
    pub num_tokens: usize,
    /// Choices per token.
    pub top_k: usize,
    /// Token of each row, `[rows]`.
    pub row_tokens: Vec<u32>,
    /// `token * top_k + choice` of each row, `[rows]`.
    pub row_choices: Vec<u32>,
    /// Row of each choice, `[tokens, top_k]`; [`DROPPED`] where there is none.
    pub choice_rows: Vec<u32>,
    /// First row of each expert, and the number of rows: `[experts + 1]`.
    pub expert_offsets: Vec<usize>,
}

impl DispatchTable {
    /// Builds the table of a routing.
    ///
    /// Slots must be a permutation of `0..count` inside each expert, as every router of this crate gives them.
    pub fn new(routing: &Routing) -> Self {
        Self::from_slots(routing.num_tokens, routing.top_k, routing.num_experts, &routing.expert_ids, &routing.slots)
    }

    /// Builds the table by counting sort: counts, exclusive prefix sum, then each choice to `offset + slot`.
    ///
    /// # Shapes
    /// `expert_ids` and `slots` `[tokens, top_k]`; [`DROPPED`] experts have no row
    ///
    /// # Panics
    /// If an expert is neither [`DROPPED`] nor below `num_experts`, or the slots of an expert leave a gap or are given twice.
    pub fn from_slots(num_tokens: usize, top_k: usize, num_experts: usize, expert_ids: &[u32], slots: &[u32]) -> Self {
        let mut table = Self::counted(num_tokens, top_k, num_experts, expert_ids);
        for (choice, (&expert, &slot)) in expert_ids.iter().zip(slots).enumerate() {
            if expert == DROPPED {
                continue;
            }
            let row = table.expert_offsets[expert as usize] + slot as usize;
            assert!(
                row < table.expert_offsets[expert as usize + 1] && table.row_choices[row] == DROPPED,
                "slots must be dense inside an expert"
            );
            table.row_tokens[row] = (choice / top_k) as u32;
            table.row_choices[row] = choice as u32;
            table.choice_rows[choice] = row as u32;
        }
        table
    }

    /// Builds the table of choices whose slots are in token order, which is what every router that drops by position or
    /// not at all gives: the same counting sort, stable, without a list of slots.
    ///
    /// # Shapes
    /// `expert_ids` `[tokens, top_k]`; [`DROPPED`] experts have no row
    ///
    /// # Panics
    /// If an expert is neither [`DROPPED`] nor below `num_experts`.
    pub fn from_expert_ids(num_tokens: usize, top_k: usize, num_experts: usize, expert_ids: &[u32]) -> Self {
        let mut table = Self::counted(num_tokens, top_k, num_experts, expert_ids);
        let mut next = table.expert_offsets.clone();
        for (choice, &expert) in expert_ids.iter().enumerate().filter(|(_, e)| **e != DROPPED) {
            let row = next[expert as usize];
            next[expert as usize] += 1;
            table.row_tokens[row] = (choice / top_k) as u32;
            table.row_choices[row] = choice as u32;
            table.choice_rows[choice] = row as u32;
        }
        table
    }

    /// The table with its offsets, from the counts, and no row assigned.
    fn counted(num_tokens: usize, top_k: usize, num_experts: usize, expert_ids: &[u32]) -> Self {
        let mut expert_offsets = vec![0usize; num_experts + 1];
        for &expert in expert_ids.iter().filter(|&&e| e != DROPPED) {
            expert_offsets[1..][expert as usize] += 1;
        }
        for expert in 0..num_experts {
            expert_offsets[expert + 1] += expert_offsets[expert];
        }
        let num_rows = expert_offsets[num_experts];
        Self {
            num_tokens,
            top_k,
            row_tokens: vec![0; num_rows],
            row_choices: vec![DROPPED; num_rows],
            choice_rows: vec![DROPPED; expert_ids.len()],
            expert_offsets,
        }
    }

    /// Rows in all.
    pub fn num_rows(&self) -> usize {
        self.row_tokens.len()
    }
}

/// Rows grouped by expert.
#[derive(Debug, Clone)]
pub struct ExpertRows {
    /// `[rows, d_model]`
    pub rows: Tensor,
    /// First row of each expert held here, and the number of rows: `[local experts + 1]`; or of each batch of each expert
    /// ([`MoeOps::grouped_linear`]), `[local experts * batches + 1]`.
    pub offsets: Vec<usize>,
}

/// Takes tokens to their experts and back.
///
/// Each way has a beginning and a finish, so that other work can run while rows travel; [`Dispatcher::dispatch`] and
/// [`Dispatcher::combine`] do both at once. Every call takes part in the graph, without rows too.
pub trait Dispatcher {
    /// Rows on their way to the experts.
    type Dispatching;
    /// What `combine` needs to undo one `dispatch`. Taken by value, so each dispatch is combined at most once.
    type Receipt;
    /// Results on their way back.
    type Combining;

    /// How many of a router's experts are held here.
    fn num_local_experts(&self, num_experts: usize) -> usize {
        num_experts
    }

    /// Sends copies of the tokens to their experts.
    ///
    /// # Shapes
    /// - `tokens`: `[tokens, d_model]`
    ///
    /// # Errors
    /// If `tokens` and `routing` disagree.
    fn begin_dispatch(&self, tokens: &Tensor, routing: &Routing) -> Result<Self::Dispatching>;

    /// The rows of the experts held here, grouped by expert.
    ///
    /// # Errors
    /// If the rows do not arrive.
    fn finish_dispatch(&self, dispatching: Self::Dispatching) -> Result<(ExpertRows, Self::Receipt)>;

    /// Sends the experts' results back.
    ///
    /// # Errors
    /// If `rows` is not the shape that the dispatch gave.
    fn begin_combine(&self, rows: ExpertRows, receipt: Self::Receipt) -> Result<Self::Combining>;

    /// Sums the experts' results per token, scaled by the combine weights.
    ///
    /// # Shapes
    /// - returns: `[tokens, d_model]`
    ///
    /// # Errors
    /// If the results do not arrive.
    fn finish_combine(&self, combining: Self::Combining) -> Result<Tensor>;

    /// [`Dispatcher::begin_dispatch`] and its finish.
    ///
    /// # Errors
    /// As these.
    fn dispatch(&self, tokens: &Tensor, routing: &Routing) -> Result<(ExpertRows, Self::Receipt)> {
        self.finish_dispatch(self.begin_dispatch(tokens, routing)?)
    }

    /// [`Dispatcher::begin_combine`] and its finish.
    ///
    /// # Errors
    /// As these.
    fn combine(&self, rows: ExpertRows, receipt: Self::Receipt) -> Result<Tensor> {
        self.finish_combine(self.begin_combine(rows, receipt)?)
    }
}

/// All experts here, rows moved by table.
#[derive(Debug, Clone)]
pub struct LocalDispatcher {
    ops: Arc<dyn MoeOps>,
}

impl LocalDispatcher {
    /// With these operations.
    pub fn new(ops: Arc<dyn MoeOps>) -> Self {
        Self { ops }
    }
}

impl Default for LocalDispatcher {
    /// In ordinary candle operations.
    fn default() -> Self {
        Self::new(Arc::new(CandleOps))
    }
}

/// The table and the weights of one dispatch.
#[derive(Debug)]
pub struct LocalReceipt {
    table: Arc<DispatchTable>,
    combine_weights: Tensor,
}

impl Dispatcher for LocalDispatcher {
    type Dispatching = (ExpertRows, LocalReceipt);
    type Receipt = LocalReceipt;
    type Combining = Tensor;

    fn begin_dispatch(&self, tokens: &Tensor, routing: &Routing) -> Result<Self::Dispatching> {
        let table = Arc::new(DispatchTable::new(routing));
        let rows = self.ops.permute(tokens, &table)?;
        let offsets = table.expert_offsets.clone();
        Ok((ExpertRows { rows, offsets }, LocalReceipt { table, combine_weights: routing.combine_weights.clone() }))
    }

    fn finish_dispatch(&self, dispatching: Self::Dispatching) -> Result<(ExpertRows, LocalReceipt)> {
        Ok(dispatching)
    }

    fn begin_combine(&self, rows: ExpertRows, receipt: LocalReceipt) -> Result<Tensor> {
        let weights = receipt.combine_weights.to_dtype(rows.rows.dtype())?;
        self.ops.unpermute(&rows.rows, &weights, &receipt.table)
    }

    fn finish_combine(&self, combining: Tensor) -> Result<Tensor> {
        Ok(combining)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_constructors_agree_on_slots_in_token_order() {
        for (tokens, top_k, experts) in [(0, 1, 3), (1, 2, 2), (50, 3, 7)] {
            let id = |i: usize| if i % 5 == 4 { DROPPED } else { (i * 7 % experts) as u32 };
            let ids: Vec<u32> = (0..tokens * top_k).map(id).collect();
            let mut counts = vec![0; experts];
            let slot = |&e: &u32| {
                counts.get_mut(e as usize).map_or(0, |c| {
                    *c += 1;
                    *c - 1
                })
            };
            let slots: Vec<u32> = ids.iter().map(slot).collect();
            let want = DispatchTable::from_slots(tokens, top_k, experts, &ids, &slots);
            assert_eq!(DispatchTable::from_expert_ids(tokens, top_k, experts, &ids), want);
        }
    }

    #[test]
    #[should_panic(expected = "slots must be dense inside an expert")]
    fn a_slot_that_is_given_twice_is_refused() {
        let _ = DispatchTable::from_slots(2, 1, 1, &[0, 0], &[0, 0]);
    }
}
