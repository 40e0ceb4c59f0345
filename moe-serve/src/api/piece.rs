//! From the engine's events to [`Piece`]s: what each event adds to one choice, independent of the endpoint's format.

use super::answer_reader::AnswerReader;
use super::prepare::Prepared;
use super::types::{CompletionTokensDetails, LayerChoice, PromptTokensDetails, TokenExperts, Usage};
use crate::engine::{FinishReason, PromptOutput, TokenLogprobs};
use crate::text::{Detokenizer, Event, TextTokenizer};
use moe_models::LayerExperts;
use std::sync::Arc;

/// A token with its place in the text.
#[derive(Debug, Clone)]
pub(super) struct ScoredToken {
    pub(super) token_id: u32,
    pub(super) logprobs: Option<TokenLogprobs>,
    pub(super) text_offset: usize,
}

/// A call of a tool, or more of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CallPiece {
    pub(super) index: usize,
    /// Its id and the tool's name, at its beginning.
    pub(super) opening: Option<(String, String)>,
    pub(super) arguments: String,
}

/// What one event adds to one choice.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) choice: usize,
    pub(super) text: String,
    /// What the model thought, where its form tells.
    pub(super) reasoning: String,
    /// Calls of tools, or parts of them.
    pub(super) calls: Vec<CallPiece>,
    /// Filled only if log-probabilities were asked for.
    pub(super) tokens: Vec<ScoredToken>,
    pub(super) experts: Vec<TokenExperts>,
    pub(super) finish: Option<FinishReason>,
    /// With `finish`: whether the choice called a tool.
    pub(super) called: bool,
}

impl Piece {
    pub(super) fn is_empty(&self) -> bool {
        self.text.is_empty()
            && self.reasoning.is_empty()
            && self.calls.is_empty()
            && self.tokens.is_empty()
            && self.experts.is_empty()
            && self.finish.is_none()
    }

    /// Appends what came later for the same choice.
    pub(super) fn extend(&mut self, later: Piece) {
        self.text.push_str(&later.text);
        self.reasoning.push_str(&later.reasoning);
        for call in later.calls {
            match self.calls.last_mut() {
                Some(last) if call.opening.is_none() => last.arguments.push_str(&call.arguments),
                _ => self.calls.push(call),
            }
        }
        self.called |= later.called;
        self.tokens.extend(later.tokens);
        self.experts.extend(later.experts);
        self.finish = later.finish.or(self.finish);
    }
}

/// What an answer begins with that is to repeat its prompt.
#[derive(Debug, Clone)]
pub(super) struct Echo {
    text: String,
    chars: usize,
    /// For each token of the prompt, the characters before it.
    offsets: Vec<usize>,
}

impl Echo {
    /// A prompt that came as text, as it came, and where its tokens begin in it.
    pub(super) fn of_text(text: String, offsets: Vec<usize>) -> Self {
        Self { chars: text.chars().count(), text, offsets }
    }

    /// One that came as tokens.
    pub(super) fn of_tokens(ids: &[u32], tokenizer: &TextTokenizer) -> Self {
        let (mut detokenizer, mut text, mut chars, mut offsets) =
            (Detokenizer::default(), String::new(), 0, Vec::new());
        for &id in ids {
            offsets.push(chars);
            let more = detokenizer.push(tokenizer.bytes(id));
            chars += more.chars().count();
            text.push_str(&more);
        }
        text.push_str(&detokenizer.finish());
        Self::of_text(text, offsets)
    }
}

/// Follows one job.
#[derive(Debug)]
pub(super) struct PieceMaker {
    tokenizer: Arc<TextTokenizer>,
    prompts: Vec<Vec<u32>>,
    n: usize,
    /// Per prompt, what its answers begin with; empty if they do not.
    echoes: Vec<Echo>,
    logprobs: bool,
    experts: bool,
    /// Per choice, the tokens generated so far and the last of them.
    generated: Vec<(usize, u32)>,
    /// Prompt tokens that did not have to be read.
    cached_tokens: usize,
    /// Generated tokens that were thoughts.
    reasoning_tokens: usize,
    /// Per choice, if the parts of answers are told apart.
    readers: Vec<AnswerReader>,
}

impl PieceMaker {
    /// `call_seed` makes the ids of calls.
    pub(super) fn new(prepared: &Prepared, tokenizer: Arc<TextTokenizer>, call_seed: u64) -> Self {
        let job = &prepared.job;
        let num_choices = job.prompts.len() * job.n;
        let readers = prepared.reading.as_ref().map_or_else(Vec::new, |reading| {
            (0..num_choices).map(|choice| AnswerReader::new(reading, choice, call_seed)).collect()
        });
        Self {
            tokenizer,
            prompts: job.prompts.clone(),
            n: job.n,
            echoes: prepared.echoes.clone(),
            logprobs: job.logprobs.is_some(),
            experts: job.experts,
            generated: vec![(0, 0); num_choices],
            cached_tokens: 0,
            reasoning_tokens: 0,
            readers,
        }
    }

    pub(super) fn num_choices(&self) -> usize {
        self.generated.len()
    }

    pub(super) fn usage(&self) -> Usage {
        let prompt_tokens = self.prompts.iter().map(Vec::len).sum();
        let completion_tokens = self.generated.iter().map(|g| g.0).sum();
        let prompt_tokens_details = PromptTokensDetails { cached_tokens: self.cached_tokens };
        let completion_tokens_details = CompletionTokensDetails { reasoning_tokens: self.reasoning_tokens };
        let total_tokens = prompt_tokens + completion_tokens;
        Usage { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details, completion_tokens_details }
    }

    /// What `event` adds; [`Event::Done`] adds nothing.
    pub(super) fn pieces(&mut self, event: Event) -> Vec<Piece> {
        match event {
            Event::Prompt { prompt_index, output } => self.prompt(prompt_index, output),
            Event::Token { choice, token } => {
                let generated = &mut self.generated[choice];
                *generated = (generated.0 + 1, token.token_id);
                let echoed = self.echoes.get(choice / self.n).map_or(0, |echo| echo.chars);
                let text_offset = echoed + token.text_offset;
                let scored = ScoredToken { token_id: token.token_id, logprobs: token.logprobs, text_offset };
                let tokens = if self.logprobs { vec![scored] } else { Vec::new() };
                let mut pieces = self.told(choice, token.text, false);
                pieces[0].tokens = tokens;
                self.reasoning_tokens += usize::from(self.readers.get(choice).is_some_and(AnswerReader::in_thought));
                pieces
            }
            Event::Experts { choice, experts } => {
                let (count, token_id) = self.generated[choice];
                let position = self.prompts[choice / self.n].len() + count - 1;
                let experts = vec![self.token_experts(position, token_id, false, &experts, 0)];
                vec![Piece { choice, experts, ..Piece::default() }]
            }
            Event::Finished { choice, text, reason } => {
                let mut pieces = self.told(choice, text, true);
                let called = self.readers.get(choice).is_some_and(AnswerReader::has_called);
                pieces.push(Piece { choice, finish: Some(reason), called, ..Piece::default() });
                pieces
            }
            Event::Done(_) => Vec::new(),
        }
    }

    /// The parts of more text, at least one; what is left in the last place if the choice has ended.
    fn told(&mut self, choice: usize, text: String, ended: bool) -> Vec<Piece> {
        match self.readers.get_mut(choice) {
            Some(reader) => reader.read(&text, ended),
            None => vec![Piece { choice, text, ..Piece::default() }],
        }
    }

    /// The echoed prompt and its experts, once per continuation.
    fn prompt(&mut self, prompt_index: usize, output: PromptOutput) -> Vec<Piece> {
        let ids = &self.prompts[prompt_index];
        let echo = self.echoes.get(prompt_index);
        let scored = |(i, logprobs): (usize, Option<TokenLogprobs>)| ScoredToken {
            token_id: ids[i],
            logprobs,
            text_offset: echo.and_then(|echo| echo.offsets.get(i)).copied().unwrap_or(0),
        };
        let tokens: Vec<ScoredToken> = output.logprobs.into_iter().enumerate().map(scored).collect();
        let experts: Vec<TokenExperts> = if self.experts {
            ids.iter().enumerate().map(|(i, &id)| self.token_experts(i, id, true, &output.experts, i)).collect()
        } else {
            Vec::new()
        };
        let piece = |k| Piece {
            choice: prompt_index * self.n + k,
            text: echo.map(|echo| echo.text.clone()).unwrap_or_default(),
            tokens: tokens.clone(),
            experts: experts.clone(),
            ..Piece::default()
        };
        let pieces = (0..self.n).map(piece).collect();
        self.cached_tokens += output.cached_tokens;
        pieces
    }

    fn token_experts(
        &self,
        position: usize,
        token_id: u32,
        prompt: bool,
        layers: &[LayerExperts],
        row: usize,
    ) -> TokenExperts {
        let layers = layers.iter().map(|layer| layer_choice(layer, row)).collect();
        TokenExperts { position, token_id, token: self.tokenizer.shown(token_id), prompt, layers }
    }
}

fn layer_choice(layer: &LayerExperts, row: usize) -> LayerChoice {
    let range = row * layer.top_k..(row + 1) * layer.top_k;
    let chosen = layer.expert_ids[range.clone()].iter().zip(&layer.weights[range]);
    let kept = chosen.filter(|(id, _)| (**id as usize) < layer.num_experts);
    let (expert_ids, weights) = kept.map(|(id, weight)| (*id, *weight)).unzip();
    LayerChoice { layer: layer.layer, expert_ids, weights }
}
