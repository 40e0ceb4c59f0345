//! The engine's thread: takes jobs in, has a step planned, runs it, draws tokens and tells them, until nothing can come any more.
//!
//! A job that fails ends alone: logits are looked at row by row, whatever a listener or a sampler does is caught, and after a step
//! that failed as a whole each of its sequences is tried alone.

use super::active::{Active, Ran};
use super::choice::{Choice, Drawn, Row};
use super::config::EngineConfig;
use super::inbox::{Inbox, Submission};
use super::plain_draw::PlainDrawn;
use super::replicas::{ReplicaOutput, ReplicaStep, Replicas};
use super::request::{FinishReason, Job};
use super::scheduler::{Part, Scheduler};
use super::sequence::{Sequence, SequenceId};
use super::watch::{JobStats, Observer, Outcome, StepStats};
use crate::{Error, Result};
use candle_core::{DType, Device, Layout, Storage, Tensor};
use moe_core::ops::host::elements;
use moe_models::LogitsOf;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::debug_span;

/// Logits from which on it pays to wake threads to draw. At 1 << 14, 32 sequences of the built-in model decoded fewer tokens/s in each
/// of four pairs of runs (two EPYC cores, 2026-11-27, `moe-serve bench offline --concurrency 32 --output-len 128`, temperatures 0 and 0.8).
const PARALLEL_LOGITS: usize = 1 << 18;

/// Between two counts of the pages in use.
const USAGE_INTERVAL: Duration = Duration::from_millis(200);

/// What the engine must know of the model itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelFacts {
    pub(super) vocab_size: usize,
    pub(super) max_seq_len: usize,
}

pub(super) struct Worker {
    replicas: Box<dyn Replicas>,
    facts: ModelFacts,
    config: EngineConfig,
    inbox: Arc<Inbox>,
    observer: Arc<dyn Observer>,
    scheduler: Scheduler,
    jobs: BTreeMap<u64, Active>,
    /// When the pages in use were counted, and their share.
    usage: (Option<Instant>, f64),
}

/// Where a part of a step lies.
#[derive(Debug, Clone)]
struct Place {
    replica: usize,
    /// Position of the part's first token.
    start: usize,
    /// That token among those of the replica's step.
    first_row: usize,
    /// The part's rows among the step's.
    rows: std::ops::Range<usize>,
    /// Whether a token is drawn after its last one.
    draws: bool,
}

/// A continuation that draws.
struct Drawing<'a> {
    id: SequenceId,
    choice: Choice,
    job: Arc<Job>,
    rows: &'a [Row<'a>],
    drafts: &'a [u32],
    drawn: Result<Vec<Drawn>>,
}

impl Worker {
    pub(super) fn new(
        replicas: Box<dyn Replicas>,
        facts: ModelFacts,
        salted: bool,
        config: EngineConfig,
        inbox: Arc<Inbox>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let scheduler = Scheduler::new(config.scheduling.clone(), replicas.pages(), salted);
        Self { replicas, facts, config, inbox, observer, scheduler, jobs: BTreeMap::new(), usage: (None, 0.0) }
    }

    /// Works until nothing can come any more.
    ///
    /// # Errors
    /// If the replicas have failed for good.
    pub(super) fn run(mut self) -> Result<()> {
        while let Some(arrived) = self.take() {
            if self.inbox.take_forget() {
                self.scheduler.forget_prefixes();
            }
            let begun = Instant::now();
            let is_idle = arrived.is_empty() && self.jobs.is_empty();
            arrived.into_iter().for_each(|submission| self.accept(submission));
            self.drop_cancelled();
            let parts = debug_span!("plan").in_scope(|| self.scheduler.plan(begun));
            self.tell_seats();
            let result = match parts {
                parts if !parts.is_empty() => self.step(&parts, begun),
                _ if is_idle => self.replicas.idle(),
                _ => {
                    self.unblock();
                    Ok(())
                }
            };
            if let Err(error) = result {
                return Err(self.give_up(&error));
            }
        }
        Ok(())
    }

    /// What has arrived; waits for it where there is nothing to do. `None` once nothing can come any more.
    fn take(&self) -> Option<Vec<Submission>> {
        // The last step may have ended sequences.
        self.tell_seats();
        self.inbox.take(self.jobs.is_empty(), self.replicas.idle_limit())
    }

    /// How many more sequences could start at once.
    fn tell_seats(&self) {
        self.inbox.set_open(self.config.scheduling.max_sequences.saturating_sub(self.scheduler.num_running()));
    }

    /// No step can be run any more: every job that is known or still comes ends with that.
    fn give_up(&mut self, error: &Error) -> Error {
        self.inbox.close();
        let text = error.to_string();
        let late = self.inbox.take(false, None).unwrap_or_default();
        late.into_iter().for_each(|submission| self.accept(submission));
        for number in self.jobs.keys().copied().collect::<Vec<_>>() {
            self.end(number, Err(Error::EngineLost(text.clone())));
        }
        Error::EngineLost(text)
    }

    /// One sequence per prompt; the others of a prompt follow when it is read.
    fn accept(&mut self, submission: Submission) {
        let number = submission.number;
        let active = Active::new(submission, &self.config, self.facts.max_seq_len);
        let job = Arc::clone(&active.job);
        for index in 0..job.prompts.len() {
            let choice = index * job.n;
            let reuses = job.prompt_logprobs.is_none() && !job.experts;
            let cached = self.scheduler.pages(0).sequence().with_seed(job.sampling.seed);
            let id = SequenceId { job: number, choice };
            let (token_ids, prompt_len) = (job.prompts[index].clone(), job.prompts[index].len());
            self.scheduler.add(Sequence {
                id,
                priority: job.priority,
                waits_since: active.submitted,
                counted: false,
                token_ids,
                prompt_len,
                max_len: prompt_len + active.limit(choice),
                cached,
                replica: 0,
                reuses,
                suspect: false,
                closing: false,
            });
        }
        self.jobs.insert(number, active);
    }

    fn drop_cancelled(&mut self) {
        let cancelled = self.jobs.iter().filter(|(_, active)| active.cancel.is_cancelled()).map(|(&number, _)| number);
        for number in cancelled.collect::<Vec<_>>() {
            self.end(number, Err(Error::Cancelled));
        }
    }

    /// Nothing was planned though somebody waits, which the scheduler promises not to happen: without this the engine would wait for it
    /// forever.
    fn unblock(&mut self) {
        if let Some(id) = self.scheduler.first_waiting() {
            self.end(id.job, Err(Error::EnginePanic("no step was planned for a sequence that waits".into())));
        }
    }

    /// Runs a step, the planning of which has begun then, and tells what it gave.
    ///
    /// # Errors
    /// If no step can be run any more.
    fn step(&mut self, parts: &[Part], begun: Instant) -> Result<()> {
        let _step = debug_span!("step").entered();
        self.start_jobs(parts);
        let (steps, places) = debug_span!("lay_out").in_scope(|| self.lay_out(parts));
        let model_begun = Instant::now();
        let ran = catch_unwind(AssertUnwindSafe(|| self.replicas.run(&steps)))
            .unwrap_or_else(|payload| Err(Error::EnginePanic(panic_text(payload.as_ref()))));
        let outputs = match (ran, parts) {
            (Ok(outputs), _) => outputs,
            (Err(error), _) if self.replicas.has_failed() => return Err(error),
            (Err(error), [part]) => {
                self.end(part.id.job, Err(error));
                return Ok(());
            }
            (Err(error), _) => {
                tracing::warn!(%error, sequences = parts.len(), "a step failed; its sequences are tried alone");
                self.scheduler.suspect(parts);
                return Ok(());
            }
        };
        let model_seconds = model_begun.elapsed().as_secs_f64();
        outputs.iter().for_each(|output| self.observer.experts(&output.experts));
        let accepted = match self.digest(parts, &places, &outputs) {
            Ok(accepted) => accepted,
            Err(error) => {
                // The logits lie where they cannot be read: that is nobody's request's fault.
                let message = error.to_string();
                parts.iter().for_each(|part| self.end(part.id.job, Err(Error::EnginePanic(message.clone()))));
                return Ok(());
            }
        };
        let (counts, page_usage) = (self.scheduler.counts(), self.page_usage());
        self.observer.step(&StepStats {
            sequences: parts.len(),
            tokens: parts.iter().map(Part::len).sum(),
            drafts: (parts.iter().map(|part| part.drafts.len()).sum(), accepted),
            seconds: (begun.elapsed().as_secs_f64(), model_seconds),
            running: self.scheduler.num_running(),
            waiting: self.scheduler.num_waiting(),
            page_usage,
            preemptions: counts.preemptions,
            prefix: (counts.prefix_queries, counts.prefix_hits),
        });
        Ok(())
    }

    /// Share of the pages in use. Counting goes through all that is kept, so it is done now and then, and when nothing runs any more.
    fn page_usage(&mut self) -> f64 {
        if self.scheduler.num_running() == 0 || self.usage.0.is_none_or(|counted| counted.elapsed() >= USAGE_INTERVAL) {
            self.usage = (Some(Instant::now()), self.scheduler.page_usage());
        }
        self.usage.1
    }

    fn start_jobs(&mut self, parts: &[Part]) {
        for part in parts {
            let Some(active) = self.jobs.get_mut(&part.id.job).filter(|active| !active.started) else { continue };
            active.started = true;
            active.stats.queued = active.submitted.elapsed();
            self.inbox.started(part.id.job);
            self.observer.started(active.stats.queued);
        }
    }

    /// The steps of the replicas, and where each part lies in them.
    fn lay_out(&mut self, parts: &[Part]) -> (Vec<ReplicaStep>, Vec<Place>) {
        let mut steps = vec![ReplicaStep::default(); self.scheduler.num_replicas()];
        let mut num_rows_of = vec![0; steps.len()];
        let mut places = Vec::with_capacity(parts.len());
        for part in parts {
            let all = self.jobs.get(&part.id.job).is_some_and(|active| active.wants_all_logits(part.id.choice));
            let pages = self.scheduler.pages_of(part.id);
            let sequence = self.scheduler.running_mut(part.id);
            let (start, replica) = (sequence.cached.len(), sequence.replica);
            let mut ids = sequence.token_ids[start..start + part.new].to_vec();
            let room = sequence.token_ids.len() < sequence.max_len;
            let draws = part.new == sequence.pending() && !sequence.closing && room;
            let (logits, num_rows) = match (all || !part.drafts.is_empty(), draws) {
                (true, _) => (LogitsOf::All, part.len()),
                (false, true) => (LogitsOf::Last, 1),
                (false, false) => (LogitsOf::None, 0),
            };
            ids.extend_from_slice(&part.drafts);
            let ReplicaStep { step, draws: plain } = &mut steps[replica];
            let first_row = step.token_ids().len();
            step.add(&mut sequence.cached, &ids, logits, &pages).expect("the plan has counted the pages");
            if self.replicas.draws() {
                // From the last ones only, and from none whose logits are wanted themselves.
                let own = match self.jobs.get(&part.id.job) {
                    Some(active) if draws && !all => active.plain_draws(part.id.choice, 1 + part.drafts.len()),
                    _ => Vec::new(),
                };
                plain.extend(std::iter::repeat_n(None, num_rows - own.len()));
                plain.extend(own);
            }
            let first = num_rows_of[replica];
            num_rows_of[replica] += num_rows;
            places.push(Place { replica, start, first_row, rows: first..first + num_rows, draws });
        }
        (steps, places)
    }

    /// Draws tokens and tells what a step gave; how many guesses came true.
    fn digest(&mut self, parts: &[Part], places: &[Place], outputs: &[ReplicaOutput]) -> Result<usize> {
        let tensors = outputs.iter().map(|output| on_host(&output.logits)).collect::<Result<Vec<_>>>()?;
        let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
        let rows = outputs.iter().zip(&guards).map(|(output, (storage, layout))| {
            Ok(rows_of(slice(storage, layout)?, &output.drawn, self.facts.vocab_size))
        });
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let of = |place: &Place| &rows[place.replica][place.rows.clone()];
        let mut drawn = debug_span!("draw").in_scope(|| self.draw(parts, places, of));
        let _tell = debug_span!("tell").entered();
        let mut accepted = 0;
        for (part, place) in parts.iter().zip(places) {
            let experts = &outputs[place.replica].experts;
            let ran = Ran { part, start: place.start, rows: of(place), experts, first_row: place.first_row };
            let told = catch_unwind(AssertUnwindSafe(|| self.tell(&ran, drawn.remove(&part.id))))
                .unwrap_or_else(|payload| Err(Error::EnginePanic(panic_text(payload.as_ref()))));
            match told {
                Ok(guessed) => accepted += guessed,
                Err(error) => self.end(part.id.job, Err(error)),
            }
        }
        Ok(accepted)
    }

    /// The tokens of all parts that draw, on several threads where that pays.
    fn draw<'a>(
        &mut self,
        parts: &'a [Part],
        places: &[Place],
        rows: impl Fn(&Place) -> &'a [Row<'a>],
    ) -> BTreeMap<SequenceId, Result<Vec<Drawn>>> {
        let vocab_size = self.facts.vocab_size;
        let mut drawings = Vec::new();
        for (part, place) in parts.iter().zip(places).filter(|(_, place)| place.draws) {
            let Some(active) = self.jobs.get_mut(&part.id.job) else { continue };
            let Some(choice) = active.take_choice(part.id.choice) else { continue };
            let rows = rows(place);
            // After a prompt whose every row was asked for, the last one is drawn from.
            let rows = &rows[rows.len() - (1 + part.drafts.len())..];
            let (id, job, drafts) = (part.id, Arc::clone(&active.job), &part.drafts[..]);
            drawings.push(Drawing { id, choice, job, rows, drafts, drawn: Ok(Vec::new()) });
        }
        let num_tokens = self.config.num_tokens;
        let draw = |drawing: &mut Drawing<'_>| {
            let Drawing { choice, job, rows, drafts, .. } = drawing;
            let drawn = || choice.draw(rows, drafts, job, num_tokens);
            drawing.drawn = catch_unwind(AssertUnwindSafe(drawn))
                .unwrap_or_else(|payload| Err(Error::EnginePanic(panic_text(payload.as_ref()))));
        };
        // A grammar's next tokens take longer to find than a draw.
        let many = drawings.len() * vocab_size >= PARALLEL_LOGITS || drawings.iter().any(|d| d.job.grammar.is_some());
        if drawings.len() > 1 && many {
            drawings.par_iter_mut().for_each(draw);
        } else {
            drawings.iter_mut().for_each(draw);
        }
        let mut drawn = BTreeMap::new();
        for Drawing { id, choice, drawn: tokens, .. } in drawings {
            if let Some(active) = self.jobs.get_mut(&id.job) {
                active.put_choice(id.choice, choice);
            }
            drawn.insert(id, tokens);
        }
        drawn
    }

    /// Tells what a part gave, and has its sequence go on or end; how many guesses came true.
    fn tell(&mut self, ran: &Ran<'_>, drawn: Option<Result<Vec<Drawn>>>) -> Result<usize> {
        let id = ran.part.id;
        let observer = self.observer.as_ref();
        // The job of an earlier part may have ended this one's.
        let Some(active) = self.jobs.get_mut(&id.job) else { return Ok(0) };
        self.scheduler.running_mut(id).cached.grow(ran.part.len());

        // 1. The prompt.
        if active.read_prompt(ran, &self.config, observer)? {
            let n = active.job.n;
            if active.limit(id.choice) == 0 {
                let choices = id.choice..id.choice + n;
                choices.for_each(|choice| self.finish(SequenceId { choice, ..id }, FinishReason::Length));
                return Ok(0);
            }
            self.scheduler.fork(id, n);
        }

        // 2. What was generated.
        active.tell_experts(ran);
        let mut ended = active.choice(id.choice).ending;
        let mut told = Vec::new();
        if let Some(drawn) = drawn {
            (told, ended) = active.tell_tokens(ran, drawn?, observer);
        }
        let wants_experts = active.experts_missing(id.choice, self.facts.max_seq_len);
        active.choice(id.choice).ending = ended;

        // 3. The sequence; guesses that did not come true are forgotten.
        let accepted = told.len().saturating_sub(1);
        let sequence = self.scheduler.running_mut(id);
        if !told.is_empty() {
            sequence.cached.truncate(sequence.token_ids.len() + accepted);
            sequence.token_ids.extend(told);
            sequence.suspect = false;
        }
        sequence.closing = ended.is_some();
        self.scheduler.keep(id, ran.start);
        match ended {
            Some(reason) if !wants_experts => self.finish(id, reason),
            _ => {}
        }
        Ok(accepted)
    }

    /// A continuation ended.
    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        self.scheduler.remove(id);
        let last = self.jobs.get_mut(&id.job).is_some_and(|active| active.finish(id.choice, reason));
        if last {
            self.end(id.job, Ok(()));
        }
    }

    /// A job ended.
    fn end(&mut self, number: u64, result: Result<()>) {
        self.scheduler.remove_job(number);
        self.inbox.ended(number);
        let Some(active) = self.jobs.remove(&number) else { return };
        let outcome = match &result {
            Ok(()) => Outcome::Finished(active.reason()),
            Err(Error::Cancelled) => Outcome::Aborted,
            Err(error) => {
                tracing::error!(%error, "a request failed");
                match error {
                    Error::LogitsNotFinite { .. } => Outcome::Corrupted,
                    _ => Outcome::Failed,
                }
            }
        };
        match active.started {
            true => self.observer.finished(outcome, &JobStats { total: active.submitted.elapsed(), ..active.stats }),
            false => self.observer.abandoned(),
        }
        if catch_unwind(AssertUnwindSafe(move || active.done(result))).is_err() {
            tracing::error!("a listener panicked when told the end of its job");
        }
        if self.jobs.is_empty() {
            self.observer.drained();
        }
    }
}

/// The rows of a step: what was drawn from them, and the logits of the others.
fn rows_of<'a>(logits: &'a [f32], drawn: &[Option<PlainDrawn>], vocab_size: usize) -> Vec<Row<'a>> {
    let mut logits = logits.chunks_exact(vocab_size);
    if drawn.is_empty() {
        return logits.map(Row::Logits).collect();
    }
    let row = |drawn: &Option<PlainDrawn>| {
        drawn.map_or_else(|| logits.next().map(Row::Logits), |drawn| Some(Row::Drawn(drawn)))
    };
    drawn.iter().map_while(row).collect()
}

/// Logits as contiguous f32 in the CPU's memory, where they lie as a rule.
fn on_host(logits: &Tensor) -> Result<Tensor> {
    Ok(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.contiguous()?)
}

fn slice<'a>(storage: &'a Storage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        Storage::Cpu(cpu) => Ok(elements(cpu, layout)?),
        _ => Err(candle_core::Error::msg("logits were copied to the CPU and are elsewhere").into()),
    }
}

fn panic_text(payload: &(dyn std::any::Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".into())
}
