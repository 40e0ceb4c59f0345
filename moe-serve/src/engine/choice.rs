//! [`Choice`]: what one continuation needs to draw its tokens.

use super::config::EngineConfig;
use super::logprobs::TokenLogprobs;
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

/// One continuation.
#[derive(Debug)]
pub(super) struct Choice {
    sampler: Sampler,
    rng: CounterRng,
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
        Self {
            sampler: Sampler::new(job.sampling.clone(), config.num_tokens, &config.suppressed, prompt),
            rng: CounterRng::new(job.sampling.seed, index as u64),
            grammar: job.grammar.as_ref().map(|grammar| grammar.start()),
            stop_ids: job.stop.stop_token_ids.iter().chain(eos).copied().collect(),
            min_tokens: job.stop.min_tokens,
            limit: job.stop.max_tokens.min(max_seq_len.saturating_sub(prompt.len())),
            prompt_len: prompt.len(),
            generated: 0,
            experts_told: 0,
            ending: None,
            last: submitted,
        }
    }

    /// Draws a token after each row of `logits`, as long as it is the guess that the next row was computed with.
    ///
    /// Nothing depends on the guesses but how many tokens come at once.
    pub(super) fn draw(
        &mut self,
        logits: &[f32],
        vocab_size: usize,
        drafts: &[u32],
        job: &Job,
        num_tokens: usize,
    ) -> Result<Vec<Drawn>> {
        let mut drawn = Vec::new();
        for (i, row) in logits.chunks_exact(vocab_size).enumerate() {
            let generated = self.generated + i;
            let forbidden: &[u32] = if generated < self.min_tokens { &self.stop_ids } else { &[] };
            let allowed = self.grammar.as_ref().map(|grammar| grammar.allowed()).transpose()?;
            let limits = TokenLimits { forbidden, allowed: allowed.as_deref() };
            let token_id = self.sampler.sample(row, limits, self.prompt_len + generated, self.rng.uniform_f64())?;
            self.sampler.push(token_id);
            let logprobs = job.logprobs.map(|num_top| TokenLogprobs::of(row, token_id, num_top, num_tokens));
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
