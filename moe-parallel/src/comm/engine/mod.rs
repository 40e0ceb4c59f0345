//! [`Engine`]: what is under way, what has come, and what is known of the other ranks; one per process, behind a mutex.
//!
//! All that ranks which are processes need and that does not depend on what carries their messages: deadlines, the thread that
//! moves messages on while nobody waits, one fault for all, goodbyes. What carries them is a [`Link`]; [`World`] is the whole.

mod communicator;
mod link;
mod world;

pub(super) use link::{Link, Result as LinkResult, Tag, Threads, Transfer, Trouble};
pub(super) use world::World;

use super::agreement::{Agreement, GRACE};
use super::pace::Pace;
use super::{Cause, Fault, Kind, Parcel, Phase, Site, Stamp, wire};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

/// What all communicators of a process share.
pub(super) struct Engine<L: Link> {
    rank: usize,
    size: usize,
    /// Of every operation.
    timeout: Duration,
    /// The only thread that may use this, where there is only one.
    owner: Option<ThreadId>,
    start: Instant,
    state: Mutex<State<L>>,
    /// Wakes the pump.
    wake: Condvar,
}

/// See [`Engine`].
struct State<L: Link> {
    rank: usize,
    /// None once the world has ended.
    link: Option<L>,
    peers: Vec<Peer<L::Transfer>>,
    agreement: Agreement,
    /// What this rank does.
    last: Stamp,
    /// Operations that have begun and are not waited for to their end.
    pending: usize,
    /// Threads that poll: the pump rests meanwhile.
    polling: usize,
    pump: Pump,
}

/// What the pump does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pump {
    Looking,
    /// There is nothing to do: it wants to be woken.
    Parked,
    /// It is to end.
    Ending,
}

/// Another rank, or this one.
struct Peer<T> {
    /// In the order of sending.
    outgoing: VecDeque<T>,
    /// In the order of coming, which is the order they are taken in: a short message does not overtake a long one.
    incoming: VecDeque<(Tag, T)>,
    /// Messages by group and operation.
    inbox: HashMap<u64, BTreeMap<u64, Parcel>>,
    /// The operation it was last seen in.
    last: Option<Stamp>,
    /// It has said goodbye, after all its other messages, or is dead.
    left: bool,
}

impl<T> Default for Peer<T> {
    fn default() -> Self {
        let (outgoing, incoming) = (VecDeque::new(), VecDeque::new());
        Self { outgoing, incoming, inbox: HashMap::new(), last: None, left: false }
    }
}

impl<T> Peer<T> {
    /// It is dead: what is under way to it and from it never ends.
    fn die(&mut self) {
        self.left = true;
        self.outgoing.clear();
        self.incoming.clear();
    }
}

impl<L: Link> fmt::Debug for Engine<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("rank", &self.rank).field("size", &self.size).finish_non_exhaustive()
    }
}

impl<L: Link> Engine<L> {
    /// For the thread that calls this where `threads` is one.
    fn new(link: L, threads: Threads, timeout: Duration) -> Arc<Self> {
        let (rank, size) = (link.rank(), link.size());
        let nothing = Stamp { context: 0, sequence: 0, kind: Kind::Barrier, site: Site::new(Phase::Start) };
        let state = State {
            rank,
            link: Some(link),
            peers: (0..size).map(|_| Peer::default()).collect(),
            agreement: Agreement::new(rank, size),
            last: nothing,
            pending: 0,
            polling: 0,
            pump: Pump::Looking,
        };
        let owner = (threads != Threads::Any).then(|| std::thread::current().id());
        let start = Instant::now();
        Arc::new(Self { rank, size, timeout, owner, start, state: Mutex::new(state), wake: Condvar::new() })
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// # Panics
    /// If another thread has this for itself.
    fn lock(&self) -> MutexGuard<'_, State<L>> {
        let allowed = self.owner.is_none_or(|owner| owner == std::thread::current().id());
        assert!(allowed, "a single-threaded {} world is for the thread that has started it", L::NAME);
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where one thread has the engine for itself, all ranks may be on it.
    fn pace(&self) -> Pace {
        if self.owner.is_some() { Pace::awake() } else { Pace::spinning(L::SPINS) }
    }

    fn ended() -> Error {
        Error::Engine(format!("the {} world of this process has ended", L::NAME))
    }

    /// Moves the engine on until `done` gives something, or all ranks know of a fault. Never longer than [`GRACE`] after there
    /// is a fault; without one `done` sees to the end.
    fn poll<T>(
        &self,
        mut done: impl FnMut(&mut State<L>, Duration) -> std::result::Result<Option<T>, Fault>,
    ) -> Result<T> {
        let mut pace = self.pace();
        let mut polling = false;
        loop {
            let now = self.now();
            let mut state = self.lock();
            if !polling {
                state.polling += 1;
                polling = true;
            }
            let ends = match state.turn(now, &mut done) {
                Turn::Done(value) => Some(Ok(value)),
                Turn::Over(fault) => Some(Err(fault.into())),
                Turn::Ended => Some(Err(Self::ended())),
                Turn::Open => None,
            };
            if let Some(result) = ends {
                state.polling -= 1;
                self.wake_pump(&state);
                return result;
            }
            let moving = state.is_moving();
            drop(state);
            if moving { pace.rest_while_moving() } else { pace.rest() }
        }
    }

    /// [`Engine::poll`] once; `None` if there is no end yet.
    fn poll_once(
        &self,
        mut done: impl FnMut(&mut State<L>, Duration) -> std::result::Result<Option<()>, Fault>,
    ) -> bool {
        let now = self.now();
        !matches!(self.lock().turn(now, &mut done), Turn::Open)
    }

    /// Begins an operation: sends its messages to ranks of the world.
    fn begin(&self, stamp: Stamp, sends: Vec<(usize, Parcel)>) -> Result<()> {
        let mut sends = Some(sends);
        self.poll(|state, _| {
            state.last = stamp;
            for (peer, parcel) in sends.take().unwrap_or_default() {
                state
                    .send(peer, Tag::Parcel, parcel.stamped(stamp).into_bytes())
                    .map_err(|text| state.engine_fault(text))?;
            }
            state.pending += 1;
            Ok(Some(()))
        })
    }

    /// What ended this engine.
    fn fault(&self) -> Option<Fault> {
        let now = self.now();
        let begun = {
            let mut state = self.lock();
            state.progress(now);
            state.agreement.begun()
        };
        // There is an outcome within the grace.
        if begun { self.poll::<()>(|_, _| Ok(None)).err().and_then(|error| error.fault().cloned()) } else { None }
    }

    /// Ends this engine with a fault found above it; the one that all ranks return. Once the world has ended that is only this
    /// rank's affair.
    fn fail(&self, fault: Fault) -> Fault {
        let told = self.poll::<()>(|_, _| Err(fault.clone())).err();
        told.and_then(|error| error.fault().cloned()).unwrap_or(fault)
    }

    fn wake_pump(&self, state: &State<L>) {
        if state.pump == Pump::Parked && state.is_busy() {
            self.wake.notify_one();
        }
    }

    /// Moves the engine on while something is under way and nobody polls: messages go out while their sender computes, and a
    /// rank that computes hears of a fault. Ends with [`Engine::leave`].
    fn pump(&self) {
        const SHORT: Duration = Duration::from_micros(50);
        const LONG: Duration = Duration::from_micros(500);
        const LOOKS: u32 = 20;
        let mut idle = 0;
        let mut state = self.lock();
        while state.pump != Pump::Ending {
            if state.polling == 0 && state.is_busy() {
                let now = self.now();
                state.progress(now);
                idle = 0;
            }
            idle += 1;
            if idle > LOOKS {
                idle = 0;
                state.pump = Pump::Parked;
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                if state.pump == Pump::Parked {
                    state.pump = Pump::Looking;
                }
            } else {
                let interval = if state.polling == 0 && state.is_moving() { SHORT } else { LONG };
                drop(state);
                std::thread::sleep(interval);
                state = self.lock();
            }
        }
    }

    /// Says goodbye and waits for the others to do so, until the deadline; after a fault, or if this rank `abandons` the
    /// others, for [`GRACE`] at most. What the link may be ended with: nothing, if there was a fault.
    fn leave(&self, abandons: bool) -> Result<Option<L>> {
        // 1. All messages are out and all others have left.
        let deadline = self.now() + if abandons { GRACE } else { self.timeout };
        let mut said = false;
        let mut result = self.poll(|state, now| {
            if !std::mem::replace(&mut said, true) {
                state.tell_all(Tag::Goodbye, &[]).map_err(|text| state.engine_fault(text))?;
            }
            let missing: Vec<_> = state.staying().map(|peer| (peer, state.peers[peer].last)).collect();
            let sent = state.peers.iter().all(|peer| peer.outgoing.is_empty());
            match (missing.is_empty() && sent, now >= deadline) {
                (true, _) => Ok(Some(())),
                (false, true) if abandons => Ok(Some(())),
                (false, true) => Err(state.fault(Cause::Timeout { missing, after: self.timeout })),
                (false, false) => Ok(None),
            }
        });

        // 2. After a fault: nobody leaves before the others have told theirs, for the launcher may end them then.
        if let Err(Error::Fault(_)) = &result {
            let deadline = self.now() + GRACE;
            let mut pace = self.pace();
            loop {
                let mut state = self.lock();
                if !std::mem::replace(&mut said, true) && state.tell_all(Tag::Goodbye, &[]).is_err() {
                    break;
                }
                state.progress(self.now());
                let waits = state.staying().any(|peer| state.agreement.has_voted(peer));
                if !waits || self.now() >= deadline {
                    break;
                }
                drop(state);
                pace.rest();
            }
        }

        let link = self.end();
        if abandons && result.is_ok() {
            result = Err(Error::Engine("this rank has left the others".into()));
        }
        result.map(|()| link)
    }

    /// The pump ends, and so does every communicator.
    fn end(&self) -> Option<L> {
        let mut state = self.lock();
        state.pump = Pump::Ending;
        self.wake.notify_all();
        state.link.take()
    }

    /// After a fault: the link to shrink. Where that would wait for every rank that lives, they come together here first, until
    /// the deadline.
    fn meet_survivors(&self) -> Result<Option<L>> {
        let Some(fault) = self.fault() else {
            return Err(Error::Argument("there was no fault: a world is shrunk after one".into()));
        };
        if let Some(why) = self.lock().link.as_ref().and_then(Link::cannot_shrink) {
            return Err(Error::Engine(why.into()));
        }
        if L::LEAVES_BEHIND {
            return Ok(self.end());
        }
        let (deadline, mut pace, mut said) = (self.now() + self.timeout, self.pace(), false);
        loop {
            let now = self.now();
            let mut state = self.lock();
            if !std::mem::replace(&mut said, true) {
                state.tell_all(Tag::Goodbye, &[]).map_err(Error::Engine)?;
            }
            state.progress(now);
            if state.staying().next().is_none() {
                drop(state);
                return Ok(self.end());
            }
            if now >= deadline {
                return Err(fault.into());
            }
            drop(state);
            pace.rest();
        }
    }
}

/// What one look at the engine has found.
enum Turn<T> {
    Done(T),
    Over(Fault),
    Ended,
    Open,
}

impl<L: Link> State<L> {
    fn turn<T>(
        &mut self,
        now: Duration,
        done: &mut impl FnMut(&mut Self, Duration) -> std::result::Result<Option<T>, Fault>,
    ) -> Turn<T> {
        self.progress(now);
        if !self.agreement.begun() && self.link.is_some() {
            match done(self, now) {
                Ok(Some(value)) => return Turn::Done(value),
                Ok(None) => return Turn::Open,
                Err(fault) => self.find(fault, now),
            }
        }
        match self.agreement.outcome(now) {
            Some(fault) => Turn::Over(fault.clone()),
            None if self.link.is_none() => Turn::Ended,
            None => Turn::Open,
        }
    }

    /// A fault that this rank has found.
    fn fault(&self, cause: Cause) -> Fault {
        Fault { rank: self.rank, stamp: self.last, cause }
    }

    fn engine_fault(&self, text: String) -> Fault {
        self.fault(Cause::Engine(text))
    }

    /// Whether the pump has something to do.
    fn is_busy(&self) -> bool {
        self.link.is_some() && (self.pending > 0 || self.peers.iter().any(|peer| !peer.outgoing.is_empty()))
    }

    /// Whether a message is on its way.
    fn is_moving(&self) -> bool {
        self.peers.iter().any(|peer| !peer.outgoing.is_empty() || !peer.incoming.is_empty())
            || self.link.as_ref().is_some_and(Link::is_receiving)
    }

    fn send(&mut self, peer: usize, tag: Tag, bytes: Vec<u8>) -> std::result::Result<(), String> {
        let Some(link) = &mut self.link else { return Ok(()) };
        if bytes.len() > L::MOST_BYTES {
            let len = bytes.len();
            return Err(format!(
                "a message of {len} bytes to rank {peer} is over {}'s {}; send it in parts",
                L::NAME,
                L::MOST_BYTES
            ));
        }
        match link.send(peer, tag, bytes) {
            Ok(transfer) => self.peers[peer].outgoing.push_back(transfer),
            Err(Trouble::Death) => self.bury(peer),
            Err(Trouble::Other(text)) => return Err(text),
        }
        Ok(())
    }

    /// Sends a message to every other rank, though it fail to some.
    fn tell_all(&mut self, tag: Tag, bytes: &[u8]) -> std::result::Result<(), String> {
        let rank = self.rank;
        let others = (0..self.peers.len()).filter(|&peer| peer != rank);
        others.map(|peer| self.send(peer, tag, bytes.to_vec())).fold(Ok(()), std::result::Result::and)
    }

    /// The other ranks that have not said goodbye.
    fn staying(&self) -> impl Iterator<Item = usize> {
        (0..self.peers.len()).filter(|&peer| peer != self.rank && !self.peers[peer].left)
    }

    /// Votes for a fault that this rank has found.
    fn find(&mut self, fault: Fault, now: Duration) {
        let vote = self.agreement.find(fault, now).map(wire::encode);
        self.vote(vote);
    }

    fn vote(&mut self, vote: Option<Vec<u8>>) {
        if let Some(bytes) = vote {
            // Those that cannot be reached do not wait for it.
            let _unreachable = self.tell_all(Tag::Vote, &bytes);
        }
    }

    /// Moves everything on that can be, without waiting.
    fn progress(&mut self, now: Duration) {
        if let Err(text) = self.try_progress(now) {
            self.find(self.engine_fault(text), now);
        }
    }

    fn try_progress(&mut self, now: Duration) -> std::result::Result<(), String> {
        // 1. What has come begins to be received.
        loop {
            let Some(link) = &mut self.link else { return Ok(()) };
            match link.receive() {
                Ok(Some((peer, tag, transfer))) => self.peers[peer].incoming.push_back((tag, transfer)),
                Ok(None) => break,
                Err(Trouble::Death) => {
                    let dead = link.acknowledge_dead().map_err(Trouble::into_text)?;
                    if dead.is_empty() {
                        return Err(format!("{} reports a death, but of no process", L::NAME));
                    }
                    dead.into_iter().for_each(|peer| self.bury(peer));
                }
                Err(Trouble::Other(text)) => return Err(text),
            }
        }

        // 2. What has gone out, and what is here.
        for index in 0..self.peers.len() {
            while self.first_is_done(index, |peer| peer.outgoing.front_mut())? {
                self.peers[index].outgoing.pop_front();
            }
            while self.first_is_done(index, |peer| peer.incoming.front_mut().map(|(_, transfer)| transfer))? {
                if let Some((tag, transfer)) = self.peers[index].incoming.pop_front() {
                    self.take(index, tag, transfer.into_bytes(), now)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the first transfer of a queue is done.
    fn first_is_done(
        &mut self,
        peer: usize,
        first: impl FnOnce(&mut Peer<L::Transfer>) -> Option<&mut L::Transfer>,
    ) -> std::result::Result<bool, String> {
        match first(&mut self.peers[peer]).map_or(Ok(false), Transfer::test) {
            Ok(done) => Ok(done),
            Err(Trouble::Death) => {
                self.bury(peer);
                Ok(false)
            }
            Err(Trouble::Other(text)) => Err(text),
        }
    }

    /// That rank is dead. Whoever waits for it finds that it has left.
    fn bury(&mut self, peer: usize) {
        self.peers[peer].die();
        self.agreement.excuse(peer);
    }

    /// A message that has come.
    fn take(&mut self, peer: usize, tag: Tag, bytes: Vec<u8>, now: Duration) -> std::result::Result<(), String> {
        match tag {
            Tag::Parcel => {
                let parcel = Parcel::from_bytes(bytes);
                let stamp = parcel.stamp().ok_or_else(|| format!("a message of rank {peer} has no readable header"))?;
                self.peers[peer].last = Some(stamp);
                self.peers[peer].inbox.entry(stamp.context).or_default().insert(stamp.sequence, parcel);
            }
            Tag::Vote => {
                let unreadable = || Fault { rank: peer, ..self.engine_fault("its fault is not readable".into()) };
                let fault = wire::decode(&bytes).unwrap_or_else(unreadable);
                let vote = self.agreement.hear(peer, fault, now).map(wire::encode);
                self.vote(vote);
            }
            Tag::Goodbye => self.peers[peer].left = true,
        }
        Ok(())
    }

    /// The message of a rank of the world in an operation, if it has come; an error if it never will, or is another's.
    fn message(&mut self, peer: usize, stamp: Stamp, expected: usize) -> std::result::Result<Option<Parcel>, Cause> {
        let Some(queue) = self.peers[peer].inbox.get_mut(&stamp.context) else { return Ok(None) };
        let Some(parcel) = queue.remove(&stamp.sequence) else {
            // Messages of a pair arrive in order: if there is a later one, this one was never sent.
            let later = queue.range(stamp.sequence..).next().and_then(|(_, later)| later.stamp());
            return later.map_or(Ok(None), |theirs| Err(Cause::Diverged { peer, theirs }));
        };
        if queue.is_empty() {
            self.peers[peer].inbox.remove(&stamp.context);
        }
        let (theirs, got) = (parcel.stamp().unwrap_or(stamp), parcel.payload().len());
        if theirs != stamp {
            return Err(Cause::Diverged { peer, theirs });
        }
        if got == expected { Ok(Some(parcel)) } else { Err(Cause::Size { peer, expected, got }) }
    }
}
