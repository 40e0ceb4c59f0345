//! Between text and token ids: the tokenizer, UTF-8-safe streaming, stop strings, chat templates. No HTTP.

mod assembler;
mod chat;
mod detokenize;
mod grammar;
mod stop;
mod tokenizer;

pub use assembler::{Event, EventReceiver, TextListener, TextOptions, TokenText};
pub use chat::{ChatMessage, ChatTemplate};
pub use detokenize::Detokenizer;
pub use grammar::{GrammarSource, Grammars};
pub use stop::StopMatcher;
pub use tokenizer::TextTokenizer;
