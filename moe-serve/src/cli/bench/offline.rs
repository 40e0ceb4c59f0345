//! The engine alone, fed with random tokens.

use super::percentiles::Percentiles;
use super::phases::{OwnSeconds, Phases, shares};
use crate::cli::{EngineArgs, ModelArgs};
use crate::engine::{
    CancelFlag, Engine, EngineConfig, FinishReason, Flow, Job, Listener, Observer, PromptOutput, SampledToken,
    SamplingParams, StepStats, StopParams,
};
use crate::{Result, ServedModel};
use anyhow::{Context, ensure};
use moe_core::CounterRng;
use moe_models::LayerExperts;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, mpsc};

/// What is run.
#[derive(Debug, Clone, clap::Args)]
pub struct OfflineArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Sequences side by side, one case each.
    #[arg(long, value_name = "N,N,...", value_delimiter = ',', default_values_t = [1, 8, 32])]
    concurrency: Vec<usize>,
    /// Tokens of each prompt, drawn at random.
    #[arg(long, value_name = "N", default_value_t = 128)]
    input_len: usize,
    /// Tokens each sequence generates.
    #[arg(long, value_name = "N", default_value_t = 64)]
    output_len: usize,
    /// 0 takes the likeliest token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Times each case is run; the fastest counts, after one that does not.
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Says which parts of a step take how much of it, too: each span's own time, without that of spans within it.
    #[arg(long)]
    pub(super) phases: bool,
    /// Where the figures go as JSON too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Tells the end of a job.
struct Ending(mpsc::Sender<Result<()>>);

impl Listener for Ending {
    fn prompt(&mut self, _: usize, _: PromptOutput) {}
    fn token(&mut self, _: usize, _: SampledToken) -> Flow {
        Flow::Continue
    }
    fn experts(&mut self, _: usize, _: Vec<LayerExperts>) {}
    fn finished(&mut self, _: usize, _: FinishReason) {}
    fn done(&mut self, result: Result<()>) {
        // Whoever waits has the receiver.
        self.0.send(result).ok();
    }
}

/// Writes the steps down.
#[derive(Default)]
struct Steps(Mutex<Vec<StepStats>>);

impl Observer for Steps {
    fn step(&self, stats: &StepStats) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(*stats);
    }
}

/// What a case came to.
struct Case {
    concurrency: usize,
    prefill: f64,
    decode: f64,
    step: Percentiles,
    /// Share of a step that is not the model's.
    overhead: f64,
    /// Shares of a step, by the names of spans, if asked for.
    phases: Vec<(&'static str, f64)>,
}

impl OfflineArgs {
    /// Measures and prints a table.
    ///
    /// # Errors
    /// If the model cannot be loaded or its context is too short, or the file cannot be written.
    pub(super) fn run(self) -> anyhow::Result<()> {
        let phases = self.phases.then(Phases::listen).transpose()?;
        let model = self.model.load(None)?;
        let (tokens, context) = (self.input_len + self.output_len, model.lm.max_seq_len());
        ensure!(
            self.input_len > 0 && self.output_len > 1,
            "--input-len must be at least 1 and --output-len at least 2"
        );
        ensure!(
            tokens <= context,
            "--input-len and --output-len make {tokens} tokens, the model's context is {context}; lower one of them"
        );
        ensure!(!self.concurrency.contains(&0), "--concurrency must be at least 1");
        let mut out = std::io::stdout();
        writeln!(
            out,
            "{}: {} + {} tokens, temperature {}",
            model.name, self.input_len, self.output_len, self.temperature
        )?;
        writeln!(
            out,
            "{:>9} {:>16} {:>16} {:>12} {:>12} {:>10}",
            "sequences", "prefill tok/s", "decode tok/s", "step p50 ms", "step p99 ms", "engine"
        )?;
        let mut cases = Vec::new();
        for &concurrency in &self.concurrency {
            let case = self.case(&model, phases.as_ref(), concurrency)?;
            writeln!(
                out,
                "{:>9} {:>16.1} {:>16.1} {:>12.3} {:>12.3} {:>9.1}%",
                case.concurrency,
                case.prefill,
                case.decode,
                1e3 * case.step.at(50.0),
                1e3 * case.step.at(99.0),
                1e2 * case.overhead
            )?;
            if !case.phases.is_empty() {
                let words: Vec<String> =
                    case.phases.iter().map(|(name, share)| format!("{name} {:.1}%", 1e2 * share)).collect();
                writeln!(out, "{:>9} {}", "", words.join(", "))?;
            }
            cases.push(case);
        }
        match &self.json {
            Some(path) => self.write_json(&model, &cases, path),
            None => Ok(()),
        }
    }

    fn case(&self, model: &ServedModel, phases: Option<&Phases>, concurrency: usize) -> anyhow::Result<Case> {
        let mut best: Option<Case> = None;
        for round in 0..=self.rounds {
            let case = self.round(model, phases, concurrency, round as u64)?;
            if round > 0 && best.as_ref().is_none_or(|best| case.decode > best.decode) {
                best = Some(case);
            }
        }
        best.context("--rounds must be at least 1")
    }

    fn round(
        &self,
        model: &ServedModel,
        phases: Option<&Phases>,
        concurrency: usize,
        seed: u64,
    ) -> anyhow::Result<Case> {
        let mut scheduling = self.engine.scheduling();
        scheduling.max_sequences = scheduling.max_sequences.max(concurrency);
        scheduling.max_batch_tokens = scheduling.max_batch_tokens.max(concurrency);
        // Prompts are random, and what is kept of the last round would only be looked through.
        scheduling.prefix_caching = false;
        let kv_cache_bytes = self.engine.kv_cache_memory_bytes;
        let steps = Arc::new(Steps::default());
        let config = EngineConfig { max_queue: concurrency, scheduling, kv_cache_bytes, ..model.engine_config() };
        let engine = Engine::start(Arc::clone(&model.lm), config, steps.clone())?;
        let mut rng = CounterRng::new(seed, 0);
        let num_tokens = model.tokenizer.num_tokens() as u32;
        // One job, so that all of it is there at once.
        let prompts = (0..concurrency).map(|_| (0..self.input_len).map(|_| rng.below(num_tokens)).collect()).collect();
        let sampling = SamplingParams { temperature: self.temperature, ..SamplingParams::default() };
        let stop = StopParams { max_tokens: self.output_len, ignore_eos: true, ..StopParams::default() };
        let (done, ending) = mpsc::channel();
        let job = Job { prompts, sampling, stop, ..Job::default() };
        engine.submit(job, Box::new(Ending(done)), CancelFlag::default())?;
        ending.recv().context("the engine's thread ended")??;
        drop(engine);
        let steps = steps.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Steps in which some prompts are read, and steps in which every sequence generates a token. Others have only some left.
        let reads = |s: &&StepStats| s.tokens > s.sequences + s.drafts.0;
        let prefill_seconds: f64 = steps.iter().filter(reads).map(|step| step.seconds.0).sum();
        let decodes = |s: &StepStats| s.sequences == concurrency && s.tokens == concurrency + s.drafts.0;
        let decode: Vec<&StepStats> = steps.iter().filter(|step| decodes(step)).collect();
        ensure!(
            !decode.is_empty(),
            "no step had {concurrency} sequences that generate: raise --output-len or --max-num-batched-tokens, so that the \
             first ones have not ended when the last prompts are read, or lower --concurrency"
        );
        let own: Vec<OwnSeconds> = phases.map(Phases::take).unwrap_or_default();
        let of_decode = steps.iter().zip(&own).filter(|(step, _)| decodes(step)).map(|(_, own)| own);
        let seconds: f64 = decode.iter().map(|step| step.seconds.0).sum();
        let of_model: f64 = decode.iter().map(|step| step.seconds.1).sum();
        let generated: usize = decode.iter().map(|step| step.sequences + step.drafts.1).sum();
        Ok(Case {
            concurrency,
            prefill: (concurrency * self.input_len) as f64 / prefill_seconds,
            decode: generated as f64 / seconds,
            step: Percentiles::new(decode.iter().map(|step| step.seconds.0).collect()),
            overhead: 1.0 - of_model / seconds,
            phases: shares(of_decode),
        })
    }

    fn write_json(&self, model: &ServedModel, cases: &[Case], path: &PathBuf) -> anyhow::Result<()> {
        let case = |case: &Case| {
            json!({
                "sequences": case.concurrency,
                "prefill_tokens_per_s": case.prefill,
                "decode_tokens_per_s": case.decode,
                "step_ms_p50": 1e3 * case.step.at(50.0),
                "step_ms_p99": 1e3 * case.step.at(99.0),
                "engine_share": case.overhead,
                "phases": case.phases.iter().copied().collect::<OwnSeconds>(),
            })
        };
        let report = json!({
            "model": model.name,
            "input_len": self.input_len,
            "output_len": self.output_len,
            "temperature": self.temperature,
            "cases": cases.iter().map(case).collect::<Vec<_>>(),
        });
        std::fs::write(path, format!("{report:#}\n")).with_context(|| format!("writing {}", path.display()))
    }
}
