//! [`Meeting`]: how ranks that share no memory come to be members of one smaller world, though some are dead, some are stopped
//! and wake up at any moment, and each sees others come at another time.
//!
//! Whoever comes says so to all. The lowest rank that has come, once every other has come or is gone or the time is over, asks
//! the others to follow it. Nobody follows two: a rank that is asked promises itself to one, and lets a lower one wait, or turns
//! a higher one away, until it is free again. A leader that is turned away frees its own followers and follows in turn. One to
//! whom *all* that have come and live are promised names the members, who go on, and tell everybody else that they have.
//!
//! So worlds are disjoint, for each member was promised to one leader; and there is but one, for whoever comes late finds that
//! the others have come and asks them in vain: it is told that it was left, by its connection to one who went on. A connection
//! that ends without that word is a process that has ended. A rank that dies between its promise and the end of the meeting costs
//! the others nothing; a leader that does, or one that has come and then answers no more, ends the meeting in an error.
//! Pure: messages and clocks are the caller's.

use crate::comm::wire::Reader;
use std::collections::BTreeSet;
use std::time::Duration;

/// How long one that has come may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// What ranks say to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Word {
    /// I have come.
    Here,
    /// Follow me.
    Follow,
    /// I follow you, and nobody else.
    Promise,
    /// I follow another.
    Refuse,
    /// Do not follow me.
    Release,
    /// These are the members.
    World(Vec<usize>),
    /// We have gone on without you.
    Left,
}

impl Word {
    pub(super) fn encode(&self) -> Vec<u8> {
        let (number, members): (u8, &[usize]) = match self {
            Self::Here => (0, &[]),
            Self::Follow => (1, &[]),
            Self::Promise => (2, &[]),
            Self::Refuse => (3, &[]),
            Self::Release => (4, &[]),
            Self::World(members) => (5, members),
            Self::Left => (6, &[]),
        };
        let members = members.iter().flat_map(|&member| (member as u64).to_le_bytes());
        std::iter::once(number).chain(members).collect()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let word = match reader.byte()? {
            0 => Self::Here,
            1 => Self::Follow,
            2 => Self::Promise,
            3 => Self::Refuse,
            4 => Self::Release,
            5 => {
                let members = std::iter::from_fn(|| reader.number()).collect();
                Self::World(members)
            }
            6 => Self::Left,
            _ => return None,
        };
        reader.0.is_empty().then_some(word)
    }
}

/// What a rank knows of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Awaited,
    Here,
    /// Asked to follow this rank.
    Asked,
    Promised,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Follows nobody yet.
    Free,
    /// Asks the others to follow, since then.
    Leads(Duration),
    /// Whom, since when.
    Follows(usize, Duration),
}

/// A rank's part in a meeting.
#[derive(Debug)]
pub(super) struct Meeting {
    rank: usize,
    places: Vec<Place>,
    role: Role,
    /// It has led, and was turned away: it does not lead again, for an answer to its first question might come then.
    was_turned: bool,
    /// Lower ones that have asked and wait for an answer.
    waiting: BTreeSet<usize>,
    timeout: Duration,
    says: Vec<(usize, Word)>,
    end: Option<Result<Vec<usize>, String>>,
}

impl Meeting {
    /// Of rank `rank` among `size`, which waits `timeout` for the others; it begins at time zero.
    pub(super) fn new(rank: usize, size: usize, timeout: Duration) -> Self {
        let mut meeting = Self {
            rank,
            places: vec![Place::Awaited; size],
            role: Role::Free,
            was_turned: false,
            waiting: BTreeSet::new(),
            timeout,
            says: Vec::new(),
            end: None,
        };
        meeting.places[rank] = Place::Promised;
        meeting.others(|_| true).into_iter().for_each(|other| meeting.say(other, Word::Here));
        meeting
    }

    /// What is to be sent, to whom.
    pub(super) fn take_words(&mut self) -> Vec<(usize, Word)> {
        std::mem::take(&mut self.says)
    }

    /// What it has come to: the members, or why there are none with this rank.
    pub(super) fn end(&self) -> Option<&Result<Vec<usize>, String>> {
        self.end.as_ref()
    }

    /// Takes a word of another rank, at time `now`.
    pub(super) fn hear(&mut self, from: usize, word: Word, now: Duration) {
        if self.end.is_some() || self.places[from] == Place::Gone {
            return;
        }
        match word {
            Word::Here => self.greet(from),
            Word::Follow => self.consider(from, now),
            Word::Promise if self.places[from] == Place::Asked => self.places[from] = Place::Promised,
            Word::Refuse if self.places[from] == Place::Asked => self.turn(now),
            Word::Release => self.release(from, now),
            Word::World(members) if self.follows(from) && self.is_world(&members) => self.go_on(members),
            Word::Promise | Word::Refuse | Word::World(_) => {}
            Word::Left => {
                self.end = Some(Err(format!("rank {from} has gone on without this rank, which came too late")))
            }
        }
    }

    /// That rank is gone: its connection has ended.
    pub(super) fn lose(&mut self, peer: usize) {
        self.places[peer] = Place::Gone;
        self.waiting.remove(&peer);
        if self.follows(peer) && self.end.is_none() {
            self.end = Some(Err(format!("rank {peer}, which was to lead the ranks that are left, is gone too")));
        }
    }

    /// Does what is due at time `now`, after all that has come was heard.
    pub(super) fn look(&mut self, now: Duration) {
        if self.end.is_some() {
            return;
        }
        match self.role {
            Role::Free if self.may_lead(now) => {
                self.role = Role::Leads(now);
                self.others(|place| place == Place::Here).into_iter().for_each(|other| self.ask(other));
                self.lead(now, now);
            }
            Role::Leads(since) => self.lead(since, now),
            Role::Follows(leader, since) if now >= since + 2 * ANSWER => {
                self.end = Some(Err(format!("rank {leader}, which was to lead the ranks that are left, is silent")));
            }
            // Lower ranks may have come just before this one's time was over, and wait as long.
            Role::Free if now >= self.timeout.saturating_add(ANSWER).saturating_mul(2) => {
                self.end = Some(Err("no rank has led the ranks that are left to a smaller world".into()));
            }
            Role::Free | Role::Follows(..) => {}
        }
    }

    /// Whether no lower rank will lead and nobody is waited for.
    fn may_lead(&self, now: Duration) -> bool {
        let is_over = now >= self.timeout;
        let lower_come = self.places[..self.rank].contains(&Place::Here);
        !self.was_turned && !lower_come && (is_over || !self.places.contains(&Place::Awaited))
    }

    fn lead(&mut self, since: Duration, now: Duration) {
        let silent = self.others(|place| place == Place::Asked);
        if silent.is_empty() {
            let members =
                (0..self.places.len()).filter(|&rank| self.places[rank] == Place::Promised).collect::<Vec<_>>();
            for other in self.others(|place| place == Place::Promised) {
                self.say(other, Word::World(members.clone()));
            }
            self.go_on(members);
        } else if now >= since + ANSWER {
            self.end = Some(Err(format!("ranks {silent:?} came to make a smaller world, and then were silent")));
        }
    }

    fn greet(&mut self, from: usize) {
        if self.places[from] == Place::Awaited {
            self.places[from] = Place::Here;
            if matches!(self.role, Role::Leads(_)) {
                self.ask(from);
            }
        }
    }

    fn ask(&mut self, other: usize) {
        self.places[other] = Place::Asked;
        self.say(other, Word::Follow);
    }

    /// Answers one that wants to lead.
    fn consider(&mut self, from: usize, now: Duration) {
        let bound_to = match self.role {
            Role::Free => return self.follow(from, now),
            Role::Leads(_) => self.rank,
            Role::Follows(leader, _) => leader,
        };
        if from < bound_to {
            self.waiting.insert(from);
        } else {
            self.say(from, Word::Refuse);
        }
    }

    fn follow(&mut self, leader: usize, now: Duration) {
        self.role = Role::Follows(leader, now);
        self.say(leader, Word::Promise);
    }

    fn follows(&self, leader: usize) -> bool {
        matches!(self.role, Role::Follows(followed, _) if followed == leader)
    }

    /// Leads no more.
    fn turn(&mut self, now: Duration) {
        for other in self.others(|place| matches!(place, Place::Asked | Place::Promised)) {
            self.places[other] = Place::Here;
            self.say(other, Word::Release);
        }
        (self.role, self.was_turned) = (Role::Free, true);
        self.follow_waiting(now);
    }

    fn release(&mut self, from: usize, now: Duration) {
        self.waiting.remove(&from);
        if self.follows(from) {
            self.role = Role::Free;
            self.follow_waiting(now);
        }
    }

    fn follow_waiting(&mut self, now: Duration) {
        if let Some(leader) = self.waiting.pop_first() {
            self.follow(leader, now);
        }
    }

    /// Whether these are ranks in their order, with this one.
    fn is_world(&self, members: &[usize]) -> bool {
        let are_ranks = members.is_sorted_by(|a, b| a < b) && members.last() < Some(&self.places.len());
        are_ranks && members.contains(&self.rank)
    }

    fn go_on(&mut self, members: Vec<usize>) {
        for other in self.others(|place| place != Place::Gone) {
            if !members.contains(&other) {
                self.say(other, Word::Left);
            }
        }
        self.end = Some(Ok(members));
    }

    /// The other ranks in such a place.
    fn others(&self, wanted: impl Fn(Place) -> bool) -> Vec<usize> {
        (0..self.places.len()).filter(|&other| other != self.rank && wanted(self.places[other])).collect()
    }

    fn say(&mut self, to: usize, word: Word) {
        self.says.push((to, word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::CounterRng;
    use std::collections::VecDeque;

    const TIMEOUT: Duration = Duration::from_millis(100);
    /// Of words, at most.
    const LATENCY: u64 = 4;
    const MS: Duration = Duration::from_millis(1);

    /// When a rank comes and when it dies, in milliseconds, if ever.
    #[derive(Debug, Clone, Copy)]
    struct Fate {
        comes: Option<u64>,
        dies: Option<u64>,
    }

    type End = (Result<Vec<usize>, String>, u64);

    /// What is on its way from one rank to another, each with the time it arrives at; nothing at last, if the connection ends.
    type Wire = VecDeque<(u64, Option<Word>)>;

    struct Simulation {
        rng: CounterRng,
        /// By receiver and sender.
        wires: Vec<Vec<Wire>>,
        /// What each has come to, and when.
        ends: Vec<Option<End>>,
    }

    impl Simulation {
        fn send(&mut self, from: usize, to: usize, word: Option<Word>, now: u64) {
            let wire = &mut self.wires[to][from];
            if wire.back().is_none_or(|(_, word)| word.is_some()) {
                let arrives = now + self.rng.next_u64() % LATENCY;
                let after = wire.back().map_or(0, |(at, _)| *at);
                wire.push_back((arrives.max(after), word));
            }
        }

        fn close(&mut self, rank: usize, keeps: &[usize], now: u64) {
            let others = (0..self.wires.len()).filter(|other| *other != rank && !keeps.contains(other));
            others.collect::<Vec<_>>().into_iter().for_each(|other| self.send(rank, other, None, now));
        }
    }

    /// What each rank comes to, and when.
    fn run(seed: u64, fates: &[Fate]) -> Vec<Option<End>> {
        let size = fates.len();
        let wires = vec![vec![Wire::new(); size]; size];
        let mut all = Simulation { rng: CounterRng::new(seed, 1), wires, ends: vec![None; size] };
        let mut meetings: Vec<Option<Meeting>> = (0..size).map(|_| None).collect();
        let is_due = |time: Option<u64>, now| time.is_some_and(|time| time <= now);
        for now in 0..12_000 {
            for rank in 0..size {
                let fate = fates[rank];
                if fate.dies == Some(now) {
                    all.close(rank, &[], now);
                }
                if all.ends[rank].is_some() || is_due(fate.dies, now) || !is_due(fate.comes, now) {
                    continue;
                }
                let since = MS * (now - fate.comes.unwrap_or(now)) as u32;
                let meeting = meetings[rank].get_or_insert_with(|| Meeting::new(rank, size, TIMEOUT));
                for other in 0..size {
                    while let Some((_, word)) = all.wires[rank][other].pop_front_if(|(at, _)| *at <= now) {
                        match word {
                            Some(word) => meeting.hear(other, word, since),
                            None => meeting.lose(other),
                        }
                    }
                }
                meeting.look(since);
                for (to, word) in meeting.take_words() {
                    assert_eq!(Word::decode(&word.encode()), Some(word.clone()));
                    all.send(rank, to, Some(word), now);
                }
                if let Some(end) = meeting.end() {
                    all.close(rank, end.as_ref().map_or(&[][..], |members| members), now);
                    all.ends[rank] = Some((end.clone(), now));
                }
            }
        }
        all.ends
    }

    fn at(comes: u64) -> Fate {
        Fate { comes: Some(comes), dies: None }
    }

    const DEAD: Fate = Fate { comes: None, dies: Some(0) };
    const STUCK: Fate = Fate { comes: None, dies: None };

    #[track_caller]
    fn check(fates: &[Fate], members: &[usize], within: u64) {
        for seed in 0..20 {
            let ends = run(seed, fates);
            for &member in members {
                let (end, time) = ends[member].as_ref().expect("an end");
                assert_eq!(end.as_deref(), Ok(members), "rank {member}, seed {seed}");
                assert!(*time <= within, "rank {member} takes {time} ms, seed {seed}");
            }
        }
    }

    #[test]
    fn those_that_live_go_on() {
        let soon = 20 + 5 * LATENCY;
        check(&[at(0)], &[0], 0);
        check(&[at(0), at(20), at(3)], &[0, 1, 2], soon);
        check(&[DEAD, at(0), at(20), DEAD], &[1, 2], soon);
        check(&[at(0), DEAD], &[0], soon);
        // Who is stuck is waited for.
        let timeout = TIMEOUT.as_millis() as u64;
        check(&[STUCK, at(0), at(20), DEAD], &[1, 2], 20 + timeout + 5 * LATENCY);
        check(&[at(20), STUCK, at(0), STUCK], &[0, 2], 20 + timeout + 5 * LATENCY);
        // Who wakes up later is not in it.
        check(&[at(400), at(0), at(20), at(9000)], &[1, 2], 20 + timeout + 5 * LATENCY);
        let ends = run(0, &[at(400), at(0), at(20)]);
        assert!(ends[0].as_ref().is_some_and(|(end, time)| end.is_err() && *time < 410), "{ends:?}");
    }

    /// Ranks that come, die and wake up at any time, many of them just when the time of others is over.
    #[test]
    fn there_is_one_world_at_most() {
        let mut worlds = 0;
        for seed in 0..4000 {
            let mut rng = CounterRng::new(seed, 0);
            let mut below = |most: u64| rng.next_u64() % most;
            let fates: Vec<Fate> = (0..2 + below(5))
                .map(|_| {
                    let comes = [Some(below(30)), Some(95 + below(15)), Some(below(300)), None][below(4) as usize];
                    let dies = (below(5) == 0).then(|| below(150));
                    Fate { comes, dies }
                })
                .collect();
            let ends = run(seed, &fates);
            let told = || format!("seed {seed}: {fates:?} {ends:?}");
            let formed: Vec<_> = ends.iter().flatten().filter_map(|(end, _)| end.as_ref().ok()).collect();
            assert!(formed.iter().all(|world| *world == formed[0]), "{}", told());
            for (rank, fate) in fates.iter().enumerate().filter(|(_, fate)| fate.dies.is_none()) {
                let Some(comes) = fate.comes else { continue };
                let (end, time) = ends[rank].as_ref().unwrap_or_else(|| panic!("no end; {}", told()));
                let most = 2 * (TIMEOUT + 2 * ANSWER);
                assert!(*time <= comes + most.as_millis() as u64, "{}", told());
                let is_member = formed.first().is_some_and(|world| world.contains(&rank));
                assert_eq!(end.is_ok(), is_member, "{}", told());
            }
            // Where nobody dies there is one, if anybody comes, with all that come in time.
            let first = fates.iter().filter_map(|fate| fate.comes).min();
            if let Some(first) = first.filter(|_| fates.iter().all(|fate| fate.dies.is_none())) {
                let time = first + TIMEOUT.as_millis() as u64 - 2 * LATENCY;
                let in_time = (0..fates.len()).filter(|&rank| fates[rank].comes.is_some_and(|comes| comes <= time));
                let world = formed.first().copied().cloned().unwrap_or_default();
                assert!(in_time.into_iter().all(|rank| world.contains(&rank)), "{}", told());
            }
            worlds += usize::from(!formed.is_empty());
        }
        assert!(worlds > 3000, "{worlds}");
    }
}
