//! [`choose`]: the layout of a run: what was asked for, and for the rest what sends the fewest bytes between nodes. Pure.

use super::cost::{LayoutCost, RunSize};
use crate::train::mesh::{ReduceConfig, Zero};
use crate::{Error, Result};
use moe_parallel::ParallelDims;
use moe_parallel::dims::ExpertOrder;

/// What was asked for; the rest is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayoutRequest {
    /// Replicas of the dense layers.
    pub dp: Option<usize>,
    /// Ranks that share each dense matrix.
    pub tp: Option<usize>,
    /// Ranks that share the experts of a layer.
    pub ep: Option<usize>,
    /// Ranks that share the matrices of an expert; 1 unless more are asked for.
    pub expert_slices: Option<usize>,
    /// Which ranks make an expert group; what goes with `tp` and `ep` if nothing is asked for.
    pub expert_order: Option<ExpertOrder>,
    /// What is divided.
    pub zero: Option<Zero>,
    /// Most memory of a rank, bytes.
    pub memory_budget: Option<usize>,
}

/// Layouts that an error names.
const NEAREST: usize = 4;

/// The layout of `world_size` ranks, `ranks_per_node` to a node: as `request` says, and where it says nothing the one that sends
/// the fewest bytes between nodes, then has the least work on a rank, then sends the fewest inside of nodes, then divides the
/// least; of those whose memory fits.
///
/// # Errors
/// [`Error::Config`] if there is none, with the reason and the nearest there are.
pub fn choose(
    size: &RunSize,
    world_size: usize,
    ranks_per_node: usize,
    request: &LayoutRequest,
    reduce: ReduceConfig,
) -> Result<LayoutCost> {
    let of =
        |dims: ParallelDims, zero: Zero| LayoutCost::new(size, dims, ranks_per_node, ReduceConfig { zero, ..reduce });
    if let (Some(dp), Some(tp)) = (request.dp, request.tp) {
        // Refused in the words of the layout.
        let ep = request.ep.unwrap_or(tp);
        let dims = ParallelDims::new(dp, tp, ep, request.expert_slices.unwrap_or(1));
        if dp * tp != world_size {
            dims.validate(world_size)?;
        }
    }
    let all = candidates(world_size, request.expert_order);
    let possible: Vec<LayoutCost> = all.iter().filter_map(|&(dims, zero)| of(dims, zero).ok()).collect();
    let asked: Vec<&LayoutCost> = possible.iter().filter(|layout| request.allows(layout)).collect();
    if asked.is_empty() {
        return Err(impossible(world_size, request, &possible, of));
    }
    let fits = |layout: &&&LayoutCost| request.memory_budget.is_none_or(|most| layout.most_memory().total() <= most);
    match asked.iter().filter(fits).min_by_key(|layout| order(layout)) {
        Some(layout) => Ok((*layout).clone()),
        None => Err(too_large(world_size, request, &asked)),
    }
}

/// All layouts of so many ranks.
fn candidates(world_size: usize, order: Option<ExpertOrder>) -> Vec<(ParallelDims, Zero)> {
    let divisors: Vec<usize> = (1..=world_size).filter(|d| world_size.is_multiple_of(*d)).collect();
    let mut all = Vec::new();
    for &tp in &divisors {
        for &ep in &divisors {
            for &slices in &divisors {
                let dims = ParallelDims::new(world_size / tp, tp, ep, slices);
                let dims = dims.with_expert_order(order.unwrap_or(dims.expert_order));
                if dims.validate(world_size).is_ok() {
                    all.extend([Zero::Off, Zero::Moments, Zero::Gradients].map(|zero| (dims, zero)));
                }
            }
        }
    }
    all
}

fn order(layout: &LayoutCost) -> (usize, usize, usize, Zero) {
    let traffic = layout.traffic().total();
    (traffic.inter_node, layout.most_work(), traffic.intra_node, layout.zero)
}

impl LayoutRequest {
    fn allows(&self, layout: &LayoutCost) -> bool {
        let ParallelDims { dp, tp, ep, expert_slices, .. } = layout.dims;
        let fits = |asked: Option<usize>, has: usize| asked.is_none_or(|asked| asked == has);
        fits(self.dp, dp)
            && fits(self.tp, tp)
            && fits(self.ep, ep)
            && expert_slices == self.expert_slices.unwrap_or(1)
            && self.zero.is_none_or(|zero| zero == layout.zero)
    }

    /// How far a layout is from what was asked for.
    fn distance(&self, layout: &LayoutCost) -> usize {
        let ParallelDims { dp, tp, ep, expert_slices, .. } = layout.dims;
        let far = |asked: Option<usize>, has: usize| asked.map_or(0, |asked| asked.abs_diff(has));
        let slices = self.expert_slices.unwrap_or(1).abs_diff(expert_slices);
        far(self.dp, dp) + far(self.tp, tp) + far(self.ep, ep) + slices
    }

    fn text(&self) -> String {
        let numbers = [("dp", self.dp), ("tp", self.tp), ("ep", self.ep), ("expert_slices", self.expert_slices)];
        let mut parts: Vec<String> =
            numbers.iter().filter_map(|(name, value)| Some(format!("{name} {}", (*value)?))).collect();
        parts.extend(self.zero.map(|zero| format!("zero {}", u8::from(zero))));
        if parts.is_empty() { "any layout".into() } else { parts.join(" x ") }
    }
}

/// Layouts for an error: without what is divided, which rules out none.
fn named(layouts: &[&LayoutCost]) -> String {
    let mut texts: Vec<String> = Vec::new();
    for layout in layouts {
        let ParallelDims { dp, tp, ep, expert_slices, .. } = layout.dims;
        let slices = if expert_slices > 1 { format!(" x expert_slices {expert_slices}") } else { String::new() };
        let text = format!("dp {dp} x tp {tp} with ep {ep}{slices}");
        if texts.len() < NEAREST && !texts.contains(&text) {
            texts.push(text);
        }
    }
    texts.join(", ")
}

fn impossible(
    world_size: usize,
    request: &LayoutRequest,
    possible: &[LayoutCost],
    of: impl Fn(ParallelDims, Zero) -> Result<LayoutCost>,
) -> Error {
    // The first reason of a layout that has the numbers asked for.
    let tp = request.tp.or_else(|| request.dp.map(|dp| world_size / dp.max(1))).unwrap_or(1).max(1);
    let dp = request.dp.unwrap_or(world_size / tp);
    let dims = ParallelDims::new(dp, tp, request.ep.unwrap_or(tp), request.expert_slices.unwrap_or(1));
    let reason = match dims.validate(world_size) {
        Err(error) => error.to_string(),
        Ok(()) => of(dims, Zero::Off).err().map_or_else(String::new, |error| error.to_string()),
    };
    let mut nearest: Vec<&LayoutCost> = possible.iter().collect();
    nearest.sort_by_key(|layout| (request.distance(layout), order(layout)));
    let named = named(&nearest);
    Error::Config(format!(
        "{} is not possible for this model on {world_size} ranks: {reason}; nearest are {named}",
        request.text()
    ))
}

fn too_large(world_size: usize, request: &LayoutRequest, asked: &[&LayoutCost]) -> Error {
    let smallest = asked.iter().min_by_key(|layout| layout.most_memory().total());
    let (needs, zero) = smallest.map_or((0, Zero::Off), |layout| (layout.most_memory().total(), layout.zero));
    let budget = request.memory_budget.unwrap_or(0);
    let gb = |bytes: usize| bytes as f64 / 1e9;
    Error::Config(format!(
        "{} on {world_size} rank{} does not fit the memory budget of {:.2} GB a rank: the smallest, {} with zero {}, needs {:.2} \
         GB; raise the budget, start more ranks, or make micro-batches smaller",
        request.text(),
        if world_size == 1 { "" } else { "s" },
        gb(budget),
        named(&smallest.copied().into_iter().collect::<Vec<_>>()),
        u8::from(zero),
        gb(needs)
    ))
}
