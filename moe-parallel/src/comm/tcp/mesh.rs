//! [`Mesh`]: ranks that know of each other connect, each with all others.

use super::TcpConfig;
use super::channel::{Channel, Frame, Kind};
use super::door::{Door, Visitor, refuse};
use super::hello::{Cookie, Guest, Hello, Purpose, Refusal, VERSION};
use super::link::{MOST_BYTES, MOST_CONTROL_BYTES, Peer};
use crate::comm::pace::Pace;
use std::collections::VecDeque;
use std::fmt::Display;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Errors are texts, which name what to change.
pub(super) type Result<T> = std::result::Result<T, String>;

/// Since the start.
#[derive(Clone, Copy)]
pub(super) struct Time {
    pub(super) start: Instant,
    pub(super) timeout: Duration,
}

impl Time {
    pub(super) fn left(self) -> Duration {
        self.timeout.saturating_sub(self.start.elapsed())
    }

    pub(super) fn is_over(self) -> bool {
        self.left().is_zero()
    }
}

/// The connections with another rank, as far as there are any.
#[derive(Default)]
pub(super) struct Half {
    pub(super) control: Option<Channel>,
    pub(super) data: Option<Channel>,
    /// What came over the first.
    pub(super) frames: VecDeque<Frame>,
}

impl Half {
    fn set(&mut self, purpose: Purpose, channel: Channel) {
        match purpose {
            Purpose::Data => self.data = Some(channel),
            Purpose::Control | Purpose::Join => self.control = Some(channel.widened(MOST_CONTROL_BYTES, 0)),
        }
    }

    fn has(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Data => self.data.is_some(),
            Purpose::Control | Purpose::Join => self.control.is_some(),
        }
    }

    fn into_peer(self) -> Option<Peer> {
        Some(Peer::new(self.data?, self.control?, self.frames))
    }
}

/// A job whose ranks know of each other and connect.
pub(super) struct Mesh<'a> {
    pub(super) config: &'a TcpConfig,
    pub(super) cookie: Cookie,
    pub(super) door: Door,
    pub(super) halves: Vec<Half>,
    /// Connections whose other end has not answered yet.
    pub(super) asked: Vec<(usize, Purpose, Channel)>,
    pub(super) time: Time,
}

impl Mesh<'_> {
    /// Connects to a rank.
    pub(super) fn ask(&mut self, rank: usize, purpose: Purpose, address: SocketAddr) -> Result<()> {
        let failed = |why: &dyn Display| {
            format!(
                "rank {} and rank {rank} at {address}: {why}; ranks must reach each other at any port",
                self.config.rank
            )
        };
        let stream = dial_at(address, self.time.left()).map_err(|why| failed(&why))?;
        // Parcels may follow the answer.
        let most = if purpose == Purpose::Data { MOST_BYTES } else { MOST_CONTROL_BYTES };
        let mut channel = Channel::over(stream, most).map_err(|error| failed(&error))?;
        channel.send(hello(self.config, purpose, self.cookie, address));
        self.asked.push((rank, purpose, channel));
        Ok(())
    }

    /// Waits until all connections are there.
    pub(super) fn complete(mut self) -> Result<Vec<Option<Peer>>> {
        let mut pace = Pace::new();
        while !self.missing().is_empty() {
            if let Err(why) = self.look() {
                return Err(self.fail(why));
            }
            pace.rest();
        }
        Ok(self.halves.into_iter().map(Half::into_peer).collect())
    }

    /// Ranks with which a connection is missing.
    fn missing(&self) -> Vec<usize> {
        let is_whole = |rank: usize| self.halves[rank].has(Purpose::Control) && self.halves[rank].has(Purpose::Data);
        (0..self.halves.len()).filter(|&rank| rank != self.config.rank && !is_whole(rank)).collect()
    }

    fn look(&mut self) -> Result<()> {
        if self.time.is_over() {
            let (rank, missing) = (self.config.rank, self.missing());
            let seconds = self.time.timeout.as_secs_f64();
            return Err(format!("rank {rank} is not connected with ranks {missing:?} within {seconds:.1} s"));
        }
        for visitor in self.door.look() {
            self.admit(visitor);
        }
        let heard = self.hear_answers();
        let asked = |rank: usize| self.asked.iter().any(|(other, ..)| *other == rank);
        let watched = self.halves.iter_mut().enumerate().try_for_each(|(rank, half)| watch(rank, half, asked(rank)));
        // Who gives up says why on one connection, then ends all.
        watched.and(heard)
    }

    /// Takes a connection of a higher rank; all others are dropped.
    fn admit(&mut self, mut visitor: Visitor) {
        let ours = visitor.hello.guest.filter(|_| visitor.hello.job == self.config.job);
        let Some(Guest { purpose, rank, cookie, .. }) = ours else { return };
        if purpose == Purpose::Join {
            refuse(&mut visitor.channel, true, &format!("all ranks have come; is rank {rank} started twice?"));
        } else if cookie == self.cookie && rank > self.config.rank && rank < self.halves.len() {
            let half = &mut self.halves[rank];
            if !half.has(purpose) {
                visitor.channel.send(Frame { kind: Kind::Accepted, epoch: 0, bytes: Vec::new() });
                half.frames.append(&mut visitor.frames);
                half.set(purpose, visitor.channel);
            }
        }
    }

    /// Keeps the connections that were accepted.
    fn hear_answers(&mut self) -> Result<()> {
        for (rank, purpose, mut channel) in std::mem::take(&mut self.asked) {
            let mut frames = VecDeque::new();
            channel.flush();
            channel.read(&mut frames).map_err(|what| format!("rank {rank}: {what}"))?;
            match frames.pop_front() {
                Some(Frame { kind: Kind::Accepted, .. }) => {
                    self.halves[rank].frames.append(&mut frames);
                    self.halves[rank].set(purpose, channel);
                }
                Some(_) => {
                    return Err(format!("rank {rank} does not accept a connection of rank {}", self.config.rank));
                }
                None if channel.has_ended() => return Err(format!("rank {rank} has ended while the ranks connected")),
                None => self.asked.push((rank, purpose, channel)),
            }
        }
        Ok(())
    }

    /// Tells all others, as far as there are connections, why there will be no job.
    pub(super) fn fail(mut self, why: String) -> String {
        let controls = self.halves.iter_mut().filter_map(|half| half.control.as_mut());
        controls.for_each(|control| refuse(control, true, &why));
        why
    }
}

/// An error if a rank says that there will be no job, or is gone before it has connected. (One that is connected may have
/// begun, and died; the engine finds that. One that still has to answer ends that connection too.)
fn watch(rank: usize, half: &mut Half, is_asked: bool) -> Result<()> {
    let Some(control) = &mut half.control else { return Ok(()) };
    control.flush();
    control.read(&mut half.frames).map_err(|what| format!("rank {rank}: {what}"))?;
    let refused = half.frames.iter().find(|frame| frame.kind == Kind::Refused);
    if let Some(Refusal { why, .. }) = refused.and_then(|frame| Refusal::decode(&frame.bytes)) {
        return Err(format!("rank {rank} says: {why}"));
    }
    let is_missing = control.has_ended() && half.data.is_none() && !is_asked;
    if is_missing { Err(format!("rank {rank} has ended while the ranks connected")) } else { Ok(()) }
}

/// What a connection begins with.
pub(super) fn hello(config: &TcpConfig, purpose: Purpose, cookie: Cookie, listens: SocketAddr) -> Frame {
    let guest = Guest { purpose, rank: config.rank, size: config.size, cookie, listens };
    let hello = Hello { version: VERSION, job: config.job.clone(), guest: Some(guest) };
    Frame { kind: Kind::Hello, epoch: 0, bytes: hello.encode() }
}

/// A connection to an address.
pub(super) fn dial_at(address: SocketAddr, within: Duration) -> Result<TcpStream> {
    // No time at all is refused.
    TcpStream::connect_timeout(&address, within.max(Duration::from_millis(1)))
        .map_err(|error| format!("cannot connect to {address}: {error}"))
}
