//! Between text and token ids: the tokenizer, UTF-8-safe streaming, stop strings, chat templates. No HTTP.

mod assembler;
mod chat;
mod detokenize;
mod grammar;
mod stop;
#[cfg(test)]
mod testing;
mod thought_grammar;
mod thoughts;
mod tokenizer;
mod tools;

pub use assembler::{Event, EventReceiver, TextListener, TextOptions, TokenText};
pub(crate) use chat::RESERVED as RESERVED_VARIABLES;
pub use chat::{ChatMessage, ChatTemplate, Tool, ToolCall};
pub use detokenize::Detokenizer;
pub use grammar::{GrammarSource, Grammars};
pub use stop::StopMatcher;
pub(crate) use thought_grammar::{AfterThought, ThoughtTokens};
pub(crate) use thoughts::ThoughtParser;
pub use tokenizer::TextTokenizer;
pub use tools::{AnswerParser, AnswerPart, MAX_CALLS, ToolFormat};
