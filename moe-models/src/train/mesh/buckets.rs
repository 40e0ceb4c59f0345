//! Buckets: which gradients are added up together, and which rank owns what of them. Pure.

use crate::Result;
use crate::train::optimizer::{Owned, PartOf, Units, part_of_list};
use std::ops::Range;

/// Parameters of one group of ranks whose gradients travel together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bucket {
    /// Number of the group, in the order of their first parameters.
    pub(super) group: usize,
    /// Among those of the group: what ranks of a group agree on, who hold the same parameters of it.
    number: usize,
    /// Ascending.
    pub(super) params: Vec<usize>,
}

/// Cuts parameters of these `sizes`, whose groups are `groups`, into buckets of about `limit` elements: those whose gradients are
/// complete early in a backward pass come first, which are the last of the model. Ranks that wait for each other's buckets need
/// the same, in the same order: the sizes are not those of one rank.
pub(super) fn buckets(sizes: &[usize], groups: &[usize], limit: usize) -> Vec<Bucket> {
    let count = groups.iter().max().map_or(0, |most| most + 1);
    let mut open = vec![(Vec::new(), 0); count];
    let mut done: Vec<Vec<usize>> = Vec::new();
    for param in (0..groups.len()).rev() {
        let (params, elements) = &mut open[groups[param]];
        params.push(param);
        *elements += sizes[param];
        if *elements >= limit {
            *elements = 0;
            done.push(std::mem::take(params));
        }
    }
    done.extend(open.into_iter().map(|(params, _)| params).filter(|params| !params.is_empty()));
    done.iter_mut().for_each(|params| params.reverse());
    done.sort_by_key(|params| std::cmp::Reverse(params[0]));
    let mut numbers = vec![0; count];
    let bucket = |params: Vec<usize>| {
        let group = groups[params[0]];
        numbers[group] += 1;
        Bucket { group, number: numbers[group] - 1, params }
    };
    done.into_iter().map(bucket).collect()
}

impl Bucket {
    /// The part that a member of the group owns. The first parts, which are longer, go round among the members.
    fn part_index(&self, member: usize, members: usize) -> usize {
        (member + self.number) % members
    }

    /// Ranges of each parameter that each of `members` owns.
    pub(super) fn parts(&self, units: &Units, members: usize) -> Vec<Vec<Vec<Range<usize>>>> {
        let of = |member| part_of_list(units, &self.params, self.part_index(member, members), members);
        (0..members).map(of).collect()
    }
}

/// What one rank owns of all buckets; `member` gives its place among how many in the group of each.
pub(super) fn owned(units: Units, buckets: &[Bucket], member: impl Fn(usize) -> (usize, usize)) -> Result<Owned> {
    let list = |bucket: &Bucket| {
        let (member, parts) = member(bucket.group);
        PartOf { params: bucket.params.clone(), index: bucket.part_index(member, parts), parts }
    };
    Owned::parts(units, &buckets.iter().map(list).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::optimizer::Unit;

    fn units(sizes: &[usize]) -> Units {
        let unit = |(i, &elements): (usize, &usize)| vec![Unit { name: format!("p{i}"), elements }];
        Units::new(&sizes.iter().enumerate().map(unit).collect::<Vec<_>>()).unwrap()
    }

    #[test]
    fn buckets_are_cut_from_the_back_and_keep_groups_apart() {
        let sizes = [100, 5, 5, 50, 7, 1, 60, 2];
        let groups = [0, 0, 1, 1, 0, 0, 1, 0];
        let cut = buckets(&sizes, &groups, 10);
        let params: Vec<_> = cut.iter().map(|bucket| (bucket.group, bucket.params.as_slice())).collect();
        let want: [(usize, &[usize]); 5] = [(1, &[6]), (0, &[4, 5, 7]), (1, &[3]), (1, &[2]), (0, &[0, 1])];
        assert_eq!(params, want);
        // One for each group if nothing is too large.
        assert_eq!(buckets(&sizes, &groups, 1000).len(), 2);
        assert!(buckets(&sizes, &groups[..0], 10).is_empty());
    }

    /// The members of a group together own every element once, and what each owns is what the others think.
    #[test]
    fn members_own_everything_once() {
        let sizes = [100_000, 5, 300_001, 50, 17_000];
        let units = units(&sizes);
        let cut = buckets(&sizes, &[0, 0, 1, 0, 1], 200_000);
        for members in [1, 2, 3, 5] {
            let all: Vec<_> = (0..members).map(|m| owned(units.clone(), &cut, |_| (m, members)).unwrap()).collect();
            for (param, &size) in sizes.iter().enumerate() {
                assert_eq!(all.iter().map(|own| own.elements(param)).sum::<usize>(), size);
            }
            for bucket in &cut {
                for (member, part) in bucket.parts(&units, members).into_iter().enumerate() {
                    for (&param, ranges) in bucket.params.iter().zip(part) {
                        assert_eq!(all[member].ranges(param), ranges);
                    }
                }
            }
        }
    }
}
