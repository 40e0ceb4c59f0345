//! [`TextListener`]: turns the engine's tokens into pieces of text and passes them on to whoever waits for them.

use super::detokenize::Detokenizer;
use super::stop::StopMatcher;
use super::tokenizer::TextTokenizer;
use crate::engine::{CancelFlag, FinishReason, Flow, Listener, PromptOutput, SampledToken, TokenLogprobs};
use crate::{Error, Result};
use moe_models::LayerExperts;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A generated token and the text it set free.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenText {
    /// The token.
    pub token_id: u32,
    /// Its log-probability and the alternatives, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// Characters generated before it.
    pub text_offset: usize,
    /// Text that is now certain; it may belong to earlier tokens.
    pub text: String,
}

/// What happens while a job runs, in order.
#[derive(Debug)]
pub enum Event {
    /// A prompt was read.
    Prompt {
        /// Which.
        prompt_index: usize,
        /// What reading it showed.
        output: PromptOutput,
    },
    /// A token came.
    Token {
        /// Of this continuation.
        choice: usize,
        /// The token and its text.
        token: TokenText,
    },
    /// The experts of the continuation's last token are known.
    Experts {
        /// Of this continuation.
        choice: usize,
        /// One row per MoE layer.
        experts: Vec<LayerExperts>,
    },
    /// A continuation ended.
    Finished {
        /// Which.
        choice: usize,
        /// Text that was held back for a stop string or an unfinished character.
        text: String,
        /// Why.
        reason: FinishReason,
    },
    /// The job ended; nothing follows.
    Done(Result<()>),
}

/// How the text of every continuation is cut.
#[derive(Debug, Clone, Default)]
pub struct TextOptions {
    /// A continuation ends before the first of these.
    pub stops: Vec<String>,
    /// Stop strings are not looked for in the first so many tokens.
    pub min_tokens: usize,
    /// Leading white space is dropped.
    pub trim_start: bool,
    /// Special tokens whose names are part of the text, for whoever reads it.
    pub shown_tokens: Vec<u32>,
}

/// The running state of one continuation.
#[derive(Debug)]
struct Assembly {
    detokenizer: Detokenizer,
    matcher: StopMatcher,
    tokens: usize,
    chars: usize,
    trimming: bool,
}

impl Assembly {
    fn new(options: &TextOptions) -> Self {
        Self {
            detokenizer: Detokenizer::default(),
            matcher: StopMatcher::new(options.stops.clone()),
            tokens: 0,
            chars: 0,
            trimming: options.trim_start,
        }
    }

    fn push(&mut self, bytes: &[u8], min_tokens: usize) -> String {
        self.tokens += 1;
        let text = self.detokenizer.push(bytes);
        self.chars += text.chars().count();
        let released =
            if self.tokens <= min_tokens { self.matcher.push_unmatched(&text) } else { self.matcher.push(&text) };
        self.trimmed(released)
    }

    fn finish(&mut self) -> String {
        let rest = self.detokenizer.finish();
        let released = self.matcher.push(&rest) + &self.matcher.finish();
        self.trimmed(released)
    }

    fn trimmed(&mut self, text: String) -> String {
        if !self.trimming {
            return text;
        }
        let trimmed = text.trim_start();
        self.trimming = trimmed.is_empty();
        trimmed.to_owned()
    }
}

/// Listens to one job.
#[derive(Debug)]
pub struct TextListener {
    tokenizer: Arc<TextTokenizer>,
    options: TextOptions,
    /// Of the continuations that have begun and not ended.
    assemblies: HashMap<usize, Assembly>,
    events: UnboundedSender<Event>,
}

impl TextListener {
    /// A listener and the receiver of its events. The channel holds at most what one request may generate.
    pub fn new(tokenizer: Arc<TextTokenizer>, options: TextOptions) -> (Self, EventReceiver) {
        let (events, receiver) = unbounded_channel();
        let cancel = CancelFlag::default();
        (Self { tokenizer, options, assemblies: HashMap::new(), events }, EventReceiver { receiver, cancel })
    }

    /// A receiver that is gone has set the cancel flag, which ends the job; there is nobody to tell.
    fn send(&self, event: Event) {
        self.events.send(event).ok();
    }

    fn assembly(&mut self, choice: usize) -> &mut Assembly {
        self.assemblies.entry(choice).or_insert_with(|| Assembly::new(&self.options))
    }
}

impl Listener for TextListener {
    fn prompt(&mut self, prompt_index: usize, output: PromptOutput) {
        self.send(Event::Prompt { prompt_index, output });
    }

    fn token(&mut self, choice: usize, token: SampledToken) -> Flow {
        let SampledToken { token_id, is_stop, logprobs } = token;
        let tokenizer = self.tokenizer.clone();
        let min_tokens = self.options.min_tokens;
        let bytes = match is_stop {
            true => &[],
            false if self.options.shown_tokens.contains(&token_id) => tokenizer.shown_bytes(token_id),
            false => tokenizer.bytes(token_id),
        };
        let assembly = self.assembly(choice);
        let text_offset = assembly.chars;
        let text = assembly.push(bytes, min_tokens);
        let flow = if assembly.matcher.stopped() { Flow::Stop } else { Flow::Continue };
        self.send(Event::Token { choice, token: TokenText { token_id, logprobs, text_offset, text } });
        flow
    }

    fn experts(&mut self, choice: usize, experts: Vec<LayerExperts>) {
        self.send(Event::Experts { choice, experts });
    }

    fn finished(&mut self, choice: usize, reason: FinishReason) {
        let text = self.assembly(choice).finish();
        self.assemblies.remove(&choice);
        self.send(Event::Finished { choice, text, reason });
    }

    fn done(&mut self, result: Result<()>) {
        self.send(Event::Done(result));
    }
}

/// Receives the events of one job; dropping it cancels the job.
#[derive(Debug)]
pub struct EventReceiver {
    receiver: UnboundedReceiver<Event>,
    cancel: CancelFlag,
}

impl EventReceiver {
    /// The flag that gives the job up.
    pub fn cancel_flag(&self) -> CancelFlag {
        self.cancel.clone()
    }

    /// The next event. After an engine that vanished without a word, [`Event::Done`] with an error.
    pub async fn next(&mut self) -> Event {
        self.receiver.recv().await.unwrap_or_else(vanished)
    }

    /// The next event if there is one already.
    pub fn ready(&mut self) -> Option<Event> {
        match self.receiver.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(vanished()),
        }
    }

    /// As [`EventReceiver::next`], outside async code.
    pub fn blocking_next(&mut self) -> Event {
        self.receiver.blocking_recv().unwrap_or_else(vanished)
    }
}

fn vanished() -> Event {
    Event::Done(Err(Error::Cancelled))
}

impl Drop for EventReceiver {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener() -> (TextListener, EventReceiver) {
        let json = serde_json::json!({
            "version": "1.0", "added_tokens": [], "decoder": {"type": "ByteFallback"},
            "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        });
        let tokenizer = TextTokenizer::from_bytes(json.to_string().as_bytes(), 1).unwrap();
        TextListener::new(Arc::new(tokenizer), TextOptions::default())
    }

    #[test]
    fn what_is_ready_comes_at_once_and_nothing_else() {
        let (mut listener, mut events) = listener();
        assert!(events.ready().is_none());
        listener.experts(0, Vec::new());
        listener.experts(1, Vec::new());
        assert!(matches!(events.ready(), Some(Event::Experts { choice: 0, .. })));
        assert!(matches!(events.blocking_next(), Event::Experts { choice: 1, .. }));
        assert!(events.ready().is_none());
        listener.done(Ok(()));
        assert!(matches!(events.ready(), Some(Event::Done(Ok(())))));
    }

    #[test]
    fn an_engine_that_is_gone_ends_the_request() {
        let (mut listener, mut events) = listener();
        listener.experts(0, Vec::new());
        drop(listener);
        assert!(matches!(events.ready(), Some(Event::Experts { .. })), "what was sent comes first");
        assert!(matches!(events.ready(), Some(Event::Done(Err(Error::Cancelled)))));
        assert!(matches!(events.blocking_next(), Event::Done(Err(Error::Cancelled))));
    }
}
