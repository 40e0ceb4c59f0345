//! [`Active`]: a job that has not ended: what was learned of its prompts, where its continuations are, and whom to tell.

use super::choice::{Choice, Drawn, Row};
use super::config::EngineConfig;
use super::inbox::{CancelFlag, Submission};
use super::logprobs::TokenLogprobs;
use super::plain_draw::PlainDraw;
use super::request::{FinishReason, Flow, Job, Listener, PromptOutput};
use super::scheduler::Part;
use super::watch::{JobStats, Observer};
use crate::{Error, Result};
use moe_models::LayerExperts;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What one part of a step gave.
pub(super) struct Ran<'a> {
    pub(super) part: &'a Part,
    /// Position of the part's first token.
    pub(super) start: usize,
    /// After each token of the part, after those that a token is drawn from, or none.
    pub(super) rows: &'a [Row<'a>],
    /// The experts of the whole step.
    pub(super) experts: &'a [LayerExperts],
    /// The part's first token among those of the step.
    pub(super) first_row: usize,
}

impl Ran<'_> {
    /// Position after the last token that is not a guess.
    pub(super) fn end(&self) -> usize {
        self.start + self.part.new
    }

    /// The experts of some of the part's tokens.
    fn experts_of(&self, positions: std::ops::Range<usize>) -> Vec<LayerExperts> {
        let rows = |position: usize| self.first_row + position - self.start;
        let of = |layer: &LayerExperts| {
            let range = rows(positions.start) * layer.top_k..rows(positions.end) * layer.top_k;
            let LayerExperts { layer: index, num_experts, top_k, expert_ids, weights } = layer;
            LayerExperts {
                layer: *index,
                num_experts: *num_experts,
                top_k: *top_k,
                expert_ids: expert_ids[range.clone()].to_vec(),
                weights: weights[range].to_vec(),
            }
        };
        self.experts.iter().map(of).collect()
    }
}

/// What is known of a prompt.
#[derive(Debug, Default)]
struct Prompt {
    /// What was learned; taken when it is told.
    output: PromptOutput,
    /// Tokens whose experts are in it.
    experts_read: usize,
    begun: bool,
    told: bool,
}

/// A job that has not ended.
pub(super) struct Active {
    pub(super) job: Arc<Job>,
    pub(super) cancel: CancelFlag,
    pub(super) submitted: Instant,
    pub(super) started: bool,
    pub(super) stats: JobStats,
    /// Times between two tokens of a continuation: how many, and all together.
    gaps: (u32, Duration),
    listener: Box<dyn Listener>,
    prompts: Vec<Prompt>,
    choices: Vec<Option<Choice>>,
    /// Continuations that have not ended.
    left: usize,
    reason: FinishReason,
}

impl Active {
    pub(super) fn new(submission: Submission, config: &EngineConfig, max_seq_len: usize) -> Self {
        let Submission { job, listener, cancel, submitted, .. } = submission;
        let left = job.prompts.len() * job.n;
        let choice = |index| Some(Choice::new(&job, index, config, max_seq_len, submitted));
        let choices = (0..left).map(choice).collect();
        let prompts = job.prompts.iter().map(|_| Prompt::default()).collect();
        let prompt_tokens = job.prompts.iter().map(Vec::len).sum();
        let stats = JobStats { prompt_tokens, ..JobStats::default() };
        let (started, reason) = (false, FinishReason::Stop);
        let gaps = (0, Duration::ZERO);
        Self { job: Arc::new(job), cancel, submitted, started, stats, gaps, listener, prompts, choices, left, reason }
    }

    /// Whether the logits after every token of a prompt are wanted, which `choice` reads.
    pub(super) fn wants_all_logits(&self, choice: usize) -> bool {
        self.job.prompt_logprobs.is_some() && !self.prompts[choice / self.job.n].told
    }

    /// How tokens are drawn from the next so many rows of a continuation, where that needs nothing but numbers.
    pub(super) fn plain_draws(&self, choice: usize, rows: usize) -> Vec<Option<PlainDraw>> {
        self.choices[choice].as_ref().map_or_else(|| vec![None; rows], |choice| choice.plain_draws(rows, &self.job))
    }

    /// Takes a continuation away, to draw from it.
    pub(super) fn take_choice(&mut self, choice: usize) -> Option<Choice> {
        self.choices.get_mut(choice)?.take()
    }

    pub(super) fn put_choice(&mut self, index: usize, choice: Choice) {
        self.choices[index] = Some(choice);
    }

    pub(super) fn choice(&mut self, index: usize) -> &mut Choice {
        self.choices[index].as_mut().expect("a choice is away only while tokens are drawn")
    }

    /// Tokens that continuation `choice` may generate.
    pub(super) fn limit(&self, choice: usize) -> usize {
        self.choices[choice].as_ref().map_or(0, |choice| choice.limit)
    }

    /// Learns what the tokens of a prompt show. True when it is read to its end for the first time.
    pub(super) fn read_prompt(
        &mut self,
        ran: &Ran<'_>,
        config: &EngineConfig,
        observer: &dyn Observer,
    ) -> Result<bool> {
        let index = ran.part.id.choice / self.job.n;
        let (prompt, ids) = (&mut self.prompts[index], &self.job.prompts[index]);
        if prompt.told {
            return Ok(false);
        }
        if !std::mem::replace(&mut prompt.begun, true) {
            prompt.output.cached_tokens = ran.start;
        }
        if let Some(num_top) = self.job.prompt_logprobs {
            let known = &mut prompt.output.logprobs;
            if known.is_empty() {
                known.push(None);
            }
            // A prompt that lost its pages is read again; what is known of it stays.
            for (i, row) in ran.rows.iter().enumerate() {
                let position = ran.start + i + 1;
                if let Row::Logits(row) = row
                    && position == known.len()
                    && position < ids.len()
                {
                    // What a token could not be drawn from has no probabilities either.
                    if !row.iter().all(|x| *x < f32::INFINITY) {
                        return Err(Error::LogitsNotFinite { position });
                    }
                    known.push(Some(TokenLogprobs::of(row, ids[position], num_top, config.num_tokens)));
                }
            }
        }
        let end = ran.end().min(ids.len());
        if self.job.experts && prompt.experts_read < end {
            append_experts(&mut prompt.output.experts, ran.experts_of(prompt.experts_read..end));
            prompt.experts_read = end;
        }
        if ran.end() < ids.len() {
            return Ok(false);
        }
        prompt.told = true;
        let output = std::mem::take(&mut prompt.output);
        observer.prompt(ids.len(), output.cached_tokens);
        self.listener.prompt(index, output);
        Ok(true)
    }

    /// Tells the experts of generated tokens that this step has read, guesses aside.
    pub(super) fn tell_experts(&mut self, ran: &Ran<'_>) {
        let index = ran.part.id.choice;
        if !self.job.experts {
            return;
        }
        loop {
            let choice = self.choice(index);
            let position = choice.prompt_len + choice.experts_told;
            if choice.experts_told == choice.generated || position < ran.start || position >= ran.end() {
                return;
            }
            choice.experts_told += 1;
            self.listener.experts(index, ran.experts_of(position..position + 1));
        }
    }

    /// Tells drawn tokens until one ends the continuation; how many were told, and why it ended.
    pub(super) fn tell_tokens(
        &mut self,
        ran: &Ran<'_>,
        drawn: Vec<Drawn>,
        observer: &dyn Observer,
    ) -> (Vec<u32>, Option<FinishReason>) {
        let index = ran.part.id.choice;
        let mut told = Vec::new();
        for (i, Drawn { token, ends }) in drawn.into_iter().enumerate() {
            let first_of_job = self.stats.first_token.is_none();
            self.stats.first_token.get_or_insert_with(|| self.submitted.elapsed());
            self.stats.generated_tokens += 1;
            let experts = self.job.experts;
            let choice = self.choice(index);
            let (elapsed, is_first) = (choice.last.elapsed(), choice.generated == 0);
            observer.token(first_of_job, is_first, elapsed);
            choice.last = Instant::now();
            choice.generated += 1;
            let at_limit = choice.generated == choice.limit;
            if !is_first {
                self.gaps = (self.gaps.0 + 1, self.gaps.1 + elapsed);
                self.stats.time_per_token = self.gaps.1.checked_div(self.gaps.0);
            }
            let token_id = token.token_id;
            told.push(token_id);
            let flow = self.listener.token(index, token);
            // A guess that came true was read in this step.
            if experts && ran.part.drafts.get(i) == Some(&token_id) {
                self.choice(index).experts_told += 1;
                let position = ran.end() + i;
                self.listener.experts(index, ran.experts_of(position..position + 1));
            }
            if flow == Flow::Stop || ends {
                return (told, Some(FinishReason::Stop));
            } else if at_limit {
                return (told, Some(FinishReason::Length));
            }
        }
        (told, None)
    }

    /// Whether experts of generated tokens are wanted that only a further step can show: the last token's, if it still fits into the
    /// model's context.
    pub(super) fn experts_missing(&mut self, index: usize, max_seq_len: usize) -> bool {
        let experts = self.job.experts;
        let choice = self.choice(index);
        experts && choice.experts_told < choice.generated && choice.prompt_len + choice.generated <= max_seq_len
    }

    /// A continuation ended; true if it was the last.
    pub(super) fn finish(&mut self, choice: usize, reason: FinishReason) -> bool {
        self.left -= 1;
        if reason == FinishReason::Length {
            self.reason = reason;
        }
        self.listener.finished(choice, reason);
        self.left == 0
    }

    /// [`FinishReason::Length`] if any continuation ended by length.
    pub(super) fn reason(&self) -> FinishReason {
        self.reason
    }

    /// The job is over.
    pub(super) fn done(mut self, result: Result<()>) {
        self.listener.done(result);
    }
}

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
