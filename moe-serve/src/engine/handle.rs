//! [`Engine`]: hands jobs to the thread that works on them.

use super::config::EngineConfig;
use super::inbox::{CancelFlag, Inbox};
use super::replicas::{LocalReplica, Replicas};
use super::request::{Job, Listener};
use super::watch::Observer;
use super::worker::{ModelFacts, Worker};
use crate::{Error, Result};
use moe_models::CausalLm;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;

/// Hands jobs to the engine's thread.
pub struct Engine {
    inbox: Arc<Inbox>,
    /// Dead once the engine works no more.
    alive: Weak<()>,
    /// The engine's own thread, if it has one.
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The part of an engine that works: on the thread that runs it.
pub struct EngineThread {
    worker: Worker,
    _alive: Arc<()>,
}

impl std::fmt::Debug for EngineThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineThread").finish_non_exhaustive()
    }
}

impl EngineThread {
    /// Works until the engine is closed and every job has ended.
    ///
    /// # Errors
    /// If what runs the model has failed for good; every job is told so.
    pub fn run(self) -> Result<()> {
        self.worker.run()
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts the engine's thread for a model in this process.
    ///
    /// # Errors
    /// As [`Engine::over`]; [`Error::Io`] if the system gives no thread; the model's error if there is no
    /// memory for the pages.
    pub fn start(lm: Arc<dyn CausalLm>, config: EngineConfig, observer: Arc<dyn Observer>) -> Result<Self> {
        let replica = LocalReplica::new(Arc::clone(&lm), config.kv_cache_bytes, config.scheduling.max_sequences)?;
        let (engine, work) = Self::over(Box::new(replica), lm.as_ref(), config, observer)?;
        let thread = std::thread::Builder::new()
            .name("moe-engine".into())
            .spawn(move || {
                if let Err(error) = work.run() {
                    tracing::error!(%error, "the engine has ended");
                }
            })
            .map_err(|reason| Error::Io { path: "moe-engine thread".into(), reason })?;
        *engine.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(engine)
    }

    /// An engine over replicas of a model, of which `lm` is any. It works on whatever thread runs the second part.
    ///
    /// # Errors
    /// [`Error::Field`] for an impossible schedule.
    pub fn over(
        replicas: Box<dyn Replicas>,
        lm: &dyn CausalLm,
        config: EngineConfig,
        observer: Arc<dyn Observer>,
    ) -> Result<(Self, EngineThread)> {
        config.scheduling.validate()?;
        let inbox = Arc::new(Inbox::new(config.max_queue, config.scheduling.max_sequences));
        let facts = ModelFacts { vocab_size: lm.vocab_size(), max_seq_len: lm.max_seq_len() };
        let worker = Worker::new(replicas, facts, lm.draws(), config, Arc::clone(&inbox), observer);
        let alive = Arc::new(());
        let engine = Self { inbox, alive: Arc::downgrade(&alive), thread: Mutex::new(None) };
        Ok((engine, EngineThread { worker, _alive: alive }))
    }

    /// Takes a job in. Results go to `listener`; `cancel` gives the job up.
    ///
    /// # Errors
    /// [`Error::QueueFull`] or [`Error::ShuttingDown`], [`Error::Field`] for a job without a prompt, with an empty one, or of which
    /// `n` is 0; `listener` then hears nothing.
    pub fn submit(&self, job: Job, listener: Box<dyn Listener>, cancel: CancelFlag) -> Result<()> {
        // An engine that has ended takes none.
        if !self.is_ready() {
            return Err(Error::ShuttingDown);
        }
        if job.n == 0 {
            return Err(Error::field("n", "a job has at least 1 continuation of each prompt"));
        }
        if job.prompts.is_empty() || job.prompts.iter().any(Vec::is_empty) {
            return Err(Error::field("prompts", "a job has at least 1 prompt, and each at least 1 token"));
        }
        self.inbox.push(job, listener, cancel)
    }

    /// Whether a job would be taken now.
    ///
    /// # Errors
    /// [`Error::QueueFull`] or [`Error::ShuttingDown`].
    pub fn check_room(&self) -> Result<()> {
        self.inbox.check_room()
    }

    /// Jobs that have not started.
    pub fn waiting(&self) -> usize {
        self.inbox.waiting()
    }

    /// Whether the engine works.
    pub fn is_alive(&self) -> bool {
        self.alive.strong_count() > 0
    }

    /// Whether jobs are taken.
    pub fn is_ready(&self) -> bool {
        self.is_alive() && self.inbox.is_open()
    }

    /// Gives up what is kept of prompts for others that begin the same way, before the next step.
    pub fn reset_prefix_cache(&self) {
        self.inbox.forget();
    }

    /// Takes no more jobs; those already in are still run.
    pub fn close(&self) {
        self.inbox.close();
    }

    /// Takes no more jobs and gives up all that wait or run.
    pub fn stop(&self) {
        self.inbox.close();
        self.inbox.cancel_all();
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
