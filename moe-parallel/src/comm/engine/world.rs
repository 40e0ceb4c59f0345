//! [`World`]: a process's place among the ranks of a link.

use super::communicator::EngineCommunicator;
use super::{Engine, Link, Threads, Trouble};
use crate::comm::{Communicator, Group};
use crate::{Error, Result};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// An engine with the thread that moves it on. Dropped, it leaves.
#[derive(Debug)]
pub(in crate::comm) struct World<L: Link> {
    engine: Arc<Engine<L>>,
    threads: Threads,
    origins: Vec<usize>,
    pump: Option<JoinHandle<()>>,
    ended: bool,
}

impl<L: Link> World<L> {
    /// The world, and the communicator of all its ranks. Every operation, and leaving, has to end within `timeout`.
    pub(in crate::comm) fn over(link: L, threads: Threads, timeout: Duration) -> Result<(Self, Arc<dyn Communicator>)> {
        let origins = link.origins().to_vec();
        let engine = Engine::new(link, threads, timeout);
        let pump = || {
            let pumped = Arc::clone(&engine);
            let name = format!("{}-pump", L::NAME.to_lowercase());
            let started = std::thread::Builder::new().name(name).spawn(move || pumped.pump());
            started.map_err(|error| Error::Engine(format!("no thread for {}'s progress: {error}", L::NAME)))
        };
        let pump = (threads == Threads::Any).then(pump).transpose()?;
        let group = Group::world(engine.rank, engine.size);
        let comm = EngineCommunicator { group, engine: Arc::clone(&engine) };
        Ok((Self { engine, threads, origins, pump, ended: false }, Arc::new(comm)))
    }

    /// Leaves: waits until all messages are out and all ranks leave, and ends the link.
    pub(in crate::comm) fn finish(mut self) -> Result<()> {
        self.end()
    }

    /// After a fault: a world of the ranks that live, in their order, of those that come here in time.
    pub(in crate::comm) fn shrink(mut self) -> Result<(Self, Arc<dyn Communicator>)> {
        let link = self.engine.meet_survivors()?;
        self.ended = true;
        self.pump.take().map_or(Ok(()), join::<L>)?;
        let link = link.ok_or_else(Engine::<L>::ended)?;
        let smaller = link.shrink(self.engine.timeout).map_err(Self::error)?;
        Self::over(smaller, self.threads, self.engine.timeout)
    }

    /// The ranks that these ranks had when the job was started.
    pub(in crate::comm) fn origins(&self) -> &[usize] {
        &self.origins
    }

    /// The error of a link that could not be started or ended.
    pub(in crate::comm) fn error(trouble: Trouble) -> Error {
        Error::Engine(trouble.into_text())
    }

    /// Is gone at once, as a process that is killed.
    #[cfg(test)]
    pub(in crate::comm) fn vanish(mut self) {
        self.ended = true;
        drop(self.engine.end());
        self.pump.take().map_or(Ok(()), join::<L>).expect("the pump ends");
    }

    fn end(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.ended, true) {
            return Ok(());
        }
        let left = self.engine.leave(std::thread::panicking());
        let joined = self.pump.take().map_or(Ok(()), join::<L>);
        let link = left?;
        joined?;
        link.map_or(Ok(()), Link::finalize).map_err(Self::error)
    }
}

fn join<L: Link>(pump: JoinHandle<()>) -> Result<()> {
    pump.join().map_err(|_| Error::Engine(format!("the thread of {}'s progress has panicked", L::NAME)))
}

impl<L: Link> Drop for World<L> {
    fn drop(&mut self) {
        let _told_before = self.end();
    }
}
