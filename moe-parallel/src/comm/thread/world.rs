//! [`ThreadWorld`] and its communicator.

use super::{FaultPlan, Injection, Moment};
use crate::comm::{Cause, Communicator, Expected, Fault, Group, Parcel, Pending, Stamp};
use crate::{Error, Result};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What time it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clock {
    /// The machine's.
    #[default]
    System,
    /// Stands still while a rank runs, and jumps to the next event when all wait. Ranks take turns, in a fixed order; they
    /// must wait for each other through their communicators only.
    Virtual,
}

/// A world of ranks to be run on threads.
#[derive(Debug, Clone)]
pub struct ThreadWorld {
    size: usize,
    timeout: Duration,
    clock: Clock,
    plan: FaultPlan,
    kernel_threads: usize,
}

impl ThreadWorld {
    /// `size` ranks, with a deadline of a minute for every operation, and each with its share of the cores for its kernels.
    ///
    /// # Panics
    /// If `size` is 0.
    pub fn new(size: usize) -> Self {
        assert!(size > 0, "a world has at least one rank");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            size,
            timeout: Duration::from_secs(60),
            clock: Clock::System,
            plan: FaultPlan::none(),
            kernel_threads: (cores / size).max(1),
        }
    }

    /// The deadline of every operation, counted from its start.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Another clock.
    #[must_use]
    pub fn with_clock(self, clock: Clock) -> Self {
        Self { clock, ..self }
    }

    /// Threads of each rank's kernels, its own included; by default the cores divided by the ranks, at least 1.
    ///
    /// # Panics
    /// If `threads` is 0.
    #[must_use]
    pub fn with_kernel_threads(self, threads: usize) -> Self {
        assert!(threads > 0, "a rank computes on one thread at least");
        Self { kernel_threads: threads, ..self }
    }

    /// What goes wrong.
    #[must_use]
    pub fn with_faults(self, plan: FaultPlan) -> Self {
        Self { plan, ..self }
    }

    /// Runs `body` on every rank, each on a thread whose kernels have a pool of their own; the results in rank order.
    ///
    /// # Panics
    /// If the system has too few threads; if a rank panics, after all have ended: the others see that it has left.
    pub fn run<T: Send>(&self, body: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<T> {
        self.run_timed(body).into_iter().map(|(result, _)| result).collect()
    }

    /// The same, with the time by the world's clock at which each rank returned.
    ///
    /// # Panics
    /// As [`ThreadWorld::run`].
    pub fn run_timed<T: Send>(&self, body: impl Fn(Arc<dyn Communicator>) -> T + Sync) -> Vec<(T, Duration)> {
        let world = Arc::new(World {
            timeout: self.timeout,
            clock: self.clock,
            plan: self.plan.clone(),
            start: Instant::now(),
            state: Mutex::new(State::new(self.size)),
            wakes: (0..self.size).map(|_| Condvar::new()).collect(),
        });
        let rank = |rank: usize| {
            let seat = Arc::new(Seat { world: Arc::clone(&world), rank });
            // This thread is one of its pool, for as long as the pool lives.
            let pool = rayon::ThreadPoolBuilder::new().num_threads(self.kernel_threads).use_current_thread();
            let _pool = pool.build().expect("threads for the kernels of a rank");
            let comm = ThreadCommunicator { group: Group::world(rank, self.size), seat };
            world.enter(rank);
            let seat = Arc::clone(&comm.seat);
            let result = body(Arc::new(comm));
            let now = world.now(&world.lock());
            drop(seat);
            (result, now)
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.size).map(|r| scope.spawn(move || rank(r))).collect();
            let ended: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            ended.into_iter().map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    }
}

/// What all ranks share.
#[derive(Debug)]
struct World {
    timeout: Duration,
    clock: Clock,
    plan: FaultPlan,
    start: Instant,
    state: Mutex<State>,
    /// One per rank.
    wakes: Vec<Condvar>,
}

/// Receiver, group and sender of messages.
type Route = (usize, u64, usize);

#[derive(Debug)]
struct State {
    ranks: Vec<RankState>,
    /// Messages that have arrived, by the operation of their group.
    inbox: HashMap<Route, BTreeMap<u64, Parcel>>,
    /// Messages on their way, by time of arrival and order of sending.
    transit: BTreeMap<(Duration, u64), (Route, Parcel)>,
    /// When the last message between two ranks arrives: later ones do not overtake it.
    last_arrival: HashMap<(usize, usize), Duration>,
    sent: u64,
    fault: Option<Fault>,
    /// On the virtual clock: what time it is, and whose turn.
    now: Duration,
    turn: Option<usize>,
}

#[derive(Debug, Default)]
struct RankState {
    operations: u64,
    last: Option<Stamp>,
    /// Its thread is done: it takes no more turns.
    left: bool,
    /// Others can see that it will send nothing more.
    gone: bool,
    /// What it returns from now on, if a plan has ended it.
    killed: Option<Fault>,
    /// On the virtual clock: when it stops waiting, and whether something has happened since.
    wakes_at: Duration,
    runnable: bool,
}

impl State {
    fn new(size: usize) -> Self {
        let rank = |_| RankState { runnable: true, ..RankState::default() };
        Self {
            ranks: (0..size).map(rank).collect(),
            inbox: HashMap::new(),
            transit: BTreeMap::new(),
            last_arrival: HashMap::new(),
            sent: 0,
            fault: None,
            now: Duration::ZERO,
            turn: Some(0),
        }
    }

    fn send(&mut self, route: Route, parcel: Parcel, sequence: u64, now: Duration, lateness: Duration) {
        let last = self.last_arrival.entry((route.2, route.0)).or_default();
        let arrives = (now + lateness).max(*last);
        *last = arrives;
        if arrives <= now {
            self.inbox.entry(route).or_default().insert(sequence, parcel.arriving());
            self.ranks[route.0].runnable = true;
        } else {
            self.sent += 1;
            self.transit.insert((arrives, self.sent), (route, parcel));
        }
    }

    /// Moves what has arrived by `now` to its inbox.
    fn deliver(&mut self, now: Duration) {
        while let Some(entry) = self.transit.first_entry().filter(|entry| entry.key().0 <= now) {
            let (route, parcel) = entry.remove();
            let sequence = parcel.stamp().map_or(0, |stamp| stamp.sequence);
            self.inbox.entry(route).or_default().insert(sequence, parcel.arriving());
            self.ranks[route.0].runnable = true;
        }
    }

    fn wake_all(&mut self) {
        self.ranks.iter_mut().for_each(|rank| rank.runnable = true);
    }

    /// On the virtual clock: gives the turn to the next rank that can run, after `rank`; lets time pass if none can.
    fn pass_turn(&mut self, rank: usize) {
        let size = self.ranks.len();
        loop {
            let can_run = |r: &usize| self.ranks[*r].runnable && !self.ranks[*r].left;
            self.turn = (1..=size).map(|step| (rank + step) % size).find(can_run);
            if self.turn.is_some() {
                return;
            }
            let arrival = self.transit.keys().next().map(|key| key.0);
            let waiting = self.ranks.iter().filter(|r| !r.left).map(|r| r.wakes_at).min();
            let Some(next) = arrival.into_iter().chain(waiting).min() else { return };
            self.now = self.now.max(next);
            let now = self.now;
            self.deliver(now);
            self.ranks.iter_mut().filter(|r| r.wakes_at <= now).for_each(|r| r.runnable = true);
        }
    }
}

impl World {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self, state: &State) -> Duration {
        match self.clock {
            Clock::System => self.start.elapsed(),
            Clock::Virtual => state.now,
        }
    }

    /// Waits for the first turn.
    fn enter(&self, rank: usize) {
        if self.clock == Clock::Virtual {
            let mut state = self.lock();
            while state.turn != Some(rank) {
                state = self.wakes[rank].wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Lets others run until something happens or it is `until`.
    fn block<'a>(&self, mut state: MutexGuard<'a, State>, rank: usize, until: Duration) -> MutexGuard<'a, State> {
        match self.clock {
            Clock::System => {
                let arrival = state.transit.keys().next().map_or(until, |key| key.0.min(until));
                let left = arrival.saturating_sub(self.start.elapsed()).max(Duration::from_micros(10));
                self.wakes[rank].wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
            }
            Clock::Virtual => {
                state.ranks[rank].runnable = false;
                state.ranks[rank].wakes_at = until;
                state.pass_turn(rank);
                self.notify(&state);
                while state.turn != Some(rank) {
                    state = self.wakes[rank].wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                state
            }
        }
    }

    /// Wakes whoever may run.
    fn notify(&self, state: &State) {
        match (self.clock, state.turn) {
            (Clock::System, _) => self.wakes.iter().for_each(Condvar::notify_all),
            (Clock::Virtual, Some(rank)) => self.wakes[rank].notify_all(),
            (Clock::Virtual, None) => {}
        }
    }

    /// Tells every rank; the first fault stays.
    fn record(&self, state: &mut State, fault: Fault) -> Fault {
        let fault = state.fault.get_or_insert(fault).clone();
        state.wake_all();
        if self.clock == Clock::System {
            self.notify(state);
        }
        fault
    }
}

/// A rank's hold on the world: when the last communicator of a rank is gone, the rank has left.
#[derive(Debug)]
struct Seat {
    world: Arc<World>,
    rank: usize,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = self.world.lock();
        state.ranks[self.rank].left = true;
        state.ranks[self.rank].gone = true;
        state.wake_all();
        if self.world.clock == Clock::Virtual {
            state.pass_turn(self.rank);
        }
        self.world.notify(&state);
    }
}

#[derive(Debug)]
struct ThreadCommunicator {
    group: Group,
    seat: Arc<Seat>,
}

impl ThreadCommunicator {
    /// A rank that answers no more: until nobody is left to notice.
    fn stop(&self, mut state: MutexGuard<'_, State>) -> Error {
        let rank = self.seat.rank;
        while (0..state.ranks.len()).any(|r| r != rank && !state.ranks[r].left && state.ranks[r].killed.is_none()) {
            let until = self.seat.world.now(&state) + self.seat.world.timeout;
            state = self.seat.world.block(state, rank, until);
        }
        state.ranks[rank].killed.clone().map_or_else(|| Error::Engine("stopped".into()), Error::Fault)
    }
}

impl Communicator for ThreadCommunicator {
    fn group(&self) -> &Group {
        &self.group
    }

    fn start(&self, stamp: Stamp, mut sends: Vec<(usize, Parcel)>, receives: &[Expected]) -> Result<Box<dyn Pending>> {
        let (world, rank) = (&self.seat.world, self.seat.rank);
        let mut state = world.lock();
        if let Some(fault) = state.ranks[rank].killed.as_ref().or(state.fault.as_ref()) {
            return Err(fault.clone().into());
        }
        let operation = state.ranks[rank].operations;
        state.ranks[rank].operations += 1;
        state.ranks[rank].last = Some(stamp);

        // 1. What the plan says.
        let injection = world.plan.at(rank, operation);
        let mut delay = Duration::ZERO;
        match injection {
            Some(Injection::Delay(by)) => delay = by,
            Some(Injection::Drop | Injection::Stop | Injection::Kill(Moment::Before)) => sends.clear(),
            Some(Injection::Kill(Moment::Inside)) => sends.truncate(sends.len() / 2),
            Some(Injection::Kill(Moment::After)) | None => {}
        }

        // 2. The messages.
        let now = world.now(&state);
        for (index, (peer, parcel)) in sends.into_iter().enumerate() {
            let route = (self.group.members()[peer], stamp.context, rank);
            let lateness = delay + world.plan.lateness(rank, operation, index as u64);
            state.send(route, parcel.stamped(stamp), stamp.sequence, now, lateness);
            if world.clock == Clock::System {
                world.wakes[route.0].notify_all();
            }
        }
        if let Some(Injection::Kill(_) | Injection::Stop) = injection {
            let fault = Fault { rank, stamp, cause: Cause::Killed };
            state.ranks[rank].killed = Some(fault.clone());
            if injection == Some(Injection::Stop) {
                return Err(self.stop(state));
            }
            state.ranks[rank].gone = true;
            state.wake_all();
            if world.clock == Clock::System {
                world.notify(&state);
            }
            return Err(fault.into());
        }

        Ok(Box::new(ThreadPending {
            seat: Arc::clone(&self.seat),
            stamp,
            receives: receives.iter().map(|e| (self.group.members()[e.peer], e.bytes)).collect(),
            arrived: vec![None; receives.len()],
            deadline: now + world.timeout,
            failed: None,
        }))
    }

    fn over(&self, group: Group) -> Arc<dyn Communicator> {
        Arc::new(Self { group, seat: Arc::clone(&self.seat) })
    }

    fn fault(&self) -> Option<Fault> {
        let state = self.seat.world.lock();
        state.ranks[self.seat.rank].killed.clone().or_else(|| state.fault.clone())
    }

    fn fail(&self, stamp: Stamp, cause: Cause) -> Fault {
        let (world, rank) = (&self.seat.world, self.seat.rank);
        let mut state = world.lock();
        let killed = state.ranks[rank].killed.clone();
        killed.unwrap_or_else(|| world.record(&mut state, Fault { rank, stamp, cause }))
    }
}

#[derive(Debug)]
struct ThreadPending {
    seat: Arc<Seat>,
    stamp: Stamp,
    /// Sender, by its number in the world, and size.
    receives: Vec<(usize, usize)>,
    arrived: Vec<Option<Parcel>>,
    deadline: Duration,
    /// What a test has found.
    failed: Option<Fault>,
}

impl ThreadPending {
    fn fault(&self, cause: Cause) -> Fault {
        Fault { rank: self.seat.rank, stamp: self.stamp, cause }
    }

    /// Takes what has arrived; whether that is all.
    fn collect(&mut self, state: &mut State) -> std::result::Result<bool, Fault> {
        let now = self.seat.world.now(state);
        state.deliver(now);
        for index in 0..self.receives.len() {
            if self.arrived[index].is_some() {
                continue;
            }
            let (peer, expected) = self.receives[index];
            let route = (self.seat.rank, self.stamp.context, peer);
            let Some(queue) = state.inbox.get_mut(&route) else { continue };
            let parcel = match queue.remove(&self.stamp.sequence) {
                Some(parcel) => parcel,
                // Messages of a pair arrive in order: this one was never sent.
                None => match queue.range(self.stamp.sequence..).next().and_then(|(_, later)| later.stamp()) {
                    Some(theirs) => return Err(self.fault(Cause::Diverged { peer, theirs })),
                    None => continue,
                },
            };
            let theirs = parcel.stamp().unwrap_or(self.stamp);
            if theirs != self.stamp {
                return Err(self.fault(Cause::Diverged { peer, theirs }));
            }
            let got = parcel.payload().len();
            if got != expected {
                return Err(self.fault(Cause::Size { peer, expected, got }));
            }
            self.arrived[index] = Some(parcel);
        }
        Ok(self.arrived.iter().all(Option::is_some))
    }

    /// Ranks whose message is missing.
    fn missing(&self) -> impl Iterator<Item = usize> {
        self.receives.iter().zip(&self.arrived).filter(|(_, parcel)| parcel.is_none()).map(|((peer, _), _)| *peer)
    }

    /// What ends the wait now, if anything does.
    fn check(&mut self, state: &mut State) -> std::result::Result<bool, Fault> {
        let rank = self.seat.rank;
        if let Some(fault) = self.failed.as_ref().or(state.ranks[rank].killed.as_ref()).or(state.fault.as_ref()) {
            return Err(fault.clone());
        }
        if self.collect(state)? {
            return Ok(true);
        }
        let on_the_way = |peer: usize| state.transit.values().any(|(route, _)| (route.0, route.2) == (rank, peer));
        if let Some(peer) = self.missing().find(|&peer| state.ranks[peer].gone && !on_the_way(peer)) {
            return Err(self.fault(Cause::Left { peer }));
        }
        if self.seat.world.now(state) >= self.deadline {
            let missing = self.missing().map(|peer| (peer, state.ranks[peer].last)).collect();
            return Err(self.fault(Cause::Timeout { missing, after: self.seat.world.timeout }));
        }
        Ok(false)
    }
}

impl Pending for ThreadPending {
    fn wait(mut self: Box<Self>) -> Result<Vec<Parcel>> {
        let world = Arc::clone(&self.seat.world);
        let mut state = world.lock();
        loop {
            match self.check(&mut state) {
                Ok(true) => return Ok(self.arrived.into_iter().flatten().collect()),
                Ok(false) => state = world.block(state, self.seat.rank, self.deadline),
                Err(fault) => {
                    let own = state.ranks[self.seat.rank].killed.is_some();
                    return Err(if own { fault } else { world.record(&mut state, fault) }.into());
                }
            }
        }
    }

    fn test(&mut self) -> bool {
        let world = Arc::clone(&self.seat.world);
        let mut state = world.lock();
        let ready = self.check(&mut state).unwrap_or_else(|fault| {
            self.failed = Some(fault);
            true
        });
        if !ready && world.clock == Clock::Virtual {
            let soon = state.now + Duration::from_micros(1);
            drop(world.block(state, self.seat.rank, soon));
        }
        ready
    }
}
