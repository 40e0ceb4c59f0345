//! [`Renderer`]: pieces to the wire format of either endpoint, whole or as chunks.

use super::piece::{CallPiece, Piece, ScoredToken};
use super::types::{
    Answer, ChatAnswer, ChatChoice, ChatLogprob, ChatLogprobs, ChatTokenLogprob, ChatToolCall, CompletionChoice,
    CompletionLogprobs, Delta, FunctionCall, TokenExperts, Usage,
};
use crate::engine::{FinishReason, TokenLogprob};
use crate::text::TextTokenizer;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// What stands for the logarithm of zero, which JSON cannot write; OpenAI's number.
const LOGPROB_FLOOR: f32 = -9999.0;

/// Which endpoint asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// `/v1/completions`
    Completions,
    /// `/v1/chat/completions`
    Chat,
}

/// Writes the answers of one request.
#[derive(Debug)]
pub(super) struct Renderer {
    pub(super) endpoint: Endpoint,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) tokenizer: Arc<TextTokenizer>,
    pub(super) logprobs: bool,
    pub(super) experts: bool,
}

impl Renderer {
    /// The whole answer.
    pub(super) fn whole(&self, pieces: Vec<Piece>, usage: Usage) -> Value {
        match self.endpoint {
            Endpoint::Completions => {
                let choices = pieces.into_iter().map(|piece| self.completion(piece)).collect();
                json!(self.answer("text_completion", choices, Some(usage)))
            }
            Endpoint::Chat => {
                let choices = pieces.into_iter().map(|piece| self.chat_answer(piece)).collect();
                json!(self.answer("chat.completion", choices, Some(usage)))
            }
        }
    }

    /// A chunk that adds `piece`; `first` if it is the first of its choice.
    pub(super) fn chunk(&self, piece: Piece, first: bool, usage: Option<Usage>) -> Value {
        match self.endpoint {
            Endpoint::Completions => json!(self.answer("text_completion", vec![self.completion(piece)], usage)),
            Endpoint::Chat => {
                json!(self.answer("chat.completion.chunk", vec![self.chat_delta(piece, first)], usage))
            }
        }
    }

    /// The last chunk of a stream that asked for the usage.
    pub(super) fn usage_chunk(&self, usage: Usage) -> Value {
        let object = match self.endpoint {
            Endpoint::Completions => "text_completion",
            Endpoint::Chat => "chat.completion.chunk",
        };
        json!(self.answer(object, Vec::<Value>::new(), Some(usage)))
    }

    fn answer<C>(&self, object: &'static str, choices: Vec<C>, usage: Option<Usage>) -> Answer<C> {
        Answer { id: self.id.clone(), object, created: self.created, model: self.model.clone(), choices, usage }
    }

    fn experts(&self, experts: Vec<TokenExperts>) -> Option<Vec<TokenExperts>> {
        self.experts.then_some(experts)
    }

    fn completion(&self, piece: Piece) -> CompletionChoice {
        CompletionChoice {
            index: piece.choice,
            text: piece.text,
            logprobs: self.logprobs.then(|| self.completion_logprobs(&piece.tokens)),
            finish_reason: piece.finish.map(FinishReason::as_str),
            expert_choices: self.experts(piece.experts),
        }
    }

    fn completion_logprobs(&self, tokens: &[ScoredToken]) -> CompletionLogprobs {
        let mut lists = CompletionLogprobs::default();
        for token in tokens {
            lists.tokens.push(self.tokenizer.shown(token.token_id));
            lists.text_offset.push(token.text_offset);
            lists.token_logprobs.push(token.logprobs.as_ref().map(|l| l.token.logprob.max(LOGPROB_FLOOR)));
            lists.top_logprobs.push(token.logprobs.as_ref().map(|l| {
                // The token itself is always among them, as with OpenAI.
                let all = l.top.iter().chain(std::iter::once(&l.token));
                let entry = |t: &TokenLogprob| (self.tokenizer.shown(t.token_id), json!(t.logprob.max(LOGPROB_FLOOR)));
                all.map(entry).collect::<Map<_, _>>()
            }));
        }
        lists
    }

    fn chat_answer(&self, piece: Piece) -> ChatChoice {
        ChatChoice {
            index: piece.choice,
            logprobs: self.chat_logprobs(&piece.tokens),
            finish_reason: finish_reason(&piece),
            message: Some(ChatAnswer {
                role: "assistant",
                content: (piece.calls.is_empty() || !piece.text.is_empty()).then_some(piece.text),
                reasoning_content: (!piece.reasoning.is_empty()).then_some(piece.reasoning),
                refusal: None,
                tool_calls: piece.calls.into_iter().filter_map(whole_call).collect(),
            }),
            delta: None,
            expert_choices: self.experts(piece.experts),
        }
    }

    fn chat_delta(&self, piece: Piece, first: bool) -> ChatChoice {
        let says_nothing = piece.text.is_empty() && piece.calls.is_empty() && piece.reasoning.is_empty();
        let content = (first && says_nothing || !piece.text.is_empty()).then_some(piece.text.clone());
        ChatChoice {
            index: piece.choice,
            logprobs: self.chat_logprobs(&piece.tokens),
            message: None,
            finish_reason: finish_reason(&piece),
            delta: Some(Delta {
                role: first.then_some("assistant"),
                content,
                reasoning_content: (!piece.reasoning.is_empty()).then_some(piece.reasoning),
                tool_calls: piece.calls.into_iter().map(call_delta).collect(),
            }),
            expert_choices: self.experts(piece.experts),
        }
    }

    fn chat_logprobs(&self, tokens: &[ScoredToken]) -> Option<ChatLogprobs> {
        self.logprobs.then(|| ChatLogprobs { content: token_logprobs(tokens, &self.tokenizer) })
    }
}

/// The newer shape of log-probabilities, which responses have too.
pub(super) fn token_logprobs(tokens: &[ScoredToken], tokenizer: &TextTokenizer) -> Vec<ChatTokenLogprob> {
    let one = |t: &TokenLogprob| ChatLogprob {
        token: tokenizer.shown(t.token_id),
        logprob: t.logprob.max(LOGPROB_FLOOR),
        bytes: tokenizer.shown_bytes(t.token_id).to_vec(),
    };
    let scored = tokens.iter().filter_map(|t| t.logprobs.as_ref());
    scored.map(|l| ChatTokenLogprob { token: one(&l.token), top_logprobs: l.top.iter().map(one).collect() }).collect()
}

/// Why a choice ended; one that called a tool waits for its answer.
fn finish_reason(piece: &Piece) -> Option<&'static str> {
    match piece.finish {
        Some(FinishReason::Stop) if piece.called => Some("tool_calls"),
        finish => finish.map(FinishReason::as_str),
    }
}

fn whole_call(call: CallPiece) -> Option<ChatToolCall> {
    let (id, name) = call.opening?;
    let function = FunctionCall { name: Some(name), arguments: call.arguments };
    Some(ChatToolCall { index: None, id: Some(id), kind: Some("function"), function })
}

fn call_delta(call: CallPiece) -> ChatToolCall {
    let (id, name) = call.opening.unzip();
    let kind = id.is_some().then_some("function");
    ChatToolCall { index: Some(call.index), id, kind, function: FunctionCall { name, arguments: call.arguments } }
}
