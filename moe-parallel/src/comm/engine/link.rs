//! [`Link`]: what an engine stands on: bytes between two processes.

use std::fmt::Debug;
use std::time::Duration;

/// The result of calls of a link.
pub(in crate::comm) type Result<T> = std::result::Result<T, Trouble>;

/// What a call of a link has come to.
#[derive(Debug)]
pub(in crate::comm) enum Trouble {
    /// A process it has to do with has died: not every link can say so.
    Death,
    /// Anything else; the text names what was tried.
    Other(String),
}

impl Trouble {
    /// For a call in which no process matters.
    pub(in crate::comm) fn into_text(self) -> String {
        match self {
            Self::Death => "a process has died".into(),
            Self::Other(text) => text,
        }
    }
}

impl From<String> for Trouble {
    fn from(text: String) -> Self {
        Self::Other(text)
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::comm) enum Tag {
    /// Part of an operation.
    Parcel = 1,
    /// A fault that its sender knows of.
    Vote = 2,
    /// The last message of its sender.
    Goodbye = 3,
}

impl Tag {
    pub(in crate::comm) const ALL: [Self; 3] = [Self::Parcel, Self::Vote, Self::Goodbye];

    /// The tag of this number.
    pub(in crate::comm) fn of(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|&tag| tag as i32 == number)
    }
}

/// Which threads of this process call the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::comm) enum Threads {
    /// The one that starts it: the engine sees to that.
    #[cfg(feature = "mpi")]
    One,
    /// Any, one at a time.
    Any,
}

/// Connects this process with the other ranks. Nothing here blocks but [`Link::shrink`] and [`Link::finalize`].
///
/// Parcels and goodbyes of a pair arrive in the order they were sent in; a vote may overtake them.
pub(in crate::comm) trait Link: Debug + Send + Sized + 'static {
    /// A message under way.
    type Transfer: Transfer;

    /// What carries the messages, in texts.
    const NAME: &'static str;
    /// Of a message.
    const MOST_BYTES: usize;
    /// Looks before a thread that waits lets others run.
    const SPINS: u32;
    /// [`Link::shrink`] goes on, after a time, without ranks that do not come. Otherwise it waits for all that live, so they
    /// have to have come before.
    const LEAVES_BEHIND: bool;

    /// This process among all.
    fn rank(&self) -> usize;

    /// The ranks that these had when the job was started.
    fn origins(&self) -> &[usize];

    /// Number of processes.
    fn size(&self) -> usize {
        self.origins().len()
    }

    /// Begins to send.
    fn send(&mut self, peer: usize, tag: Tag, bytes: Vec<u8>) -> Result<Self::Transfer>;

    /// Begins to receive a message that has come, if one has; with it, its sender and what it is. Asked until there is none,
    /// whenever the engine moves on.
    fn receive(&mut self) -> Result<Option<(usize, Tag, Self::Transfer)>>;

    /// Whether part of a message has come that [`Link::receive`] does not give yet.
    fn is_receiving(&self) -> bool {
        false
    }

    /// Ranks that have died, if this link can tell; it goes on then with the others.
    fn acknowledge_dead(&mut self) -> Result<Vec<usize>>;

    /// Why [`Link::shrink`] is impossible, if it is.
    fn cannot_shrink(&self) -> Option<&'static str> {
        None
    }

    /// The link of the ranks that live and call this, in their order, on which nothing is under way. Links that leave ranks
    /// behind wait `timeout` for them.
    fn shrink(self, timeout: Duration) -> Result<Self>;

    /// Ends it, once all have said goodbye.
    fn finalize(self) -> Result<()>;
}

/// A message under way, with its bytes.
pub(in crate::comm) trait Transfer: Send {
    /// Whether the link is done with it.
    fn test(&mut self) -> Result<bool>;

    /// The bytes of a message that has come and is done.
    fn into_bytes(self) -> Vec<u8>;
}
