//! [`Channel`]: frames over one TCP connection that never blocks.
//!
//! A frame is a header and bytes. It is written from where its bytes are and read to where they stay; only small ones go through
//! a buffer, so that one call of the system brings several. Who is at the other end is not known here: a length is refused
//! before anything is allocated for it if it is over what the channel takes.

use crate::comm::engine::{LinkResult, Tag, Transfer};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// In front of a frame's bytes: [`MAGIC`], world, length (each 4 bytes, numbers little-endian), kind, nothing (3 bytes).
const HEADER: usize = 16;
/// What every frame begins with.
const MAGIC: [u8; 4] = *b"moeT";
/// Read or written on one channel before another has its turn.
const TURN_BYTES: usize = 4 << 20;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A message of the engine.
    Message(Tag),
    /// Who connects, and what for.
    Hello,
    /// To ranks that have come to rank 0: where all are.
    Table,
    /// To a rank that has connected: it is welcome.
    Accepted,
    /// Why the other end is turned away, or the whole job ends.
    Refused,
    /// What ranks say to each other when they make a smaller world.
    Meeting,
}

impl Kind {
    const OTHERS: [Self; 5] = [Self::Hello, Self::Table, Self::Accepted, Self::Refused, Self::Meeting];
    /// Number of the first of [`Kind::OTHERS`].
    const FIRST: u8 = 16;

    fn number(self) -> u8 {
        match self {
            Self::Message(tag) => tag as u8,
            other => Self::OTHERS.iter().zip(Self::FIRST..).find(|(kind, _)| **kind == other).map_or(0, |(_, n)| n),
        }
    }

    fn of(number: u8) -> Option<Self> {
        let other = || Self::OTHERS.get(usize::from(number.checked_sub(Self::FIRST)?)).copied();
        Tag::of(number.into()).map(Self::Message).or_else(other)
    }
}

/// What is sent at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: Kind,
    /// Of the sender's world: how often it was shrunk.
    pub(super) epoch: u32,
    pub(super) bytes: Vec<u8>,
}

impl Frame {
    /// # Panics
    /// If its length does not fit the header: what is sent is bounded.
    fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&MAGIC);
        header[4..8].copy_from_slice(&self.epoch.to_le_bytes());
        let len = u32::try_from(self.bytes.len()).expect("a frame is no longer than its channel takes");
        header[8..12].copy_from_slice(&len.to_le_bytes());
        header[12] = self.kind.number();
        header
    }
}

/// A frame of which a part has come.
#[derive(Debug)]
struct Coming {
    frame: Frame,
    missing: usize,
}

impl Coming {
    /// The frame of a header, if its length is at most `most`; else what is wrong with it.
    fn of(header: &[u8; HEADER], most: usize) -> Result<Self, String> {
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let [.., kind, _, _, _] = *header;
        let (epoch, missing) = (word(4), word(8) as usize);
        let kind = Kind::of(kind).filter(|_| header[..4] == MAGIC).ok_or("it sends what is no frame of this engine")?;
        if missing > most {
            return Err(format!("it sends a frame of {missing} bytes, where {most} are the most"));
        }
        let mut bytes = Vec::new();
        let no_memory = |_| format!("there is no memory for its message of {missing} bytes");
        bytes.try_reserve_exact(missing).map_err(no_memory)?;
        Ok(Self { frame: Frame { kind, epoch, bytes }, missing })
    }
}

/// What a read or a write has come to.
enum Moved {
    /// There may be more.
    More,
    /// There is no more for now.
    Enough,
    /// The connection has ended.
    Ended,
}

impl Moved {
    fn failed(error: &io::Error) -> Self {
        match error.kind() {
            ErrorKind::WouldBlock => Self::Enough,
            ErrorKind::Interrupted => Self::More,
            _ => Self::Ended,
        }
    }
}

/// A connection.
#[derive(Debug)]
pub(super) struct Channel {
    stream: TcpStream,
    /// Of a frame's bytes.
    most: usize,
    /// What was read and not yet taken is `buffer[from..to]`.
    buffer: Vec<u8>,
    from: usize,
    to: usize,
    coming: Option<Coming>,
    /// It will bring nothing more: the other end is gone.
    ended: bool,
    outgoing: VecDeque<Outgoing>,
    queued: u64,
    /// Frames that are written, or never will be.
    written: Arc<AtomicU64>,
}

/// A frame that waits to be written.
#[derive(Debug)]
struct Outgoing {
    header: [u8; HEADER],
    bytes: Vec<u8>,
    /// Of both.
    written: usize,
}

impl Outgoing {
    fn write(&self, mut to: &TcpStream) -> io::Result<usize> {
        let end = |written: usize| self.bytes.len().min(written + TURN_BYTES);
        match self.written.checked_sub(HEADER) {
            Some(written) => to.write(&self.bytes[written..end(written)]),
            None => {
                let parts = [IoSlice::new(&self.header[self.written..]), IoSlice::new(&self.bytes[..end(0)])];
                to.write_vectored(&parts)
            }
        }
    }

    fn len(&self) -> usize {
        HEADER + self.bytes.len()
    }
}

impl Channel {
    /// Over a connection, whose frames have at most `most` bytes.
    pub(super) fn over(stream: TcpStream, most: usize) -> io::Result<Self> {
        const BUFFER: usize = 4 << 10;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            most,
            buffer: vec![0; BUFFER],
            from: 0,
            to: 0,
            coming: None,
            ended: false,
            outgoing: VecDeque::new(),
            queued: 0,
            written: Arc::default(),
        })
    }

    /// The same for frames of up to `most` bytes, with a buffer of `buffer` bytes.
    pub(super) fn widened(mut self, most: usize, buffer: usize) -> Self {
        self.most = most;
        self.buffer.resize(buffer.max(self.buffer.len()), 0);
        self
    }

    /// Whether the other end is gone, and all that it has sent is read.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether part of a frame has come.
    pub(super) fn is_receiving(&self) -> bool {
        self.coming.is_some()
    }

    /// Takes what has come, for a turn: whole frames go to `frames`. An error, which begins with "it", if it cannot be read;
    /// the channel is of no use then.
    pub(super) fn read(&mut self, frames: &mut VecDeque<Frame>) -> Result<(), String> {
        let mut left = TURN_BYTES;
        while left > 0 && !self.ended {
            let (moved, read) = match &mut self.coming {
                Some(coming) => read_rest(&self.stream, coming),
                None => self.fill(),
            };
            left = left.saturating_sub(read);
            self.ended |= matches!(moved, Moved::Ended);
            self.take(frames).inspect_err(|_| self.ended = true)?;
            if !matches!(moved, Moved::More) {
                break;
            }
        }
        Ok(())
    }

    /// Reads into the buffer, of which all is taken but part of a header.
    fn fill(&mut self) -> (Moved, usize) {
        self.buffer.copy_within(self.from..self.to, 0);
        (self.from, self.to) = (0, self.to - self.from);
        match (&self.stream).read(&mut self.buffer[self.to..]) {
            Ok(0) => (Moved::Ended, 0),
            Ok(read) => {
                self.to += read;
                // What is read in part is read to its end.
                (if self.to == self.buffer.len() { Moved::More } else { Moved::Enough }, read)
            }
            Err(error) => (Moved::failed(&error), 0),
        }
    }

    /// Takes frames out of the buffer.
    fn take(&mut self, frames: &mut VecDeque<Frame>) -> Result<(), String> {
        loop {
            if self.coming.is_none() {
                let Some(header) = self.buffer[self.from..self.to].first_chunk() else { return Ok(()) };
                self.coming = Some(Coming::of(header, self.most)?);
                self.from += HEADER;
            }
            let Some(coming) = &mut self.coming else { return Ok(()) };
            let part = coming.missing.min(self.to - self.from);
            coming.frame.bytes.extend_from_slice(&self.buffer[self.from..self.from + part]);
            coming.missing -= part;
            self.from += part;
            if coming.missing > 0 {
                return Ok(());
            }
            frames.extend(self.coming.take().map(|coming| coming.frame));
        }
    }

    /// Sends a frame, after those sent before; what can be written is written at once.
    pub(super) fn send(&mut self, frame: Frame) -> TcpTransfer {
        self.queued += 1;
        let header = frame.header();
        self.outgoing.push_back(Outgoing { header, bytes: frame.bytes, written: 0 });
        if self.outgoing.len() == 1 {
            self.flush();
        }
        TcpTransfer::Leaving { number: self.queued, written: Arc::clone(&self.written) }
    }

    /// Writes what can be, for a turn. To an end that is gone everything can.
    pub(super) fn flush(&mut self) {
        let mut left = TURN_BYTES;
        while let Some(first) = self.outgoing.front_mut().filter(|_| left > 0) {
            let moved = match first.write(&self.stream) {
                Ok(0) => Moved::Ended,
                Ok(written) => {
                    first.written += written;
                    left = left.saturating_sub(written);
                    if first.written == first.len() { Moved::More } else { Moved::Enough }
                }
                Err(error) => Moved::failed(&error),
            };
            match moved {
                Moved::More if first.written == first.len() => self.drop_first(),
                Moved::More => {}
                Moved::Enough => return,
                // That it is gone is found where it is read.
                Moved::Ended => (0..self.outgoing.len()).for_each(|_| self.drop_first()),
            }
        }
    }

    /// Drops what waits to be written, but for a frame of which a part is.
    pub(super) fn drop_unwritten(&mut self) {
        let begun = usize::from(self.outgoing.front().is_some_and(|first| first.written > 0));
        self.written.fetch_add((self.outgoing.len() - begun) as u64, Ordering::Relaxed);
        self.outgoing.truncate(begun);
    }

    fn drop_first(&mut self) {
        self.outgoing.pop_front();
        self.written.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads the rest of a frame to where it stays.
fn read_rest(stream: &TcpStream, coming: &mut Coming) -> (Moved, usize) {
    let (before, wanted) = (coming.frame.bytes.len(), coming.missing.min(TURN_BYTES));
    let result = stream.take(wanted as u64).read_to_end(&mut coming.frame.bytes);
    // An error comes after what was read before it.
    let read = coming.frame.bytes.len() - before;
    coming.missing -= read;
    let moved = match result {
        Ok(_) if read == wanted => Moved::More,
        Ok(_) => Moved::Ended,
        Err(error) => Moved::failed(&error),
    };
    (moved, read)
}

/// A message of the engine on its way.
#[derive(Debug)]
pub(in crate::comm) enum TcpTransfer {
    /// It has come.
    Arrived(Vec<u8>),
    /// It is the frame of this number on a channel, which counts those that it has written.
    Leaving { number: u64, written: Arc<AtomicU64> },
}

impl Transfer for TcpTransfer {
    fn test(&mut self) -> LinkResult<bool> {
        Ok(match self {
            Self::Arrived(_) => true,
            Self::Leaving { number, written } => written.load(Ordering::Relaxed) >= *number,
        })
    }

    fn into_bytes(self) -> Vec<u8> {
        match self {
            Self::Arrived(bytes) => bytes,
            Self::Leaving { .. } => Vec::new(),
        }
    }
}
