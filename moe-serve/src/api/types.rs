//! Answers as they stand on the wire.

use serde::Serialize;
use serde_json::{Map, Value};

/// Tokens a request used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct Usage {
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) total_tokens: usize,
    pub(super) prompt_tokens_details: PromptTokensDetails,
    pub(super) completion_tokens_details: CompletionTokensDetails,
}

/// Of the tokens of a request's prompts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct PromptTokensDetails {
    /// Those that were kept from a prompt before.
    pub(super) cached_tokens: usize,
}

/// Of the tokens of a request's answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub(super) struct CompletionTokensDetails {
    /// Those that were thoughts.
    pub(super) reasoning_tokens: usize,
}

/// An answer, or one chunk of a streamed one, of either endpoint.
#[derive(Debug, Serialize)]
pub(super) struct Answer<C> {
    pub(super) id: String,
    pub(super) object: &'static str,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) choices: Vec<C>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) usage: Option<Usage>,
}

/// A continuation from `/v1/completions`.
#[derive(Debug, Serialize)]
pub(super) struct CompletionChoice {
    pub(super) index: usize,
    pub(super) text: String,
    pub(super) logprobs: Option<CompletionLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expert_choices: Option<Vec<TokenExperts>>,
}

/// The older shape of log-probabilities: parallel lists.
#[derive(Debug, Default, Serialize)]
pub(super) struct CompletionLogprobs {
    pub(super) tokens: Vec<String>,
    pub(super) token_logprobs: Vec<Option<f32>>,
    pub(super) top_logprobs: Vec<Option<Map<String, Value>>>,
    pub(super) text_offset: Vec<usize>,
}

/// A continuation from `/v1/chat/completions`.
#[derive(Debug, Serialize)]
pub(super) struct ChatChoice {
    pub(super) index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) message: Option<ChatAnswer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) delta: Option<Delta>,
    pub(super) logprobs: Option<ChatLogprobs>,
    pub(super) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) expert_choices: Option<Vec<TokenExperts>>,
}

/// A whole answer.
#[derive(Debug, Serialize)]
pub(super) struct ChatAnswer {
    pub(super) role: &'static str,
    /// Null if the answer is calls alone.
    pub(super) content: Option<String>,
    /// What the model thought before it answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning_content: Option<String>,
    /// Always null: the model does not refuse in a separate field.
    pub(super) refusal: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<ChatToolCall>,
}

/// A call of a tool, or what a chunk adds to one.
#[derive(Debug, Serialize)]
pub(super) struct ChatToolCall {
    /// Which one, in chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<&'static str>,
    pub(super) function: FunctionCall,
}

/// The function of a call.
#[derive(Debug, Serialize)]
pub(super) struct FunctionCall {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) name: Option<String>,
    /// JSON, as the model wrote it.
    pub(super) arguments: String,
}

/// What a chunk adds.
#[derive(Debug, Serialize)]
pub(super) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tool_calls: Vec<ChatToolCall>,
}

/// The newer shape of log-probabilities.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprobs {
    pub(super) content: Vec<ChatTokenLogprob>,
}

/// One token of [`ChatLogprobs`].
#[derive(Debug, Serialize)]
pub(super) struct ChatTokenLogprob {
    #[serde(flatten)]
    pub(super) token: ChatLogprob,
    pub(super) top_logprobs: Vec<ChatLogprob>,
}

/// A token and its log-probability.
#[derive(Debug, Serialize)]
pub(super) struct ChatLogprob {
    pub(super) token: String,
    pub(super) logprob: f32,
    pub(super) bytes: Vec<u8>,
}

/// Extension: the experts that worked on one token.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct TokenExperts {
    /// Place in the sequence, the prompt's first token being 0.
    pub(super) position: usize,
    pub(super) token_id: u32,
    pub(super) token: String,
    /// Whether the token belongs to the prompt.
    pub(super) prompt: bool,
    pub(super) layers: Vec<LayerChoice>,
}

/// The experts of one layer for one token; choices dropped for capacity are left out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct LayerChoice {
    pub(super) layer: usize,
    pub(super) expert_ids: Vec<u32>,
    pub(super) weights: Vec<f32>,
}
