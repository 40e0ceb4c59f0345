//! [`ParallelDims`]: how many ranks each kind of parallelism has, and which rank stands where. Pure functions of numbers:
//! nothing here communicates.
//!
//! The dense layers see a grid of `dp x tp` ranks, tensor index fastest. The experts see the same ranks as groups of their
//! own, chosen independently: `ep` ranks share the experts of a layer, `expert_slices` such groups share the matrices of each
//! expert, and what is left are replicas.
//!
//! ```text
//! Fig. 7: dp 4, tp 4, ep 8, expert_slices 2
//! rank            0  1  2  3 | 4  5  6  7 | 8  9 10 11 |12 13 14 15
//! tensor group    ---- 0 --- | ---- 1 --- | ---- 2 --- | ---- 3 ---
//! expert          0  1  2  3   4  5  6  7 | 0  1  2  3   4  5  6  7
//! slice           ---------- 0 ---------- | ---------- 1 ----------
//! ```

use crate::{Error, Result};
use std::ops::Range;

/// Which ranks make an expert-parallel group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ExpertOrder {
    /// Consecutive ranks, whatever their tensor index.
    ///
    /// # Source
    /// Paper Fig. 7; DeepSpeed's inference engine, and its training groups without tensor slicing.
    #[default]
    Consecutive,
    /// Ranks of one tensor index: the experts are there once per tensor index.
    ///
    /// # Source
    /// DeepSpeed `groups.py`, expert + model + data parallelism.
    WithinTensor,
    /// Ranks far apart: replicas are consecutive instead.
    ///
    /// # Source
    /// DeepSpeed `use_data_before_expert_parallel`.
    DataFirst,
}

/// Numbers of ranks per kind of parallelism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParallelDims {
    /// Replicas of the dense layers, each with tokens of its own.
    pub dp: usize,
    /// Ranks that share each matrix of the dense layers, and see the same tokens.
    pub tp: usize,
    /// Ranks that share the experts of a layer, at most: a layer with fewer experts uses fewer (see [`ParallelDims::experts`]).
    pub ep: usize,
    /// Ranks that share the matrices of each expert.
    pub expert_slices: usize,
    /// Which ranks make a group.
    pub expert_order: ExpertOrder,
}

/// Where a rank stands among the dense layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DenseCoordinates {
    /// Replica.
    pub dp_rank: usize,
    /// Part of each matrix.
    pub tp_rank: usize,
}

impl ParallelDims {
    /// One rank.
    pub const SINGLE: Self = Self { dp: 1, tp: 1, ep: 1, expert_slices: 1, expert_order: ExpertOrder::Consecutive };

    /// Groups of experts are consecutive where `tp` divides `ep`, so that each has every tensor index equally often; else they
    /// lie within a tensor index.
    pub fn new(dp: usize, tp: usize, ep: usize, expert_slices: usize) -> Self {
        let whole = tp > 0 && ep.is_multiple_of(tp);
        let expert_order = if whole { ExpertOrder::Consecutive } else { ExpertOrder::WithinTensor };
        Self { dp, tp, ep, expert_slices, expert_order }
    }

    /// The same in another order.
    #[must_use]
    pub fn with_expert_order(self, expert_order: ExpertOrder) -> Self {
        Self { expert_order, ..self }
    }

    /// Ranks in all.
    pub fn world_size(&self) -> usize {
        self.dp * self.tp
    }

    /// Refuses a layout that `world_size` ranks cannot have.
    ///
    /// # Errors
    /// [`Error::Layout`] with the setting and the nearest possible ones.
    pub fn validate(&self, world_size: usize) -> Result<()> {
        let Self { dp, tp, ep, expert_slices: slices, expert_order } = *self;
        for (name, value) in [("dp", dp), ("tp", tp), ("ep", ep), ("expert_slices", slices)] {
            if value == 0 {
                return Err(Error::Layout(format!("{name} must be at least 1, got 0")));
            }
        }
        if dp * tp != world_size {
            let near = divisors(world_size).into_iter().min_by_key(|t| t.abs_diff(tp)).unwrap_or(1);
            return Err(Error::Layout(format!(
                "dp {dp} x tp {tp} needs {} ranks, but there are {world_size}; possible is dp {} x tp {near}",
                dp * tp,
                world_size / near
            )));
        }
        // Ranks that one expert group can be made of.
        let pool = if expert_order == ExpertOrder::WithinTensor { dp } else { world_size };
        if !pool.is_multiple_of(ep * slices) {
            let fits: Vec<String> = divisors(pool / gcd(pool, slices)).iter().map(ToString::to_string).collect();
            let what = if pool == world_size { "ranks" } else { "ranks of one tensor index" };
            return Err(Error::Layout(format!(
                "ep {ep} x expert_slices {slices} must divide the {pool} {what}; with these slices ep can be {}",
                fits.join(", ")
            )));
        }
        if expert_order != ExpertOrder::WithinTensor && !ep.is_multiple_of(tp) {
            return Err(Error::Layout(format!(
                "expert groups over consecutive ranks need an ep that tp divides, got ep {ep} and tp {tp}; take ep {} or \
                 the order within a tensor index",
                ep.next_multiple_of(tp)
            )));
        }
        if tp > 1 && expert_order == ExpertOrder::DataFirst {
            return Err(Error::Layout(format!("data before experts is for tp 1, got tp {tp}")));
        }
        if !dp.is_multiple_of(slices) {
            return Err(Error::Layout(format!(
                "partners of a sliced expert stand in different data-parallel replicas, so expert_slices {slices} must divide \
                 dp {dp}"
            )));
        }
        Ok(())
    }

    /// Where a rank stands among the dense layers.
    pub fn dense(&self, rank: usize) -> DenseCoordinates {
        DenseCoordinates { dp_rank: rank / self.tp, tp_rank: rank % self.tp }
    }

    /// The ranks that share each dense matrix with `rank`.
    pub fn tensor_group(&self, rank: usize) -> Vec<usize> {
        let first = rank / self.tp * self.tp;
        (first..first + self.tp).collect()
    }

    /// The ranks that hold the same parts of the dense matrices as `rank`.
    pub fn data_group(&self, rank: usize) -> Vec<usize> {
        (0..self.dp).map(|d| d * self.tp + rank % self.tp).collect()
    }

    /// How the experts of a layer with `num_experts` are spread: over `ep` ranks, or fewer where there are fewer experts: the
    /// largest divisor of `ep` that leaves no rank without one. What EP loses, replicas gain.
    ///
    /// # Source
    /// DeepSpeed's `min(ep_size, num_experts)` of 2022, which its PR-MoE scripts rely on.
    pub fn experts(&self, num_experts: usize) -> ExpertDims {
        let slices = self.expert_slices;
        let within = ExpertOrder::WithinTensor;
        let order_of = |ep: usize| {
            if self.expert_order != within && ep.is_multiple_of(self.tp) {
                Some(self.expert_order)
            } else {
                self.dp.is_multiple_of(ep * slices).then_some(within)
            }
        };
        let fits = divisors(self.ep).into_iter().rev().filter(|&ep| ep <= num_experts.max(1));
        let (ep, order) = fits.filter_map(|ep| order_of(ep).map(|order| (ep, order))).next().unwrap_or((1, within));
        let pool = if order == within { self.dp } else { self.world_size() };
        ExpertDims {
            ep,
            slices,
            replicas: pool / (ep * slices),
            stride: if order == within { self.tp } else { 1 },
            order,
        }
    }
}

/// How the experts of one layer are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertDims {
    /// Ranks that share the experts.
    pub ep: usize,
    /// Ranks that share each expert.
    pub slices: usize,
    /// Copies of the experts (of each tensor index, where groups lie within one): expert-data-parallel ranks.
    pub replicas: usize,
    /// Between neighbours of the order.
    stride: usize,
    /// Which ranks make a group.
    pub order: ExpertOrder,
}

/// Where a rank stands among the experts of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertCoordinates {
    /// Which experts.
    pub ep_rank: usize,
    /// Which part of each.
    pub slice: usize,
    /// Which copy.
    pub replica: usize,
}

impl ExpertDims {
    /// Where a rank stands.
    pub fn coordinates(&self, rank: usize) -> ExpertCoordinates {
        let index = rank / self.stride;
        if self.order == ExpertOrder::DataFirst {
            let copies = self.slices * self.replicas;
            let (ep_rank, copy) = (index / copies, index % copies);
            return ExpertCoordinates { ep_rank, slice: copy % self.slices, replica: copy / self.slices };
        }
        let (ep_rank, copy) = (index % self.ep, index / self.ep);
        ExpertCoordinates { ep_rank, slice: copy % self.slices, replica: copy / self.slices }
    }

    /// The rank at these coordinates that has the tensor index of `rank`, where groups lie within one.
    fn rank(&self, at: ExpertCoordinates, rank: usize) -> usize {
        let copy = at.replica * self.slices + at.slice;
        let index = if self.order == ExpertOrder::DataFirst {
            at.ep_rank * self.slices * self.replicas + copy
        } else {
            copy * self.ep + at.ep_rank
        };
        index * self.stride + rank % self.stride
    }

    /// The ranks that share the layer's experts with `rank`, by `ep_rank`.
    pub fn expert_group(&self, rank: usize) -> Vec<usize> {
        let at = self.coordinates(rank);
        (0..self.ep).map(|ep_rank| self.rank(ExpertCoordinates { ep_rank, ..at }, rank)).collect()
    }

    /// The ranks that share each expert with `rank`, by slice.
    pub fn slice_group(&self, rank: usize) -> Vec<usize> {
        let at = self.coordinates(rank);
        (0..self.slices).map(|slice| self.rank(ExpertCoordinates { slice, ..at }, rank)).collect()
    }

    /// The ranks that hold the same experts, and the same parts of them, as `rank`: expert-data-parallel.
    pub fn replica_group(&self, rank: usize) -> Vec<usize> {
        let at = self.coordinates(rank);
        (0..self.replicas).map(|replica| self.rank(ExpertCoordinates { replica, ..at }, rank)).collect()
    }
}

/// Part `index` of `0..len` cut into `parts`; the first ones are longer by one where it does not divide.
///
/// # Panics
/// If there are no parts.
pub fn part(len: usize, index: usize, parts: usize) -> Range<usize> {
    let (least, longer) = (len / parts, len % parts);
    let start = index * least + index.min(longer);
    start..start + least + usize::from(index < longer)
}

/// Which of `parts` holds item `item` of `0..len`: the inverse of [`part`].
pub fn part_of(len: usize, item: usize, parts: usize) -> usize {
    let (least, longer) = (len / parts, len % parts);
    let long = longer * (least + 1);
    if item < long { item / (least + 1) } else { longer + (item - long) / least.max(1) }
}

fn divisors(n: usize) -> Vec<usize> {
    (1..=n).filter(|d| n.is_multiple_of(*d)).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(world: usize, of: impl Fn(usize) -> Vec<usize>) -> Vec<Vec<usize>> {
        let mut all: Vec<_> = (0..world).map(of).collect();
        all.sort();
        all.dedup();
        all
    }

    fn strided(starts: impl IntoIterator<Item = usize>, count: usize, stride: usize) -> Vec<Vec<usize>> {
        starts.into_iter().map(|s| (0..count).map(|i| s + i * stride).collect()).collect()
    }

    /// DeepSpeed `groups.py`, the worked examples of its comments.
    #[test]
    fn groups_of_the_reference() {
        let dims = ParallelDims::new(16, 1, 4, 1);
        let experts = dims.experts(4);
        assert_eq!(groups(16, |r| experts.expert_group(r)), strided([0, 4, 8, 12], 4, 1));
        assert_eq!(groups(16, |r| experts.replica_group(r)), strided(0..4, 4, 4));

        let reversed = dims.with_expert_order(ExpertOrder::DataFirst).experts(4);
        assert_eq!(groups(16, |r| reversed.expert_group(r)), strided(0..4, 4, 4));
        assert_eq!(groups(16, |r| reversed.replica_group(r)), strided([0, 4, 8, 12], 4, 1));

        let sliced = ParallelDims::new(8, 2, 4, 1).with_expert_order(ExpertOrder::WithinTensor);
        sliced.validate(16).unwrap();
        let experts = sliced.experts(4);
        assert_eq!(groups(16, |r| experts.expert_group(r)), strided([0, 1, 8, 9], 4, 2));
        assert_eq!(groups(16, |r| experts.replica_group(r)), strided(0..8, 2, 8));
    }

    /// Paper Fig. 7: rank i pairs with rank i + 8, tensor groups are 4j..4j+3.
    #[test]
    fn the_papers_figure_7() {
        let dims = ParallelDims::new(4, 4, 8, 2);
        dims.validate(16).unwrap();
        let experts = dims.experts(8);
        assert_eq!((experts.ep, experts.slices, experts.replicas), (8, 2, 1));
        assert_eq!(groups(16, |r| dims.tensor_group(r)), strided([0, 4, 8, 12], 4, 1));
        assert_eq!(groups(16, |r| dims.data_group(r)), strided(0..4, 4, 4));
        assert_eq!(groups(16, |r| experts.expert_group(r)), strided([0, 8], 8, 1));
        assert_eq!(groups(16, |r| experts.slice_group(r)), strided(0..8, 2, 8));
        assert_eq!(experts.coordinates(11), ExpertCoordinates { ep_rank: 3, slice: 1, replica: 0 });
    }

    /// PR-MoE on one set of ranks: EP 32/64/128 with 4/2/1 replicas.
    #[test]
    fn several_expert_counts_on_the_same_ranks() {
        let dims = ParallelDims::new(128, 1, 128, 1);
        dims.validate(128).unwrap();
        let of = |n| (dims.experts(n).ep, dims.experts(n).replicas);
        assert_eq!([32, 64, 128, 256].map(of), [(32, 4), (64, 2), (128, 1), (128, 1)]);
        assert_eq!([1, 3, 5, 100].map(of), [(1, 128), (2, 64), (4, 32), (64, 2)]);
        let mixed = ParallelDims::new(4, 4, 8, 1);
        assert_eq!(mixed.experts(2).order, ExpertOrder::WithinTensor, "two experts cannot be in four tensor indices");
    }

    /// Every rank is in one group of each kind, at the place its coordinates say, in all layouts of up to 24 ranks.
    #[test]
    fn groups_partition_the_ranks() {
        let mut layouts = 0;
        for world in 1..=24 {
            for (tp, ep, slices) in (1..=world * world * world)
                .map(|i| (i % world + 1, i / world % world + 1, i / world / world % world + 1))
                .filter(|(tp, _, _)| world % tp == 0)
            {
                for order in [ExpertOrder::Consecutive, ExpertOrder::WithinTensor, ExpertOrder::DataFirst] {
                    let dims = ParallelDims::new(world / tp, tp, ep, slices).with_expert_order(order);
                    if dims.validate(world).is_err() {
                        continue;
                    }
                    layouts += 1;
                    for num_experts in [1, 2, 3, 8, 30] {
                        let e = dims.experts(num_experts);
                        assert!(e.ep <= num_experts && dims.ep.is_multiple_of(e.ep), "{dims:?} {e:?}");
                        for rank in 0..world {
                            let at = e.coordinates(rank);
                            assert_eq!(e.expert_group(rank)[at.ep_rank], rank, "{dims:?}");
                            assert_eq!(e.slice_group(rank)[at.slice], rank, "{dims:?}");
                            assert_eq!(e.replica_group(rank)[at.replica], rank, "{dims:?}");
                            let tokens = |r: &usize| dims.dense(*r).dp_rank;
                            let mut of_slices: Vec<usize> = e.slice_group(rank).iter().map(tokens).collect();
                            of_slices.dedup();
                            assert_eq!(of_slices.len(), e.slices, "partners start with different tokens: {dims:?}");
                        }
                    }
                }
            }
        }
        assert!(layouts > 200, "{layouts}");
    }

    #[test]
    fn impossible_layouts_are_refused_with_what_is_possible() {
        for (dims, world, text) in [
            (ParallelDims::new(2, 3, 1, 1), 8, "dp 2 x tp 3 needs 6 ranks, but there are 8; possible is dp 4 x tp 2"),
            (ParallelDims::new(8, 1, 3, 1), 8, "ep can be 1, 2, 4, 8"),
            (ParallelDims::new(8, 1, 8, 2), 8, "ep can be 1, 2, 4"),
            (ParallelDims::new(4, 2, 3, 1), 8, "4 ranks of one tensor index; with these slices ep can be 1, 2, 4"),
            (ParallelDims::new(0, 1, 1, 1), 1, "dp must be at least 1"),
            (
                ParallelDims::new(2, 4, 2, 1).with_expert_order(ExpertOrder::Consecutive),
                8,
                "need an ep that tp divides, got ep 2 and tp 4; take ep 4",
            ),
            (ParallelDims::new(1, 8, 1, 2), 8, "ep"),
        ] {
            let error = dims.validate(world).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn parts_and_their_inverse() {
        for (len, parts) in [(0, 3), (7, 3), (3, 7), (8, 4), (1, 1)] {
            let mut next = 0;
            for index in 0..parts {
                let range = part(len, index, parts);
                assert_eq!(range.start, next);
                next = range.end;
                range.for_each(|item| assert_eq!(part_of(len, item, parts), index));
            }
            assert_eq!(next, len);
        }
    }
}
