//! `moe-generate`: continues a prompt in the terminal, token by token.

use super::load::ModelArgs;
use crate::ServedModel;
use crate::engine::{Engine, FinishReason, Job, SamplingParams, StopParams};
use crate::text::{AnswerParser, AnswerPart, Event, TextListener, TextOptions, ThoughtParser};
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
    /// Treats the prompt as a message and answers it; what the model thinks before goes to standard error.
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
        let prompt = if self.chat { model.chat_prompt(&self.prompt)? } else { self.prompt.clone() };
        let reader = if self.chat { reader(&model, &prompt) } else { None };
        let mut printer = Printer::new(reader, std::io::stdout(), std::io::stderr());
        let job = self.job(&model, &prompt, sampling)?;
        let (listener, mut events) = TextListener::new(model.tokenizer.clone(), text);
        let engine = Engine::start(model.lm.clone(), model.engine_config(), Arc::new(()))?;
        engine.submit(job, Box::new(listener), events.cancel_flag())?;
        if !self.chat {
            printer.print(vec![AnswerPart::Text(prompt)])?;
        }
        loop {
            match events.blocking_next() {
                Event::Token { token, .. } => printer.read(token.text)?,
                Event::Finished { text, reason, .. } => {
                    printer.read(text)?;
                    printer.finish()?;
                    if reason == FinishReason::Length {
                        tracing::info!("ended by length; --max-tokens or the model's context is reached");
                    }
                }
                Event::Done(result) => return Ok(result?),
                Event::Prompt { .. } | Event::Experts { .. } => {}
            }
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
        // What tells a thought from the answer after it is read here.
        let format = model.chat.tool_format().filter(|format| self.chat && format.always_reads());
        let mut shown_tokens = format.map(|format| format.markers(&model.tokenizer)).unwrap_or_default();
        if self.chat {
            shown_tokens.extend(model.chat.thought_markers(&model.tokenizer));
        }
        TextOptions { stops, min_tokens, trim_start: self.chat && model.chat.trims_start(), shown_tokens }
    }

    fn job(&self, model: &ServedModel, prompt: &str, sampling: SamplingParams) -> anyhow::Result<Job> {
        let mut prompt = if self.chat { model.encode_chat(prompt)? } else { model.tokenizer.encode(prompt)? };
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

/// What tells a thought from the answer after it, in answers of a model that may think.
fn reader(model: &ServedModel, prompt: &str) -> Option<Box<dyn AnswerParser>> {
    let format = model.chat.tool_format().filter(|format| format.always_reads());
    let answer = format.map(|format| format.parser(&[]));
    match model.chat.thinks() {
        true => Some(Box::new(ThoughtParser::new(model.chat.opens_thought(prompt), answer))),
        false => answer,
    }
}

/// Prints an answer as it comes, and what was thought before it elsewhere.
struct Printer<O, T> {
    reader: Option<Box<dyn AnswerParser>>,
    answers: O,
    thoughts: T,
    /// Whether a thought was printed last, whose line is not over.
    in_thought: bool,
}

impl<O: Write, T: Write> Printer<O, T> {
    fn new(reader: Option<Box<dyn AnswerParser>>, answers: O, thoughts: T) -> Self {
        Self { reader, answers, thoughts, in_thought: false }
    }

    fn read(&mut self, text: String) -> std::io::Result<()> {
        let parts = match &mut self.reader {
            Some(reader) => reader.push(&text),
            None => vec![AnswerPart::Text(text)],
        };
        self.print(parts)
    }

    fn finish(&mut self) -> std::io::Result<()> {
        let rest = self.reader.as_mut().map(|reader| reader.finish()).unwrap_or_default();
        self.print(rest)?;
        self.print(vec![AnswerPart::Text("\n".into())])
    }

    fn print(&mut self, parts: Vec<AnswerPart>) -> std::io::Result<()> {
        for part in parts {
            let is_thought = matches!(part, AnswerPart::Reasoning(_));
            if self.in_thought && !is_thought {
                writeln!(self.thoughts)?;
            }
            self.in_thought = is_thought;
            match part {
                AnswerPart::Reasoning(text) => write!(self.thoughts, "{text}")?,
                // No tools were offered: a call is text.
                AnswerPart::Text(text) | AnswerPart::Call(text) | AnswerPart::Arguments(text) => {
                    write!(self.answers, "{text}")?;
                }
            }
        }
        self.thoughts.flush()?;
        self.answers.flush()
    }
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thoughts_go_elsewhere_on_a_line_of_their_own() {
        for (reader, want) in [
            (Some(Box::new(ThoughtParser::new(false, None)) as Box<dyn AnswerParser>), ("Yes.\n", "Is it? It is.\n")),
            (None, ("<think>Is it? It is.</think>\n\nYes.\n", "")),
        ] {
            let mut printer = Printer::new(reader, Vec::new(), Vec::new());
            for text in ["<thi", "nk>Is it?", " It is.</think>", "\n\nYes", "."] {
                printer.read(text.into()).expect("prints");
            }
            printer.finish().expect("prints");
            let printed =
                [&printer.answers, &printer.thoughts].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
            assert_eq!([printed[0].as_str(), &printed[1]], [want.0, want.1]);
        }
    }
}
