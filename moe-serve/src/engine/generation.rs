//! Runs one [`Job`]: reads each prompt once, then draws its continuations one after the other.

use super::logprobs::TokenLogprobs;
use super::queue::CancelFlag;
use super::request::{FinishReason, Flow, Job, Listener, PromptOutput, SampledToken};
use super::runner::{EngineConfig, Observer};
use super::sampler::Sampler;
use crate::{Error, Result};
use candle_core::Tensor;
use moe_core::CounterRng;
use moe_models::{CachedSequence, CausalLm, KvPool, LayerExperts, LogitsOf, SequenceStep, StepOutput};
use std::time::Instant;

/// Everything one job's run needs.
pub(super) struct Generation<'a> {
    pub(super) lm: &'a dyn CausalLm,
    pub(super) pool: &'a KvPool,
    pub(super) config: &'a EngineConfig,
    pub(super) observer: &'a dyn Observer,
    pub(super) job: &'a Job,
    pub(super) cancel: &'a CancelFlag,
    pub(super) submitted: Instant,
}

/// A prompt that was read: what its continuations start from.
struct Prefilled {
    sequence: CachedSequence,
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

    fn forward(&self, token_ids: &[u32], sequence: &mut CachedSequence, logits: LogitsOf) -> Result<StepOutput> {
        self.check_cancelled()?;
        let step = self.lm.forward(&mut [SequenceStep { sequence, token_ids, logits }], self.pool)?;
        self.observer.experts(&step.experts);
        Ok(step)
    }

    /// Reads the prompt in chunks, which change no bit of what follows: a request that is given up midway ends soon.
    fn prefill(&self, prompt_index: usize, prompt: &[u32], listener: &mut dyn Listener) -> Result<Prefilled> {
        let mut sequence = self.pool.sequence().with_seed(self.job.sampling.seed);
        let mut output = PromptOutput { logprobs: Vec::new(), experts: Vec::new() };
        if self.job.prompt_logprobs.is_some() {
            output.logprobs.push(None);
        }
        let mut next_logits = Vec::new();
        for chunk in prompt.chunks(PREFILL_CHUNK) {
            let start = sequence.len();
            let is_last = start + chunk.len() == prompt.len();
            let wanted = match (self.job.prompt_logprobs, is_last) {
                (Some(_), _) => LogitsOf::All,
                (None, true) => LogitsOf::Last,
                (None, false) => LogitsOf::None,
            };
            let step = self.forward(chunk, &mut sequence, wanted)?;
            if let Some(num_top) = self.job.prompt_logprobs {
                output.logprobs.extend(self.score(&step.logits, &prompt[start..], num_top, start)?);
            }
            if is_last {
                next_logits = row(&step.logits, step.logits.dim(0)? - 1)?;
            }
            if self.job.experts {
                append_experts(&mut output.experts, step.experts);
            }
        }
        self.observer.prompt(prompt.len());
        listener.prompt(prompt_index, output);
        Ok(Prefilled { sequence, next_logits })
    }

    /// The log-probability of each token that follows a row of `logits` in `tokens`, of which the first is at `position`.
    fn score(
        &self,
        logits: &Tensor,
        tokens: &[u32],
        num_top: usize,
        position: usize,
    ) -> Result<Vec<Option<TokenLogprobs>>> {
        let following = tokens[1..].iter().take(logits.dim(0)?);
        following
            .enumerate()
            .map(|(i, &token_id)| {
                let logits = row(logits, i)?;
                if logits.iter().any(|x| x.is_nan()) {
                    return Err(Error::LogitsNotFinite { position: position + i + 1 });
                }
                Ok(Some(TokenLogprobs::of(&logits, token_id, num_top, self.config.num_tokens)))
            })
            .collect()
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
        let mut sequence = prefilled.sequence.clone();
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
                let step = self.forward(&[token_id], &mut sequence, LogitsOf::Last)?;
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

/// Most tokens of a prompt that are read between two looks at whether anybody still waits.
const PREFILL_CHUNK: usize = 256;

/// Adds the experts of more tokens, layer by layer.
fn append_experts(all: &mut Vec<LayerExperts>, more: Vec<LayerExperts>) {
    if all.is_empty() {
        *all = more;
        return;
    }
    for (all, more) in all.iter_mut().zip(more) {
        all.expert_ids.extend(more.expert_ids);
        all.weights.extend(more.weights);
    }
}

/// Row `index` of `[tokens, vocab_size]`.
fn row(logits: &Tensor, index: usize) -> Result<Vec<f32>> {
    Ok(logits.get(index)?.to_vec1::<f32>()?)
}
