//! `moe-train`: trains a model of the paper's GPT family on text files. Reads arguments and shows progress; everything
//! else is `moe_models::train`.

mod allocator;
mod args;
mod evaluate;
mod model_args;
mod progress;
mod signals;

use anyhow::{Context, Result};
use args::Args;
use candle_core::Device;
use clap::Parser;
use moe_kernels::select;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::hf::write_atomically;
use moe_models::train::checkpoint::{CheckpointStore, TrainerState, read_state, verify};
use moe_models::train::data::DataCache;
use moe_models::train::{Corpus, Outcome, RunLock, RunText, TrainConfig, Trainer, export, tokenizer};
use progress::Progress;
use signals::Signals;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tokenizers::Tokenizer;

fn main() -> ExitCode {
    allocator::keep_freed_memory();
    match choose_kernels().and_then(|()| run(&Args::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Forces the kernels that the environment names, if it names any.
fn choose_kernels() -> Result<()> {
    match std::env::var(select::ENV) {
        Ok(name) => Ok(select::force(name.parse()?)?),
        Err(_) => Ok(()),
    }
}

fn run(args: &Args) -> Result<()> {
    if let Some(target) = &args.export {
        export::check_target(target)?;
    }
    // Looking for a checkpoint clears what a crash left, so the folder must be ours by then.
    let lock = if args.resume { Some(RunLock::acquire(&args.out)?) } else { None };
    let checkpoint = lock.as_ref().map_or(Ok(None), find_checkpoint)?;
    let base = base_config(args, checkpoint.as_ref())?;
    let config = args.apply_to(base);
    if args.evaluate.is_none() {
        args.check_all_used(&config)?;
    }
    if args.resume && checkpoint.is_none() {
        eprintln!("no checkpoint in {}; starting a new run", args.out.display());
    }

    if let Some(folder) = &args.evaluate {
        return evaluate::evaluate_folder(folder, &config, &mut Progress::new(config.log_interval));
    }

    let signals = Signals::listen()?;
    let mut progress = Progress::new(config.log_interval);
    let mut trainer = match (checkpoint, lock) {
        (Some((folder, _)), Some(lock)) => resumed_run(args, config, lock, &folder, &mut progress)?,
        (_, lock) => new_run(args, config, lock, &mut progress)?,
    };
    let outcome = signals.while_training(|stop| trainer.run(stop, &mut progress))?;
    progress.finish();
    match outcome {
        Outcome::Finished => finish(args, &trainer),
        Outcome::Stopped => {
            eprintln!("stopped after step {} and saved; continue with --resume", trainer.step());
            Ok(())
        }
    }
}

/// The checkpoint to resume, with its state. Without any, the run starts anew.
fn find_checkpoint(run: &RunLock) -> Result<Option<(PathBuf, TrainerState)>> {
    let Some(folder) = CheckpointStore::open(run.dir(), 1)?.latest()? else { return Ok(None) };
    let state = read_state(&folder)?;
    verify(&folder, &state)?;
    Ok(Some((folder, state)))
}

/// Settings before the command line: the file's, or else the saved run's, or else the defaults.
fn base_config(args: &Args, checkpoint: Option<&(PathBuf, TrainerState)>) -> Result<TrainConfig> {
    match (&args.config, checkpoint) {
        (Some(path), _) => Ok(TrainConfig::from_file(path)?),
        (None, Some((_, state))) => Ok(state.config.clone()),
        (None, None) => Ok(TrainConfig::default()),
    }
}

fn new_run(args: &Args, config: TrainConfig, lock: Option<RunLock>, progress: &mut Progress) -> Result<Trainer<Gpt>> {
    // Settings are checked before the text is read: a typing error should not cost a minute.
    let mut shape = args.model.config(config.seq_length)?;
    let config = config.resolved(shape.max_seq_len)?;
    let lock = lock.map_or_else(|| RunLock::acquire(&args.out), Ok)?;
    CheckpointStore::open(lock.dir(), config.keep_last)?;
    let text = RunText::read(&config.data, &config.valid, progress)?;
    let tokenizer = text.tokenizer(&args.model.tokenizer_choice(shape.vocab_size), progress)?;
    args.model.fit_to(&mut shape, &tokenizer)?;
    shape.validate()?;
    let corpus = pack(args, text, &tokenizer, &shape, &config, progress)?;
    let model = following(Gpt::new(shape, config.seed, &Device::Cpu)?, &config)?;
    describe(&model, &corpus, &config, &args.out)?;
    Ok(Trainer::new_in(model, config, corpus, tokenizer::to_json(&tokenizer)?, lock)?)
}

fn resumed_run(
    args: &Args,
    config: TrainConfig,
    lock: RunLock,
    folder: &Path,
    progress: &mut Progress,
) -> Result<Trainer<Gpt>> {
    let model = Gpt::load(folder, &Device::Cpu)?;
    let config = config.resolved(model.config().max_seq_len)?;
    let model = following(model, &config)?;
    let tokenizer = tokenizer::load(&folder.join("tokenizer.json"))?;
    args.model.check_tokenizer(&tokenizer)?;
    if args.model.is_given() {
        let mut asked = args.model.config(config.seq_length)?;
        args.model.fit_to(&mut asked, &tokenizer)?;
        let saved = model.config();
        anyhow::ensure!(
            asked == *saved,
            "the model asked for differs from the saved one; drop the model flags or start a new run\nasked: {asked:?}\nsaved: {saved:?}"
        );
    }
    let text = RunText::read(&config.data, &config.valid, progress)?;
    let corpus = pack(args, text, &tokenizer, model.config(), &config, progress)?;
    describe(&model, &corpus, &config, &args.out)?;
    eprintln!("resuming from {}", folder.display());
    Ok(Trainer::resume_in(model, config, corpus, tokenizer::to_json(&tokenizer)?, lock, folder)?)
}

/// The model as the settings ask for.
fn following(model: Gpt, config: &TrainConfig) -> Result<Gpt> {
    let model = model.with_precision(config.precision)?.with_recompute(config.recompute);
    Ok(model.with_dropout(config.dropout())?)
}

fn pack(
    args: &Args,
    text: RunText,
    tokenizer: &Tokenizer,
    shape: &GptConfig,
    config: &TrainConfig,
    progress: &mut Progress,
) -> Result<Corpus> {
    // In the run's folder, unless another is named: a run that is resumed finds its own tokens.
    let folder = config.data_cache.as_ref().map_or_else(|| args.out.join("data-cache"), PathBuf::from);
    let (train, valid) = text.pack(tokenizer, shape.vocab_size, &DataCache::Folder(folder), progress)?;
    Ok(Corpus::new(train, valid, config)?)
}

/// Prints what is about to be trained, and leaves the model's size and cost in `model_summary.json`.
fn describe(model: &Gpt, corpus: &Corpus, config: &TrainConfig, out: &Path) -> Result<()> {
    let count = model.config().parameter_count();
    eprintln!("model: {} parameters, {} per token", count.total, count.active);
    let summary = serde_json::json!({
        "total_parameters": count.total,
        "active_parameters": count.active,
        "flops_per_token": model.config().flops_per_token(),
    });
    write_atomically(&out.join("model_summary.json"), |file| file.write_all(summary.to_string().as_bytes()))?;
    for (source, share) in corpus.sampler.sources().iter().zip(corpus.sampler.shares()) {
        eprintln!("  {}: {} tokens, {:.1} % of the blend", source.name, source.num_tokens(), share * 100.0);
    }
    let (steps, tokens) = (config.total_steps(), config.tokens_per_step());
    eprintln!("run: {steps} steps of {tokens} tokens, seed {}", config.seed);
    Ok(())
}

fn finish(args: &Args, trainer: &Trainer<Gpt>) -> Result<()> {
    eprintln!("done after step {}: {}", trainer.step(), args.out.display());
    let Some(target) = &args.export else { return Ok(()) };
    let (tokenizer, dtype) = (trainer.tokenizer_json(), args.export_dtype.into());
    if args.export_best {
        let best = trainer.best_checkpoint().context(
            "no checkpoint has a finite validation loss, so none is the best; export the last by --resume without --export-best",
        )?;
        export::export(&Gpt::load(&best, &Device::Cpu)?, tokenizer, target, dtype)?;
    } else {
        export::export(trainer.model(), tokenizer, target, dtype)?;
    }
    eprintln!("exported to {}", target.display());
    Ok(())
}
