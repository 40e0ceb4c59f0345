//! The [`Communicator`] of an [`Engine`], and its operations under way.

use super::{Engine, Link, State};
use crate::Result;
use crate::comm::{Cause, Communicator, Expected, Fault, Group, Parcel, Pending, Stamp};
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug)]
pub(super) struct EngineCommunicator<L: Link> {
    pub(super) group: Group,
    pub(super) engine: Arc<Engine<L>>,
}

impl<L: Link> Communicator for EngineCommunicator<L> {
    fn group(&self) -> &Group {
        &self.group
    }

    fn start(&self, stamp: Stamp, sends: Vec<(usize, Parcel)>, receives: &[Expected]) -> Result<Box<dyn Pending>> {
        let deadline = self.engine.now() + self.engine.timeout;
        let world = |peer: usize| self.group.members()[peer];
        self.engine.begin(stamp, sends.into_iter().map(|(peer, parcel)| (world(peer), parcel)).collect())?;
        Ok(Box::new(EnginePending {
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
struct EnginePending<L: Link> {
    engine: Arc<Engine<L>>,
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
    fn collect<L: Link>(&mut self, state: &mut State<L>, now: Duration) -> std::result::Result<Option<()>, Fault> {
        let stamp = self.stamp;
        let fault = |state: &State<L>, cause| Fault { stamp, ..state.fault(cause) };
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

impl<L: Link> Pending for EnginePending<L> {
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

impl<L: Link> Drop for EnginePending<L> {
    fn drop(&mut self) {
        self.engine.lock().pending -= 1;
    }
}
