//! Runs one [`Job`]: reads each prompt once, then draws its continuations one after the other.

use super::logprobs::TokenLogprobs;
use super::queue::CancelFlag;
use super::request::{FinishReason, Flow, Job, Listener, PromptOutput, SampledToken};
use super::runner::{EngineConfig, Observer};
use super::sampler::Sampler;
use crate::{Error, Result};
use candle_core::Tensor;
use moe_core::CounterRng;
use moe_models::{CausalLm, KvCache, StepOutput};
use std::time::Instant;

/// Everything one job's run needs.
pub(super) struct Generation<'a> {
    pub(super) lm: &'a dyn CausalLm,
    pub(super) config: &'a EngineConfig,
    pub(super) observer: &'a dyn Observer,
    pub(super) job: &'a Job,
    pub(super) cancel: &'a CancelFlag,
    pub(super) submitted: Instant,
}

/// A prompt that was read: what its continuations start from.
struct Prefilled {
    cache: KvCache,
    /// `[vocab_size]`: logits after the prompt's last token.
    next_logits: Vec<f32>,
}

impl Generation<'_> {
    /// Runs the job to its end; [`FinishReason::Length`] if any continuation ended by length.
    pub(super) fn run(&self, listener: &mut dyn Listener) -> Result<FinishReason> {
        let mut reason = FinishReason::Stop;
        for (prompt_index, prompt) in self.job.prompts.iter().enumerate() {
            let prefilled = self.prefill(prompt_index, prompt, listener)?;
            for k in 0..self.job.n {
                let choice = prompt_index * self.job.n + k;
                let ended = self.continue_prompt(choice, prompt, &prefilled, listener)?;
                listener.finished(choice, ended);
                if ended == FinishReason::Length {
                    reason = ended;
                }
            }
        }
        Ok(reason)
    }

    fn check_cancelled(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn forward(&self, token_ids: &[u32], cache: &mut KvCache) -> Result<StepOutput> {
        self.check_cancelled()?;
        let step = self.lm.forward(token_ids, cache)?;
        self.observer.experts(&step.experts);
        Ok(step)
    }

    /// Reads the whole prompt in one step: a capacity limit in the model counts the tokens of a step.
    fn prefill(&self, prompt_index: usize, prompt: &[u32], listener: &mut dyn Listener) -> Result<Prefilled> {
        let mut cache = self.lm.new_cache();
        let step = self.forward(prompt, &mut cache)?;
        let next_logits = row(&step.logits, prompt.len() - 1)?;
        let logprobs = match self.job.prompt_logprobs {
            Some(num_top) => self.score(&step.logits, prompt, num_top)?,
            None => Vec::new(),
        };
        let experts = if self.job.experts { step.experts } else { Vec::new() };
        self.observer.prompt(prompt.len());
        listener.prompt(prompt_index, PromptOutput { logprobs, experts });
        Ok(Prefilled { cache, next_logits })
    }

    /// The log-probability of each prompt token under the logits of the one before it.
    fn score(&self, logits: &Tensor, prompt: &[u32], num_top: usize) -> Result<Vec<Option<TokenLogprobs>>> {
        let mut logprobs = vec![None];
        for (i, &token_id) in prompt[1..].iter().enumerate() {
            let logits = row(logits, i)?;
            if logits.iter().any(|x| x.is_nan()) {
                return Err(Error::LogitsNotFinite { position: i + 1 });
            }
            logprobs.push(Some(TokenLogprobs::of(&logits, token_id, num_top, self.config.num_tokens)));
        }
        Ok(logprobs)
    }

    fn continue_prompt(
        &self,
        choice: usize,
        prompt: &[u32],
        prefilled: &Prefilled,
        listener: &mut dyn Listener,
    ) -> Result<FinishReason> {
        let job = self.job;
        let limit = job.stop.max_tokens.min(self.lm.max_seq_len().saturating_sub(prompt.len()));
        let stop_ids = self.stop_ids();
        let mut rng = CounterRng::new(job.sampling.seed, choice as u64);
        let mut sampler = Sampler::new(&job.sampling, self.config.num_tokens, &self.config.suppressed, prompt);
        let mut cache = prefilled.cache.clone();
        let mut logits = prefilled.next_logits.clone();
        let mut last = self.submitted;

        for generated in 0..limit {
            let forbidden: &[u32] = if generated < job.stop.min_tokens { &stop_ids } else { &[] };
            let len = prompt.len() + generated;
            let token_id = sampler.sample(&logits, forbidden, len, rng.uniform_f64())?;
            sampler.push(token_id);
            let logprobs =
                job.logprobs.map(|num_top| TokenLogprobs::of(&logits, token_id, num_top, self.config.num_tokens));
            self.observer.token(choice == 0 && generated == 0, generated == 0, last.elapsed());
            last = Instant::now();

            let is_stop = stop_ids.contains(&token_id);
            let flow = listener.token(choice, SampledToken { token_id, is_stop, logprobs });
            let ended = if flow == Flow::Stop || is_stop {
                Some(FinishReason::Stop)
            } else if generated + 1 == limit {
                Some(FinishReason::Length)
            } else {
                None
            };
            // The last token is read only by those who want to see its experts.
            if ended.is_none() || job.experts && len < self.lm.max_seq_len() {
                let step = self.forward(&[token_id], &mut cache)?;
                logits = row(&step.logits, 0)?;
                if job.experts {
                    listener.experts(choice, step.experts);
                }
            }
            if let Some(reason) = ended {
                return Ok(reason);
            }
        }
        Ok(FinishReason::Length)
    }

    fn stop_ids(&self) -> Vec<u32> {
        let stop = &self.job.stop;
        let eos: &[u32] = if stop.ignore_eos { &[] } else { &self.config.eos_token_ids };
        stop.stop_token_ids.iter().chain(eos).copied().collect()
    }
}

/// Row `index` of `[tokens, vocab_size]`.
fn row(logits: &Tensor, index: usize) -> Result<Vec<f32>> {
    Ok(logits.get(index)?.to_vec1::<f32>()?)
}
