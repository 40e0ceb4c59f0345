//! [`Agreement`]: how ranks that share no memory come to return one fault, though several may find one at the same time.
//!
//! The first a rank knows of a fault, found by itself or heard of, is its vote, which it sends to all others; from then on it
//! finds none. When every rank has voted, or [`GRACE`] is over, a rank decides for the vote whose finder has the lowest
//! number. Ranks that hear each other within half of that time hold the same votes by then, and so decide alike; one that is
//! stopped or dead costs the others the time and no more. Pure: messages and clocks are the caller's.

use super::Fault;
use std::time::Duration;

/// How long a rank waits for the votes of the others.
pub(super) const GRACE: Duration = Duration::from_millis(500);

/// What a rank knows of the fault that ends its world.
#[derive(Debug)]
pub(super) struct Agreement {
    rank: usize,
    votes: Vec<Option<Fault>>,
    /// Ranks whose vote is not waited for.
    excused: Vec<bool>,
    /// When the first vote was known.
    since: Option<Duration>,
    decided: Option<Fault>,
}

impl Agreement {
    /// Of rank `rank` among `size`, which knows of no fault.
    pub(super) fn new(rank: usize, size: usize) -> Self {
        Self { rank, votes: vec![None; size], excused: vec![false; size], since: None, decided: None }
    }

    /// Whether there is a fault; which one may not be known yet.
    pub(super) fn begun(&self) -> bool {
        self.since.is_some()
    }

    /// Takes a vote, at time `now`; what this rank has to send to all others, if it has not voted yet.
    pub(super) fn hear(&mut self, voter: usize, fault: Fault, now: Duration) -> Option<&Fault> {
        self.since.get_or_insert(now);
        self.votes[voter].get_or_insert_with(|| fault.clone());
        if voter != self.rank && self.votes[self.rank].is_some() {
            return None;
        }
        Some(self.votes[self.rank].insert(fault))
    }

    /// A fault this rank has found, at time `now`: its vote, unless it has voted.
    pub(super) fn find(&mut self, fault: Fault, now: Duration) -> Option<&Fault> {
        if self.begun() { None } else { self.hear(self.rank, fault, now) }
    }

    /// That rank is dead and will not vote.
    pub(super) fn excuse(&mut self, rank: usize) {
        self.excused[rank] = true;
    }

    /// Whether that rank has voted.
    pub(super) fn has_voted(&self, rank: usize) -> bool {
        self.votes[rank].is_some()
    }

    /// The fault that all ranks return, once that is known.
    pub(super) fn outcome(&mut self, now: Duration) -> Option<&Fault> {
        let over = now.saturating_sub(self.since?) >= GRACE;
        let all = self.votes.iter().zip(&self.excused).all(|(vote, &excused)| excused || vote.is_some());
        if self.decided.is_none() && (all || over) {
            self.decided = self.votes.iter().flatten().min_by_key(|fault| fault.rank).cloned();
        }
        self.decided.as_ref()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Cause, Kind, Phase, Site, Stamp};
    use moe_core::CounterRng;
    use std::collections::BTreeMap;

    fn found_by(rank: usize) -> Fault {
        let stamp = Stamp { context: 0, sequence: 1, kind: Kind::Barrier, site: Site::new(Phase::Start) };
        Fault { rank, stamp, cause: Cause::Left { peer: rank + 1 } }
    }

    /// Ranks that find faults at these times, with messages that take up to `latency`; what each decides, and when.
    fn run(seed: u64, found_at: &[Option<Duration>], silent: &[usize], latency: Duration) -> Vec<(Fault, Duration)> {
        let size = found_at.len();
        let mut rng = CounterRng::new(seed, 0);
        let mut ranks: Vec<Agreement> = (0..size).map(|rank| Agreement::new(rank, size)).collect();
        // By time and a running number: receiver, voter, vote.
        let mut events: BTreeMap<(Duration, usize), (usize, usize, Fault)> = BTreeMap::new();
        for (rank, at) in found_at.iter().enumerate().filter_map(|(rank, at)| at.map(|at| (rank, at))) {
            events.insert((at, events.len()), (rank, rank, found_by(rank)));
        }
        let mut sent = size;
        let mut ends: Vec<Option<(Fault, Duration)>> = vec![None; size];
        // Ranks look every millisecond.
        for now in (0..5000).map(Duration::from_millis) {
            while let Some(event) = events.first_entry().filter(|event| event.key().0 <= now) {
                let (to, voter, fault) = event.remove();
                let agreement = &mut ranks[to];
                let vote = if voter == to { agreement.find(fault, now) } else { agreement.hear(voter, fault, now) };
                for peer in (0..size).filter(|peer| *peer != to && !silent.contains(peer)) {
                    let Some(vote) = vote else { break };
                    sent += 1;
                    let takes = latency.mul_f64((rng.next_u64() % 1000) as f64 / 1000.0);
                    events.insert((now + takes, sent), (peer, to, vote.clone()));
                }
            }
            for (rank, end) in ends.iter_mut().enumerate().filter(|(_, end)| end.is_none()) {
                *end = ranks[rank].outcome(now).map(|fault| (fault.clone(), now));
            }
        }
        let heard = |(rank, end): (usize, Option<_>)| (!silent.contains(&rank)).then(|| end.expect("decided"));
        ends.into_iter().enumerate().filter_map(heard).collect()
    }

    #[test]
    fn one_finder_is_believed_by_all() {
        let found_at = [None, None, Some(Duration::from_secs(1)), None];
        for (fault, at) in run(0, &found_at, &[], GRACE / 8) {
            assert_eq!(fault, found_by(2));
            assert!(at < Duration::from_secs(1) + GRACE, "all have voted: no need to wait");
        }
    }

    #[test]
    fn ranks_that_find_faults_at_once_decide_alike() {
        let latency = GRACE / 4;
        for seed in 0..500 {
            let mut rng = CounterRng::new(seed, 1);
            let size = 2 + (rng.next_u64() % 7) as usize;
            let silent: Vec<usize> = if seed % 2 == 0 { vec![(rng.next_u64() as usize) % size] } else { Vec::new() };
            let mut found_at = vec![None; size];
            for (rank, at) in found_at.iter_mut().enumerate().filter(|(rank, _)| !silent.contains(rank)) {
                let late = latency.mul_f64((rng.next_u64() % 1000) as f64 / 1000.0);
                *at = (rank % 2 == 0 || size < 4).then_some(late);
            }
            let ends = run(seed, &found_at, &silent, latency);
            assert!(ends.iter().all(|(fault, _)| *fault == ends[0].0), "seed {seed}: {ends:?}");
            let tick = Duration::from_millis(3);
            assert!(ends.iter().all(|(_, at)| *at <= latency * 2 + GRACE + tick), "seed {seed}: {ends:?}");
        }
    }

    #[test]
    fn a_rank_votes_once() {
        let mut agreement = Agreement::new(1, 3);
        assert!(!agreement.begun() && agreement.outcome(GRACE).is_none());
        assert_eq!(agreement.hear(2, found_by(2), GRACE), Some(&found_by(2)), "it passes on what it hears");
        assert_eq!(agreement.find(found_by(1), GRACE), None);
        assert!(agreement.outcome(GRACE).is_none(), "rank 0 has not voted");
        agreement.excuse(0);
        assert_eq!(agreement.outcome(GRACE), Some(&found_by(2)), "it will not");
        assert_eq!(agreement.hear(0, found_by(0), GRACE), None);
        assert_eq!(agreement.outcome(GRACE * 9), Some(&found_by(2)), "what is decided stays");
    }
}
