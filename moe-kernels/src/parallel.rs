//! One queue of numbered tasks over the threads of the current rayon pool.
//!
//! A task's work and the memory it writes depend on its number only, never on the thread that takes it: results are the
//! same for any number of threads.

use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

thread_local! {
    static SERIAL: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body` with every kernel that it calls on the calling thread alone: for callers that are parallel themselves.
pub fn serially<R>(body: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            SERIAL.set(self.0);
        }
    }
    let _restore = Restore(SERIAL.replace(true));
    body()
}

/// Runs `work(i)` for every `i` in `0..count`; each thread takes the next number when it is free.
pub fn for_each(count: usize, work: impl Fn(usize) + Sync) {
    let threads = if SERIAL.get() { 1 } else { rayon::current_num_threads().min(count) };
    if threads <= 1 {
        return (0..count).for_each(work);
    }
    let next = AtomicUsize::new(0);
    let run = || {
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= count {
                return;
            }
            work(task);
        }
    };
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| run());
        }
        run();
    });
}

/// Runs `work(i)` over `count` tasks on several threads only if there is enough to do: at least `least_units` of work
/// per thread, `units` in all.
pub fn for_each_if(units: usize, least_units: usize, count: usize, work: impl Fn(usize) + Sync) {
    if units < 2 * least_units { (0..count).for_each(work) } else { for_each(count, work) }
}

/// A pointer that tasks share to write disjoint parts of one buffer.
#[derive(Debug)]
pub(crate) struct SharedMut<T>(*mut T, usize);

impl<T> Clone for SharedMut<T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SharedMut<T> {}

// SAFETY: the pointer is only turned into slices by `slice`, whose caller promises that they do not overlap.
unsafe impl<T: Send> Send for SharedMut<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<T> {}

impl<T> SharedMut<T> {
    pub(crate) fn new(buffer: &mut [T]) -> Self {
        Self(buffer.as_mut_ptr(), buffer.len())
    }

    /// `len` elements at `pointer`, which need not hold values yet.
    pub(crate) fn from_raw(pointer: *mut T, len: usize) -> Self {
        Self(pointer, len)
    }

    /// Elements of the buffer.
    pub(crate) fn len(self) -> usize {
        self.1
    }

    /// The part `start..start + len`.
    ///
    /// # Safety
    /// The buffer must outlive the slice, and no two live slices may overlap.
    pub(crate) unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.1), "a task must stay inside its buffer");
        // SAFETY: inside the buffer by the assertion; lifetime and exclusiveness are the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(start), len) }
    }

    /// The address of element `start`.
    pub(crate) fn at(self, start: usize) -> *mut T {
        assert!(start <= self.1, "a task must stay inside its buffer");
        self.0.wrapping_add(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn serial_work_stays_on_the_calling_thread() {
        let here = std::thread::current().id();
        serially(|| for_each(1000, |_| assert_eq!(std::thread::current().id(), here)));
        assert!(!SERIAL.get());
    }

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 3, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            for count in [0, 1, 2, 7, 100] {
                let seen: Vec<AtomicU32> = (0..count).map(|_| AtomicU32::new(0)).collect();
                pool.install(|| {
                    for_each(count, |i| {
                        seen[i].fetch_add(1, Ordering::Relaxed);
                    });
                });
                assert!(seen.iter().all(|s| s.load(Ordering::Relaxed) == 1), "{threads} threads, {count} tasks");
            }
        }
    }
}
