//! [`TcpLink`]: the connections of one rank with all others.
//!
//! Two with each: parcels and goodbyes go over one, and over the other what is short and must not wait behind megabytes, votes
//! and what is said while a smaller world is made. The second is never full, so a rank that is stopped has there, when it
//! wakes up, what it was told meanwhile.

use super::channel::{Channel, Frame, Kind, TcpTransfer};
use super::hello::Refusal;
use super::meeting::{Meeting, Word};
use crate::comm::engine::{Link, LinkResult, Tag, Trouble};
use crate::comm::pace::Pace;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Of a parcel: what MPI takes too, so that what goes over one goes over the other.
pub(super) const MOST_BYTES: usize = i32::MAX as usize;
/// Of a frame beside the parcels.
pub(super) const MOST_CONTROL_BYTES: usize = 1 << 20;
/// A rank to and from which nothing went for so many looks is idle.
const IDLE_LOOKS: u32 = 64;
/// All ranks are looked at this often for each of them, those that are not idle whenever there is a look: one takes about a
/// tenth of that.
const ALL_EVERY: Duration = Duration::from_micros(3);
/// Short messages are looked for this often; so a rank that was not running for a while hears what the others have found before
/// it finds something itself.
const CONTROL_EVERY: Duration = Duration::from_millis(1);

/// The connections of a rank with all others.
#[derive(Debug)]
pub(super) struct TcpLink {
    rank: usize,
    /// The ranks they had when the job was started.
    origins: Vec<usize>,
    /// How often the world was shrunk. What comes from an earlier one is dropped.
    epoch: u32,
    /// By rank; none for this one.
    peers: Vec<Option<Peer>>,
    /// Whole messages.
    arrived: VecDeque<(usize, Tag, Vec<u8>)>,
    last_look: LastLook,
    /// All that has come was looked for since the engine last moved on.
    looked: bool,
}

/// The connections with another rank.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) data: Channel,
    pub(super) control: Channel,
    /// What came before this rank can take it: a meeting, or a world that it is not in yet.
    pub(super) early: VecDeque<Frame>,
    /// Looks since something went to it or came from it.
    idle: u32,
    state: State,
}

/// When all ranks were last looked at, and when for short messages too.
#[derive(Debug, Default)]
struct LastLook {
    all: Option<Instant>,
    control: Option<Instant>,
}

/// What a look is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    /// Parcels of ranks that are not idle.
    Busy,
    /// Parcels of all ranks.
    All,
    /// Short messages too.
    Control,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Its connection has ended.
    Gone,
    /// The engine knows.
    Buried,
}

impl Peer {
    pub(super) fn new(data: Channel, control: Channel, early: VecDeque<Frame>) -> Self {
        const BUFFER: usize = 64 << 10;
        let data = data.widened(MOST_BYTES, BUFFER);
        Self { data, control: control.widened(MOST_CONTROL_BYTES, 0), early, idle: 0, state: State::Open }
    }

    /// Moves on what can be; what has come.
    fn look(&mut self, look: Look, frames: &mut VecDeque<Frame>) -> Result<(), String> {
        self.data.flush();
        self.control.flush();
        if look == Look::Busy && self.idle > IDLE_LOOKS {
            return Ok(());
        }
        self.data.read(frames)?;
        let is_idle = frames.is_empty() && !self.data.is_receiving();
        self.idle = if is_idle { self.idle.saturating_add(1) } else { 0 };
        if look == Look::Control || self.data.has_ended() {
            self.control.read(frames)?;
        }
        if self.data.has_ended() {
            self.state = State::Gone;
        }
        Ok(())
    }
}

impl TcpLink {
    pub(super) fn new(rank: usize, peers: Vec<Option<Peer>>) -> Result<Self, Trouble> {
        let origins = (0..peers.len()).collect();
        let link = Self {
            rank,
            origins,
            epoch: 0,
            peers,
            arrived: VecDeque::new(),
            last_look: LastLook::default(),
            looked: false,
        };
        link.with_early()
    }

    /// With what came before this world was there.
    fn with_early(mut self) -> LinkResult<Self> {
        for rank in 0..self.peers.len() {
            let early = self.peers[rank].as_mut().map(|peer| std::mem::take(&mut peer.early));
            early.into_iter().flatten().try_for_each(|frame| self.take(rank, frame))?;
        }
        Ok(self)
    }

    /// What is due to be looked at.
    fn next_look(&mut self) -> Look {
        let now = Instant::now();
        let is_due = |last: Option<Instant>, every| last.is_none_or(|last| now - last >= every);
        if is_due(self.last_look.control, CONTROL_EVERY) {
            self.last_look = LastLook { all: Some(now), control: Some(now) };
            Look::Control
        } else if is_due(self.last_look.all, ALL_EVERY * self.peers.len() as u32) {
            self.last_look.all = Some(now);
            Look::All
        } else {
            Look::Busy
        }
    }

    /// Moves on what can be on all connections.
    fn look(&mut self) -> LinkResult<()> {
        let look = self.next_look();
        let mut frames = VecDeque::new();
        for rank in 0..self.peers.len() {
            let Some(peer) = self.peers[rank].as_mut().filter(|peer| peer.state == State::Open) else { continue };
            let read = peer.look(look, &mut frames);
            while let Some(frame) = frames.pop_front() {
                self.take(rank, frame)?;
            }
            read.map_err(|what| Trouble::Other(format!("rank {rank}: {what}")))?;
        }
        Ok(())
    }

    /// A frame that has come.
    fn take(&mut self, rank: usize, frame: Frame) -> LinkResult<()> {
        if frame.epoch < self.epoch {
            return Ok(());
        }
        match frame.kind {
            Kind::Message(tag) if frame.epoch == self.epoch => self.arrived.push_back((rank, tag, frame.bytes)),
            Kind::Message(_) | Kind::Meeting => {
                if let Some(peer) = &mut self.peers[rank] {
                    peer.early.push_back(frame);
                }
            }
            Kind::Refused => {
                let why =
                    Refusal::decode(&frame.bytes).map_or_else(|| "nothing readable".into(), |refusal| refusal.why);
                return Err(Trouble::Other(format!("rank {rank} says: {why}")));
            }
            kind => return Err(Trouble::Other(format!("rank {rank} says {kind:?} in the middle of the job"))),
        }
        Ok(())
    }

    /// Comes to an agreement with the others that live on who goes on.
    fn meet(&mut self, timeout: Duration) -> LinkResult<Vec<usize>> {
        let (start, mut pace) = (Instant::now(), Pace::new());
        let mut meeting = Meeting::new(self.rank, self.peers.len(), timeout);
        loop {
            for rank in 0..self.peers.len() {
                self.hear(rank, &mut meeting, start.elapsed());
            }
            meeting.look(start.elapsed());
            for (rank, said) in meeting.take_words() {
                if let Some(peer) = &mut self.peers[rank] {
                    peer.control.send(Frame { kind: Kind::Meeting, epoch: self.epoch, bytes: said.encode() });
                }
            }
            if let Some(end) = meeting.end() {
                return end.clone().map_err(Trouble::Other);
            }
            pace.rest();
        }
    }

    /// What a rank has said in the meeting.
    fn hear(&mut self, rank: usize, meeting: &mut Meeting, now: Duration) {
        let Some(peer) = &mut self.peers[rank] else { return };
        peer.control.flush();
        // What cannot be read ends the connection.
        let _unreadable = peer.control.read(&mut peer.early);
        // What the next world says stays for it.
        let early = std::mem::take(&mut peer.early).into_iter();
        let (heard, rest): (VecDeque<_>, _) = early.partition(|frame| frame.epoch <= self.epoch);
        peer.early = rest;
        let words = heard.iter().filter(|frame| frame.kind == Kind::Meeting && frame.epoch == self.epoch);
        words.filter_map(|frame| Word::decode(&frame.bytes)).for_each(|said| meeting.hear(rank, said, now));
        if peer.control.has_ended() {
            meeting.lose(rank);
        }
    }
}

impl Link for TcpLink {
    type Transfer = TcpTransfer;

    const NAME: &'static str = "TCP";
    const MOST_BYTES: usize = MOST_BYTES;
    // A look is a call of the system for each connection: others had better run meanwhile.
    const SPINS: u32 = 0;
    const LEAVES_BEHIND: bool = true;

    fn rank(&self) -> usize {
        self.rank
    }

    fn origins(&self) -> &[usize] {
        &self.origins
    }

    fn send(&mut self, peer: usize, tag: Tag, bytes: Vec<u8>) -> LinkResult<TcpTransfer> {
        let Some(other) = &mut self.peers[peer] else {
            self.arrived.push_back((peer, tag, bytes));
            return Ok(TcpTransfer::Arrived(Vec::new()));
        };
        other.idle = 0;
        let channel = if tag == Tag::Vote { &mut other.control } else { &mut other.data };
        Ok(channel.send(Frame { kind: Kind::Message(tag), epoch: self.epoch, bytes }))
    }

    fn receive(&mut self) -> LinkResult<Option<(usize, Tag, TcpTransfer)>> {
        if !self.looked {
            // A death is told a look later than it is found: the engine has then taken all that came before it.
            if self.peers.iter().flatten().any(|peer| peer.state == State::Gone) {
                return Err(Trouble::Death);
            }
            self.look()?;
        }
        let next = self.arrived.pop_front();
        self.looked = next.is_some();
        Ok(next.map(|(peer, tag, bytes)| (peer, tag, TcpTransfer::Arrived(bytes))))
    }

    fn is_receiving(&self) -> bool {
        self.peers.iter().flatten().any(|peer| peer.data.is_receiving())
    }

    fn acknowledge_dead(&mut self) -> LinkResult<Vec<usize>> {
        let bury = |(rank, peer): (usize, &mut Option<Peer>)| {
            let state = &mut peer.as_mut().filter(|peer| peer.state == State::Gone)?.state;
            *state = State::Buried;
            Some(rank)
        };
        Ok(self.peers.iter_mut().enumerate().filter_map(bury).collect())
    }

    fn shrink(mut self, timeout: Duration) -> LinkResult<Self> {
        let members = self.meet(timeout)?;
        let mut peers: Vec<_> = members.iter().map(|&member| self.peers[member].take()).collect();
        for peer in peers.iter_mut().flatten() {
            peer.data.drop_unwritten();
            peer.state = State::Open;
        }
        let smaller = Self {
            rank: members.iter().position(|&member| member == self.rank).unwrap_or_default(),
            origins: members.iter().map(|&member| self.origins[member]).collect(),
            epoch: self.epoch + 1,
            peers,
            arrived: VecDeque::new(),
            last_look: LastLook::default(),
            looked: false,
        };
        smaller.with_early()
    }

    /// The connections are closed.
    fn finalize(self) -> LinkResult<()> {
        Ok(())
    }
}
