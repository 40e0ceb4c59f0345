//! Ranks that are processes of an MPI job, started by `mpirun` or the like.
//!
//! MPI carries bytes between two ranks and nothing more: every send is one `MPI_Isend`, every receive an `MPI_Irecv` of a
//! message that `MPI_Iprobe` has found, and all waiting is polling against the deadline, so that a rank which is slow, stopped
//! or elsewhere ends in a typed [`Fault`](super::Fault) and not in a call that never returns. No collective of MPI's is used
//! but those that start and end it, and these have no deadline of their own.
//!
//! # Progress
//! While nobody waits, a thread of the engine's moves messages on as long as any are under way; so a large message reaches
//! its receiver though its sender computes. MPI must offer thread level SERIALIZED. [`MpiWorld::start_single_threaded`] does
//! without that thread and that level.
//!
//! # Faults
//! The ranks tell each other which fault they know of and agree on one within half a second (see `agreement.rs`), which every
//! operation returns from then on, on all ranks. Messages that are under way then are never completed; their buffers are
//! leaked, for MPI may still write to them. `MPI_Finalize`, which would wait for the missing rank, is not called, so
//! `mpirun` ends the job with an error: a program returns from `main` soon after a fault, having dropped its [`MpiWorld`].
//!
//! A rank that has gone is seen by its silence at the deadline, or at once if it has dropped its world. A process that *dies*
//! is the launcher's affair: Open MPI 4.1 ends the whole job then, within about a second, and no rank returns. Under Open MPI 5
//! with `mpirun --with-ft ulfm` the others return that it has left, and may go on without it: [`MpiWorld::shrink`]. The world
//! that is left does not call `MPI_Finalize` either, for that waits for the dead process at times; its job ends well.

mod engine;
mod raw;
mod ulfm;

use super::{Communicator, Expected, Fault, Group, Parcel, Pending, Stamp};
use crate::comm::Cause;
use crate::{Error, Result};
use engine::{Engine, State};
use raw::{Link, Threads, Trouble};
use std::marker::PhantomData;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// This process's place in an MPI job. Dropped last, on the thread it was started on.
#[derive(Debug)]
pub struct MpiWorld {
    engine: Arc<Engine>,
    threads: Threads,
    origins: Vec<usize>,
    pump: Option<JoinHandle<()>>,
    ended: bool,
    /// MPI is ended by the thread that has started it.
    _thread: PhantomData<*const ()>,
}

impl MpiWorld {
    /// Starts MPI, which waits for all processes of the job; the world, and the communicator of all its ranks. Every
    /// operation, and leaving, has to end within `timeout`.
    ///
    /// # Errors
    /// [`Error::Engine`] if MPI was started before, offers too low a thread level, or fails.
    pub fn start(timeout: Duration) -> Result<(Self, Arc<dyn Communicator>)> {
        Self::over(Link::start(Threads::Any).map_err(engine_error)?, Threads::Any, timeout)
    }

    /// [`MpiWorld::start`] for an MPI that only one thread may call, such as a simulator's: messages move only while this
    /// thread starts or awaits an operation, and it never sleeps while it waits. Communicators panic on any other thread.
    ///
    /// # Errors
    /// As [`MpiWorld::start`], but for the thread level.
    pub fn start_single_threaded(timeout: Duration) -> Result<(Self, Arc<dyn Communicator>)> {
        Self::over(Link::start(Threads::One).map_err(engine_error)?, Threads::One, timeout)
    }

    fn over(link: Link, threads: Threads, timeout: Duration) -> Result<(Self, Arc<dyn Communicator>)> {
        let origins = link.origins().to_vec();
        let engine = Engine::new(link, threads, timeout);
        let pump = || {
            let pumped = Arc::clone(&engine);
            let started = std::thread::Builder::new().name("mpi-pump".into()).spawn(move || pumped.pump());
            started.map_err(|error| Error::Engine(format!("no thread for MPI's progress: {error}")))
        };
        let pump = (threads == Threads::Any).then(pump).transpose()?;
        let group = Group::world(engine.rank, engine.size);
        let comm = MpiCommunicator { group, engine: Arc::clone(&engine) };
        Ok((Self { engine, threads, origins, pump, ended: false, _thread: PhantomData }, Arc::new(comm)))
    }

    /// Leaves: waits until all messages are out and all ranks leave, and ends MPI. Communicators are of no use afterwards.
    /// Dropping does the same, but tells nothing.
    ///
    /// # Errors
    /// [`Error::Fault`] if there was a fault or there is one now, which can be that a rank does not leave within the
    /// timeout. MPI is not ended then; the other ranks have half a second to report theirs before this returns.
    pub fn finish(mut self) -> Result<()> {
        self.end()
    }

    /// After a fault: a world of the ranks that live, in their order, for which every one of them calls this within the
    /// timeout. Communicators of the old world are of no use afterwards.
    ///
    /// # Errors
    /// [`Error::Engine`] if this MPI cannot do so (Open MPI 5 can, with `--with-ft ulfm`); [`Error::Fault`], the one there
    /// was, if a rank that lives does not come; [`Error::Argument`] if there was none.
    pub fn shrink(mut self) -> Result<(Self, Arc<dyn Communicator>)> {
        let link = self.engine.meet_survivors()?;
        self.ended = true;
        self.pump.take().map_or(Ok(()), join)?;
        let ended = || Error::Engine("the MPI world of this process has ended".into());
        let smaller = link.ok_or_else(ended)?.shrink().map_err(engine_error)?;
        Self::over(smaller, self.threads, self.engine.timeout)
    }

    /// The ranks that these ranks had when the job was started.
    pub fn origins(&self) -> &[usize] {
        &self.origins
    }

    fn end(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let left = self.engine.leave(std::thread::panicking());
        let joined = self.pump.take().map_or(Ok(()), join);
        let link = left?;
        joined?;
        link.map_or(Ok(()), Link::finalize).map_err(engine_error)
    }
}

fn join(pump: JoinHandle<()>) -> Result<()> {
    pump.join().map_err(|_| Error::Engine("the thread of MPI's progress has panicked".into()))
}

fn engine_error(trouble: Trouble) -> Error {
    Error::Engine(trouble.into_text())
}

impl Drop for MpiWorld {
    fn drop(&mut self) {
        let _told_before = self.end();
    }
}

#[derive(Debug)]
struct MpiCommunicator {
    group: Group,
    engine: Arc<Engine>,
}

impl Communicator for MpiCommunicator {
    fn group(&self) -> &Group {
        &self.group
    }

    fn start(&self, stamp: Stamp, sends: Vec<(usize, Parcel)>, receives: &[Expected]) -> Result<Box<dyn Pending>> {
        let deadline = self.engine.now() + self.engine.timeout;
        let world = |peer: usize| self.group.members()[peer];
        self.engine.begin(stamp, sends.into_iter().map(|(peer, parcel)| (world(peer), parcel)).collect())?;
        Ok(Box::new(MpiPending {
            engine: Arc::clone(&self.engine),
            messages: Messages {
                stamp,
                receives: receives.iter().map(|e| (world(e.peer), e.bytes)).collect(),
                arrived: vec![None; receives.len()],
                deadline,
                timeout: self.engine.timeout,
            },
        }))
    }

    fn over(&self, group: Group) -> Arc<dyn Communicator> {
        Arc::new(Self { group, engine: Arc::clone(&self.engine) })
    }

    fn fault(&self) -> Option<Fault> {
        self.engine.fault()
    }

    fn fail(&self, stamp: Stamp, cause: Cause) -> Fault {
        self.engine.fail(Fault { rank: self.engine.rank, stamp, cause })
    }
}

#[derive(Debug)]
struct MpiPending {
    engine: Arc<Engine>,
    messages: Messages,
}

/// The messages an operation waits for.
#[derive(Debug)]
struct Messages {
    stamp: Stamp,
    /// Sender, by its number in the world, and size.
    receives: Vec<(usize, usize)>,
    arrived: Vec<Option<Parcel>>,
    deadline: Duration,
    timeout: Duration,
}

impl Messages {
    /// Takes what has come; whether that is all. An error if the rest will not come.
    fn collect(&mut self, state: &mut State, now: Duration) -> std::result::Result<Option<()>, Fault> {
        let stamp = self.stamp;
        let fault = |state: &State, cause| Fault { stamp, ..state.fault(cause) };
        for (&(peer, bytes), arrived) in self.receives.iter().zip(&mut self.arrived).filter(|(_, a)| a.is_none()) {
            *arrived = state.message(peer, stamp, bytes).map_err(|cause| fault(state, cause))?;
        }
        let missing =
            || self.receives.iter().zip(&self.arrived).filter(|(_, a)| a.is_none()).map(|((peer, _), _)| *peer);
        if missing().next().is_none() {
            return Ok(Some(()));
        }
        if let Some(peer) = missing().find(|&peer| state.peers[peer].left) {
            return Err(fault(state, Cause::Left { peer }));
        }
        if now >= self.deadline {
            let missing = missing().map(|peer| (peer, state.peers[peer].last)).collect();
            return Err(fault(state, Cause::Timeout { missing, after: self.timeout }));
        }
        Ok(None)
    }
}

impl Pending for MpiPending {
    fn wait(mut self: Box<Self>) -> Result<Vec<Parcel>> {
        let messages = &mut self.messages;
        self.engine.poll(|state, now| messages.collect(state, now))?;
        Ok(std::mem::take(&mut messages.arrived).into_iter().flatten().collect())
    }

    fn test(&mut self) -> bool {
        let messages = &mut self.messages;
        self.engine.poll_once(|state, now| messages.collect(state, now))
    }
}

impl Drop for MpiPending {
    fn drop(&mut self) {
        self.engine.lock().pending -= 1;
    }
}
