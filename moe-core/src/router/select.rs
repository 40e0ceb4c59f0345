//! Plain functions on host values that the policies share: picking experts, giving slots, dropping, assembling.

use super::RouteContext;
use crate::{DROPPED, ExpertLoad, Result, RouterLosses, Routing};
use candle_core::Tensor;

/// Index of the largest value, the first of equals. NaN never wins; the scores of its policies are a softmax, which is NaN
/// for every expert if one logit is, so that the weight shows it.
pub(super) fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (index, value) in values.iter().enumerate() {
        if *value > values[best] || values[best].is_nan() && !value.is_nan() {
            best = index;
        }
    }
    best as u32
}

/// Indices of the `k` largest values, largest first, lower index first among equals.
///
/// NaN of either sign is above all numbers: an expert whose score is lost is chosen, and its weight is NaN. Passed over it
/// would leave no trace in the output.
pub(super) fn top_k_indices(values: &[f32], k: usize) -> Vec<u32> {
    let score = |index: u32| {
        let value = values[index as usize];
        if value.is_nan() { f32::NAN } else { value }
    };
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    order.truncate(k);
    order
}

/// Choices before any drop, with padding tokens taken out.
pub(super) struct Demand {
    pub(super) expert_ids: Vec<u32>,
    pub(super) top_k: usize,
    pub(super) tokens_per_expert: Vec<u32>,
}

impl Demand {
    pub(super) fn new(mut expert_ids: Vec<u32>, top_k: usize, num_experts: usize, context: &RouteContext<'_>) -> Self {
        let mut tokens_per_expert = vec![0; num_experts];
        for (choice, expert) in expert_ids.iter_mut().enumerate() {
            if context.is_used(choice / top_k) {
                tokens_per_expert[*expert as usize] += 1;
            } else {
                *expert = DROPPED;
            }
        }
        Self { expert_ids, top_k, tokens_per_expert }
    }

    /// All choices that stand.
    pub(super) fn choices(&self) -> impl Iterator<Item = (usize, u32)> + '_ {
        self.expert_ids.iter().copied().enumerate().filter(|(_, e)| *e != DROPPED)
    }

    /// For each expert its choices, ordered by `rank` (ties: in the order of the choices).
    pub(super) fn ranked_by(&self, rank: impl Fn(usize) -> f32) -> Vec<Vec<usize>> {
        let mut lists: Vec<Vec<usize>> = vec![Vec::new(); self.tokens_per_expert.len()];
        for (choice, expert) in self.choices() {
            lists[expert as usize].push(choice);
        }
        for list in &mut lists {
            list.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
        }
        lists
    }

    /// Keeps, per expert, the first `capacity` choices of its list; the rest are dropped.
    pub(super) fn keep_first(&self, lists: &[Vec<usize>], capacity: Option<usize>) -> Vec<u32> {
        let mut kept = vec![DROPPED; self.expert_ids.len()];
        for (expert, list) in lists.iter().enumerate() {
            for &choice in list.iter().take(capacity.unwrap_or(usize::MAX)) {
                kept[choice] = expert as u32;
            }
        }
        kept
    }
}

/// Slots of the kept choices inside their experts, in the order in which `choices` visits them.
pub(super) fn slots_in_order(kept: &[u32], num_experts: usize, choices: impl Iterator<Item = usize>) -> Vec<u32> {
    let mut next = vec![0u32; num_experts];
    let mut slots = vec![0; kept.len()];
    for choice in choices.filter(|&c| kept[c] != DROPPED) {
        let count = &mut next[kept[choice] as usize];
        slots[choice] = *count;
        *count += 1;
    }
    slots
}

/// A tensor `[tokens, top_k]` of the scores of the demanded experts, 0 where a choice was dropped.
pub(super) fn kept_scores(scores: &Tensor, demanded: &[u32], kept: &[u32], top_k: usize) -> Result<Tensor> {
    let tokens = scores.dim(0)?;
    let ids: Vec<u32> = demanded.iter().map(|&e| if e == DROPPED { 0 } else { e }).collect();
    let ids = Tensor::from_vec(ids, (tokens, top_k), scores.device())?;
    let mask: Vec<f32> = kept.iter().map(|&e| if e == DROPPED { 0.0 } else { 1.0 }).collect();
    let mask = Tensor::from_vec(mask, (tokens, top_k), scores.device())?.to_dtype(scores.dtype())?;
    Ok((scores.contiguous()?.gather(&ids, 1)? * mask)?)
}

/// Divides each token's weights by their sum, kept away from 0.
pub(super) fn normalized(weights: &Tensor, least: f64) -> Result<Tensor> {
    let sum = weights.sum_keepdim(1)?;
    let floor = sum.ones_like()?.affine(least, 0.0)?;
    Ok(weights.broadcast_div(&sum.maximum(&floor)?)?)
}

/// The parts of a decision, put together.
pub(super) struct Decision {
    pub(super) demand: Demand,
    pub(super) kept: Vec<u32>,
    pub(super) slots: Vec<u32>,
    pub(super) capacity: Option<usize>,
    pub(super) combine_weights: Tensor,
    pub(super) losses: RouterLosses,
}

impl Decision {
    pub(super) fn into_routing(self) -> Routing {
        let demanded = self.demand.choices().count();
        let kept = self.kept.iter().filter(|&&e| e != DROPPED).count();
        Routing {
            num_tokens: self.kept.len() / self.demand.top_k.max(1),
            num_experts: self.demand.tokens_per_expert.len(),
            top_k: self.demand.top_k,
            expert_ids: self.kept,
            slots: self.slots,
            combine_weights: self.combine_weights,
            capacity: self.capacity,
            load: ExpertLoad { tokens_per_expert: self.demand.tokens_per_expert, dropped: (demanded - kept) as u32 },
            losses: self.losses,
        }
    }
}
