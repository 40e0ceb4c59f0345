//! [`Choice`]: what one continuation needs to draw its tokens.

use super::config::EngineConfig;
use super::logprobs::TokenLogprobs;
use super::plain_draw::{PlainDraw, PlainDrawn};
use super::request::{FinishReason, GrammarState, Job, SampledToken};
use super::sampler::{Sampler, TokenLimits};
use crate::Result;
use moe_core::CounterRng;
use std::time::Instant;

/// A token that was drawn.
#[derive(Debug)]
pub(super) struct Drawn {
    pub(super) token: SampledToken,
    /// Whether it is the last one: a stop token, or the one that completes a grammar.
    pub(super) ends: bool,
}

/// What a step gave after a token.
#[derive(Debug, Clone, Copy)]
pub(super) enum Row<'a> {
    /// `[vocab_size]`.
    Logits(&'a [f32]),
    /// What was drawn from logits that lie elsewhere.
    Drawn(PlainDrawn),
}

/// One continuation.
#[derive(Debug)]
pub(super) struct Choice {
    sampler: Sampler,
    rng: CounterRng,
    /// From the first draw on, where the job has a grammar: until then there may be many that wait, and it is not small.
    grammar: Option<Box<dyn GrammarState>>,
    stop_ids: Vec<u32>,
    min_tokens: usize,
    /// Tokens it may generate.
    pub(super) limit: usize,
    pub(super) prompt_len: usize,
    /// Tokens drawn and told.
    pub(super) generated: usize,
    /// Generated tokens whose experts were told.
    pub(super) experts_told: usize,
    /// Why it ends once the experts of its last token are told.
    pub(super) ending: Option<FinishReason>,
    /// When its last token came, or it was submitted.
    pub(super) last: Instant,
}

impl Choice {
    /// Continuation `index` of a job's prompt.
    pub(super) fn new(job: &Job, index: usize, config: &EngineConfig, max_seq_len: usize, submitted: Instant) -> Self {
        let prompt = &job.prompts[index / job.n];
        let eos: &[u32] = if job.stop.ignore_eos { &[] } else { &config.eos_token_ids };
        let mut suppressed = config.suppressed.clone();
        if job.stop.ignore_eos && job.grammar.is_some() {
            // A text goes on after an end that is ignored, a grammar does not.
            let ends = config.eos_token_ids.iter().filter(|id| !job.stop.stop_token_ids.contains(id));
            suppressed.extend(ends);
        }
        Self {
            sampler: Sampler::new(job.sampling.clone(), config.num_tokens, &suppressed, prompt),
            rng: CounterRng::new(job.sampling.seed, index as u64),
            grammar: None,
            stop_ids: job.stop.stop_token_ids.iter().chain(eos).copied().collect(),
            min_tokens: job.stop.min_tokens,
            limit: job.stop.tokens_after(prompt.len(), max_seq_len),
            prompt_len: prompt.len(),
            generated: 0,
            experts_told: 0,
            ending: None,
            last: submitted,
        }
    }

    /// The draws after the next so many rows, each for the case that the guesses before it come true, where they need nothing else.
    pub(super) fn plain_draws(&self, rows: usize, job: &Job) -> Vec<Option<PlainDraw>> {
        if job.grammar.is_some() || job.logprobs.is_some() {
            return vec![None; rows];
        }
        let mut rng = self.rng.clone();
        let draw =
            |generated| self.sampler.plain(self.forbidden(generated), self.prompt_len + generated, rng.uniform_f64());
        (self.generated..self.generated + rows).map(draw).collect()
    }

    /// What the token after so many generated ones may not be.
    fn forbidden(&self, generated: usize) -> &[u32] {
        if generated < self.min_tokens { &self.stop_ids } else { &[] }
    }

    /// Draws a token after each of `rows`, as long as it is the guess that the next row was computed with.
    ///
    /// Nothing depends on the guesses but how many tokens come at once.
    pub(super) fn draw(
        &mut self,
        rows: &[Row<'_>],
        drafts: &[u32],
        job: &Job,
        num_tokens: usize,
    ) -> Result<Vec<Drawn>> {
        let mut drawn = Vec::new();
        if let (Some(grammar), None) = (&job.grammar, &self.grammar) {
            self.grammar = Some(grammar.start());
        }
        for (i, row) in rows.iter().enumerate() {
            let generated = self.generated + i;
            let (position, uniform) = (self.prompt_len + generated, self.rng.uniform_f64());
            let allowed = self.grammar.as_ref().map(|grammar| grammar.allowed()).transpose()?;
            let limits = TokenLimits { forbidden: self.forbidden(generated), allowed: allowed.as_deref() };
            let token_id = match *row {
                Row::Logits(logits) => self.sampler.sample(logits, limits, position, uniform)?,
                Row::Drawn(drawn) => drawn.token(position)?,
            };
            self.sampler.push(token_id);
            let logprobs = match (job.logprobs, row) {
                (Some(num_top), Row::Logits(logits)) => Some(TokenLogprobs::of(logits, token_id, num_top, num_tokens)),
                _ => None,
            };
            let is_stop = self.stop_ids.contains(&token_id);
            let is_complete = match &mut self.grammar {
                Some(grammar) if !is_stop => {
                    grammar.push(token_id)?;
                    grammar.is_complete()
                }
                _ => false,
            };
            drawn.push(Drawn { token: SampledToken { token_id, is_stop, logprobs }, ends: is_stop || is_complete });
            if is_stop || is_complete || generated + 1 == self.limit || drafts.get(i) != Some(&token_id) {
                break;
            }
        }
        Ok(drawn)
    }
}
