//! `moe-generate`: continues a prompt in the terminal, token by token.

use super::load::ModelArgs;
use crate::ServedModel;
use crate::engine::{Engine, FinishReason, Job, SamplingParams, StopParams};
use crate::text::{Event, TextListener, TextOptions};
use anyhow::{Context, bail, ensure};
use std::io::Write;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// What to generate.
#[derive(Debug, Clone, clap::Args)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue.
    #[arg(long)]
    prompt: String,
    /// Treats the prompt as a message and answers it.
    #[arg(long)]
    chat: bool,
    /// Tokens to generate at most; by default what the model's generation_config.json says, or its context leaves.
    #[arg(long, value_name = "N")]
    max_tokens: Option<usize>,
    /// 0 always takes the likeliest token, up to 2.
    #[arg(long)]
    temperature: Option<f32>,
    /// Keeps the N likeliest tokens; 0 keeps all.
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Keeps the likeliest tokens that reach this probability together.
    #[arg(long)]
    top_p: Option<f32>,
    /// Keeps tokens at least this many times as likely as the likeliest.
    #[arg(long)]
    min_p: Option<f32>,
    /// Above 1 makes tokens already seen less likely.
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Ends before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Same seed, same text; by default the clock's.
    #[arg(long)]
    seed: Option<u64>,
}

impl GenerateArgs {
    /// Prints prompt and continuation to standard output.
    ///
    /// # Errors
    /// If an argument is impossible, or the model cannot be loaded or fails.
    pub fn run(self) -> anyhow::Result<()> {
        let model = self.model.load(None)?;
        let sampling = self.sampling(&model.defaults.sampling)?;
        let text = self.text_options(&model);
        let job = self.job(&model, sampling)?;
        let (listener, mut events) = TextListener::new(model.tokenizer.clone(), text);
        let engine = Engine::start(model.lm.clone(), model.engine_config(), Arc::new(()))?;
        engine.submit(job, Box::new(listener), events.cancel_flag())?;
        let mut out = std::io::stdout().lock();
        if !self.chat {
            write!(out, "{}", self.prompt)?;
        }
        loop {
            match events.blocking_next() {
                Event::Token { token, .. } => write!(out, "{}", token.text)?,
                Event::Finished { text, reason, .. } => {
                    writeln!(out, "{text}")?;
                    if reason == FinishReason::Length {
                        tracing::info!("ended by length; --max-tokens or the model's context is reached");
                    }
                }
                Event::Done(result) => return Ok(result?),
                Event::Prompt { .. } | Event::Experts { .. } => {}
            }
            out.flush()?;
        }
    }

    fn sampling(&self, defaults: &SamplingParams) -> anyhow::Result<SamplingParams> {
        let params = SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            seed: self.seed.unwrap_or_else(clock_seed),
            ..defaults.clone()
        };
        ensure!(
            (0.0..=2.0).contains(&params.temperature),
            "--temperature: expected 0 to 2, found {}",
            params.temperature
        );
        ensure!(
            params.top_p > 0.0 && params.top_p <= 1.0,
            "--top-p: expected above 0, at most 1, found {}",
            params.top_p
        );
        ensure!((0.0..=1.0).contains(&params.min_p), "--min-p: expected 0 to 1, found {}", params.min_p);
        let penalty = params.repetition_penalty;
        ensure!(
            penalty > 0.0 && penalty <= 10.0,
            "--repetition-penalty: expected above 0, at most 10, found {penalty}"
        );
        Ok(params)
    }

    fn text_options(&self, model: &ServedModel) -> TextOptions {
        let chat_stops = if self.chat { model.chat.stop_strings() } else { Vec::new() };
        let stops = self.stop.iter().chain(&model.defaults.stop_strings).cloned().chain(chat_stops).collect();
        let min_tokens = model.defaults.min_new_tokens;
        TextOptions { stops, min_tokens, trim_start: self.chat && model.chat.trims_start(), ..TextOptions::default() }
    }

    fn job(&self, model: &ServedModel, sampling: SamplingParams) -> anyhow::Result<Job> {
        let mut prompt = if self.chat {
            model.encode_chat(&model.chat_prompt(&self.prompt)?)?
        } else {
            model.tokenizer.encode(&self.prompt)?
        };
        if prompt.is_empty() {
            prompt.push(model.first_token().context("--prompt is empty, and this model has no token to begin with")?);
        }
        let max_seq_len = model.lm.max_seq_len();
        if prompt.len() >= max_seq_len {
            bail!("--prompt has {} tokens, the model's context is {max_seq_len}; shorten it", prompt.len());
        }
        let asked = self.max_tokens.map(|max_tokens| StopParams { max_tokens, ..StopParams::default() });
        let ends = asked.unwrap_or_else(|| model.defaults.ends(max_seq_len));
        let stop = StopParams { min_tokens: model.defaults.min_new_tokens, ..ends };
        Ok(Job { prompts: vec![prompt], sampling, stop, ..Job::default() })
    }
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos() as u64)
}
