//! The engine's thread: takes jobs from the queue, runs them, survives their panics.

use super::generation::Generation;
use super::queue::{CancelFlag, Queue};
use super::request::{FinishReason, Job, Listener};
use crate::{Error, Result};
use moe_models::{CausalLm, KvPool, LayerExperts, PoolConfig};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What the engine must know beside the model.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Jobs that may wait.
    pub max_queue: usize,
    /// Ids below this are real tokens; the rest of the model's vocabulary is padding and is never sampled.
    pub num_tokens: usize,
    /// Tokens that end a sequence unless the job ignores them.
    pub eos_token_ids: Vec<u32>,
    /// Tokens never sampled.
    pub suppressed: Vec<u32>,
}

/// How a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All continuations ended.
    Finished(FinishReason),
    /// Nobody wanted the result any more.
    Aborted,
    /// It failed.
    Failed,
}

/// Watches the engine, for metrics. Called on the engine's thread; must not block.
pub trait Observer: Send + Sync {
    /// A job left the queue after waiting `queued`.
    fn started(&self, queued: Duration);
    /// A prompt of so many tokens was read.
    fn prompt(&self, num_tokens: usize);
    /// A token was sampled, `elapsed` after the one before it (after submission for a continuation's first).
    fn token(&self, first_of_job: bool, first_of_choice: bool, elapsed: Duration);
    /// Experts one forward step used.
    fn experts(&self, experts: &[LayerExperts]);
    /// A started job ended, `elapsed` after its submission.
    fn finished(&self, outcome: Outcome, elapsed: Duration);
    /// A job was given up before it started.
    fn abandoned(&self);
}

struct Waiting {
    job: Job,
    listener: Box<dyn Listener>,
    submitted: Instant,
}

/// Hands jobs to the engine's thread.
pub struct Engine {
    queue: Arc<Queue<Waiting>>,
    observer: Arc<dyn Observer>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts the engine's thread, with pages for one sequence of the model's length and its continuations.
    ///
    /// # Errors
    /// [`Error::Io`] if the system gives no thread; the model's error if there is no memory for the pages.
    pub fn start(lm: Arc<dyn CausalLm>, config: EngineConfig, observer: Arc<dyn Observer>) -> Result<Self> {
        let queue = Arc::new(Queue::new(config.max_queue));
        let pages = PoolConfig::for_tokens(1, lm.max_seq_len());
        let pool = lm.new_pool(pages)?;
        let worker = Worker { lm, pool, config, queue: queue.clone(), observer: observer.clone() };
        let thread = std::thread::Builder::new()
            .name("moe-engine".into())
            .spawn(move || worker.run())
            .map_err(|reason| Error::Io { path: "moe-engine thread".into(), reason })?;
        Ok(Self { queue, observer, thread: Mutex::new(Some(thread)) })
    }

    /// Puts a job into the queue. Results go to `listener`; `cancel` gives the job up.
    ///
    /// # Errors
    /// [`Error::QueueFull`] or [`Error::ShuttingDown`]; `listener` then hears nothing.
    pub fn submit(&self, job: Job, listener: Box<dyn Listener>, cancel: CancelFlag) -> Result<()> {
        debug_assert!(job.n > 0 && job.prompts.iter().all(|p| !p.is_empty()), "checked at the door");
        let (result, left) = self.queue.push(Waiting { job, listener, submitted: Instant::now() }, cancel);
        for mut waiting in left {
            self.observer.abandoned();
            waiting.listener.done(Err(Error::Cancelled));
        }
        result
    }

    /// Jobs in the queue.
    pub fn waiting(&self) -> usize {
        self.queue.waiting()
    }

    /// Whether the engine's thread lives.
    pub fn is_alive(&self) -> bool {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Takes no more jobs; those already in are still run.
    pub fn close(&self) {
        self.queue.close();
    }

    /// Takes no more jobs and gives up all that wait or run.
    pub fn stop(&self) {
        self.queue.close();
        self.queue.cancel_all();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A listener may hold the last reference to the engine; its thread cannot wait for itself.
            if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
                tracing::error!("the engine's thread panicked");
            }
        }
    }
}

struct Worker {
    lm: Arc<dyn CausalLm>,
    pool: KvPool,
    config: EngineConfig,
    queue: Arc<Queue<Waiting>>,
    observer: Arc<dyn Observer>,
}

impl Worker {
    fn run(&self) {
        while let Some((mut waiting, cancel)) = self.queue.pop() {
            if cancel.is_cancelled() {
                self.observer.abandoned();
                waiting.listener.done(Err(Error::Cancelled));
                continue;
            }
            self.run_job(waiting, &cancel);
        }
    }

    fn run_job(&self, waiting: Waiting, cancel: &CancelFlag) {
        let Waiting { job, mut listener, submitted } = waiting;
        self.observer.started(submitted.elapsed());
        let generation = Generation {
            lm: self.lm.as_ref(),
            pool: &self.pool,
            config: &self.config,
            observer: self.observer.as_ref(),
            job: &job,
            cancel,
            submitted,
        };
        // The sequences of an interrupted run are dropped with it and give their pages back; model and configuration are only read.
        let result = catch_unwind(AssertUnwindSafe(|| generation.run(listener.as_mut())))
            .unwrap_or_else(|payload| Err(Error::EnginePanic(panic_text(payload.as_ref()))));
        let outcome = match &result {
            Ok(reason) => Outcome::Finished(*reason),
            Err(Error::Cancelled) => Outcome::Aborted,
            Err(error) => {
                tracing::error!(%error, "a request failed");
                Outcome::Failed
            }
        };
        self.observer.finished(outcome, submitted.elapsed());
        if catch_unwind(AssertUnwindSafe(move || listener.done(result.map(|_| ())))).is_err() {
            tracing::error!("a listener panicked when told the end of its job");
        }
    }
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into())
}
