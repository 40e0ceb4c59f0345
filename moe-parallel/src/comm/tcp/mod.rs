//! Ranks that are processes which reach each other over TCP: with the standard library alone, whatever has started them.
//!
//! Rank 0 listens at an address that all know; the others come there, hear where all are, and connect with each other
//! (`rendezvous.rs`). From then on nobody listens. The connections never block: the engine that MPI's ranks have too polls them
//! (`link.rs`), so a rank that is slow, stopped or elsewhere ends in a typed [`Fault`](super::Fault). What is sent is not
//! encrypted, and a job's name is no password: this is for networks whose machines trust each other.
//!
//! # Progress
//! As with MPI, a thread of the engine's moves messages on while nobody waits. What is sent is written from its own buffer and
//! read into the one it is used from; there is no limit to what may be under way but memory.
//!
//! # Faults
//! The ranks agree on one fault as they do over MPI (see `agreement.rs`). A process that dies is seen at once, by the end of its
//! connections: all others return that it has left. A machine that is switched off, or a network that is cut, is seen at the
//! deadline only, as is a process that is stopped.
//!
//! # Going on without some
//! After a fault the ranks that live may make a smaller world: [`TcpWorld::shrink`]. They agree on who is in it (`meeting.rs`), so
//! that there is one such world, of all that come in time; one that was stopped and wakes up later is told that the others have
//! gone on, and cannot disturb them: they have closed their connections with it. That holds among processes that can reach
//! each other. A network that falls into two parts for longer than the timeout leaves a world in each.

mod channel;
mod door;
mod hello;
mod link;
mod meeting;
mod mesh;
mod rendezvous;
#[cfg(test)]
mod tests;

use super::Communicator;
use super::engine::{Threads, World};
use crate::{Error, Result};
use link::TcpLink;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

/// A process's place in a job, and how to find the others. All but the rank and `listen` is the same on all ranks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpConfig {
    /// This process, from 0 to `size - 1`.
    pub rank: usize,
    /// Number of processes.
    pub size: usize,
    /// Where rank 0 listens, and the others find it: `host:port`.
    pub master: String,
    /// What tells this job from others that might meet at the same address; any text of up to 256 bytes.
    pub job: String,
    /// Until all have come and are connected; then of every operation, and of leaving.
    pub timeout: Duration,
    /// The address of this machine at which others connect to this rank; without one any of its addresses. Of rank 0 too, whose
    /// port is that of `master`.
    pub listen: Option<IpAddr>,
}

impl TcpConfig {
    fn check(&self) -> Result<()> {
        /// Where all are has to fit one message.
        const MOST_RANKS: usize = 1 << 15;
        let (rank, size, bytes) = (self.rank, self.size, self.job.len());
        let wrong = if rank >= size {
            format!("rank {rank} is none of {size}: ranks count from 0 to `size` - 1")
        } else if size > MOST_RANKS {
            format!("`size` is {size}, but {MOST_RANKS} ranks are the most that connect over TCP")
        } else if bytes > hello::MOST_JOB_BYTES {
            format!("`job` has {bytes} bytes; it may have {}", hello::MOST_JOB_BYTES)
        } else if self.timeout.is_zero() {
            "`timeout` is zero: nothing can be done in time".into()
        } else {
            return Ok(());
        };
        Err(Error::Argument(wrong))
    }
}

/// This process's place in a job. Dropped last.
#[derive(Debug)]
pub struct TcpWorld(World<TcpLink>);

impl TcpWorld {
    /// Waits for all processes of the job; the world, and the communicator of all its ranks.
    ///
    /// # Errors
    /// [`Error::Argument`] if the configuration is impossible. [`Error::Engine`] if rank 0 cannot listen at its address; if a
    /// rank does not come in time, or cannot be reached, which the text names; if a process comes as a rank that there is
    /// already, as one of another number of ranks, or with another version of this engine.
    pub fn start(config: &TcpConfig) -> Result<(Self, Arc<dyn Communicator>)> {
        Self::start_with(config, || rendezvous::listen(config))
    }

    /// [`TcpWorld::start`], on rank 0 with a listener of the caller's.
    pub(crate) fn start_with(
        config: &TcpConfig,
        listener: impl FnOnce() -> std::result::Result<TcpListener, String>,
    ) -> Result<(Self, Arc<dyn Communicator>)> {
        config.check()?;
        let peers = rendezvous::connect(config, listener).map_err(Error::Engine)?;
        let link = TcpLink::new(config.rank, peers).map_err(World::<TcpLink>::error)?;
        let (world, comm) = World::over(link, Threads::Any, config.timeout)?;
        Ok((Self(world), comm))
    }

    /// Leaves: waits until all messages are out and all ranks leave, and closes the connections. Communicators are of no use
    /// afterwards. Dropping does the same, but tells nothing.
    ///
    /// # Errors
    /// [`Error::Fault`] if there was a fault or there is one now, which can be that a rank does not leave within the
    /// timeout. The other ranks have half a second to report theirs before this returns.
    pub fn finish(self) -> Result<()> {
        self.0.finish()
    }

    /// After a fault: a world of the ranks that live and call this within the timeout, in their order. Returns as soon as all
    /// that are connected have come; one that lives and does not come costs the others the timeout. Communicators of the old
    /// world are of no use afterwards.
    ///
    /// # Errors
    /// [`Error::Engine`] if the others have gone on without this rank, or if one that has come dies or stops before all are
    /// agreed; then there is no smaller world. [`Error::Argument`] if there was no fault.
    pub fn shrink(self) -> Result<(Self, Arc<dyn Communicator>)> {
        self.0.shrink().map(|(world, comm)| (Self(world), comm))
    }

    /// The ranks that these ranks had when the job was started.
    pub fn origins(&self) -> &[usize] {
        self.0.origins()
    }
}
