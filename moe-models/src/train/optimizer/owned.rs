//! [`Owned`]: the elements an optimizer holds moments of and updates, as ranges of parameters. Plain arithmetic.

use super::units::{Chunk, Units};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::ops::Range;

/// A list of parameters of which one of several ranks owns a part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartOf {
    /// Which parameters, in the order in which they are cut.
    pub params: Vec<usize>,
    /// Which part.
    pub index: usize,
    /// Of how many.
    pub parts: usize,
}

/// Elements of parameters: of each a list of ascending ranges without overlap that begin and end where chunks do.
#[derive(Debug, Clone, PartialEq)]
pub struct Owned {
    units: Units,
    ranges: Vec<Vec<Range<usize>>>,
}

impl Owned {
    /// Every element.
    pub fn everything(units: Units) -> Self {
        let whole = |param| Some(0..units.elements(param)).filter(|range| !range.is_empty());
        let ranges = (0..units.num_params()).map(|param| whole(param).into_iter().collect()).collect();
        Self { units, ranges }
    }

    /// These ranges of each parameter.
    ///
    /// # Errors
    /// [`Error::Argument`] for ranges that are empty, not ascending, or end inside of a chunk.
    pub fn new(units: Units, ranges: Vec<Vec<Range<usize>>>) -> Result<Self> {
        if ranges.len() != units.num_params() {
            let (want, got) = (units.num_params(), ranges.len());
            return Err(Error::Argument(format!("expected ranges of {want} parameters, got those of {got}")));
        }
        for (param, own) in ranges.iter().enumerate() {
            let chunks = units.chunks(param);
            let borders: BTreeSet<usize> = chunks.iter().flat_map(|c| [c.range.start, c.range.end]).collect();
            let mut end = 0;
            for range in own {
                let fits = [range.start, range.end].iter().all(|border| borders.contains(border));
                if !fits || range.is_empty() || range.start < end {
                    return Err(Error::Argument(format!(
                        "{range:?} of parameter {param} is no run of whole chunks after element {end}"
                    )));
                }
                end = range.end;
            }
        }
        Ok(Self { units, ranges })
    }

    /// One part of each list of parameters, and nothing of parameters in none of them. The chunks of a list, one after the
    /// other, are cut into parts of equal size, up to a chunk; parts may be empty.
    ///
    /// # Errors
    /// [`Error::Argument`] for a part that there is not, and for a parameter that is unknown or listed twice.
    ///
    /// # Source
    /// ZeRO, stages 1 and 2 (Rajbhandari et al. 2020, 1910.02054): every rank of a group updates its part of a flat buffer.
    /// Differs: cuts lie between chunks, so that sums of squares are of the same chunks for any number of parts.
    pub fn parts(units: Units, lists: &[PartOf]) -> Result<Self> {
        let mut ranges = vec![Vec::new(); units.num_params()];
        let mut seen = BTreeSet::new();
        for PartOf { params, index, parts } in lists {
            if index >= parts {
                return Err(Error::Argument(format!("there is no part {index} of {parts}")));
            }
            if let Some(param) = params.iter().find(|&&param| param >= units.num_params() || !seen.insert(param)) {
                return Err(Error::Argument(format!("parameter {param} is unknown or listed twice")));
            }
            for (&param, own) in params.iter().zip(part_of_list(&units, params, *index, *parts)) {
                ranges[param] = own;
            }
        }
        Ok(Self { units, ranges })
    }

    /// What the elements are counted in.
    pub fn units(&self) -> &Units {
        &self.units
    }

    /// The ranges of a parameter.
    pub fn ranges(&self, param: usize) -> &[Range<usize>] {
        &self.ranges[param]
    }

    /// Number of elements of a parameter that are owned.
    pub fn elements(&self, param: usize) -> usize {
        self.ranges[param].iter().map(Range::len).sum()
    }

    /// The owned values of a whole parameter.
    ///
    /// # Panics
    /// If `whole` is shorter than the parameter.
    pub fn cut(&self, param: usize, whole: &[f32]) -> Vec<f32> {
        self.ranges[param].iter().flat_map(|range| &whole[range.clone()]).copied().collect()
    }

    /// Writes owned values to where they belong in the whole parameter.
    ///
    /// # Panics
    /// If there are not as many, or `whole` is shorter than the parameter.
    pub fn paste(&self, param: usize, own: &[f32], whole: &mut [f32]) {
        assert_eq!(own.len(), self.elements(param), "owned values of parameter {param}");
        let mut rest = own;
        for range in &self.ranges[param] {
            let (values, others) = rest.split_at(range.len());
            whole[range.clone()].copy_from_slice(values);
            rest = others;
        }
    }

    /// The owned chunks of a parameter.
    pub(super) fn chunks(&self, param: usize) -> Vec<Chunk> {
        let mut ranges = self.ranges[param].iter().peekable();
        let mut chunks = self.units.chunks(param);
        chunks.retain(|chunk| {
            while ranges.next_if(|range| range.end <= chunk.range.start).is_some() {}
            ranges.peek().is_some_and(|range| range.start <= chunk.range.start)
        });
        chunks
    }
}

/// Ranges of each parameter of a list: part `index` of `parts`.
pub(crate) fn part_of_list(units: &Units, params: &[usize], index: usize, parts: usize) -> Vec<Vec<Range<usize>>> {
    let total: usize = params.iter().map(|&param| units.elements(param)).sum();
    let [start, end] = [index, index + 1].map(|part| total as u128 * part as u128 / parts as u128);
    let mut before = 0;
    let of_param = |&param: &usize| {
        let mut ranges = Vec::new();
        for Chunk { range, .. } in units.chunks(param) {
            if (start..end).contains(&((before + range.start) as u128)) {
                push(&mut ranges, range);
            }
        }
        before += units.elements(param);
        ranges
    };
    params.iter().map(of_param).collect()
}

/// Adds a range at the end, to the last one if it continues it.
fn push(ranges: &mut Vec<Range<usize>>, next: Range<usize>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => ranges.push(next),
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of one range are meant")]
mod tests {
    use super::super::units::Unit;
    use super::*;
    use moe_kernels::adamw::CHUNK;

    /// Parameters of so many units of such a size.
    fn units(params: &[(usize, usize)]) -> Units {
        let held: Vec<Vec<Unit>> = params
            .iter()
            .enumerate()
            .map(|(p, &(count, elements))| (0..count).map(|u| Unit { name: format!("{p}.{u}"), elements }).collect())
            .collect();
        Units::new(&held).unwrap()
    }

    /// Sizes around nothing, one and a chunk, and experts of odd sizes: the parts of any number are runs of whole chunks that
    /// cover everything once, in order, and none is larger than its share by more than a chunk.
    #[test]
    fn parts_cover_everything_once() {
        let many: &[(usize, usize)] =
            &[(1, 0), (1, 1), (1, 5), (3, CHUNK + 7), (1, CHUNK), (2, 0), (5, 333), (1, 9 * CHUNK + 1)];
        for params in [many, &[], &[(1, 0)], &[(1, 1)], &[(1, CHUNK)], &[(4, 2 * CHUNK)], &[(7, CHUNK - 1), (1, 1)]] {
            let units = units(params);
            let list: Vec<usize> = (0..params.len()).collect();
            let total: usize = list.iter().map(|&p| units.elements(p)).sum();
            for parts in [1, 2, 3, 4, 7, 64] {
                let of = |index| PartOf { params: list.clone(), index, parts };
                let mut ends = vec![0; params.len()];
                for index in 0..parts {
                    let owned = Owned::parts(units.clone(), &[of(index)]).unwrap();
                    assert_eq!(Owned::new(units.clone(), owned.ranges.clone()).unwrap(), owned, "ends between chunks");
                    let mut size = 0;
                    for (param, end) in ends.iter_mut().enumerate() {
                        for range in owned.ranges(param) {
                            assert_eq!(range.start, *end, "{params:?}: part {index} of {parts}");
                            (*end, size) = (range.end, size + range.len());
                        }
                        let chunks: Vec<_> = owned.chunks(param).into_iter().map(|c| c.range).collect();
                        assert_eq!(chunks.iter().map(Range::len).sum::<usize>(), owned.elements(param));
                    }
                    assert!(size < total.div_ceil(parts) + CHUNK, "{params:?}: part {index} of {parts} has {size}");
                }
                let want: Vec<usize> = list.iter().map(|&p| units.elements(p)).collect();
                assert_eq!(ends, want, "{params:?} in {parts} parts");
            }
            assert_eq!(Owned::parts(units.clone(), &[of_one(&list)]).unwrap(), Owned::everything(units));
        }
    }

    fn of_one(list: &[usize]) -> PartOf {
        PartOf { params: list.to_vec(), index: 0, parts: 1 }
    }

    /// Groups of ranks of different sizes: each list is cut by itself, and what is in none is not owned.
    #[test]
    fn lists_are_cut_apart() {
        let units = units(&[(1, 2 * CHUNK), (1, 4 * CHUNK), (1, CHUNK), (1, 3)]);
        let lists = [PartOf { params: vec![2, 0], index: 1, parts: 3 }, PartOf { params: vec![1], index: 3, parts: 4 }];
        let owned = Owned::parts(units.clone(), &lists).unwrap();
        assert_eq!(owned.ranges, [vec![0..CHUNK], vec![3 * CHUNK..4 * CHUNK], vec![], vec![]]);
        let whole: Vec<f32> = (0..4 * CHUNK).map(|i| i as f32).collect();
        let own = owned.cut(1, &whole);
        assert_eq!(own, whole[3 * CHUNK..]);
        let mut back = vec![-1.0; 4 * CHUNK];
        owned.paste(1, &own, &mut back);
        assert!(back[..3 * CHUNK].iter().all(|&v| v == -1.0) && back[3 * CHUNK..] == whole[3 * CHUNK..]);
        for (bad, word) in [
            (vec![PartOf { params: vec![0], index: 2, parts: 2 }], "no part 2 of 2"),
            (vec![of_one(&[0]), of_one(&[0])], "parameter 0"),
            (vec![of_one(&[4])], "parameter 4"),
        ] {
            let message = Owned::parts(units.clone(), &bad).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn ranges_that_cut_a_chunk_are_refused() {
        let units = units(&[(2, CHUNK + 1)]);
        for good in [vec![0..CHUNK], vec![CHUNK..CHUNK + 1, CHUNK + 1..2 * CHUNK + 1], vec![]] {
            Owned::new(units.clone(), vec![good]).unwrap();
        }
        for bad in [vec![0..1], vec![1..CHUNK], vec![0..0], vec![CHUNK..CHUNK + 1, 0..CHUNK], vec![0..3 * CHUNK]] {
            let message = Owned::new(units.clone(), vec![bad]).unwrap_err().to_string();
            assert!(message.contains("whole chunks"), "{message}");
        }
        assert!(Owned::new(units, vec![]).is_err());
    }
}
