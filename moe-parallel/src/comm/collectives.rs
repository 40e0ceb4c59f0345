//! [`Collectives`]: the operations users know, made of [`Communicator::start`].

use super::{Cause, Communicator, Element, Expected, Group, Kind, Parcel, Pending, Site};
use crate::dims::part;
use crate::{Error, Result};
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Instant;

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// In rank order; bf16 in f32, rounded once.
    Sum,
    /// The largest; NaN stays.
    Max,
}

impl Reduction {
    /// Element by element over `parts`, one per rank, in their order.
    fn apply<T: Element>(self, parts: &[Vec<T>]) -> Vec<T> {
        let Some((first, rest)) = parts.split_first() else { return Vec::new() };
        match self {
            Self::Max => rest.iter().fold(first.clone(), |mut most, part| {
                most.iter_mut().zip(part).for_each(|(a, b)| *a = Element::max(*a, *b));
                most
            }),
            Self::Sum => {
                let mut sums: Vec<T::Sum> = first.iter().map(|v| v.to_sum()).collect();
                for part in rest {
                    sums.iter_mut().zip(part).for_each(|(sum, term)| *sum = T::add(*sum, *term));
                }
                sums.into_iter().map(T::from_sum).collect()
            }
        }
    }
}

/// Values on their way from every member, in rank order.
#[derive(Debug)]
#[must_use = "values arrive when it is waited for"]
pub struct Gathering<T> {
    pending: Box<dyn Pending>,
    /// From whom a message comes; the others send nothing.
    expected: Vec<Expected>,
    /// What this rank sends to itself.
    own: Vec<T>,
    rank: usize,
    size: usize,
}

impl<T: Element> Gathering<T> {
    /// Waits; the parts of all members, one after the other.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn wait(self) -> Result<Vec<T>> {
        Ok(self.wait_parts()?.concat())
    }

    /// Waits; the part of each member.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn wait_parts(self) -> Result<Vec<Vec<T>>> {
        Ok(self.wait_timed()?.0)
    }

    /// [`Gathering::wait_parts`], and when the last of them arrived.
    ///
    /// # Errors
    /// As there.
    pub fn wait_timed(self) -> Result<(Vec<Vec<T>>, Option<Instant>)> {
        let parcels = self.pending.wait()?;
        let mut parts = vec![Vec::new(); self.size];
        for (expected, parcel) in self.expected.iter().zip(&parcels) {
            parts[expected.peer] = parcel.values();
        }
        parts[self.rank] = self.own;
        Ok((parts, parcels.iter().filter_map(Parcel::arrived).max()))
    }

    /// Whether [`Gathering::wait`] would return at once.
    pub fn test(&mut self) -> bool {
        self.pending.test()
    }
}

/// A reduction on its way.
#[derive(Debug)]
#[must_use = "values arrive when it is waited for"]
pub struct AllReducing<'a, T, C: ?Sized> {
    comm: &'a C,
    site: Site,
    reduction: Reduction,
    first: Gathering<T>,
    /// Of all values where each member reduces a part only.
    parts_of: Option<usize>,
    _values: PhantomData<T>,
}

impl<T: Element, C: Communicator + ?Sized> AllReducing<'_, T, C> {
    /// Waits; the same values on every member.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn wait(self) -> Result<Vec<T>> {
        let reduced = self.reduction.apply(&self.first.wait_parts()?);
        let Some(len) = self.parts_of else { return Ok(reduced) };
        let group = self.comm.group();
        let counts: Vec<usize> = (0..group.size()).map(|r| part(len, r, group.size()).len()).collect();
        start_all_gather_v(self.comm, Kind::AllReduce, self.site, &reduced, &counts)?.wait()
    }
}

/// A reduction on its way, of which each member gets a part.
#[derive(Debug)]
#[must_use = "values arrive when it is waited for"]
pub struct ReduceScattering<T> {
    parts: Gathering<T>,
    reduction: Reduction,
}

impl<T: Element> ReduceScattering<T> {
    /// Waits; this rank's part.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn wait(self) -> Result<Vec<T>> {
        Ok(self.wait_timed()?.0)
    }

    /// [`ReduceScattering::wait`], and when the last part arrived.
    ///
    /// # Errors
    /// As there.
    pub fn wait_timed(self) -> Result<(Vec<T>, Option<Instant>)> {
        let (parts, arrived) = self.parts.wait_timed()?;
        Ok((self.reduction.apply(&parts), arrived))
    }

    /// Whether [`ReduceScattering::wait`] would return at once.
    pub fn test(&mut self) -> bool {
        self.parts.test()
    }
}

/// One member's values on their way to all.
#[derive(Debug)]
#[must_use = "values arrive when it is waited for"]
pub struct Broadcasting<T> {
    parts: Gathering<T>,
    root: usize,
}

impl<T: Element> Broadcasting<T> {
    /// Waits; the root's values.
    ///
    /// # Errors
    /// As [`Pending::wait`].
    pub fn wait(self) -> Result<Vec<T>> {
        Ok(self.parts.wait_parts()?.swap_remove(self.root))
    }

    /// Whether [`Broadcasting::wait`] would return at once.
    pub fn test(&mut self) -> bool {
        self.parts.test()
    }
}

/// Up to this size every member sends all its values to all others: one exchange instead of two.
const SMALL_REDUCTION: usize = 4096;

fn sum_of(counts: &[usize]) -> usize {
    counts.iter().sum()
}

fn check_counts(name: &str, counts: &[usize], size: usize, values: Option<usize>) -> Result<()> {
    if counts.len() != size || values.is_some_and(|values| values != sum_of(counts)) {
        let got = values.map_or(String::new(), |values| format!(" of {values} values"));
        return Err(Error::Argument(format!("{name} must be {size} counts{got}, got {counts:?}")));
    }
    Ok(())
}

/// Messages to the members that are sent anything, and those awaited.
fn start_exchange<T: Element, C: Communicator + ?Sized>(
    comm: &C,
    kind: Kind,
    site: Site,
    part_for: impl Fn(usize) -> Vec<T>,
    sends_to: impl Fn(usize) -> bool,
    receive_counts: &[usize],
) -> Result<Gathering<T>> {
    let (rank, size) = (comm.rank(), comm.size());
    let sends =
        (0..size).filter(|&peer| peer != rank && sends_to(peer)).map(|peer| (peer, Parcel::of(&part_for(peer))));
    let expected: Vec<Expected> = receive_counts
        .iter()
        .enumerate()
        .filter(|&(peer, &count)| peer != rank && count > 0)
        .map(|(peer, &count)| Expected { peer, bytes: count * size_of::<T>() })
        .collect();
    let pending = comm.start(comm.group().stamp(kind, site), sends.collect(), &expected)?;
    Ok(Gathering { pending, expected, own: part_for(rank), rank, size })
}

fn start_all_gather_v<T: Element, C: Communicator + ?Sized>(
    comm: &C,
    kind: Kind,
    site: Site,
    values: &[T],
    counts: &[usize],
) -> Result<Gathering<T>> {
    check_counts("counts", counts, comm.size(), None)?;
    if counts[comm.rank()] != values.len() {
        let (want, got) = (counts[comm.rank()], values.len());
        return Err(Error::Argument(format!("counts says {want} values of this rank, got {got}")));
    }
    start_exchange(comm, kind, site, |_| values.to_vec(), |_| !values.is_empty(), counts)
}

/// The collectives, over any communicator. Every member calls the same ones in the same order.
///
/// Counts are in values. A pair of ranks with a count of 0 exchanges no message.
pub trait Collectives: Communicator {
    /// This rank's place in the group.
    fn rank(&self) -> usize {
        self.group().rank()
    }

    /// Number of ranks in the group.
    fn size(&self) -> usize {
        self.group().size()
    }

    /// Begins to send part `r` of `values` to rank `r`.
    ///
    /// # Errors
    /// [`Error::Argument`] if the counts do not fit; [`Error::Fault`].
    fn start_all_to_all_v<T: Element>(
        &self,
        site: Site,
        values: &[T],
        send_counts: &[usize],
        receive_counts: &[usize],
    ) -> Result<Gathering<T>> {
        check_counts("send_counts", send_counts, self.size(), Some(values.len()))?;
        check_counts("receive_counts", receive_counts, self.size(), None)?;
        let (own, back) = (send_counts[self.rank()], receive_counts[self.rank()]);
        if own != back {
            return Err(Error::Argument(format!("this rank sends itself {own} values but expects {back}")));
        }
        let offset = |peer: usize| sum_of(&send_counts[..peer]);
        let part_for = |peer: usize| values[offset(peer)..][..send_counts[peer]].to_vec();
        start_exchange(self, Kind::AllToAll, site, part_for, |peer| send_counts[peer] > 0, receive_counts)
    }

    /// Sends part `r` of `values` to rank `r`; the parts that came, in rank order.
    ///
    /// # Errors
    /// As [`Collectives::start_all_to_all_v`].
    fn all_to_all_v<T: Element>(
        &self,
        site: Site,
        values: &[T],
        send_counts: &[usize],
        receive_counts: &[usize],
    ) -> Result<Vec<T>> {
        self.start_all_to_all_v(site, values, send_counts, receive_counts)?.wait()
    }

    /// [`Collectives::all_to_all_v`] of equal parts.
    ///
    /// # Errors
    /// [`Error::Argument`] if the values are not as many for each rank; [`Error::Fault`].
    fn all_to_all<T: Element>(&self, site: Site, values: &[T]) -> Result<Vec<T>> {
        let size = self.size();
        if !values.len().is_multiple_of(size) {
            let len = values.len();
            return Err(Error::Argument(format!(
                "an all-to-all over {size} ranks needs equal parts, got {len} values"
            )));
        }
        let counts = vec![values.len() / size; size];
        self.all_to_all_v(site, values, &counts, &counts)
    }

    /// Begins to send `values` to every rank.
    ///
    /// # Errors
    /// [`Error::Argument`] if the counts do not fit; [`Error::Fault`].
    fn start_all_gather_v<T: Element>(&self, site: Site, values: &[T], counts: &[usize]) -> Result<Gathering<T>> {
        start_all_gather_v(self, Kind::AllGather, site, values, counts)
    }

    /// The values of all ranks, in rank order; `counts` are the numbers of each.
    ///
    /// # Errors
    /// As [`Collectives::start_all_gather_v`].
    fn all_gather_v<T: Element>(&self, site: Site, values: &[T], counts: &[usize]) -> Result<Vec<T>> {
        self.start_all_gather_v(site, values, counts)?.wait()
    }

    /// [`Collectives::all_gather_v`] where every rank has as many.
    ///
    /// # Errors
    /// [`Error::Fault`], also if a rank has another number of values.
    fn all_gather<T: Element>(&self, site: Site, values: &[T]) -> Result<Vec<T>> {
        self.all_gather_v(site, values, &vec![values.len(); self.size()])
    }

    /// Part `rank` of the values, reduced over all ranks; parts are of [`crate::dims::part`].
    ///
    /// # Errors
    /// [`Error::Fault`], also if a rank has another number of values.
    fn reduce_scatter<T: Element>(&self, site: Site, values: &[T], reduction: Reduction) -> Result<Vec<T>> {
        self.start_reduce_scatter(site, values, reduction)?.wait()
    }

    /// Begins [`Collectives::reduce_scatter`].
    ///
    /// # Errors
    /// [`Error::Fault`].
    fn start_reduce_scatter<T: Element>(
        &self,
        site: Site,
        values: &[T],
        reduction: Reduction,
    ) -> Result<ReduceScattering<T>> {
        Ok(ReduceScattering { parts: start_reduce_scatter(self, Kind::ReduceScatter, site, values)?, reduction })
    }

    /// Begins to reduce values of which member `r` gets the `counts[r]` that are its part, in rank order.
    ///
    /// # Errors
    /// [`Error::Argument`] if the counts do not fit; [`Error::Fault`].
    fn start_reduce_scatter_v<T: Element>(
        &self,
        site: Site,
        values: &[T],
        counts: &[usize],
        reduction: Reduction,
    ) -> Result<ReduceScattering<T>> {
        check_counts("counts", counts, self.size(), Some(values.len()))?;
        let own = counts[self.rank()];
        let part_for = |peer: usize| values[sum_of(&counts[..peer])..][..counts[peer]].to_vec();
        let receives = vec![own; self.size()];
        let parts = start_exchange(self, Kind::ReduceScatter, site, part_for, |peer| counts[peer] > 0, &receives)?;
        Ok(ReduceScattering { parts, reduction })
    }

    /// Begins [`Collectives::all_reduce`].
    ///
    /// # Errors
    /// [`Error::Fault`].
    fn start_all_reduce<T: Element>(
        &self,
        site: Site,
        values: &[T],
        reduction: Reduction,
    ) -> Result<AllReducing<'_, T, Self>> {
        let kind = Kind::AllReduce;
        let small = size_of_val(values) <= SMALL_REDUCTION || self.size() == 2;
        let (first, parts_of) = if small {
            let counts = vec![values.len(); self.size()];
            (start_all_gather_v(self, kind, site, values, &counts)?, None)
        } else {
            (start_reduce_scatter(self, kind, site, values)?, Some(values.len()))
        };
        Ok(AllReducing { comm: self, site, reduction, first, parts_of, _values: PhantomData })
    }

    /// The values reduced over all ranks, in rank order, the same bits on each.
    ///
    /// # Errors
    /// [`Error::Fault`], also if a rank has another number of values.
    fn all_reduce<T: Element>(&self, site: Site, values: &[T], reduction: Reduction) -> Result<Vec<T>> {
        self.start_all_reduce(site, values, reduction)?.wait()
    }

    /// The values of rank `root` on every rank; the others' are replaced and must be as many.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such rank; [`Error::Fault`].
    fn broadcast<T: Element>(&self, site: Site, values: &mut [T], root: usize) -> Result<()> {
        let sent = self.start_broadcast(site, values, root)?.wait()?;
        values.copy_from_slice(&sent);
        Ok(())
    }

    /// Begins [`Collectives::broadcast`]; the values of ranks other than `root` only say how many come.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no such rank; [`Error::Fault`].
    fn start_broadcast<T: Element>(&self, site: Site, values: &[T], root: usize) -> Result<Broadcasting<T>> {
        let (rank, size) = (self.rank(), self.size());
        if root >= size {
            return Err(Error::Argument(format!("root {root} is not one of {size} ranks")));
        }
        let counts: Vec<usize> = (0..size).map(|r| if r == root { values.len() } else { 0 }).collect();
        let part_for = |_| if rank == root { values.to_vec() } else { Vec::new() };
        let sends_to = |_| rank == root && !values.is_empty();
        Ok(Broadcasting { parts: start_exchange(self, Kind::Broadcast, site, part_for, sends_to, &counts)?, root })
    }

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// [`Error::Fault`].
    fn barrier(&self, site: Site) -> Result<()> {
        self.start_barrier(site)?.wait().map(drop)
    }

    /// Begins [`Collectives::barrier`]; what it gives when it is waited for is of no use.
    ///
    /// # Errors
    /// [`Error::Fault`].
    fn start_barrier(&self, site: Site) -> Result<Box<dyn Pending>> {
        let peers = || (0..self.size()).filter(|&peer| peer != self.rank());
        let sends = peers().map(|peer| (peer, Parcel::with_capacity(0))).collect();
        let receives: Vec<Expected> = peers().map(|peer| Expected { peer, bytes: 0 }).collect();
        self.start(self.group().stamp(Kind::Barrier, site), sends, &receives)
    }

    /// Ends this engine on every rank, for a failure above it; the error that all of them return.
    fn give_up(&self, site: Site, why: String) -> Error {
        Error::Fault(self.fail(self.group().stamp(Kind::Barrier, site), Cause::Engine(why)))
    }

    /// A communicator of the ranks that give the same color, in the order of their keys (of this group where keys are equal).
    ///
    /// # Errors
    /// [`Error::Fault`].
    fn split(&self, site: Site, color: u64, key: u64) -> Result<Arc<dyn Communicator>> {
        let counts = vec![2; self.size()];
        let stamp = self.group().stamp(Kind::Split, site);
        let all = start_all_gather_v(self, Kind::Split, site, &[color, key], &counts)?.wait()?;
        let mut members: Vec<(u64, usize)> =
            (0..self.size()).filter(|&r| all[2 * r] == color).map(|r| (all[2 * r + 1], r)).collect();
        members.sort_unstable();
        let world = members.iter().map(|&(_, r)| self.group().members()[r]).collect();
        let context = mix([stamp.context, stamp.sequence, color]);
        Ok(self.over(Group::new(context, world, self.group().world_rank())))
    }
}

impl<C: Communicator + ?Sized> Collectives for C {}

fn start_reduce_scatter<T: Element, C: Communicator + ?Sized>(
    comm: &C,
    kind: Kind,
    site: Site,
    values: &[T],
) -> Result<Gathering<T>> {
    let (len, size) = (values.len(), comm.size());
    let own = part(len, comm.rank(), size).len();
    let part_for = |peer: usize| values[part(len, peer, size)].to_vec();
    start_exchange(comm, kind, site, part_for, |peer| !part(len, peer, size).is_empty(), &vec![own; size])
}

/// One number of several, the same everywhere (the finalizer of MurmurHash3 over each).
fn mix(values: [u64; 3]) -> u64 {
    values.into_iter().fold(0x9e37_79b9_7f4a_7c15, |hash, value| {
        let mut x = hash ^ value;
        x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        x ^ (x >> 33)
    })
}
