//! [`Communicator`]: a group of ranks that exchange messages under a deadline; [`Collectives`]: what is built from that.
//!
//! Everything is made of one primitive, [`Communicator::start`]: some messages out, some in, each with the [`Stamp`] of the
//! operation it belongs to. An engine (threads, TCP, MPI, NCCL) implements that and knows no collective; the collectives know no
//! engine. Reductions are an exchange of parts and a local sum in rank order, so their results depend neither on arrival nor
//! on the engine.

mod agreement;
mod collectives;
mod element;
mod engine;
mod fault;
#[cfg(feature = "mpi")]
pub mod mpi;
#[cfg(feature = "nccl")]
pub mod nccl;
mod pace;
mod parcel;
mod stamp;
pub mod tcp;
#[cfg(test)]
mod tests;
pub mod thread;
mod wire;

pub use collectives::{AllReducing, Broadcasting, Collectives, Gathering, ReduceScattering, Reduction};
pub use element::Element;
pub use fault::{Cause, Fault};
pub use parcel::Parcel;
pub use stamp::{Kind, Phase, Site, Stamp};

use crate::Result;
use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Some ranks of a world, in an order that all of them agree on.
#[derive(Debug)]
pub struct Group {
    context: u64,
    members: Vec<usize>,
    rank: usize,
    sequence: AtomicU64,
}

impl Group {
    /// All `size` ranks, seen from `rank`.
    ///
    /// # Panics
    /// If `rank` is not one of them.
    pub fn world(rank: usize, size: usize) -> Self {
        Self::new(0, (0..size).collect(), rank)
    }

    /// The ranks `members` of the world, seen from the world's rank `world_rank`; `context` tells their messages from those
    /// of other groups, and must be the same on all of them and on no other group.
    ///
    /// # Panics
    /// If `world_rank` is not among `members`.
    pub fn new(context: u64, members: Vec<usize>, world_rank: usize) -> Self {
        let rank = members.iter().position(|&m| m == world_rank).expect("a rank is a member of its group");
        Self { context, members, rank, sequence: AtomicU64::new(0) }
    }

    /// Tells messages of this group from others'.
    pub fn context(&self) -> u64 {
        self.context
    }

    /// The world's ranks of the members, in the group's order.
    pub fn members(&self) -> &[usize] {
        &self.members
    }

    /// This rank's place in the group.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// This rank's number in the world.
    pub fn world_rank(&self) -> usize {
        self.members[self.rank]
    }

    /// Number of members.
    pub fn size(&self) -> usize {
        self.members.len()
    }

    /// The stamp of the next operation.
    pub(crate) fn stamp(&self, kind: Kind, site: Site) -> Stamp {
        Stamp { context: self.context, sequence: self.sequence.fetch_add(1, Ordering::Relaxed), kind, site }
    }
}

/// A message that is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Sender, by its place in the group.
    pub peer: usize,
    /// Size without the header.
    pub bytes: usize,
}

/// An operation under way.
pub trait Pending: Debug + Send {
    /// Waits for every message; they come in the order they were asked for.
    ///
    /// # Errors
    /// [`crate::Error::Fault`] when the deadline has passed, a peer is gone or does something else.
    fn wait(self: Box<Self>) -> Result<Vec<Parcel>>;

    /// Whether [`Pending::wait`] would return at once. Moves the engine on.
    fn test(&mut self) -> bool;
}

/// A group of ranks that exchange messages: what an engine implements.
pub trait Communicator: Debug + Send + Sync {
    /// Who takes part.
    fn group(&self) -> &Group;

    /// Sends messages to members and says of whom messages are awaited, at most one each. Returns at once. The deadline of
    /// the operation begins now.
    ///
    /// # Errors
    /// [`crate::Error::Fault`] if the engine has failed before or fails now.
    fn start(&self, stamp: Stamp, sends: Vec<(usize, Parcel)>, receives: &[Expected]) -> Result<Box<dyn Pending>>;

    /// The same engine for another group, which this rank is a member of.
    fn over(&self, group: Group) -> Arc<dyn Communicator>;

    /// What ended this engine, if anything did: every operation then returns it.
    fn fault(&self) -> Option<Fault>;

    /// Ends this engine on every rank, for what was found in an operation above it; the fault that all return, which may be
    /// an earlier one.
    fn fail(&self, stamp: Stamp, cause: Cause) -> Fault;
}
