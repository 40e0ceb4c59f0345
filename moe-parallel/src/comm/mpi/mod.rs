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

mod raw;
mod ulfm;

use super::Communicator;
use super::engine::{Threads, World};
use crate::Result;
use raw::MpiLink;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

/// This process's place in an MPI job. Dropped last, on the thread it was started on.
#[derive(Debug)]
pub struct MpiWorld {
    world: World<MpiLink>,
    /// MPI is ended by the thread that has started it.
    _thread: PhantomData<*const ()>,
}

impl MpiWorld {
    /// Starts MPI, which waits for all processes of the job; the world, and the communicator of all its ranks. Every
    /// operation, and leaving, has to end within `timeout`.
    ///
    /// # Errors
    /// [`crate::Error::Engine`] if MPI was started before, offers too low a thread level, or fails.
    pub fn start(timeout: Duration) -> Result<(Self, Arc<dyn Communicator>)> {
        Self::begin(Threads::Any, timeout)
    }

    /// [`MpiWorld::start`] for an MPI that only one thread may call, such as a simulator's: messages move only while this
    /// thread starts or awaits an operation, and it never sleeps while it waits. Communicators panic on any other thread.
    ///
    /// # Errors
    /// As [`MpiWorld::start`], but for the thread level.
    pub fn start_single_threaded(timeout: Duration) -> Result<(Self, Arc<dyn Communicator>)> {
        Self::begin(Threads::One, timeout)
    }

    fn begin(threads: Threads, timeout: Duration) -> Result<(Self, Arc<dyn Communicator>)> {
        let link = MpiLink::start(threads).map_err(World::<MpiLink>::error)?;
        Ok(Self::of(World::over(link, threads, timeout)?))
    }

    fn of((world, comm): (World<MpiLink>, Arc<dyn Communicator>)) -> (Self, Arc<dyn Communicator>) {
        (Self { world, _thread: PhantomData }, comm)
    }

    /// Leaves: waits until all messages are out and all ranks leave, and ends MPI. Communicators are of no use afterwards.
    /// Dropping does the same, but tells nothing.
    ///
    /// # Errors
    /// [`crate::Error::Fault`] if there was a fault or there is one now, which can be that a rank does not leave within the
    /// timeout. MPI is not ended then; the other ranks have half a second to report theirs before this returns.
    pub fn finish(self) -> Result<()> {
        self.world.finish()
    }

    /// After a fault: a world of the ranks that live, in their order, for which every one of them calls this within the
    /// timeout. Communicators of the old world are of no use afterwards.
    ///
    /// # Errors
    /// [`crate::Error::Engine`] if this MPI cannot do so (Open MPI 5 can, with `--with-ft ulfm`); [`crate::Error::Fault`], the one there
    /// was, if a rank that lives does not come; [`crate::Error::Argument`] if there was none.
    pub fn shrink(self) -> Result<(Self, Arc<dyn Communicator>)> {
        self.world.shrink().map(Self::of)
    }

    /// The ranks that these ranks had when the job was started.
    pub fn origins(&self) -> &[usize] {
        self.world.origins()
    }
}
