//! [`Door`]: a listener, and those who have connected and not yet said who they are.

use super::channel::{Channel, Frame, Kind};
use super::hello::{Hello, Refusal};
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

/// How long one may take to say who it is.
const PATIENCE: Duration = Duration::from_secs(5);
/// Of what it says.
const MOST_HELLO_BYTES: usize = 1 << 10;
/// Who have said nothing yet: of more the first are turned away.
const MOST_GUESTS: usize = 1 << 10;

/// A listener, with those who have not yet said who they are. Strangers cost nothing but their place here, for a while.
#[derive(Debug)]
pub(super) struct Door {
    listener: TcpListener,
    silent: VecDeque<Silent>,
}

#[derive(Debug)]
struct Silent {
    channel: Channel,
    from: IpAddr,
    since: Instant,
    frames: VecDeque<Frame>,
}

/// Somebody who says to be a process of a job.
#[derive(Debug)]
pub(super) struct Visitor {
    pub(super) hello: Hello,
    pub(super) from: IpAddr,
    pub(super) channel: Channel,
    /// What it has said besides.
    pub(super) frames: VecDeque<Frame>,
}

impl Door {
    pub(super) fn new(listener: TcpListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, silent: VecDeque::new() })
    }

    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Who has said its name since the last look.
    pub(super) fn look(&mut self) -> Vec<Visitor> {
        for _ in 0..MOST_GUESTS {
            // Whatever keeps a connection from being accepted may be over at the next look.
            let Ok((stream, from)) = self.listener.accept() else { break };
            if self.silent.len() == MOST_GUESTS {
                self.silent.pop_front();
            }
            let silent = Channel::over(stream, MOST_HELLO_BYTES).map(|channel| Silent {
                channel,
                from: from.ip().to_canonical(),
                since: Instant::now(),
                frames: VecDeque::new(),
            });
            self.silent.extend(silent);
        }
        let guests = std::mem::take(&mut self.silent);
        guests.into_iter().filter_map(|guest| self.listen_to(guest)).collect()
    }

    /// What a guest says, if it is one; it is kept if it has said nothing yet.
    fn listen_to(&mut self, mut guest: Silent) -> Option<Visitor> {
        guest.channel.read(&mut guest.frames).ok()?;
        match guest.frames.pop_front() {
            Some(first) => {
                let hello = Hello::decode(&first.bytes).filter(|_| first.kind == Kind::Hello)?;
                Some(Visitor { hello, from: guest.from, channel: guest.channel, frames: guest.frames })
            }
            None => {
                let waits = !guest.channel.has_ended() && guest.since.elapsed() < PATIENCE;
                self.silent.extend(waits.then_some(guest));
                None
            }
        }
    }
}

/// Tells the other end why it is turned away.
pub(super) fn refuse(channel: &mut Channel, is_final: bool, why: &str) {
    let bytes = Refusal { is_final, why: why.into() }.encode();
    channel.send(Frame { kind: Kind::Refused, epoch: 0, bytes });
}
