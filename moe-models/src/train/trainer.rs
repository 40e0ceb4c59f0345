//! The loop: draw, accumulate, update, report, validate, save. All parts are elsewhere; this file orders them, on every rank
//! alike.

use super::alike;
use super::balance::move_selection_biases;
use super::checkpoint::{BestCheckpoint, CheckpointStore, TrainerState, read_state};
use super::config::TrainConfig;
use super::data::packed::Fingerprint;
use super::data::{PackedSource, SequenceSampler, ValidSource};
use super::division::Division;
use super::evaluate::evaluate_over;
use super::folder_files::FolderFiles;
use super::lock::RunLock;
use super::memory;
use super::metrics::{self, MetricsWriter, Record};
use super::model::{TokenBatch, TrainModel, TrainPass, update_rules};
use super::non_finite::NonFinite;
use super::observer::{Event, Observer};
use super::optimizer::{AdamW, StepReport, Update};
use super::ranks::{DividedParam, Ranks, Traffic, all_well, any, most};
use super::run_folder::RunFolder;
use super::saving::{Saved, Saving, verify_over};
use super::step::{BatchSums, StepBuffers, accumulate_share};
use crate::{Error, Result};
use moe_core::CounterRng;
use moe_parallel::Phase;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tracing::debug_span;

/// Keeps the passes' random numbers apart from every other use of the run's seed.
const PASS_TAG: u64 = 0x7061_7373_0000_0000;

/// How [`Trainer::run`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// The stop flag was raised; everything is saved.
    Stopped,
}

/// Tokenised data of a run.
#[derive(Debug)]
pub struct Corpus {
    /// Training sources in blend order.
    pub sampler: SequenceSampler,
    /// Validation sources; may be empty.
    pub valid: Vec<ValidSource>,
    pub(super) fingerprints: Vec<Fingerprint>,
}

impl Corpus {
    /// Splits, weighs and cuts packed sources as `config` (resolved) says. With no `valid` source the tail of each
    /// training source is held out.
    ///
    /// # Errors
    /// [`Error::Config`] for weights together with `blend = tokens`, or a source too short for one sequence.
    pub fn new(mut train: Vec<PackedSource>, mut valid: Vec<PackedSource>, config: &TrainConfig) -> Result<Self> {
        if valid.is_empty() && config.valid_fraction > 0.0 {
            valid = train.iter_mut().map(|source| source.split_tail(config.valid_fraction)).collect();
        }
        let weights = super::data::sampler::blend_weights(&train, config.blend)?;
        let seq_len = config.seq_len();
        let fingerprints = train.iter().map(PackedSource::fingerprint).collect();
        let windows = config.eval_iters * config.micro_batch_size;
        Ok(Self {
            sampler: SequenceSampler::new(train, &weights, seq_len, config.seed)?,
            valid: valid.into_iter().map(|source| ValidSource::new(source, seq_len, windows)).collect::<Result<_>>()?,
            fingerprints,
        })
    }
}

/// One training run over one model.
#[derive(Debug)]
pub struct Trainer<M> {
    model: M,
    config: TrainConfig,
    corpus: Corpus,
    folder_files: FolderFiles,
    optimizer: AdamW,
    buffers: StepBuffers,
    ranks: Box<dyn Ranks>,
    saving: Saving,
    division: Box<dyn Division>,
    dir: PathBuf,
    store: CheckpointStore,
    /// On the rank that writes.
    files: Option<Files>,
    step: u64,
    saved_step: Option<u64>,
    best: Option<BestCheckpoint>,
    /// Training time and steps since the last record.
    speed: (Duration, u64),
    /// What this rank had sent by then.
    traffic: Traffic,
    /// Most memory of this process, bytes.
    memory_budget: Option<usize>,
}

/// What the rank that writes keeps open.
#[derive(Debug)]
struct Files {
    metrics: MetricsWriter,
    lock: RunLock,
}

impl<M: TrainModel> Trainer<M> {
    /// A run from step 0 that writes to the folder `out` and keeps others from doing so until it is dropped. `config` must
    /// be resolved for `model`.
    ///
    /// # Errors
    /// [`Error::Argument`] if `out` already holds checkpoints; [`Error::InUse`] if another run writes to it;
    /// [`Error::Io`] if it cannot be written to; [`Error::Config`] for impossible settings, and for a `precision`, `recompute` or
    /// dropout that is not the model's.
    pub fn new(
        model: M,
        config: TrainConfig,
        corpus: Corpus,
        folder_files: impl Into<FolderFiles>,
        out: &Path,
    ) -> Result<Self> {
        check_model(&model, &config)?;
        Self::new_in(model, config, corpus, folder_files, RunLock::acquire(out)?)
    }

    /// As [`Trainer::new`], in a folder that the caller has locked, or shares with other ranks. All ranks bring the same model
    /// (the same values, not only the same shape), settings and data; an error of one is one on all.
    ///
    /// # Errors
    /// As [`Trainer::new`]; as [`Ranks`].
    pub fn new_in(
        model: M,
        config: TrainConfig,
        corpus: Corpus,
        folder_files: impl Into<FolderFiles>,
        folder: impl Into<RunFolder>,
    ) -> Result<Self> {
        let folder = folder.into();
        let prepare = || {
            check_model(&model, &config)?;
            let store = open_store(&folder, &config)?;
            if folder.lock.is_some() {
                store.check_empty()?;
            }
            let saving = Saving::new(&model, folder.ranks.placement())?;
            let division = division(&model, &saving, &*folder.ranks)?;
            let optimizer = AdamW::new(config.adamw(), division.owned().clone(), update_rules(&model))?;
            Ok(Start { saving, division, optimizer, store, step: 0, best: None })
        };
        let start = all_well(&*folder.ranks, Phase::Start, prepare())?;
        alike::check(&*folder.ranks, &config, &corpus, model.description())?;
        Self::assemble(model, config, corpus, folder_files.into(), folder, start)
    }

    /// Continues the run in `out` from the checkpoint `folder`, whose weights `model` already holds. As [`Trainer::new`],
    /// it keeps others out of the folder.
    ///
    /// # Errors
    /// [`Error::InUse`] if another run writes to `out`; [`Error::Config`] if settings or data differ in a way that would
    /// change the run's course, or the model's precision is not that of `config`; [`Error::Io`] and [`Error::Format`] for a
    /// checkpoint that cannot be read or is damaged.
    pub fn resume(
        model: M,
        config: TrainConfig,
        corpus: Corpus,
        folder_files: impl Into<FolderFiles>,
        out: &Path,
        folder: &Path,
    ) -> Result<Self> {
        check_model(&model, &config)?;
        Self::resume_in(model, config, corpus, folder_files, RunLock::acquire(out)?, folder)
    }

    /// As [`Trainer::resume`], in a folder that the caller has locked, or shares with other ranks: as many as before or not.
    ///
    /// # Errors
    /// As [`Trainer::resume`]; as [`Ranks`].
    pub fn resume_in(
        model: M,
        config: TrainConfig,
        mut corpus: Corpus,
        folder_files: impl Into<FolderFiles>,
        run: impl Into<RunFolder>,
        folder: &Path,
    ) -> Result<Self> {
        let run = run.into();
        // Opening clears what a crash left, so nobody reads before.
        let store =
            all_well(&*run.ranks, Phase::Start, check_model(&model, &config).and_then(|()| open_store(&run, &config)))?;
        let state = all_well(&*run.ranks, Phase::Start, read_state(folder))?;
        verify_over(&*run.ranks, folder, &state)?;
        let prepare = || {
            config.check_continues(&state.config)?;
            check_same_data(&corpus, &state)?;
            let saving = Saving::new(&model, run.ranks.placement())?;
            let division = division(&model, &saving, &*run.ranks)?;
            let optimizer = saving.load(folder, &state, &model, division.owned().clone())?;
            corpus.sampler.seek(state.data_position)?;
            Ok(Start { saving, division, optimizer, store, step: state.step, best: state.best })
        };
        let start = prepare();
        let start = all_well(&*run.ranks, Phase::Start, start)?;
        alike::check(&*run.ranks, &config, &corpus, model.description())?;
        Self::assemble(model, config, corpus, folder_files.into(), run, start)
    }

    fn assemble(
        model: M,
        config: TrainConfig,
        corpus: Corpus,
        folder_files: FolderFiles,
        folder: RunFolder,
        start: Start,
    ) -> Result<Self> {
        let Start { saving, division, optimizer, store, step, best } = start;
        let RunFolder { dir, ranks, lock } = folder;
        let open = |lock: RunLock| Ok(Files { metrics: MetricsWriter::open(lock.dir(), step)?, lock });
        let files = lock.map(open).transpose();
        let parts = files.and_then(|files| Ok((files, StepBuffers::new(&model)?)));
        let (files, buffers) = all_well(&*ranks, Phase::Start, parts)?;
        let saved_step = (step > 0).then_some(step);
        let speed = (Duration::ZERO, 0);
        Ok(Self {
            model,
            config,
            corpus,
            folder_files,
            optimizer,
            buffers,
            ranks,
            saving,
            division,
            dir,
            store,
            files,
            step,
            saved_step,
            best,
            speed,
            traffic: Traffic::default(),
            memory_budget: None,
        })
    }

    /// The same run, which ends with an error after a step in which this process has come to need more memory: what was saved
    /// before is whole. All ranks have a budget, or none has.
    #[must_use]
    pub fn with_memory_budget(self, bytes: Option<usize>) -> Self {
        Self { memory_budget: bytes, ..self }
    }

    /// The run's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model, which is free for other use; another run may then write to the folder.
    pub fn into_model(self) -> M {
        self.model
    }

    /// The optimizer's state.
    pub fn optimizer(&self) -> &AdamW {
        &self.optimizer
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Training tokens seen.
    pub fn tokens(&self) -> u64 {
        self.step * self.config.tokens_per_step()
    }

    /// The tokenizer, as the text of a `tokenizer.json`.
    pub fn tokenizer_json(&self) -> &str {
        self.folder_files.tokenizer_json()
    }

    /// The last checkpoint's folder, if one was saved.
    pub fn last_checkpoint(&self) -> Option<PathBuf> {
        self.saved_step.map(|step| self.store.folder(step))
    }

    /// The best checkpoint's folder, if validation ran.
    pub fn best_checkpoint(&self) -> Option<PathBuf> {
        self.store.best()
    }

    /// Trains to the end, or until `stop` is raised on any rank; either way the last state is saved before this returns. Every
    /// rank's `observer` is told everything. At step 0 validates first, if the settings ask for it: there is no checkpoint
    /// to be the best by then, so that loss is only recorded.
    ///
    /// # Errors
    /// What model, optimizer or disk return, on any rank; checkpoints written before stay intact.
    pub fn run(&mut self, stop: &AtomicBool, observer: &mut dyn Observer) -> Result<Outcome> {
        let total_steps = self.config.total_steps();
        let tokens_per_step = self.config.tokens_per_step();
        observer.event(&Event::Started { step: self.step, total_steps, tokens_per_step });
        if self.config.eval_on_start && self.step == 0 {
            let mut record = Record::new(0, 0);
            self.validate(&mut record, observer)?;
            self.write(&record)?;
        }
        while self.step < total_steps && !any(&*self.ranks, Phase::Update, stop.load(Ordering::Relaxed))? {
            self.one_step(total_steps, observer)?;
            if let Some(budget) = self.memory_budget {
                all_well(&*self.ranks, Phase::Update, memory::check(budget))?;
            }
        }
        if self.saved_step != Some(self.step) && self.step > 0 {
            self.save(None, observer)?;
        }
        Ok(if self.step < total_steps { Outcome::Stopped } else { Outcome::Finished })
    }

    /// One optimizer step and whatever is due after it.
    fn one_step(&mut self, total_steps: u64, observer: &mut dyn Observer) -> Result<()> {
        let lr = self.config.schedule().lr(self.tokens());
        let (sums, report) = self.update(lr)?;
        let StepReport { grad_norm, applied, non_finite } = report;
        if let Some(what) = non_finite {
            observer.event(&Event::Skipped { step: self.step, what, in_a_row: self.optimizer.skipped_in_a_row() });
        }
        observer.event(&Event::Step { step: self.step, loss: sums.loss, parts: sums.parts, grad_norm, lr, applied });

        let last = self.step == total_steps;
        let due = |interval: u64| last || self.step.is_multiple_of(interval);
        let (log, validate, save) =
            (due(self.config.log_interval), due(self.config.eval_interval), due(self.config.save_interval));
        let mut record = Record::new(self.step, self.tokens());
        if log {
            self.push_training(&mut record, &sums, grad_norm, lr);
            self.push_traffic(&mut record)?;
        }
        // Every checkpoint that is due is measured, so that the best of them is known; one of a run that is stopped is not.
        let valid_loss = if validate || save { self.validate(&mut record, observer)? } else { None };
        self.write(&record)?;
        if save {
            self.save(valid_loss, observer)?;
        }
        Ok(())
    }

    /// Appends a record to the metrics, unless it is empty.
    fn write(&mut self, record: &Record) -> Result<()> {
        if record.values.is_empty() {
            return Ok(());
        }
        let write = |files: &mut Files| files.lock.check().and_then(|()| files.metrics.write(record));
        all_well(&*self.ranks, Phase::Update, self.files.as_mut().map_or(Ok(()), write))
    }

    /// Draws a global batch, sums its gradients and updates the parameters.
    fn update(&mut self, lr: f64) -> Result<(BatchSums, StepReport)> {
        let started = Instant::now();
        let _step = debug_span!("step", index = self.step + 1).entered();
        let count = self.config.grad_accum();
        let share = self.ranks.share(count);
        let batches = self.draw_batches(&share);
        let (step, tokens) = (self.step, self.tokens());
        let pass = |micro_batch: usize| {
            let seed = CounterRng::mix(self.config.seed, &[PASS_TAG, step, micro_batch as u64]);
            TrainPass { seed, step, tokens, micro_batch }
        };
        let passes: Vec<TrainPass> = share.map(pass).collect();
        let idle = pass(count);
        let (how, buffers, division) = (self.ranks.passes(count), &mut self.buffers, &mut *self.division);
        let own = debug_span!("gradients")
            .in_scope(|| accumulate_share(&self.model, &batches, &passes, idle, how, buffers, division));
        let sums = BatchSums::over(&*self.ranks, count, own)?;
        debug_span!("reduce").in_scope(|| self.division.finish(&mut self.buffers.grads))?;
        let step = self.step + 1;
        let report = debug_span!("update").in_scope(|| self.apply(&sums, lr)).map_err(|e| match e {
            Error::NonFinite { what, in_a_row, .. } => Error::NonFinite { step: Some(step), what, in_a_row },
            other => other,
        })?;
        self.step = step;
        self.speed = (self.speed.0 + started.elapsed(), self.speed.1 + 1);
        Ok((sums, report))
    }

    /// Updates the parameters, unless a loss or a gradient is not finite. Ranks decide alike: losses and norm are those of all.
    fn apply(&mut self, sums: &BatchSums, lr: f64) -> Result<StepReport> {
        let (params, copies) = (self.model.params(), &self.buffers.copies);
        let grads = self.division.grads(&self.buffers.grads);
        let grad_scale = 1.0 / sums.micro_batches as f64;
        let squares = self.division.gather_squares(self.optimizer.squares(params, &grads)?)?;
        let grad_norm = self.optimizer.norm(&squares)? * grad_scale;
        match sums.non_finite {
            None => {
                let report = self.optimizer.apply(params, &grads, Update { lr, grad_scale, grad_norm }, copies)?;
                if report.applied {
                    let written = self.division.gather_params(params)?;
                    copies.refresh(written.into_iter().map(|param| params[param].1.as_tensor()))?;
                    move_selection_biases(&self.model, &sums.layers, self.config.bias_update_speed)?;
                }
                Ok(report)
            }
            // Its gradient may be finite by chance, but it points nowhere.
            loss => {
                let why = NonFinite { loss, ..NonFinite::find(params, &grads)? };
                self.optimizer.skip(grad_norm, why)
            }
        }
    }

    /// This rank's share of the next global batch. All of it is drawn, so that ranks stay at one position.
    fn draw_batches(&mut self, share: &Range<usize>) -> Vec<TokenBatch> {
        let (batch, seq_len) = (self.config.micro_batch_size, self.config.seq_len());
        let sampler = &mut self.corpus.sampler;
        let draw = |micro_batch: usize| {
            let (mut input_ids, mut target_ids) = (Vec::new(), Vec::new());
            for _ in 0..batch {
                sampler.draw(&mut input_ids, &mut target_ids);
            }
            let own = share.contains(&micro_batch);
            own.then_some(TokenBatch { input_ids, target_ids, batch, seq_len })
        };
        (0..self.config.grad_accum()).filter_map(draw).collect()
    }

    fn push_training(&mut self, record: &mut Record, sums: &BatchSums, grad_norm: f64, lr: f64) {
        let (time, steps) = std::mem::take(&mut self.speed);
        record.push(metrics::TRAIN_LOSS, sums.loss);
        record.push(metrics::TRAIN_LM_LOSS, sums.parts.lm);
        record.push(metrics::TRAIN_AUX_LOSS, sums.parts.aux());
        record.push(metrics::TRAIN_LOAD_BALANCE_LOSS, sums.parts.load_balance);
        record.push(metrics::TRAIN_ROUTER_Z_LOSS, sums.parts.router_z);
        // Of students alone, while they follow their teacher.
        if sums.parts.kd != 0.0 {
            record.push(metrics::TRAIN_KD_LOSS, sums.parts.kd);
        }
        record.push(metrics::TRAIN_LR, lr);
        record.push(metrics::TRAIN_GRAD_NORM, grad_norm);
        let tokens = (steps * self.config.tokens_per_step()) as f64;
        record.push(metrics::TRAIN_TOKENS_PER_SECOND, tokens / time.as_secs_f64().max(1e-9));
        record.push_loads(&sums.layers);
    }

    fn push_traffic(&mut self, record: &mut Record) -> Result<()> {
        let peak = memory::peak_bytes().map_or(0, |bytes| bytes as u64);
        match most(&*self.ranks, peak)? {
            0 => {}
            peak => record.push(metrics::PEAK_MEMORY_BYTES, peak as f64),
        }
        let Some(now) = self.ranks.traffic() else { return Ok(()) };
        let own = now.since(&std::mem::replace(&mut self.traffic, now));
        record.push_traffic(&Traffic::over(&*self.ranks, &own)?);
        Ok(())
    }

    /// The loss on validation text, if there is any; `record` gets all that was measured.
    fn validate(&self, record: &mut Record, observer: &mut dyn Observer) -> Result<Option<f64>> {
        if self.corpus.valid.is_empty() {
            return Ok(None);
        }
        let (valid, batch_size) = (&self.corpus.valid, self.config.micro_batch_size);
        let evaluation = evaluate_over(&*self.ranks, &self.model, valid, batch_size)?;
        observer.event(&Event::Validated {
            step: self.step,
            loss: evaluation.loss(),
            bits_per_byte: evaluation.bits_per_byte(),
            by_source: evaluation.bits_per_byte_by_source(),
        });
        evaluation.push_to(record);
        Ok(Some(evaluation.loss()))
    }

    fn save(&mut self, valid_loss: Option<f64>, observer: &mut dyn Observer) -> Result<()> {
        let improves = |loss: &f64| loss.is_finite() && self.best.is_none_or(|best| *loss < best.valid_loss);
        if let Some(valid_loss) = valid_loss.filter(improves) {
            self.best = Some(BestCheckpoint { step: self.step, valid_loss });
        }
        let state = TrainerState {
            step: self.step,
            tokens: self.tokens(),
            data_position: self.corpus.sampler.position().clone(),
            data: self.corpus.fingerprints.clone(),
            shares: self.corpus.sampler.shares().to_vec(),
            optimizer_updates: self.optimizer.updates(),
            skipped_in_a_row: self.optimizer.skipped_in_a_row(),
            valid_loss,
            best: self.best,
            config: self.config.clone(),
            files: Vec::new(),
        };
        let dir = self.saving.save(&Saved {
            ranks: &*self.ranks,
            store: &self.store,
            lock: self.files.as_ref().map(|files| &files.lock),
            model: &self.model,
            division: &*self.division,
            moments: self.optimizer.moments(),
            files: &self.folder_files,
            state: &state,
        })?;
        self.saved_step = Some(self.step);
        observer.event(&Event::Saved { step: self.step, dir });
        Ok(())
    }
}

/// What differs between a new and a resumed run.
struct Start {
    saving: Saving,
    division: Box<dyn Division>,
    optimizer: AdamW,
    store: CheckpointStore,
    step: u64,
    best: Option<BestCheckpoint>,
}

/// The checkpoints in a run's folder, made ready by the rank that writes them.
fn open_store(folder: &RunFolder, config: &TrainConfig) -> Result<CheckpointStore> {
    match folder.lock {
        Some(_) => CheckpointStore::open(&folder.dir, config.keep_last),
        None => Ok(CheckpointStore::read_only(&folder.dir, config.keep_last)),
    }
}

/// This rank's part of gradients, moments and updates.
fn division<M: TrainModel>(model: &M, saving: &Saving, ranks: &dyn Ranks) -> Result<Box<dyn Division>> {
    let param = |name: &String| DividedParam { name: name.clone(), group: model.grad_group(name) };
    let params: Vec<_> = model.params().iter().map(|(name, _)| param(name)).collect();
    ranks.division(saving.units()?, &params)
}

/// Settings are recorded in checkpoints, so one that the model does not follow would tell a lie about the run.
fn check_model<M: TrainModel>(model: &M, config: &TrainConfig) -> Result<()> {
    let (asked, computed) = (config.precision, model.precision());
    if asked != computed {
        return Err(Error::Config(format!(
            "precision is {asked:?} in the settings, the model computes in {computed:?}; build the model with the settings' precision (Model::with_precision) or change the setting"
        )));
    }
    let (asked, does) = (config.recompute, model.recompute());
    if asked != does {
        return Err(Error::Config(format!(
            "recompute is {asked:?} in the settings, the model does {does:?}; build the model with the settings' recompute (Model::with_recompute) or change the setting"
        )));
    }
    config.check_balances(!model.selection_biases().is_empty())?;
    let (asked, does) = (config.dropout(), model.dropout());
    if asked != does {
        return Err(Error::Config(format!(
            "attention_dropout and hidden_dropout are {} and {} in the settings, {} and {} in the model; build the model with the settings' (Model::with_dropout) or change the settings",
            asked.attention, asked.hidden, does.attention, does.hidden
        )));
    }
    Ok(())
}

fn check_same_data(corpus: &Corpus, state: &TrainerState) -> Result<()> {
    if corpus.fingerprints != state.data {
        let changed = corpus.fingerprints.iter().find(|print| !state.data.contains(print));
        let which = changed.map_or("the list of sources", |print| print.name.as_str());
        return Err(Error::Config(format!(
            "the training data changed since the checkpoint ({which}); resume with the same files or start a new run"
        )));
    }
    if corpus.sampler.shares() != state.shares {
        let (now, then) = (corpus.sampler.shares(), &state.shares);
        return Err(Error::Config(format!(
            "the blend changed since the checkpoint: shares were {then:?}, are {now:?}; resume with the same weights"
        )));
    }
    Ok(())
}
