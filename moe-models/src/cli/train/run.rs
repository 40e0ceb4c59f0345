//! A run, seen from one of its ranks: prepares text, lays out the ranks, trains, exports.

use super::args::TrainArgs;
use super::layout;
use super::progress::Progress;
use super::recipe::Recipe;
use super::signals::Signals;
use crate::Error;
use crate::cli::ranks::Seat;
use crate::hf::write_atomically;
use crate::train::checkpoint::{CheckpointStore, TrainerState, read_state, verify};
use crate::train::data::{DataCache, SourceSpec};
use crate::train::ranks::{all_well, from_words, to_words};
use crate::train::shards::export;
use crate::train::{
    Corpus, Event, FolderFiles, MeshRanks, Observer, OneRank, Outcome, Ranks, ReduceConfig, RunFolder, RunLock,
    RunText, Timeline, TrainConfig, Trainer, first_rank_first, lock_for, take_over_for, tokenizer,
};
use crate::{DecoderConfig, Family, Model, ReadFamily};
use anyhow::{Context, Result, bail, ensure};
use candle_core::DType;
use moe_parallel::{Mesh, Phase};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tokenizers::Tokenizer;

/// How a run begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Begin {
    New,
    /// From the newest checkpoint, if there is one.
    Resume,
    /// As well, after ranks were given up.
    Restart,
}

/// The run that `args` ask for, or what is left of it.
pub(crate) fn run<R: Recipe>(args: &TrainArgs, recipe: &R, seat: &Seat, begin: Begin, signals: &Signals) -> Result<()> {
    // What ranks agree on before there is a model.
    let crew: Box<dyn Ranks> = match &seat.comm {
        None => Box::new(OneRank),
        Some(comm) => Box::new(MeshRanks::data_parallel(Arc::clone(comm), ReduceConfig::default())?),
    };
    // Looking for a checkpoint clears what a crash left, so the folder must be ours by then.
    let lock = match begin {
        Begin::New => None,
        Begin::Resume => lock_for(&args.out, &*crew)?,
        Begin::Restart => take_over_for(&args.out, &*crew)?,
    };
    let resumes = begin != Begin::New;
    let found = if resumes { first_rank_first(&*crew, || find_checkpoint(&args.out, lock.as_ref()))? } else { None };
    let config = args.apply_to(base_config(args, found.as_ref())?);
    args.check_all_used(&config)?;
    let progress = if crew.rank() == 0 { Progress::new(config.log_interval) } else { Progress::silent() };
    if resumes && found.is_none() {
        progress.say(&format!("no checkpoint in {}; starting a new run", args.out.display()));
    }
    let timeline = args.ranks.trace.as_ref().map(|_| Arc::new(Timeline::default()));
    let mut run = Run { args, recipe, seat, begin, crew, progress, timeline };
    let trainer = match found {
        Some((folder, _)) => run.resumed(config, lock, &folder)?,
        None => run.new_run(config, lock, resumes)?,
    };
    let budget = args.ranks.memory_budget.map(|of_rank| of_rank * seat.ranks_of_process);
    let mut trainer = trainer.with_memory_budget(budget);
    let outcome = signals.while_training(|stop| {
        let mut observer = |event: &Event| {
            run.progress.event(event);
            if let (Event::Step { step, .. }, Some(interval)) = (event, args.exit_interval) {
                stop.fetch_or(step.is_multiple_of(interval), Ordering::Relaxed);
            }
        };
        trainer.run(stop, &mut observer)
    })?;
    run.progress.finish();
    run.write_trace()?;
    match outcome {
        Outcome::Finished => run.export(&trainer),
        Outcome::Stopped => {
            run.progress.say(&match trainer.last_checkpoint() {
                Some(_) => format!("stopped after step {} and saved; continue with --resume", trainer.step()),
                None => "stopped before the first step, with nothing to save; start again".into(),
            });
            Ok(())
        }
    }
}

/// Every rank reads the text, and a pipe can be read only once.
fn refuse_pipes(sources: &[String]) -> Result<()> {
    let paths = SourceSpec::parse_list(sources)?.iter().map(SourceSpec::path).collect::<Vec<_>>();
    match paths.iter().find(|path| !path.is_file()) {
        Some(path) => bail!("{} is no plain file, and each of several ranks reads it; give a file", path.display()),
        None => Ok(()),
    }
}

/// The checkpoint to resume, with its state. Without any, the run starts anew. Rank 0, which has the lock, looks first.
fn find_checkpoint(out: &Path, lock: Option<&RunLock>) -> crate::Result<Option<(PathBuf, TrainerState)>> {
    let store = match lock {
        Some(lock) => CheckpointStore::open(lock.dir(), 1)?,
        None => CheckpointStore::read_only(out, 1),
    };
    let Some(folder) = store.latest()? else { return Ok(None) };
    let state = read_state(&folder)?;
    if lock.is_some() {
        verify(&folder, &state)?;
    }
    Ok(Some((folder, state)))
}

/// Settings before the command line: the file's, or else the saved run's, or else the defaults.
pub(crate) fn base_config(args: &TrainArgs, checkpoint: Option<&(PathBuf, TrainerState)>) -> Result<TrainConfig> {
    match (&args.config, checkpoint) {
        (Some(path), _) => Ok(TrainConfig::from_file(path)?),
        (None, Some((_, state))) => Ok(state.config.clone()),
        (None, None) => Ok(TrainConfig::default()),
    }
}

/// The settings of a run of this model, all filled in.
fn resolved(mut config: TrainConfig, decoder: &DecoderConfig) -> Result<TrainConfig> {
    config.attention_dropout.get_or_insert(decoder.attention_dropout);
    let mut experts = decoder.layers.iter().filter_map(|layer| layer.feed_forward.moe());
    config.check_balances(experts.any(|moe| moe.selection_bias().is_some()))?;
    Ok(config.resolved(decoder.max_seq_len)?)
}

/// The fields of the configurations of two models that differ, a line each.
fn differences<F: Family>(asked: &F, saved: &F) -> Result<Vec<String>> {
    let fields = |family: &F| -> Result<Map<String, Value>> { Ok(serde_json::from_str(&family.to_json(DType::F32)?)?) };
    let (asked, saved) = (fields(asked)?, fields(saved)?);
    let names: BTreeSet<&String> = asked.keys().chain(saved.keys()).collect();
    let of = |fields: &Map<String, Value>, name: &String| fields.get(name).cloned().unwrap_or_default();
    let values = names.into_iter().map(|name| (name, of(&asked, name), of(&saved, name)));
    let differing = values.filter(|(_, asked, saved)| asked != saved);
    Ok(differing.map(|(name, asked, saved)| format!("{name}: asked {asked}, saved {saved}")).collect())
}

/// What a rank prepares its run with.
struct Run<'a, R> {
    args: &'a TrainArgs,
    recipe: &'a R,
    seat: &'a Seat,
    begin: Begin,
    crew: Box<dyn Ranks>,
    progress: Progress,
    timeline: Option<Arc<Timeline>>,
}

/// A rank's model, and the ranks it runs over.
struct Laid<M> {
    model: M,
    ranks: Box<dyn Ranks>,
}

impl<R: Recipe> Run<'_, R> {
    fn new_run(&mut self, config: TrainConfig, lock: Option<RunLock>, locked: bool) -> Result<Trainer<R::Model>> {
        // Settings are checked before the text is read: a typing error should not cost a minute.
        let args = self.args;
        let (recipe, seq_length) = (self.recipe, config.seq_length);
        let asked = recipe.shape(&args.model, seq_length, None)?.decoder()?;
        let config = resolved(config, &asked)?;
        let lock = if locked { lock } else { lock_for(&args.out, &*self.crew)? };
        let is_free = |lock: &RunLock| CheckpointStore::open(lock.dir(), config.keep_last)?.check_empty();
        first_rank_first(&*self.crew, || lock.as_ref().map_or(Ok(()), is_free))?;
        let text = self.text(&config)?;
        let tokenizer = self.tokenizer(&text, asked.vocab_size)?;
        let shape = recipe.shape(&args.model, seq_length, Some(&tokenizer))?;
        let decoder = shape.decoder()?;
        let corpus = self.pack(text, &tokenizer, &decoder, &config)?;
        let layout = self.layout(&decoder, &config)?;
        let seed = config.seed;
        let laid = self.lay_out(layout, &config, |mesh| recipe.initial(&args.model, shape, seed, mesh))?;
        self.enter(lock.as_ref(), &config, false)?;
        self.describe(&decoder, &corpus, &config)?;
        let end = decoder.eos_token_id.and_then(|id| tokenizer.id_to_token(id));
        let files = recipe.files(&args.model, tokenizer::to_json(&tokenizer)?)?.ending_with(end);
        let folder = RunFolder::locked(&args.out, laid.ranks, lock);
        Ok(Trainer::new_in(laid.model, config, corpus, files, folder)?)
    }

    fn resumed(&mut self, config: TrainConfig, lock: Option<RunLock>, folder: &Path) -> Result<Trainer<R::Model>> {
        let args = self.args;
        let saved = R::Family::read_file(&folder.join("config.json"))?;
        let decoder = saved.decoder()?;
        let config = resolved(config, &decoder)?;
        let tokenizer = tokenizer::load(&folder.join("tokenizer.json"))?;
        args.model.check_tokenizer(&tokenizer)?;
        if args.model.is_given() {
            let asked = self.recipe.shape(&args.model, config.seq_length, Some(&tokenizer))?;
            let differs = differences(&asked, &saved)?;
            ensure!(
                differs.is_empty(),
                "the model asked for differs from the saved one; drop the model flags or start a new run\n{}",
                differs.join("\n")
            );
        }
        self.enter(lock.as_ref(), &config, true)?;
        let text = self.text(&config)?;
        let corpus = self.pack(text, &tokenizer, &decoder, &config)?;
        let layout = self.layout(&decoder, &config)?;
        let laid = self.lay_out(layout, &config, |mesh| Ok(Model::load_checkpoint(folder, mesh)?))?;
        self.describe(&decoder, &corpus, &config)?;
        self.progress.say(&format!("resuming from {}", folder.display()));
        let files = FolderFiles::of_folder(tokenizer::to_json(&tokenizer)?, folder)?;
        let run = RunFolder::locked(&args.out, laid.ranks, lock);
        Ok(Trainer::resume_in(laid.model, config, corpus, files, run, folder)?)
    }

    /// The rank that writes sees to it that the folder is one of this recipe's.
    fn enter(&self, lock: Option<&RunLock>, config: &TrainConfig, resumed: bool) -> Result<()> {
        let entered = lock.map_or(Ok(()), |_| self.recipe.enter(&self.args.out, config, resumed));
        Ok(all_well(&*self.crew, Phase::Start, entered.map_err(|e| Error::Config(format!("{e:#}"))))?)
    }

    fn text(&mut self, config: &TrainConfig) -> Result<RunText> {
        if self.seat.comm.is_some() {
            refuse_pipes(&[config.data.as_slice(), &config.valid].concat())?;
        }
        let progress = &mut self.progress;
        Ok(first_rank_first(&*self.crew, || RunText::read(&config.data, &config.valid, progress))?)
    }

    /// Made or read by rank 0, which sends it to the others.
    fn tokenizer(&mut self, text: &RunText, vocab_size: usize) -> Result<Tokenizer> {
        let choice = self.recipe.tokenizer(&self.args.model, vocab_size)?;
        let (first, progress) = (self.crew.rank() == 0, &mut self.progress);
        let made = || if first { text.tokenizer(&choice, progress).map(Some) } else { Ok(None) };
        let made = first_rank_first(&*self.crew, made)?;
        let json = made.as_ref().map(tokenizer::to_json).transpose()?.unwrap_or_default();
        let all = self.crew.exchange(Phase::Start, to_words(json.as_bytes()))?;
        match made {
            Some(tokenizer) => Ok(tokenizer),
            None => {
                let bytes = all.first().and_then(|words| from_words(words)).unwrap_or_default();
                Tokenizer::from_bytes(bytes).map_err(|e| anyhow::anyhow!("rank 0 has sent no tokenizer: {e}"))
            }
        }
    }

    /// In the run's folder, unless another is named: a run that is resumed finds its own tokens, and so do ranks after the first.
    fn pack(
        &mut self,
        text: RunText,
        tokenizer: &Tokenizer,
        decoder: &DecoderConfig,
        config: &TrainConfig,
    ) -> Result<Corpus> {
        let folder = config.data_cache.as_ref().map_or_else(|| self.args.out.join("data-cache"), PathBuf::from);
        let progress = &mut self.progress;
        let pack = || text.pack(tokenizer, decoder, &DataCache::Folder(folder), progress);
        let (train, valid) = first_rank_first(&*self.crew, pack)?;
        Ok(Corpus::new(train, valid, config)?)
    }

    fn layout(&self, decoder: &DecoderConfig, config: &TrainConfig) -> Result<Option<layout::Chosen>> {
        let size = layout::run_size(decoder, self.recipe.beside()?, config);
        layout::choose(&self.args.ranks, self.seat, &size, self.begin, &self.progress)
    }

    /// Builds this rank's model, as the settings ask for, and the ranks it runs over.
    fn lay_out(
        &self,
        layout: Option<layout::Chosen>,
        config: &TrainConfig,
        model: impl FnOnce(Option<Arc<Mesh>>) -> Result<Model<R::Family>>,
    ) -> Result<Laid<R::Model>> {
        let following = |model: Model<R::Family>| -> Result<Model<R::Family>> {
            let model = model.with_precision(config.precision)?.with_recompute(config.recompute);
            Ok(model.with_dropout(config.dropout())?)
        };
        let (Some(layout), Some(comm)) = (layout, &self.seat.comm) else {
            let model = self.recipe.complete(following(model(None)?)?, config, None)?;
            return Ok(Laid { model, ranks: Box::new(OneRank) });
        };
        let layout::Chosen { dims, reduce, exchange } = layout;
        let mesh = Arc::new(Mesh::new(Arc::clone(comm), dims, self.seat.ranks_per_node, exchange)?);
        let model = following(model(Some(Arc::clone(&mesh)))?)?;
        for (ep, times) in mesh.route_times() {
            self.progress.say(&format!("all-to-all over {ep} ranks: {times}"));
        }
        let mut ranks = MeshRanks::new(&mesh, model.table(), reduce)?;
        if let Some(timeline) = &self.timeline {
            ranks = ranks.with_timeline(Arc::clone(timeline));
        }
        let model = self.recipe.complete(model, config, Some(mesh))?;
        Ok(Laid { model, ranks: Box::new(ranks) })
    }

    /// Prints what is about to be trained, and leaves the model's size and cost in `model_summary.json`.
    fn describe(&self, decoder: &DecoderConfig, corpus: &Corpus, config: &TrainConfig) -> Result<()> {
        if self.crew.rank() != 0 {
            return Ok(());
        }
        let count = decoder.parameter_count();
        self.progress.say(&format!("model: {} parameters, {} per token", count.total, count.active));
        let summary = serde_json::json!({
            "total_parameters": count.total,
            "active_parameters": count.active,
            "flops_per_token": decoder.flops_per_token(),
        });
        let path = self.args.out.join("model_summary.json");
        write_atomically(&path, |file| file.write_all(summary.to_string().as_bytes()))?;
        for (source, share) in corpus.sampler.sources().iter().zip(corpus.sampler.shares()) {
            let (name, tokens) = (&source.name, source.num_tokens());
            self.progress.say(&format!("  {name}: {tokens} tokens, {:.1} % of the blend", share * 100.0));
        }
        let (steps, tokens) = (config.total_steps(), config.tokens_per_step());
        self.progress.say(&format!("run: {steps} steps of {tokens} tokens, seed {}", config.seed));
        self.recipe.describe(config).iter().for_each(|line| self.progress.say(line));
        Ok(())
    }

    fn write_trace(&self) -> Result<()> {
        let (Some(dir), Some(timeline)) = (&self.args.ranks.trace, &self.timeline) else { return Ok(()) };
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let rank = self.crew.rank();
        Ok(timeline.write(&dir.join(format!("rank-{rank}.json")), rank)?)
    }

    /// By rank 0; the others wait for it, as long as that may take.
    fn export(&self, trainer: &Trainer<R::Model>) -> Result<()> {
        let args = self.args;
        self.progress.say(&format!("done after step {}: {}", trainer.step(), args.out.display()));
        let Some(target) = &args.export else { return Ok(()) };
        let checkpoint = if args.export_best {
            trainer.best_checkpoint().context(
                "no checkpoint has a finite validation loss, so none is the best; export the last by --resume without --export-best",
            )?
        } else {
            trainer.last_checkpoint().context("nothing was trained, so there is nothing to export")?
        };
        let (first, dtype) = (self.crew.rank() == 0, args.export_dtype.into());
        first_rank_first(&*self.crew, || if first { export(&checkpoint, target, dtype) } else { Ok(()) })?;
        self.progress.say(&format!("exported to {}", target.display()));
        Ok(())
    }
}
