//! [`WritePlan`]: which of the ranks that hold the same part of a tensor writes it. Pure: every rank finds the same by itself.

use super::part::is_whole_stack;
use crate::Result;
use crate::hf::NameTable;
use moe_core::ParamSpec;
use moe_parallel::{Extent, ParallelDims, Placement};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

/// A part of a tensor, with the ranks that hold it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// The part's key ([`Extent::key`]), or any other name that no other part has.
    pub key: String,
    /// Size of what is written of it.
    pub bytes: usize,
    /// Who holds it; one at least.
    pub ranks: Vec<usize>,
}

/// A writer for each part: the largest first, each goes to the rank that has the least to write of those that hold it. Among equals
/// the first in the order given.
pub fn writers(parts: &[Held]) -> Vec<usize> {
    let mut largest_first: Vec<usize> = (0..parts.len()).collect();
    largest_first.sort_by_key(|&part| Reverse(parts[part].bytes));
    let (mut writers, mut load) = (vec![0; parts.len()], HashMap::<usize, usize>::new());
    for part in largest_first {
        let Held { bytes, ranks, .. } = &parts[part];
        let least = ranks.iter().copied().min_by_key(|rank| load.get(rank).copied().unwrap_or(0));
        writers[part] = least.unwrap_or(0);
        *load.entry(writers[part]).or_default() += bytes;
    }
    writers
}

/// Who writes what of a model over ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WritePlan {
    /// By the keys of parts.
    writers: HashMap<String, usize>,
}

impl WritePlan {
    /// For the parameters `specs` over the ranks of `dims`. A stack that `names` publishes as one tensor has one writer, if every
    /// rank holds all of it.
    ///
    /// # Errors
    /// [`moe_parallel::Error::Layout`] if the layout is impossible.
    pub fn new(specs: &[ParamSpec], names: NameTable, dims: ParallelDims) -> Result<Self> {
        let ranks = placements(dims)?;
        let (mut parts, mut stacks) = (Vec::new(), Vec::new());
        for spec in specs {
            let whole = |rank: &Placement| is_whole_stack(spec, &rank.extents(spec));
            if names.stack(&spec.name).is_some() && ranks.iter().all(whole) {
                let (bytes, ranks) = (spec.elem_count() * size_of::<f32>(), (0..ranks.len()).collect());
                stacks.push(spec);
                parts.push(Held { key: spec.name.clone(), bytes, ranks });
            } else {
                parts.extend(held(spec, &ranks));
            }
        }
        let writers = writers(&parts);
        let mut writers: HashMap<String, usize> = parts.into_iter().map(|part| part.key).zip(writers).collect();
        for spec in stacks {
            let Some(writer) = writers.remove(&spec.name) else { continue };
            writers.extend(Placement::WHOLE.extents(spec).into_iter().map(|extent| (extent.key(), writer)));
        }
        Ok(Self { writers })
    }

    /// What `rank` writes of a parameter of which it holds these extents: runs of its elements, each of whole extents.
    pub fn ranges(&self, rank: usize, extents: &[Extent]) -> Vec<Range<usize>> {
        let (mut ranges, mut start) = (Vec::<Range<usize>>::new(), 0);
        for extent in extents {
            let range = start..start + extent.elements();
            start = range.end;
            if range.is_empty() || self.writers.get(&extent.key()) != Some(&rank) {
                continue;
            }
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        ranges
    }
}

fn placements(dims: ParallelDims) -> Result<Vec<Placement>> {
    dims.validate(dims.world_size())?;
    Ok((0..dims.world_size()).map(|rank| Placement::new(dims, rank)).collect::<moe_parallel::Result<_>>()?)
}

/// All parts of a parameter that ranks hold, in the order of the ranks.
fn held(spec: &ParamSpec, ranks: &[Placement]) -> Vec<Held> {
    let (mut parts, mut by_key) = (Vec::<Held>::new(), HashMap::new());
    for placement in ranks {
        for extent in placement.extents(spec) {
            let (key, bytes) = (extent.key(), extent.elements() * size_of::<f32>());
            let index = *by_key.entry(key.clone()).or_insert(parts.len());
            if index == parts.len() {
                parts.push(Held { key, bytes, ranks: Vec::new() });
            }
            parts[index].ranks.push(placement.rank());
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::{ParamInit, SplitKind};

    const NO_RULES: NameTable = NameTable::new(&[]);

    fn part(key: &str, bytes: usize, ranks: &[usize]) -> Held {
        Held { key: key.into(), bytes, ranks: ranks.to_vec() }
    }

    #[test]
    fn the_largest_are_given_out_first() {
        let all = [0, 1, 2];
        let parts =
            [part("a", 1, &all), part("b", 6, &all), part("c", 4, &all), part("d", 5, &all), part("e", 2, &all)];
        assert_eq!(writers(&parts), [1, 0, 2, 1, 2], "6 | 5 + 1 | 4 + 2");
        let parts = [part("a", 9, &[2]), part("b", 1, &[2, 1]), part("c", 1, &[1, 2]), part("d", 1, &[])];
        assert_eq!(writers(&parts), [2, 1, 1, 0], "only holders write");
        assert_eq!(writers(&[]), [0; 0]);
    }

    /// Every element is written once, by a rank that holds it, and no rank has much more to write than another.
    #[test]
    fn every_part_has_one_writer() {
        let spec = |name: &str, shape: &[usize]| ParamSpec::new(name, shape, ParamInit::Zeros);
        let experts = |n| spec("fc.weight", &[12, 7]).split(SplitKind::Tensor, 0, 2).stacked(n).below(&format!("l{n}"));
        let mut specs = vec![spec("embed", &[30, 8]).split(SplitKind::Tensor, 0, 1), experts(4), experts(8)];
        specs.extend((0..24).map(|i| spec(&format!("dense.{i}.weight"), &[11, 7])));
        for dims in [(1, 1, 1, 1), (4, 1, 1, 1), (4, 1, 4, 1), (2, 2, 2, 1), (4, 2, 4, 2), (3, 1, 3, 1)] {
            let dims = ParallelDims::new(dims.0, dims.1, dims.2, dims.3);
            let plan = WritePlan::new(&specs, NO_RULES, dims).unwrap();
            let world = dims.world_size();
            let mut written = vec![0; world];
            for (spec, rank) in specs.iter().flat_map(|spec| (0..world).map(move |rank| (spec, rank))) {
                let extents = Placement::new(dims, rank).unwrap().extents(spec);
                let ranges = plan.ranges(rank, &extents);
                assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), "{ranges:?}");
                written[rank] += ranges.iter().map(Range::len).sum::<usize>();
            }
            let total: usize = specs.iter().map(ParamSpec::elem_count).sum();
            assert_eq!(written.iter().sum::<usize>(), total, "{dims:?}");
            assert!(written.iter().all(|&own| own < 2 * total / world), "{dims:?}: {written:?}");
        }
        assert!(WritePlan::new(&specs, NO_RULES, ParallelDims::new(0, 1, 1, 1)).is_err());
    }
}
