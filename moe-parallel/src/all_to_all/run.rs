//! [`AllToAll`]: runs plans over a communicator, forwards and back.

use super::{Counts, Nodes, Plan, Route, RouteChoice, RouteTimes, Step, Transfer};
use crate::comm::{Collectives, Communicator, Element, Expected, Kind, Parcel, Pending, Site};
use crate::{Error, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use tracing::debug_span;

/// Which way a plan is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From senders to receivers.
    There,
    /// From receivers to senders: exactly the other way round, rows end where they came from.
    Back,
}

impl Direction {
    /// The other.
    #[must_use]
    pub fn reversed(self) -> Self {
        if self == Self::There { Self::Back } else { Self::There }
    }
}

/// All-to-alls of one group.
#[derive(Debug)]
pub struct AllToAll {
    comm: Arc<dyn Communicator>,
    nodes: Nodes,
    choice: RouteChoice,
    /// Once measured: what [`RouteChoice::BySize`] goes by.
    times: OnceLock<RouteTimes>,
    sent: Sent,
}

/// What has been sent, counted as it is.
#[derive(Debug, Default)]
struct Sent {
    messages: [AtomicU64; 2],
    bytes: [AtomicU64; 2],
    nanoseconds: [AtomicU64; 2],
}

/// Messages and bytes sent to other ranks, and how long they were waited for, by level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SentBytes {
    /// Messages inside the node.
    pub intra_node_messages: u64,
    /// Bytes in them.
    pub intra_node_bytes: u64,
    /// Messages to other nodes.
    pub inter_node_messages: u64,
    /// Bytes in them.
    pub inter_node_bytes: u64,
    /// Time that ranks of the node were waited for.
    pub intra_node_wait: Duration,
    /// Time that other nodes were waited for; all time of a group over several nodes whose messages go to both at once.
    pub inter_node_wait: Duration,
}

impl std::ops::Add for SentBytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            intra_node_messages: self.intra_node_messages + other.intra_node_messages,
            intra_node_bytes: self.intra_node_bytes + other.intra_node_bytes,
            inter_node_messages: self.inter_node_messages + other.inter_node_messages,
            inter_node_bytes: self.inter_node_bytes + other.inter_node_bytes,
            intra_node_wait: self.intra_node_wait + other.intra_node_wait,
            inter_node_wait: self.inter_node_wait + other.inter_node_wait,
        }
    }
}

impl AllToAll {
    /// Over all ranks of `comm`, whose nodes are `nodes`.
    ///
    /// # Errors
    /// [`Error::Argument`] if `nodes` is of another number of ranks.
    pub fn new(comm: Arc<dyn Communicator>, nodes: Nodes, choice: impl Into<RouteChoice>) -> Result<Self> {
        if nodes.size() != comm.size() {
            let (got, want) = (nodes.size(), comm.size());
            return Err(Error::Argument(format!("nodes must be given for all {want} ranks, got {got}")));
        }
        let choice = match choice.into() {
            RouteChoice::BySize if !nodes.has_levels() => Route::Flat.into(),
            choice => choice,
        };
        Ok(Self { comm, nodes, choice, times: OnceLock::new(), sent: Sent::default() })
    }

    /// Who takes part.
    pub fn comm(&self) -> &Arc<dyn Communicator> {
        &self.comm
    }

    /// The way rows take; fixed where nodes leave no choice.
    pub fn choice(&self) -> RouteChoice {
        self.choice
    }

    /// What the route of an exchange depends on, once that was measured.
    pub fn route_times(&self) -> Option<&RouteTimes> {
        self.times.get()
    }

    /// The first ones count.
    pub(super) fn set_route_times(&self, times: RouteTimes) {
        self.times.get_or_init(|| times);
    }

    /// The nodes of the ranks.
    pub fn nodes(&self) -> &Nodes {
        &self.nodes
    }

    /// What has been sent to other ranks so far.
    pub fn sent(&self) -> SentBytes {
        let Sent { messages, bytes, nanoseconds } = &self.sent;
        let [messages, bytes, waits] =
            [messages, bytes, nanoseconds].map(|c| c.each_ref().map(|n| n.load(Ordering::Relaxed)));
        SentBytes {
            intra_node_messages: messages[0],
            intra_node_bytes: bytes[0],
            inter_node_messages: messages[1],
            inter_node_bytes: bytes[1],
            intra_node_wait: Duration::from_nanos(waits[0]),
            inter_node_wait: Duration::from_nanos(waits[1]),
        }
    }

    /// Tells every rank what it needs of the others' counts, by the route of the rows. `sends` are this rank's, for each rank and
    /// each of its chunks. Where the route depends on the number of rows, counts travel by the hierarchical one, which tells what
    /// either needs, and with them how many rows each rank sends.
    ///
    /// # Errors
    /// [`Error::Argument`] if `sends` is not for every rank; [`Error::Fault`].
    pub fn exchange_counts(self: &Arc<Self>, site: Site, sends: Vec<Vec<usize>>) -> Result<Counts> {
        let (rank, size) = (self.comm.rank(), self.comm.size());
        if sends.len() != size {
            let got = sends.len();
            return Err(Error::Argument(format!("sends must be given for all {size} ranks, got {got}")));
        }
        let (route, total) = match self.choice {
            RouteChoice::Fixed(route) => (route, None),
            RouteChoice::BySize => (Route::Hierarchical, Some(sends.iter().flatten().sum())),
        };
        let told =
            |chunks: &Vec<usize>| chunks.iter().copied().chain(total).map(|count| count as u64).collect::<Vec<_>>();
        let values: Vec<u64> = sends.iter().flat_map(told).collect();
        let chunks: Vec<usize> = sends.iter().map(|chunks| chunks.len() + total.iter().len()).collect();
        let agreed = Counts::equal(1, &chunks, rank, route, &self.nodes);
        let plan = Arc::new(self.plan(&agreed));
        let mut passing = Vec::new();
        let moving = self.start(&plan, Direction::There, site, &values, 1)?;
        // The output is by chunk, then by sender.
        let values = moving.finish_seeing(|buffer| passing = self.passing(buffer, &chunks))?;
        let from = |sender: usize| (0..sends[rank].len()).map(|chunk| values[chunk * size + sender] as usize).collect();
        let receives = (0..size).map(from).collect();
        let mut route = route;
        if total.is_some() {
            passing.iter_mut().flatten().for_each(|chunks| _ = chunks.pop());
            let all: u64 = values[sends[rank].len() * size..].iter().sum();
            if all > self.times.get().map_or(0, |times| times.few) {
                (route, passing) = (Route::Flat, Vec::new());
            }
        }
        Ok(Counts { route, sends, receives, passing })
    }

    /// What the node's members send through this rank, from the buffer between the two steps: by receiver, member and chunk.
    fn passing(&self, buffer: &[u64], chunks: &[usize]) -> Vec<Vec<Vec<usize>>> {
        let rank = self.comm.rank();
        let nothing: Vec<_> = chunks.iter().map(|&chunks| vec![0; chunks]).collect();
        let mut passing = vec![nothing; self.nodes.node_of(rank).len()];
        let mut values = buffer.iter();
        for receiver in self.nodes.carried_by(rank) {
            for count in passing.iter_mut().flat_map(|member| &mut member[receiver]) {
                *count = values.next().map_or(0, |&value| value as usize);
            }
        }
        passing
    }

    /// This rank's plan for these counts.
    pub fn plan(&self, counts: &Counts) -> Plan {
        Plan::new(self.comm.rank(), &self.nodes, counts)
    }

    /// Begins to move `values`, rows of `width`. The first step is under way when this returns; the others follow when it is
    /// waited for.
    ///
    /// # Errors
    /// [`Error::Argument`] if `values` is not as long as the plan says; [`Error::Fault`].
    pub fn start<T: Element>(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        direction: Direction,
        site: Site,
        values: &[T],
        width: usize,
    ) -> Result<Moving<T>> {
        let (rows, first) = match direction {
            Direction::There => (plan.rows, 0),
            Direction::Back => (plan.output_rows(), plan.steps.len() - 1),
        };
        if values.len() != rows * width {
            let got = values.len();
            return Err(Error::Argument(format!("the plan moves {rows} rows of {width}, got {got} values")));
        }
        Moving::start(Way { all: Arc::clone(self), plan: Arc::clone(plan), direction, site, width }, first, values)
    }

    /// [`AllToAll::start`] and its finish.
    ///
    /// # Errors
    /// As these.
    pub fn run<T: Element>(
        self: &Arc<Self>,
        plan: &Arc<Plan>,
        direction: Direction,
        site: Site,
        values: &[T],
        width: usize,
    ) -> Result<Vec<T>> {
        self.start(plan, direction, site, values, width)?.finish()
    }

    /// Waits for the messages of a step.
    fn wait(&self, kind: Kind, pending: Box<dyn Pending>) -> Result<Vec<Parcel>> {
        let begun = Instant::now();
        let arrived = pending.wait();
        let alone = self.nodes.node_of(self.comm.rank()).len() == self.nodes.size();
        let level = usize::from(kind != Kind::IntraNode && !alone);
        let waited = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.sent.nanoseconds[level].fetch_add(waited, Ordering::Relaxed);
        arrived
    }

    fn count(&self, peer: usize, bytes: usize) {
        let level = usize::from(!self.nodes.together(self.comm.rank(), peer));
        self.sent.messages[level].fetch_add(1, Ordering::Relaxed);
        self.sent.bytes[level].fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// What is done with which plan.
#[derive(Debug)]
struct Way {
    all: Arc<AllToAll>,
    plan: Arc<Plan>,
    direction: Direction,
    site: Site,
    width: usize,
}

impl Way {
    /// What leaves the old buffer in a step, what fills the new one, and the rows of that.
    fn step(&self, index: usize) -> (&[Transfer], &[Transfer], usize) {
        let step: &Step = &self.plan.steps[index];
        let before = if index == 0 { self.plan.rows } else { self.plan.steps[index - 1].rows };
        match self.direction {
            Direction::There => (&step.sends, &step.receives, step.rows),
            Direction::Back => (&step.receives, &step.sends, before),
        }
    }

    fn next(&self, index: usize) -> Option<usize> {
        match self.direction {
            Direction::There => (index + 1 < self.plan.steps.len()).then_some(index + 1),
            Direction::Back => index.checked_sub(1),
        }
    }
}

/// Rows on their way.
#[derive(Debug)]
#[must_use = "rows arrive when it is finished"]
pub struct Moving<T> {
    way: Way,
    /// Step of the plan that is under way.
    step: usize,
    pending: Box<dyn Pending>,
    /// Rows that stayed are in their places already.
    buffer: Vec<T>,
}

impl<T: Element> Moving<T> {
    fn start(way: Way, step: usize, values: &[T]) -> Result<Self> {
        let (rank, width) = (way.all.comm.rank(), way.width);
        let bytes_of = |transfer: &Transfer| transfer.rows() * width * size_of::<T>();
        let (from, into, rows) = way.step(step);
        let rows_of = |piece: &std::ops::Range<usize>| &values[piece.start * width..piece.end * width];
        let mut sends = Vec::with_capacity(from.len());
        for transfer in from.iter().filter(|transfer| transfer.peer != rank) {
            let mut parcel = Parcel::with_capacity(bytes_of(transfer));
            transfer.pieces.iter().for_each(|piece| parcel.push(rows_of(piece)));
            way.all.count(transfer.peer, bytes_of(transfer));
            sends.push((transfer.peer, parcel));
        }
        let arriving = into.iter().filter(|transfer| transfer.peer != rank);
        let expected: Vec<Expected> = arriving.map(|t| Expected { peer: t.peer, bytes: bytes_of(t) }).collect();
        let comm = &way.all.comm;
        let pending = comm.start(comm.group().stamp(way.plan.steps[step].kind, way.site), sends, &expected)?;

        // Rows that stay are moved while the others travel.
        let mut buffer = vec![T::ZERO; rows * width];
        let own = |all: &[Transfer]| all.iter().find(|t| t.peer == rank).map_or(Vec::new(), |t| t.pieces.clone());
        let stay: Vec<T> = own(from).iter().flat_map(rows_of).copied().collect();
        let mut at = 0;
        for piece in own(into) {
            let to = &mut buffer[piece.start * width..piece.end * width];
            to.copy_from_slice(&stay[at..at + to.len()]);
            at += to.len();
        }
        Ok(Self { way, step, pending, buffer })
    }

    /// Waits for the step under way and does the others.
    ///
    /// # Errors
    /// [`Error::Fault`].
    pub fn finish(self) -> Result<Vec<T>> {
        self.finish_seeing(|_| ())
    }

    /// [`Moving::finish`], showing the buffers between two steps.
    fn finish_seeing(mut self, mut see: impl FnMut(&[T])) -> Result<Vec<T>> {
        let Site { phase, layer } = self.way.site;
        let _exchange = debug_span!("all_to_all", ?phase, layer, direction = ?self.way.direction).entered();
        loop {
            let (way, step) = (self.way, self.step);
            let buffer = receive(&way, step, self.pending, self.buffer)?;
            let Some(next) = way.next(step) else { return Ok(buffer) };
            see(&buffer);
            self = Self::start(way, next, &buffer)?;
        }
    }
}

fn receive<T: Element>(way: &Way, step: usize, pending: Box<dyn Pending>, mut buffer: Vec<T>) -> Result<Vec<T>> {
    let (rank, width) = (way.all.comm.rank(), way.width);
    let (_, into, _) = way.step(step);
    let arrived = way.all.wait(way.plan.steps[step].kind, pending)?;
    for (transfer, parcel) in into.iter().filter(|transfer| transfer.peer != rank).zip(arrived) {
        let mut bytes = parcel.payload();
        for piece in &transfer.pieces {
            let (head, rest) = bytes.split_at(piece.len() * width * size_of::<T>());
            T::read(head, &mut buffer[piece.start * width..piece.end * width]);
            bytes = rest;
        }
    }
    Ok(buffer)
}
