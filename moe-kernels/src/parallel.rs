//! One queue of numbered tasks over the threads of the current rayon pool.
//!
//! A task's work and the memory it writes depend on its number only, never on the thread that takes it: results are the
//! same for any number of threads.

use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

thread_local! {
    static SERIAL: Cell<bool> = const { Cell::new(false) };
    /// The team that the calling thread leads.
    static TEAM: Cell<*const Team> = const { Cell::new(ptr::null()) };
}

/// Gives a thread-local its old value back when dropped.
struct Restore<T: Copy + 'static>(&'static std::thread::LocalKey<Cell<T>>, T);

impl<T: Copy> Drop for Restore<T> {
    fn drop(&mut self) {
        self.0.set(self.1);
    }
}

/// Runs `body` with every kernel that it calls on the calling thread alone: for callers that are parallel themselves.
pub fn serially<R>(body: impl FnOnce() -> R) -> R {
    let _restore = Restore(&SERIAL, SERIAL.replace(true));
    body()
}

/// Runs `body` with the pool's threads kept awake from one kernel to the next: a thread that has gone to sleep takes longer
/// to wake (50 us and more) than a small product takes. For a chain of short kernels; the threads that wait do so busily.
///
/// On a thread of the pool `body` runs as it is: its waiting neighbours would take no other work, and a thread that waits
/// for one of them could itself become one. Threads that find nothing to do for 20 ms go back to the pool, so a `body`
/// that uses the pool by other means than this module gets its threads after that time.
pub fn together<R>(body: impl FnOnce() -> R) -> R {
    if rayon::current_thread_index().is_some() { body() } else { with_team(body) }
}

/// How long a waiting thread stays awake: many times what lies between two kernels of one chain.
const IDLE: Duration = Duration::from_millis(20);

/// [`together`], on any thread.
fn with_team<R>(body: impl FnOnce() -> R) -> R {
    let threads = rayon::current_num_threads();
    if threads <= 1 || SERIAL.get() || !TEAM.get().is_null() {
        return body();
    }
    let team = Team { helpers: AtomicUsize::new(threads - 1), ..Team::default() };
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| team.help());
        }
        // Dropped before the scope waits for its threads, also if `body` panics.
        let _dismiss = Dismiss(&team);
        let _restore = Restore(&TEAM, TEAM.replace(&raw const team));
        body()
    })
}

/// Threads that wait for the kernels of one leader.
#[derive(Debug, Default)]
struct Team {
    /// The tasks at hand, or null.
    queue: AtomicPtr<Queue<'static>>,
    /// Helpers that may be reading `queue`.
    inside: AtomicUsize,
    /// Helpers that have not gone back to the pool.
    helpers: AtomicUsize,
    dismissed: AtomicBool,
}

struct Dismiss<'a>(&'a Team);

impl Drop for Dismiss<'_> {
    fn drop(&mut self) {
        self.0.dismissed.store(true, Ordering::SeqCst);
    }
}

/// Turns of a waiting loop before the thread offers its core to others.
const PATIENCE: u32 = 4096;

fn wait_until(mut ready: impl FnMut() -> bool) {
    let mut turns = 0;
    while !ready() {
        pause(&mut turns);
    }
}

fn pause(turns: &mut u32) {
    *turns = turns.saturating_add(1);
    if *turns < PATIENCE { std::hint::spin_loop() } else { std::thread::yield_now() }
}

impl Team {
    fn help(&self) {
        let (mut turns, mut last_work) = (0, Instant::now());
        while !self.dismissed.load(Ordering::Relaxed) {
            if self.help_once() {
                (turns, last_work) = (0, Instant::now());
            }
            pause(&mut turns);
            if turns >= PATIENCE && last_work.elapsed() > IDLE {
                break;
            }
        }
        self.helpers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Takes part in the queue at hand; whether there was a task left in it.
    fn help_once(&self) -> bool {
        if self.queue.load(Ordering::Relaxed).is_null() {
            return false;
        }
        let _inside = Inside::enter(&self.inside);
        // A leader that takes its queue back waits for every helper that entered before, and one that enters after
        // finds null.
        let queue = self.queue.load(Ordering::SeqCst);
        // SAFETY: the leader keeps the queue alive while a helper is inside.
        unsafe { queue.as_ref() }.is_some_and(|queue| serially(|| queue.run()))
    }

    /// Runs a queue on the leader and every helper that is awake.
    fn lead(&self, queue: &Queue<'_>) {
        /// Takes the queue back, also if a task panics.
        struct TakeBack<'a>(&'a Team);
        impl Drop for TakeBack<'_> {
            fn drop(&mut self) {
                self.0.queue.store(ptr::null_mut(), Ordering::SeqCst);
                wait_until(|| self.0.inside.load(Ordering::SeqCst) == 0);
            }
        }
        let _take_back = TakeBack(self);
        self.queue.store((&raw const *queue).cast_mut().cast(), Ordering::SeqCst);
        // A kernel inside a task stays on its thread: there is one queue at a time.
        serially(|| queue.run());
    }
}

struct Inside<'a>(&'a AtomicUsize);

impl<'a> Inside<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Numbered tasks, dealt out as one run of neighbours per thread: neighbours read neighbouring memory. A thread that is
/// done takes from the end of the longest run that is left.
struct Queue<'a> {
    work: &'a (dyn Fn(usize) + Sync),
    /// First task and end of what is left of each run, in the two halves.
    runs: Vec<AtomicU64>,
    /// Runs taken by threads so far.
    taken: AtomicUsize,
}

impl<'a> Queue<'a> {
    fn new(count: usize, threads: usize, work: &'a (dyn Fn(usize) + Sync)) -> Self {
        assert!(u32::try_from(count).is_ok(), "a queue holds fewer than 2^32 tasks, got {count}");
        let bound = |run: usize| (run * count / threads) as u64;
        let runs = (0..threads).map(|run| AtomicU64::new(bound(run) << 32 | bound(run + 1))).collect();
        Self { work, runs, taken: AtomicUsize::new(0) }
    }

    /// Takes tasks until none is left; whether there was one.
    fn run(&self) -> bool {
        let mut worked = false;
        let mut work = |task| {
            worked = true;
            (self.work)(task);
        };
        let own = self.taken.fetch_add(1, Ordering::Relaxed);
        if let Some(run) = self.runs.get(own) {
            while let Some(task) = take(run, |first, end| (first, (first + 1, end))) {
                work(task);
            }
        }
        let left = |run: &&AtomicU64| {
            let (first, end) = halves(run.load(Ordering::Relaxed));
            end - first
        };
        while let Some(run) = self.runs.iter().max_by_key(left).filter(|run| left(run) > 0) {
            if let Some(task) = take(run, |first, end| (end - 1, (first, end - 1))) {
                work(task);
            }
        }
        worked
    }
}

fn halves(run: u64) -> (u32, u32) {
    ((run >> 32) as u32, run as u32)
}

/// One task of a run, if any is left: `split` gives it and the run without it.
fn take(run: &AtomicU64, split: impl Fn(u32, u32) -> (u32, (u32, u32))) -> Option<usize> {
    let without = |run| {
        let (first, end) = halves(run);
        (first < end).then(|| {
            let (_, (first, end)) = split(first, end);
            u64::from(first) << 32 | u64::from(end)
        })
    };
    let (first, end) = halves(run.fetch_update(Ordering::Relaxed, Ordering::Relaxed, without).ok()?);
    Some(split(first, end).0 as usize)
}

/// Threads that [`for_each`] called here would take.
pub(crate) fn threads() -> usize {
    if SERIAL.get() { 1 } else { rayon::current_num_threads() }
}

/// Runs `work(i)` for every `i` in `0..count`; each thread takes the next task when it is free.
pub fn for_each(count: usize, work: impl Fn(usize) + Sync) {
    let threads = threads().min(count);
    if threads <= 1 {
        return (0..count).for_each(work);
    }
    let queue = Queue::new(count, threads, &work);
    let team = TEAM.get();
    // SAFETY: set by `with_team` on this thread for as long as the team lives.
    if let Some(team) = unsafe { team.as_ref() }
        && team.helpers.load(Ordering::Relaxed) > 0
    {
        return team.lead(&queue);
    }
    rayon::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(|_| _ = queue.run());
        }
        queue.run();
    });
}

/// Runs `work(i)` over `count` tasks on several threads only if there is enough to do: at least `least_units` of work
/// per thread, `units` in all. Threads that are awake ([`together`]) cost far less to ask: an eighth is enough then.
pub fn for_each_if(units: usize, least_units: usize, count: usize, work: impl Fn(usize) + Sync) {
    let least_units = if TEAM.get().is_null() { least_units } else { least_units / 8 };
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

/// A new buffer of `len` elements, filled in parts of `part` by `fill`, which gets the range of a part and its elements, zeroed.
/// Fresh memory is touched once, by the thread that fills it.
pub(crate) fn filled(
    len: usize,
    part: usize,
    least_units: usize,
    fill: impl Fn(std::ops::Range<usize>, &mut [f32]) + Sync,
) -> Vec<f32> {
    let part = part.max(1);
    let mut out: Vec<f32> = Vec::with_capacity(len);
    let shared = SharedMut::from_raw(out.as_mut_ptr(), len);
    for_each_if(len, least_units, len.div_ceil(part), |task| {
        let range = task * part..((task + 1) * part).min(len);
        // SAFETY: parts do not overlap, and each lies inside of the capacity; zeros are values.
        let values = unsafe {
            std::ptr::write_bytes(shared.at(range.start), 0, range.len());
            shared.slice(range.start, range.len())
        };
        fill(range, values);
    });
    // SAFETY: the parts cover the buffer, and every element has been written.
    unsafe { out.set_len(len) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn a_new_buffer_is_filled_once() {
        for (len, part) in [(0, 3), (1, 0), (7, 3), (100_000, 777)] {
            let got = filled(len, part, 1 << 10, |range, values| {
                assert!(values.iter().all(|v| *v == 0.0));
                values.iter_mut().zip(range).for_each(|(v, i)| *v += i as f32);
            });
            assert!(got.len() == len && got.iter().enumerate().all(|(i, v)| *v == i as f32), "{len} by {part}");
        }
    }

    #[test]
    fn serial_work_stays_on_the_calling_thread() {
        let here = std::thread::current().id();
        serially(|| for_each(1000, |_| assert_eq!(std::thread::current().id(), here)));
        assert!(!SERIAL.get());
    }

    #[test]
    fn a_team_runs_one_kernel_after_another_and_survives_a_panic() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        pool.install(|| {
            let mut sums = vec![0u64; 500];
            let total: u64 = with_team(|| {
                for round in 0..200u64 {
                    let shared = SharedMut::new(&mut sums);
                    // SAFETY: each task has an element of its own.
                    for_each(500, |i| unsafe { shared.slice(i, 1)[0] += round * i as u64 });
                }
                // A team inside a team is the same team.
                with_team(|| for_each(3, |_| ()));
                sums.iter().sum()
            });
            assert_eq!(total, (0..200).sum::<u64>() * (0..500).sum::<u64>());
            let panicked = std::panic::catch_unwind(|| with_team(|| for_each(100, |i| assert!(i != 77, "task 77"))));
            assert!(panicked.is_err() && TEAM.get().is_null());
            for_each(10, |_| ());
        });
    }

    /// Fails if `body` has not ended after 20 s; its thread is left behind then.
    #[track_caller]
    fn must_end(what: &str, body: impl FnOnce() + Send + 'static) {
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            body();
            done.send(()).ok();
        });
        assert!(ended.recv_timeout(Duration::from_secs(20)).is_ok(), "{what} must end");
    }

    /// A body that needs every thread of the pool, by other means than this module's queue.
    fn uses_the_pool() {
        for_each(64, |_| ());
        assert_eq!(rayon::broadcast(|_| ()).len(), rayon::current_num_threads());
        let sum = AtomicUsize::new(0);
        for_each(64, |i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), (0..64).sum::<usize>());
    }

    #[test]
    fn a_team_whose_body_uses_the_pool_ends() {
        for threads in [2, 3, 5] {
            let pool = move || rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            // The same inside a task: its leader waits for threads that wait for its next task.
            let in_a_task = || {
                for_each(2, |i| {
                    if i == 0 {
                        _ = rayon::broadcast(|_| ())
                    }
                })
            };
            must_end("a task that uses the pool", move || pool().install(|| with_team(in_a_task)));
            must_end("together on a thread of the pool", move || pool().install(|| together(uses_the_pool)));
            must_end("a team led by a thread of the pool", move || pool().install(|| with_team(uses_the_pool)));
            let twice = || with_team(|| rayon::join(|| together(uses_the_pool), || with_team(uses_the_pool)));
            must_end("a team inside a team", move || {
                pool().install(twice);
            });
        }
        must_end("together on a thread outside of the pool", || together(uses_the_pool));
    }

    #[test]
    fn a_thread_of_the_pool_leads_no_team() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        assert!(pool.install(|| together(|| TEAM.get().is_null())));
    }

    #[test]
    fn helpers_without_work_go_back_to_the_pool_and_kernels_go_on_without_them() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        pool.install(|| {
            with_team(|| {
                for_each(64, |_| ());
                // SAFETY: the team lives until the end of this closure.
                let helpers = || unsafe { (*TEAM.get()).helpers.load(Ordering::Relaxed) };
                let start = Instant::now();
                while helpers() > 0 {
                    assert!(start.elapsed() < Duration::from_secs(20), "{} helpers stay awake", helpers());
                    std::thread::sleep(IDLE);
                }
                let threads = std::sync::Mutex::new(std::collections::HashSet::new());
                for_each(64, |_| {
                    std::thread::sleep(Duration::from_millis(1));
                    threads.lock().unwrap().insert(std::thread::current().id());
                });
                assert!(threads.into_inner().unwrap().len() > 1, "the pool's threads take part again");
            });
        });
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
