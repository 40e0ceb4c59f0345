//! The bounded waiting line in front of the engine's thread.

use crate::{Error, Result};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Set by whoever no longer wants a job's result; the engine looks at it between tokens.
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

struct State<T> {
    waiting: VecDeque<(T, CancelFlag)>,
    running: Option<CancelFlag>,
    closed: bool,
}

/// First in, first out; at most `max_waiting` entries, cancelled ones not counted.
pub(crate) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    max_waiting: usize,
}

impl<T> Queue<T> {
    pub(crate) fn new(max_waiting: usize) -> Self {
        let state = State { waiting: VecDeque::new(), running: None, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), max_waiting }
    }

    /// The state is a few plain fields, consistent between statements, so a poisoned lock is still good.
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends an entry, or says why not. Entries whose client has left are handed back, to be told.
    pub(crate) fn push(&self, entry: T, cancel: CancelFlag) -> (Result<()>, Vec<T>) {
        let mut state = self.lock();
        let left = take_cancelled(&mut state.waiting);
        let waiting = state.waiting.len();
        let result = if state.closed {
            Err(Error::ShuttingDown)
        } else if state.running.is_some() && waiting >= self.max_waiting || waiting > self.max_waiting {
            Err(Error::QueueFull { waiting, max_queue: self.max_waiting })
        } else {
            state.waiting.push_back((entry, cancel));
            self.changed.notify_one();
            Ok(())
        };
        (result, left)
    }

    /// Waits for the next entry; `None` once the queue is closed and empty.
    pub(crate) fn pop(&self) -> Option<(T, CancelFlag)> {
        let mut state = self.lock();
        state.running = None;
        loop {
            if let Some((entry, cancel)) = state.waiting.pop_front() {
                state.running = Some(cancel.clone());
                return Some((entry, cancel));
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Entries whose client is still there and that do not run yet.
    pub(crate) fn waiting(&self) -> usize {
        self.lock().waiting.iter().filter(|(_, cancel)| !cancel.is_cancelled()).count()
    }

    /// Takes no more entries; those already in are still served.
    pub(crate) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Cancels everything waiting and running.
    pub(crate) fn cancel_all(&self) {
        let state = self.lock();
        state.waiting.iter().map(|(_, cancel)| cancel).chain(&state.running).for_each(CancelFlag::cancel);
    }
}

fn take_cancelled<T>(waiting: &mut VecDeque<(T, CancelFlag)>) -> Vec<T> {
    let (gone, kept) = std::mem::take(waiting).into_iter().partition::<VecDeque<_>, _>(|(_, c)| c.is_cancelled());
    *waiting = kept;
    gone.into_iter().map(|(entry, _)| entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_counts_waiting_entries_only() {
        let queue = Queue::new(1);
        assert!(queue.push("a", CancelFlag::default()).0.is_ok());
        assert!(queue.push("b", CancelFlag::default()).0.is_ok(), "an idle engine takes one at once");
        assert!(matches!(queue.push("c", CancelFlag::default()).0, Err(Error::QueueFull { .. })));
        assert_eq!(queue.pop().map(|e| e.0), Some("a"));
        assert!(matches!(queue.push("c", CancelFlag::default()).0, Err(Error::QueueFull { .. })));
        assert_eq!(queue.pop().map(|e| e.0), Some("b"));
        assert!(queue.push("c", CancelFlag::default()).0.is_ok());
    }

    #[test]
    fn a_cancelled_entry_frees_its_place() {
        let queue = Queue::new(0);
        let cancel = CancelFlag::default();
        assert!(queue.push("a", cancel.clone()).0.is_ok());
        cancel.cancel();
        let (result, left) = queue.push("b", CancelFlag::default());
        assert!(result.is_ok());
        assert_eq!(left, ["a"]);
    }

    #[test]
    fn a_closed_queue_serves_what_it_holds() {
        let queue = Queue::new(4);
        assert!(queue.push("a", CancelFlag::default()).0.is_ok());
        queue.close();
        assert!(matches!(queue.push("b", CancelFlag::default()).0, Err(Error::ShuttingDown)));
        assert_eq!(queue.pop().map(|e| e.0), Some("a"));
        assert!(queue.pop().is_none());
    }
}
