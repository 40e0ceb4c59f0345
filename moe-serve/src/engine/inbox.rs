//! The bounded way into the engine's thread.

use super::request::{Job, Listener};
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Set by whoever no longer wants a job's result; the engine looks at it between steps.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Asks the engine to give the job up.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether the job is given up.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A job on its way.
pub(super) struct Submission {
    /// In the order of arrival.
    pub(super) number: u64,
    pub(super) job: Job,
    pub(super) listener: Box<dyn Listener>,
    pub(super) cancel: CancelFlag,
    pub(super) submitted: Instant,
}

/// A job that has not ended.
struct Known {
    cancel: CancelFlag,
    started: bool,
}

struct State {
    next: u64,
    arrived: Vec<Submission>,
    known: BTreeMap<u64, Known>,
    /// Sequences that could start at once.
    open: usize,
    closed: bool,
    /// Whether what is kept of prompts is to be given up.
    forget: bool,
}

/// Jobs that have arrived, and those that have not ended.
pub(super) struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
    max_waiting: usize,
}

impl Inbox {
    /// At most `max_waiting` jobs may wait beyond the `open` sequences that could start.
    pub(super) fn new(max_waiting: usize, open: usize) -> Self {
        let state = State { next: 0, arrived: Vec::new(), known: BTreeMap::new(), open, closed: false, forget: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), max_waiting }
    }

    /// The state is a few plain fields, consistent between statements, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more job would be taken in.
    pub(super) fn check_room(&self) -> Result<()> {
        self.check_room_in(&self.lock())
    }

    fn check_room_in(&self, state: &State) -> Result<()> {
        let waiting = waiting(state);
        if state.closed {
            return Err(Error::ShuttingDown);
        }
        if waiting >= self.max_waiting.saturating_add(state.open) {
            return Err(Error::QueueFull { waiting, max_queue: self.max_waiting });
        }
        Ok(())
    }

    /// Takes a job in, or says why not.
    pub(super) fn push(&self, job: Job, listener: Box<dyn Listener>, cancel: CancelFlag) -> Result<()> {
        let mut state = self.lock();
        self.check_room_in(&state)?;
        let number = state.next;
        state.next += 1;
        state.known.insert(number, Known { cancel: cancel.clone(), started: false });
        state.arrived.push(Submission { number, job, listener, cancel, submitted: Instant::now() });
        self.changed.notify_one();
        Ok(())
    }

    /// What has arrived. Where `idle`, waits for something to arrive, for `limit` at most; `None` once nothing can any more.
    pub(super) fn take(&self, idle: bool, limit: Option<Duration>) -> Option<Vec<Submission>> {
        let mut state = self.lock();
        let until = limit.map(|limit| Instant::now() + limit);
        while idle && state.arrived.is_empty() && !state.forget {
            if state.closed {
                return None;
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            state = match left {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => break,
                Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
        Some(std::mem::take(&mut state.arrived))
    }

    /// Asks for what is kept of prompts to be given up.
    pub(super) fn forget(&self) {
        self.lock().forget = true;
        self.changed.notify_all();
    }

    /// Whether that was asked for since the last time.
    pub(super) fn take_forget(&self) -> bool {
        std::mem::take(&mut self.lock().forget)
    }

    /// Whether jobs are still taken.
    pub(super) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// A job does not wait any more.
    pub(super) fn started(&self, number: u64) {
        if let Some(known) = self.lock().known.get_mut(&number) {
            known.started = true;
        }
    }

    /// A job has ended.
    pub(super) fn ended(&self, number: u64) {
        self.lock().known.remove(&number);
    }

    /// So many more sequences could start at once.
    pub(super) fn set_open(&self, open: usize) {
        self.lock().open = open;
    }

    /// Jobs that have not started and that somebody still waits for.
    pub(super) fn waiting(&self) -> usize {
        waiting(&self.lock())
    }

    /// Takes no more jobs; those already in are still run.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Cancels all jobs.
    pub(super) fn cancel_all(&self) {
        self.lock().known.values().for_each(|known| known.cancel.cancel());
    }
}

fn waiting(state: &State) -> usize {
    state.known.values().filter(|known| !known.started && !known.cancel.is_cancelled()).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::{FinishReason, Flow, PromptOutput, SampledToken, SamplingParams, StopParams};
    use moe_models::LayerExperts;

    struct Deaf;

    impl Listener for Deaf {
        fn prompt(&mut self, _: usize, _: PromptOutput) {}
        fn token(&mut self, _: usize, _: SampledToken) -> Flow {
            Flow::Continue
        }
        fn experts(&mut self, _: usize, _: Vec<LayerExperts>) {}
        fn finished(&mut self, _: usize, _: FinishReason) {}
        fn done(&mut self, _: Result<()>) {}
    }

    fn push(inbox: &Inbox, cancel: &CancelFlag) -> Result<()> {
        let (sampling, stop) = (SamplingParams::default(), StopParams::default());
        let job = Job { prompts: vec![vec![1]], sampling, stop, ..Job::default() };
        inbox.push(job, Box::new(Deaf), cancel.clone())
    }

    #[test]
    fn the_bound_counts_jobs_that_wait_and_are_wanted() {
        let inbox = Inbox::new(1, 1);
        let flags: Vec<CancelFlag> = (0..4).map(|_| CancelFlag::default()).collect();
        push(&inbox, &flags[0]).expect("one could start at once");
        push(&inbox, &flags[1]).expect("one may wait");
        assert!(matches!(push(&inbox, &flags[2]), Err(Error::QueueFull { waiting: 2, max_queue: 1 })));
        let numbers: Vec<u64> = inbox.take(true, None).expect("open").iter().map(|s| s.number).collect();
        assert_eq!(numbers, [0, 1]);
        inbox.started(0);
        inbox.set_open(0);
        assert_eq!(inbox.waiting(), 1);
        assert!(push(&inbox, &flags[2]).is_err(), "one runs, one waits");
        flags[1].cancel();
        assert_eq!(inbox.waiting(), 0);
        push(&inbox, &flags[2]).expect("who leaves makes room");
        inbox.ended(0);
        inbox.cancel_all();
        assert!(flags[2].is_cancelled() && !flags[0].is_cancelled());
    }

    #[test]
    fn closing_serves_what_is_in_and_then_ends() {
        let inbox = Inbox::new(4, 0);
        push(&inbox, &CancelFlag::default()).expect("open");
        inbox.close();
        assert!(matches!(push(&inbox, &CancelFlag::default()), Err(Error::ShuttingDown)));
        assert_eq!(inbox.take(true, None).map(|arrived| arrived.len()), Some(1));
        assert_eq!(inbox.take(false, None).map(|arrived| arrived.len()), Some(0), "who still works does not wait");
        assert!(inbox.take(true, None).is_none());
        let open = Inbox::new(4, 0);
        let begun = Instant::now();
        assert_eq!(open.take(true, Some(Duration::from_millis(20))).map(|arrived| arrived.len()), Some(0));
        assert!(begun.elapsed() >= Duration::from_millis(20));
    }
}
