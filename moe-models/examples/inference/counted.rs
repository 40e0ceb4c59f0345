//! [`Counted`]: a communicator that counts what the experts' exchanges send, and the time they take, on its way to another one.

use moe_parallel::comm::{Cause, Communicator, Expected, Fault, Group, Kind, Parcel, Pending, Stamp};
use moe_parallel::{Phase, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Messages to other ranks and the bytes in them, inside the node and to other nodes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) intra_node_messages: u64,
    pub(crate) intra_node_bytes: u64,
    pub(crate) inter_node_messages: u64,
    pub(crate) inter_node_bytes: u64,
}

/// Counts of one rank, over all its groups.
#[derive(Debug, Default)]
struct Counts {
    messages: [AtomicU64; 2],
    bytes: [AtomicU64; 2],
    nanoseconds: AtomicU64,
}

impl Counts {
    /// Adds the time that something takes.
    fn timed<T>(&self, body: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = body();
        let nanoseconds = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        result
    }
}

/// An exchange under way, which is waited for on the clock.
#[derive(Debug)]
struct Timed {
    inner: Box<dyn Pending>,
    counts: Arc<Counts>,
}

impl Pending for Timed {
    fn wait(self: Box<Self>) -> Result<Vec<Parcel>> {
        let Self { inner, counts } = *self;
        counts.timed(|| inner.wait())
    }

    fn test(&mut self) -> bool {
        self.inner.test()
    }
}

/// All-to-alls of rows and counts, and the gathering of what tensor ranks have fetched apart.
fn is_of_experts(stamp: &Stamp) -> bool {
    let of_layer = stamp.site.phase == Phase::Forward && stamp.site.layer.is_some();
    of_layer && matches!(stamp.kind, Kind::AllToAll | Kind::IntraNode | Kind::InterNode | Kind::AllGather)
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Counted {
    inner: Arc<dyn Communicator>,
    ranks_per_node: usize,
    counts: Arc<Counts>,
}

impl Counted {
    /// Over `inner`, whose ranks are `ranks_per_node` to a node.
    pub(crate) fn new(inner: Arc<dyn Communicator>, ranks_per_node: usize) -> Self {
        Self { inner, ranks_per_node, counts: Arc::default() }
    }

    /// Time in exchanges so far: handing messages over, and waiting for those of others.
    pub(crate) fn exchange_time(&self) -> Duration {
        Duration::from_nanos(self.counts.nanoseconds.load(Ordering::Relaxed))
    }

    /// What has been sent so far.
    pub(crate) fn traffic(&self) -> Traffic {
        let Counts { messages, bytes, .. } = &*self.counts;
        let [messages, bytes] = [messages, bytes].map(|levels| levels.each_ref().map(|n| n.load(Ordering::Relaxed)));
        Traffic {
            intra_node_messages: messages[0],
            intra_node_bytes: bytes[0],
            inter_node_messages: messages[1],
            inter_node_bytes: bytes[1],
        }
    }
}

impl Communicator for Counted {
    fn group(&self) -> &Group {
        self.inner.group()
    }

    fn start(&self, stamp: Stamp, sends: Vec<(usize, Parcel)>, receives: &[Expected]) -> Result<Box<dyn Pending>> {
        if !is_of_experts(&stamp) {
            return self.inner.start(stamp, sends, receives);
        }
        let node = |world_rank: usize| world_rank / self.ranks_per_node;
        let here = node(self.group().world_rank());
        for (peer, parcel) in &sends {
            let level = usize::from(node(self.group().members()[*peer]) != here);
            self.counts.messages[level].fetch_add(1, Ordering::Relaxed);
            self.counts.bytes[level].fetch_add(parcel.payload().len() as u64, Ordering::Relaxed);
        }
        let inner = self.counts.timed(|| self.inner.start(stamp, sends, receives))?;
        Ok(Box::new(Timed { inner, counts: Arc::clone(&self.counts) }))
    }

    fn over(&self, group: Group) -> Arc<dyn Communicator> {
        Arc::new(Self { inner: self.inner.over(group), ..self.clone() })
    }

    fn fault(&self) -> Option<Fault> {
        self.inner.fault()
    }

    fn fail(&self, stamp: Stamp, cause: Cause) -> Fault {
        self.inner.fail(stamp, cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_parallel::comm::thread::ThreadWorld;
    use moe_parallel::{Collectives, Site};

    #[test]
    fn rows_count_by_node_and_all_else_does_not() {
        let sent = ThreadWorld::new(4).run(|comm| {
            let comm = Arc::new(Counted::new(comm, 2));
            let layer = Site::layer(Phase::Forward, 1);
            // One value for each rank of the world; two in a group of the ranks 0, 2 and 1, 3.
            comm.start_all_to_all_v(layer, &[1f32; 4], &[1; 4], &[1; 4]).unwrap().wait().unwrap();
            let members = vec![comm.rank() % 2, comm.rank() % 2 + 2];
            assert!(comm.exchange_time() > Duration::ZERO);
            let group = comm.over(Group::new(1 + comm.rank() as u64 % 2, members, comm.rank()));
            group.all_gather(layer, &[1f32; 2]).unwrap();
            comm.all_gather(Site::new(Phase::Forward), &[1f32; 2]).unwrap();
            comm.barrier(layer).unwrap();
            comm.traffic()
        });
        let want = Traffic {
            intra_node_messages: 1,
            intra_node_bytes: 4,
            inter_node_messages: 3,
            inter_node_bytes: 2 * 4 + 8,
        };
        assert!(sent.iter().all(|traffic| *traffic == want), "{sent:?}");
    }
}
