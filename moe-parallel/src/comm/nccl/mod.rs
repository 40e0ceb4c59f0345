//! Ranks that have a GPU each and exchange over NCCL.
//!
//! Every operation has two parts. The host part goes over another engine, of threads or MPI: each message's stamp and size,
//! so that a rank which is dead, late or elsewhere gives that engine's typed fault and never a kernel which waits for ever.
//! The device part begins when all stamps have come and fit: one group of sends and receives, polled until the deadline,
//! after which the communicator is aborted.
//!
//! Layers compute on the CPU today, so payloads are staged: host to device, over NCCL, device to host. That is of no use for
//! speed yet; it is the place where device buffers go in.
//!
//! # Order
//! The device takes operations one after the other, in the order they were started in. So ranks must start the operations of
//! *all* their groups in one order, not only those of each group; otherwise two ranks wait for each other until the deadline.

mod raw;
#[cfg(test)]
mod tests;

use super::pace::Pace;
use super::{Cause, Collectives, Communicator, Expected, Fault, Group, Kind, Parcel, Pending, Phase, Site, Stamp};
use crate::{Error, Result};
use cudarc::driver::CudaEvent;
use raw::{Gpu, ID_BYTES, Link, Staged};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const SITE: Site = Site::new(Phase::Start);

/// A communicator of the ranks of `host`, each with the GPU `device` of its machine. Every rank calls this; `host` goes on to
/// carry the stamps of the operations, each of which has to end within `timeout`.
///
/// # Errors
/// [`Error::Engine`] on all ranks if one of them has no CUDA driver, no NCCL or no such GPU, or if NCCL cannot connect them;
/// [`Error::Fault`] if the host's engine fails.
pub fn start(host: &dyn Communicator, device: usize, timeout: Duration) -> Result<Arc<dyn Communicator>> {
    // A group of its own: its stamps are not mistaken for those of the host's users.
    let host = host.split(SITE, 0, host.rank() as u64)?;
    let (rank, size) = (host.rank(), host.size());

    // 1. Who has a device?
    let gpu = Gpu::open(device);
    let lacking = host.all_gather(SITE, &[u8::from(gpu.is_err())])?;
    let gpu = gpu.map_err(Error::Engine)?;
    if let Some(other) = lacking.iter().position(|&lacks| lacks != 0) {
        let other = host.group().members()[other];
        return Err(Error::Engine(format!(
            "rank {other} has no CUDA driver, no NCCL or no such GPU; its error says which"
        )));
    }

    // 2. Connect them. From here on whoever fails tells the others, who may be waiting for it.
    let stamp = host.group().stamp(Kind::Broadcast, SITE);
    let failed = |text| Error::Fault(host.fail(stamp, Cause::Engine(text)));
    let mut id = [0; ID_BYTES];
    if rank == 0 {
        id = Link::new_id().map_err(failed)?;
    }
    host.broadcast(SITE, &mut id, 0)?;
    let link = Link::start(gpu, id, rank, size).map_err(failed)?;
    let (mut pace, until) = (Pace::new(), Instant::now() + timeout);
    while !link.is_ready().map_err(failed)? {
        if let Some(fault) = host.fault() {
            return Err(fault.into());
        }
        if Instant::now() >= until {
            return Err(failed(format!("NCCL has not connected {size} ranks within {:.1} s", timeout.as_secs_f64())));
        }
        pace.rest();
    }

    let group = same(host.group());
    let members = group.members().to_vec();
    let state = State { link: Some(link), operations: BTreeMap::new(), started: 0 };
    let engine = Engine { host: Arc::clone(&host), members, timeout, state: Mutex::new(state) };
    Ok(Arc::new(NcclCommunicator { group, host, engine: Arc::new(engine) }))
}

/// The same group, with operations of its own.
fn same(group: &Group) -> Group {
    Group::new(group.context(), group.members().to_vec(), group.world_rank())
}

/// What all communicators of a rank share.
struct Engine {
    host: Arc<dyn Communicator>,
    /// The host world's ranks, in the order NCCL counts them.
    members: Vec<usize>,
    timeout: Duration,
    state: Mutex<State>,
}

struct State {
    /// None after a fault.
    link: Option<Link>,
    /// By the order of their start.
    operations: BTreeMap<u64, Operation>,
    started: u64,
}

struct Operation {
    stamp: Stamp,
    timeout: Duration,
    /// Of the device part; the host's engine has one for its own.
    deadline: Instant,
    /// The world's ranks that bytes go to or come from.
    peers: Vec<usize>,
    /// What goes to whom, by NCCL's count; empty ones do not go over the device.
    sends: Vec<(usize, Parcel)>,
    receives: Vec<Receive>,
    stage: Stage,
    /// Somebody will wait for it.
    awaited: bool,
}

#[derive(Clone, Copy)]
struct Receive {
    /// By NCCL's count.
    peer: usize,
    world_rank: usize,
    bytes: usize,
}

/// How far an operation is.
enum Stage {
    /// The stamps are on their way.
    Agreeing(Box<dyn Pending>),
    /// NCCL connects, or puts its kernels on the stream.
    Launching(Buffers),
    /// The device exchanges.
    Moving(Buffers, CudaEvent),
    /// In the order they were asked for.
    Arrived(Vec<Parcel>),
    /// Between two of the others.
    Changing,
}

/// What the device reads and writes.
struct Buffers {
    _sends: Vec<Staged>,
    receives: Vec<Staged>,
}

/// What a look at an operation has found.
enum Step {
    /// It is as far as it can be: those after it may go on.
    Past,
    /// Those after it wait for it.
    Blocked,
}

/// Why an operation fails.
enum Failure {
    /// The host's engine says so, which has told all ranks.
    Host(Error),
    /// This rank has found it.
    Own(Stamp, Cause),
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("members", &self.members).finish_non_exhaustive()
    }
}

impl Engine {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves all operations on, in the order of their start.
    fn progress(&self, state: &mut State) -> Result<()> {
        let failure = match self.host.fault() {
            Some(fault) => Failure::Host(fault.into()),
            None => match state.advance() {
                Ok(()) => return Ok(()),
                Err(failure) => failure,
            },
        };
        // The device may wait for a rank that is gone: its kernels end with the communicator, and then the buffers may.
        if let Some(link) = state.link.take() {
            link.abort();
        }
        state.operations.clear();
        Err(match failure {
            Failure::Host(error) => error,
            Failure::Own(stamp, cause) => self.host.fail(stamp, cause).into(),
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let timeout = self.timeout;
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(link) = state.link.take() {
            link.finish(timeout);
        }
    }
}

impl State {
    fn advance(&mut self) -> std::result::Result<(), Failure> {
        let Some(link) = &self.link else {
            return Err(Failure::Host(Error::Engine("this NCCL communicator has ended".into())));
        };
        for operation in self.operations.values_mut() {
            if let Step::Blocked = operation.advance(link)? {
                break;
            }
        }
        self.operations.retain(|_, operation| operation.awaited || !matches!(operation.stage, Stage::Arrived(_)));
        Ok(())
    }
}

impl Operation {
    fn advance(&mut self, link: &Link) -> std::result::Result<Step, Failure> {
        let stamp = self.stamp;
        let own = |text| Failure::Own(stamp, Cause::Engine(text));
        loop {
            self.stage = match std::mem::replace(&mut self.stage, Stage::Changing) {
                Stage::Agreeing(mut host) => {
                    if !host.test() {
                        self.stage = Stage::Agreeing(host);
                        return Ok(Step::Blocked);
                    }
                    self.check(&host.wait().map_err(Failure::Host)?)?;
                    self.launch(link).map_err(own)?
                }
                Stage::Launching(buffers) => {
                    if !link.is_ready().map_err(own)? {
                        self.stage = Stage::Launching(buffers);
                        return self.undone(Step::Blocked);
                    }
                    Stage::Moving(buffers, link.gpu().mark().map_err(own)?)
                }
                Stage::Moving(buffers, event) => {
                    if !link.gpu().is_done(&event).map_err(own)? {
                        self.stage = Stage::Moving(buffers, event);
                        return self.undone(Step::Past);
                    }
                    Stage::Arrived(self.unpack(link, buffers).map_err(own)?)
                }
                done @ (Stage::Arrived(_) | Stage::Changing) => {
                    self.stage = done;
                    return Ok(Step::Past);
                }
            };
        }
    }

    /// Holds the sizes that the peers have announced to those that are expected.
    fn check(&self, announced: &[Parcel]) -> std::result::Result<(), Failure> {
        for (receive, parcel) in self.receives.iter().zip(announced) {
            let (peer, expected) = (receive.world_rank, receive.bytes);
            let got = parcel.values::<u64>().first().map_or(0, |&bytes| bytes as usize);
            if got != expected {
                return Err(Failure::Own(self.stamp, Cause::Size { peer, expected, got }));
            }
        }
        Ok(())
    }

    fn launch(&mut self, link: &Link) -> raw::Result<Stage> {
        let gpu = link.gpu();
        let sends = std::mem::take(&mut self.sends).into_iter().filter(|(_, parcel)| !parcel.payload().is_empty());
        let sends: Vec<Staged> =
            sends.map(|(peer, parcel)| Ok((peer, gpu.upload(parcel.payload())?))).collect::<raw::Result<_>>()?;
        let receives = self.receives.iter().filter(|receive| receive.bytes > 0);
        let mut receives: Vec<Staged> =
            receives.map(|receive| Ok((receive.peer, gpu.room(receive.bytes)?))).collect::<raw::Result<_>>()?;
        if sends.is_empty() && receives.is_empty() {
            return Ok(Stage::Arrived(vec![Parcel::default(); self.receives.len()]));
        }
        link.exchange(&sends, &mut receives)?;
        Ok(Stage::Launching(Buffers { _sends: sends, receives }))
    }

    fn unpack(&self, link: &Link, buffers: Buffers) -> raw::Result<Vec<Parcel>> {
        let mut received = buffers.receives.iter();
        let mut next = |receive: &Receive| match receive.bytes {
            0 => Ok(Parcel::default()),
            _ => {
                received.next().map_or(Ok(Parcel::default()), |(_, bytes)| Ok(Parcel::of(&link.gpu().download(bytes)?)))
            }
        };
        self.receives.iter().map(&mut next).collect()
    }

    /// What a device part comes to that is not done: all that is known of the peers is what this rank awaits of them.
    fn undone(&self, step: Step) -> std::result::Result<Step, Failure> {
        if Instant::now() < self.deadline {
            return Ok(step);
        }
        let missing = self.peers.iter().map(|&peer| (peer, None)).collect();
        Err(Failure::Own(self.stamp, Cause::Timeout { missing, after: self.timeout }))
    }
}

#[derive(Debug)]
struct NcclCommunicator {
    group: Group,
    /// Of the same group.
    host: Arc<dyn Communicator>,
    engine: Arc<Engine>,
}

impl Communicator for NcclCommunicator {
    fn group(&self) -> &Group {
        &self.group
    }

    fn start(&self, stamp: Stamp, sends: Vec<(usize, Parcel)>, receives: &[Expected]) -> Result<Box<dyn Pending>> {
        let world = |peer: usize| self.group.members()[peer];
        // Groups are split from the one this engine was started with, so every member is one of its ranks.
        let device = |peer: usize| self.engine.members.iter().position(|&m| m == world(peer)).unwrap_or_default();
        let announced = sends.iter().map(|(peer, parcel)| (*peer, Parcel::of(&[parcel.payload().len() as u64])));
        let awaited: Vec<Expected> =
            receives.iter().map(|receive| Expected { peer: receive.peer, bytes: size_of::<u64>() }).collect();
        let sending = sends.iter().filter(|(_, parcel)| !parcel.payload().is_empty()).map(|(peer, _)| *peer);
        let receiving = receives.iter().filter(|receive| receive.bytes > 0).map(|receive| receive.peer);
        let mut peers: Vec<usize> = sending.chain(receiving).map(world).collect();
        peers.sort_unstable();
        peers.dedup();

        // The device takes operations in the order of their stamps.
        let mut state = self.engine.lock();
        let host = self.host.start(stamp, announced.collect(), &awaited)?;
        let place = |receive: &Expected| Receive {
            peer: device(receive.peer),
            world_rank: world(receive.peer),
            bytes: receive.bytes,
        };
        let ticket = state.started;
        state.started += 1;
        let operation = Operation {
            stamp,
            timeout: self.engine.timeout,
            deadline: Instant::now() + self.engine.timeout,
            receives: receives.iter().map(place).collect(),
            sends: sends.into_iter().map(|(peer, parcel)| (device(peer), parcel)).collect(),
            peers,
            stage: Stage::Agreeing(host),
            awaited: true,
        };
        state.operations.insert(ticket, operation);
        Ok(Box::new(NcclPending { engine: Arc::clone(&self.engine), ticket, failed: None }))
    }

    fn over(&self, group: Group) -> Arc<dyn Communicator> {
        let host = self.host.over(same(&group));
        Arc::new(Self { group, host, engine: Arc::clone(&self.engine) })
    }

    fn fault(&self) -> Option<Fault> {
        self.host.fault()
    }

    fn fail(&self, stamp: Stamp, cause: Cause) -> Fault {
        self.host.fail(stamp, cause)
    }
}

#[derive(Debug)]
struct NcclPending {
    engine: Arc<Engine>,
    ticket: u64,
    /// What a test has found.
    failed: Option<Error>,
}

impl NcclPending {
    /// Whether the operation has ended.
    fn look(&mut self) -> Result<bool> {
        let mut state = self.engine.lock();
        self.engine.progress(&mut state)?;
        Ok(state.operations.get(&self.ticket).is_none_or(|operation| matches!(operation.stage, Stage::Arrived(_))))
    }
}

impl Pending for NcclPending {
    fn wait(mut self: Box<Self>) -> Result<Vec<Parcel>> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let mut pace = Pace::new();
        while !self.look()? {
            pace.rest();
        }
        match self.engine.lock().operations.remove(&self.ticket).map(|operation| operation.stage) {
            Some(Stage::Arrived(parcels)) => Ok(parcels),
            _ => Err(Error::Engine("this NCCL communicator has ended".into())),
        }
    }

    fn test(&mut self) -> bool {
        self.failed.is_some()
            || self.look().unwrap_or_else(|error| {
                self.failed = Some(error);
                true
            })
    }
}

impl Drop for NcclPending {
    fn drop(&mut self) {
        // The peers may count on its messages: it goes on, but nobody takes what comes.
        if let Some(operation) = self.engine.lock().operations.get_mut(&self.ticket) {
            operation.awaited = false;
        }
    }
}
