//! [`MeshDivision`]: gradients of each bucket are added up by the ranks that own parts of it, in rank order; the sums, or the
//! parameters once they are updated, are brought to all.

use super::buckets::{Bucket, buckets, owned};
use super::{GroupRanks, MeshRanks, Sent, UPDATE, Zero, exchange};
use crate::train::division::Division;
use crate::train::optimizer::{ChunkSum, Grads, Owned, Units, with_values};
use crate::train::ranks::DividedParam;
use crate::train::timeline::{Track, covered};
use crate::{Error, Result};
use candle_core::Var;
use moe_core::tape::{After, CompleteGrads, GradBuffers};
use moe_parallel::comm::{Gathering, ReduceScattering, Reduction};
use moe_parallel::{Collectives, Communicator, Phase, Site};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

const SUMS: Site = Site::new(Phase::Backward);

/// Buckets whose parameters are under way at a time.
const WINDOW: usize = 2;

/// Who owns what of a bucket.
#[derive(Debug)]
struct Parts {
    /// Of each member of the group, of each parameter of the bucket.
    ranges: Vec<Vec<Vec<Range<usize>>>>,
    /// Elements of each member.
    counts: Vec<usize>,
}

impl Parts {
    fn new(units: &Units, bucket: &Bucket, members: usize) -> Self {
        let ranges = bucket.parts(units, members);
        let count = |part: &Vec<Vec<Range<usize>>>| part.iter().flatten().map(Range::len).sum();
        Self { counts: ranges.iter().map(count).collect(), ranges }
    }

    /// What a member owns of values of the bucket's parameters, appended to `to`.
    fn cut(&self, member: usize, values: &[&[f32]], to: &mut Vec<f32>) {
        for (values, ranges) in values.iter().zip(&self.ranges[member]) {
            ranges.iter().for_each(|range| to.extend_from_slice(&values[range.clone()]));
        }
    }

    /// What a member owns, one parameter after the other: `paste` gets its number in the bucket, the range and the values.
    fn each(&self, member: usize, mut own: &[f32], mut paste: impl FnMut(usize, &Range<usize>, &[f32])) {
        for (number, ranges) in self.ranges[member].iter().enumerate() {
            for range in ranges {
                let (values, rest) = own.split_at(range.len());
                paste(number, range, values);
                own = rest;
            }
        }
    }
}

/// A bucket under way.
#[derive(Debug)]
struct Flight<T> {
    bucket: usize,
    begun: Instant,
    values: T,
}

impl<T> Flight<T> {
    fn new(bucket: usize, values: T) -> Self {
        Self { bucket, begun: Instant::now(), values }
    }
}

/// A parameter, and where it is in its bucket.
#[derive(Debug, Clone, Copy)]
struct Place {
    bucket: usize,
    number: usize,
    param: usize,
}

/// Where the sums of gradients are written.
trait Sums {
    fn of(&mut self, place: Place) -> Result<&mut [f32]>;
}

impl Sums for GradBuffers {
    fn of(&mut self, place: Place) -> Result<&mut [f32]> {
        Ok(self.of_mut(place.param))
    }
}

/// During a backward pass: of buckets that are complete on this rank.
impl Sums for CompleteGrads<'_> {
    fn of(&mut self, place: Place) -> Result<&mut [f32]> {
        Ok(self.sum_mut(place.bucket, place.number)?)
    }
}

/// One rank's part, and what is under way.
#[derive(Debug)]
pub(super) struct MeshDivision {
    world: Arc<dyn Communicator>,
    groups: Vec<GroupRanks>,
    ranks_per_node: usize,
    sent: Arc<Sent>,
    zero: Zero,
    overlap: bool,
    most_under_way: usize,
    /// What the optimizer updates.
    owned: Owned,
    buckets: Vec<Vec<usize>>,
    group_of: Vec<usize>,
    parts: Vec<Parts>,
    /// Buckets whose sums are under way to their owners, in the order of starting.
    adding: VecDeque<Flight<ReduceScattering<f32>>>,
    /// Buckets whose sums are under way to all.
    gathering: VecDeque<Flight<Gathering<f32>>>,
    /// Sums of what is owned of buckets, which are to go to all as soon as there is room for more messages.
    held_back: VecDeque<(usize, Vec<f32>)>,
    /// When buckets were under way in this step.
    under_way: Vec<(Instant, Instant)>,
    /// Where only moments are divided: sums of what is owned of buckets, until they are written where gradients are kept.
    added: Vec<(usize, Vec<f32>)>,
    /// Where gradients are divided: sums of what is owned of each parameter, and whether they are those of a step before.
    sums: Vec<Vec<f32>>,
    stale: Vec<bool>,
}

impl MeshDivision {
    pub(super) fn new(ranks: &MeshRanks, units: Units, params: &[DividedParam]) -> Result<Self> {
        let number = |DividedParam { group: name, .. }: &DividedParam| {
            let known = ranks.groups.iter().position(|group| group.name.as_ref().is_none_or(|own| own == name));
            known.ok_or_else(|| Error::Argument(format!("no parameter of the mesh's model is in the group {name}")))
        };
        let numbers = params.iter().map(number).collect::<Result<Vec<_>>>()?;
        // Whole models are of one size everywhere.
        let size = |(index, param): (usize, &DividedParam)| {
            ranks.sizes.get(&param.name).copied().unwrap_or_else(|| units.elements(index))
        };
        let sizes: Vec<usize> = params.iter().enumerate().map(size).collect();
        let list = buckets(&sizes, &numbers, ranks.config.bucket_elements);
        let size = |group: usize| ranks.groups[group].sums.size();
        let parts: Vec<_> = list.iter().map(|bucket| Parts::new(&units, bucket, size(bucket.group))).collect();
        let zero = ranks.config.zero;
        let member = |group: usize| (ranks.groups[group].sums.rank(), size(group));
        let divided = owned(units.clone(), &list, member)?;
        let sums = if zero == Zero::Gradients {
            (0..params.len()).map(|param| vec![0.0; divided.elements(param)]).collect()
        } else {
            Vec::new()
        };
        Ok(Self {
            world: Arc::clone(ranks.mesh.world()),
            groups: ranks.groups.clone(),
            ranks_per_node: ranks.mesh.ranks_per_node(),
            sent: Arc::clone(&ranks.sent),
            zero,
            overlap: ranks.config.overlap,
            most_under_way: ranks.config.most_under_way,
            owned: if zero == Zero::Off { Owned::everything(units) } else { divided },
            group_of: list.iter().map(|bucket| bucket.group).collect(),
            stale: vec![true; list.len()],
            buckets: list.into_iter().map(|bucket| bucket.params).collect(),
            parts,
            adding: VecDeque::new(),
            gathering: VecDeque::new(),
            held_back: VecDeque::new(),
            under_way: Vec::new(),
            added: Vec::new(),
            sums,
        })
    }

    fn ranks(&self, bucket: usize) -> &GroupRanks {
        &self.groups[self.group_of[bucket]]
    }

    fn member(&self, bucket: usize) -> usize {
        self.ranks(bucket).sums.rank()
    }

    /// The sums of what this rank owns of a bucket are here: they go where they belong.
    fn take_sums(&mut self, bucket: usize, sums: Vec<f32>) -> Result<()> {
        match self.zero {
            Zero::Off => {
                self.held_back.push_back((bucket, sums));
                self.gather_more()?;
            }
            Zero::Moments => self.added.push((bucket, sums)),
            Zero::Gradients => self.accumulate(bucket, &sums),
        }
        Ok(())
    }

    fn elements(&self, bucket: usize) -> usize {
        self.parts[bucket].counts.iter().sum()
    }

    /// Whether a bucket may go on its way beside others of so many elements.
    fn has_room(&self, others: impl Iterator<Item = usize>, bucket: usize) -> bool {
        let others: usize = others.map(|bucket| self.elements(bucket)).sum();
        others == 0 || others + self.elements(bucket) <= self.most_under_way
    }

    /// Sends sums to all, in the order of their buckets, as long as there is room.
    fn gather_more(&mut self) -> Result<()> {
        let has_room = |division: &Self, bucket: usize| {
            division.has_room(division.gathering.iter().map(|flight| flight.bucket), bucket)
        };
        while let Some((bucket, sums)) = self.held_back.pop_front() {
            if !has_room(self, bucket) {
                self.held_back.push_front((bucket, sums));
                break;
            }
            let (parts, ranks) = (&self.parts[bucket], self.ranks(bucket));
            let gathering = ranks.values.start_all_gather_v(SUMS, &sums, &parts.counts)?;
            self.sent.count(&*ranks.values, self.ranks_per_node, |_| sums.len());
            self.gathering.push_back(Flight::new(bucket, gathering));
        }
        Ok(())
    }

    /// Adds to the sums of the passes before. Each pass is finished before it is added.
    fn accumulate(&mut self, bucket: usize, own: &[f32]) {
        let stale = std::mem::replace(&mut self.stale[bucket], false);
        let (params, member) = (&self.buckets[bucket], self.member(bucket));
        let mut rest = own;
        for (&param, ranges) in params.iter().zip(&self.parts[bucket].ranges[member]) {
            let (values, others) = rest.split_at(ranges.iter().map(Range::len).sum());
            rest = others;
            let sums = &mut self.sums[param];
            if stale {
                sums.copy_from_slice(values);
            } else {
                sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
            }
        }
    }

    /// Writes the sums of the next bucket that are under way to all: they are in memory once then, and others may follow.
    fn put_next<S: Sums>(&mut self, sums: &mut S) -> Result<()> {
        let Some(Flight { bucket, begun, values }) = self.gathering.pop_front() else { return Ok(()) };
        let (parts, arrived) = self.sent.waiting(|| values.wait_timed())?;
        self.has_come(Track::Values, bucket, begun, arrived);
        for (member, own) in parts.iter().enumerate() {
            self.put(bucket, member, own, sums)?;
        }
        self.gather_more()
    }

    /// Writes what a member owns of a bucket.
    fn put<S: Sums>(&self, bucket: usize, member: usize, own: &[f32], sums: &mut S) -> Result<()> {
        let mut written = Ok(());
        self.parts[bucket].each(member, own, |number, range, values| {
            let param = self.buckets[bucket][number];
            match sums.of(Place { bucket, number, param }) {
                Ok(sum) => sum[range.clone()].copy_from_slice(values),
                Err(error) => written = Err(error),
            }
        });
        written
    }

    fn take_next(&mut self) -> Result<()> {
        let Some(Flight { bucket, begun, values }) = self.adding.pop_front() else { return Ok(()) };
        let (sums, arrived) = self.sent.waiting(|| values.wait_timed())?;
        self.has_come(Track::Sums, bucket, begun, arrived);
        self.take_sums(bucket, sums)
    }

    /// A bucket was under way.
    fn has_come(&mut self, track: Track, bucket: usize, begun: Instant, arrived: Option<Instant>) {
        let arrived = arrived.unwrap_or_else(Instant::now);
        self.under_way.push((begun, arrived.max(begun)));
        self.sent.note(track, &format!("bucket {bucket}"), begun, arrived);
    }
}

impl Division for MeshDivision {
    fn owned(&self) -> &Owned {
        &self.owned
    }

    fn divides(&self, param: usize) -> Option<&[usize]> {
        let bucket = self.buckets.iter().position(|params| params.contains(&param));
        bucket.filter(|_| self.zero != Zero::Off).map(|bucket| self.ranks(bucket).sums.group().members())
    }

    fn buckets(&self) -> &[Vec<usize>] {
        &self.buckets
    }

    fn every_pass(&self) -> bool {
        self.zero == Zero::Gradients
    }

    fn overlaps(&self) -> bool {
        self.overlap
    }

    fn note(&self, what: &str, begin: Instant, end: Instant) {
        self.sent.note(Track::Work, what, begin, end);
    }

    fn begin(&mut self) {
        self.stale.fill(true);
    }

    /// Takes what has come, bucket by bucket in their order.
    fn advance(&mut self, complete: &mut CompleteGrads<'_>) -> Result<()> {
        while self.adding.front_mut().is_some_and(|flight| flight.values.test()) {
            self.take_next()?;
        }
        while self.gathering.front_mut().is_some_and(|flight| flight.values.test()) {
            self.put_next(complete)?;
        }
        Ok(())
    }

    fn start(&mut self, bucket: usize, complete: &mut CompleteGrads<'_>) -> Result<After> {
        self.advance(complete)?;
        let after = if self.zero == Zero::Gradients { After::Release } else { After::Keep };
        let alone = self.ranks(bucket).sums.size() == 1;
        if alone && after == After::Keep {
            return Ok(after);
        }
        // Whoever is behind never waits for what is sent here only now, so this ends.
        while !self.has_room(self.adding.iter().map(|flight| flight.bucket), bucket) {
            self.take_next()?;
        }
        let (ranks, parts) = (self.ranks(bucket), &self.parts[bucket]);
        let mut values = Vec::with_capacity(self.elements(bucket));
        let sums = complete.sums(bucket)?;
        (0..parts.counts.len()).for_each(|member| parts.cut(member, &sums, &mut values));
        if alone {
            self.accumulate(bucket, &values);
            return Ok(after);
        }
        let adding = ranks.sums.start_reduce_scatter_v(SUMS, &values, &parts.counts, Reduction::Sum)?;
        self.sent.count(&*ranks.sums, self.ranks_per_node, |member| parts.counts[member]);
        self.adding.push_back(Flight::new(bucket, adding));
        Ok(after)
    }

    fn finish(&mut self, buffers: &mut GradBuffers) -> Result<()> {
        while !self.adding.is_empty() {
            self.take_next()?;
        }
        for (bucket, sums) in std::mem::take(&mut self.added) {
            self.put(bucket, self.member(bucket), &sums, buffers)?;
        }
        while !self.gathering.is_empty() {
            self.put_next(buffers)?;
        }
        self.sent.was_busy(covered(std::mem::take(&mut self.under_way)));
        Ok(())
    }

    fn grads<'a>(&'a self, buffers: &'a GradBuffers) -> Grads<'a> {
        match self.zero {
            Zero::Gradients => Grads::Owned(self.sums.iter().map(Vec::as_slice).collect()),
            Zero::Off | Zero::Moments => Grads::Whole(buffers.all()),
        }
    }

    fn gather_squares(&self, own: Vec<ChunkSum>) -> Result<Vec<ChunkSum>> {
        let words: Vec<u64> = own.iter().flat_map(|s| [s.chunk as u64, s.sum.to_bits()]).collect();
        let all = exchange(&*self.world, UPDATE, &words)?.concat();
        Ok(all.chunks(2).map(|pair| ChunkSum { chunk: pair[0] as usize, sum: f64::from_bits(pair[1]) }).collect())
    }

    fn gather_params(&self, params: &[(String, Var)]) -> Result<Vec<usize>> {
        if self.zero == Zero::Off {
            return Ok(Vec::new());
        }
        let travels = |&bucket: &usize| self.ranks(bucket).values.size() > 1;
        let travelling: Vec<usize> = (0..self.buckets.len()).filter(travels).collect();
        let (mut flights, begun) = (VecDeque::new(), Instant::now());
        for &bucket in &travelling {
            if flights.len() == WINDOW {
                flights.pop_front().map_or(Ok(()), |first| self.put_params(first, params))?;
            }
            flights.push_back(Flight::new(bucket, self.start_params(bucket, params)?));
        }
        flights.into_iter().try_for_each(|one| self.put_params(one, params))?;
        self.sent.was_busy(begun.elapsed());
        Ok(travelling.into_iter().flat_map(|bucket| self.buckets[bucket].iter().copied()).collect())
    }
}

impl MeshDivision {
    /// Sends what this rank has updated of a bucket.
    fn start_params(&self, bucket: usize, params: &[(String, Var)]) -> Result<Gathering<f32>> {
        let (parts, member) = (&self.parts[bucket], self.member(bucket));
        let mut own = Vec::with_capacity(parts.counts[member]);
        for (&param, ranges) in self.buckets[bucket].iter().zip(&parts.ranges[member]) {
            with_values(&params[param].1, |values| {
                ranges.iter().for_each(|range| own.extend_from_slice(&values[range.clone()]));
                Ok(())
            })?;
        }
        let ranks = self.ranks(bucket);
        self.sent.count(&*ranks.values, self.ranks_per_node, |_| own.len());
        Ok(ranks.values.start_all_gather_v(UPDATE, &own, &parts.counts)?)
    }

    /// Writes what the others have updated of a bucket.
    fn put_params(&self, flight: Flight<Gathering<f32>>, params: &[(String, Var)]) -> Result<()> {
        let Flight { bucket, begun, values } = flight;
        let (parts, own) = (&self.parts[bucket], self.member(bucket));
        let (others, arrived) = self.sent.waiting(|| values.wait_timed())?;
        self.sent.note(Track::Values, &format!("bucket {bucket}"), begun, arrived.unwrap_or_else(Instant::now));
        for (member, values) in others.iter().enumerate().filter(|(member, _)| *member != own) {
            let mut rest = values.as_slice();
            for (&param, ranges) in self.buckets[bucket].iter().zip(&parts.ranges[member]) {
                with_values(&params[param].1, |values| {
                    for range in ranges {
                        let (new, others) = rest.split_at(range.len());
                        values[range.clone()].copy_from_slice(new);
                        rest = others;
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }
}
