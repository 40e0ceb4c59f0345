//! What the tests share: a server in this process, a small HTTP client, a model that says what it is told.

mod client;
mod scripted;

pub(crate) use client::{Client, Reply};
pub(crate) use scripted::{NAN_TEXT, PANIC_TEXT, ScriptedLm};

use moe_models::CausalLm;
use moe_serve::api::{Limits, Server, ServerConfig};
use moe_serve::text::{ChatTemplate, TextTokenizer};
use moe_serve::{GenerationDefaults, ServedModel};
use std::sync::Arc;
use std::thread::JoinHandle;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};
use tokio::sync::oneshot;

/// The one name the test servers use.
pub(crate) const MODEL: &str = "tiny";

/// A byte-level BPE trained on a few sentences; token 0 is `<|endoftext|>`.
pub(crate) fn tokenizer() -> Tokenizer {
    let alphabet = ByteLevel::alphabet().into_iter().collect();
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(300)
        .show_progress(false)
        .initial_alphabet(alphabet)
        .special_tokens(vec![AddedToken::from("<|endoftext|>", true)])
        .build()
        .into();
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    let text = ["the cat sat on the mat and the dog sat on the cat", "A: how are you?\nB: I am well, and you?"];
    tokenizer.train(&mut trainer, text.into_iter()).expect("trains on two lines");
    tokenizer
}

/// The token ids of a text.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode(text, false).expect("encodes").get_ids().to_vec()
}

/// `lm` with the test tokenizer, the dialogue format, and `<|endoftext|>` as its end.
pub(crate) fn served(lm: Arc<dyn CausalLm>) -> ServedModel {
    let defaults = GenerationDefaults { eos_token_ids: vec![0], bos_token_id: Some(0), ..Default::default() };
    let tokenizer = TextTokenizer::new(tokenizer(), lm.vocab_size()).expect("byte-level");
    ServedModel::new(MODEL, lm, tokenizer, ChatTemplate::dialogue().expect("compiles"), defaults).expect("fits")
}

/// A server on a free port; stops when dropped.
pub(crate) struct TestServer {
    pub(crate) client: Client,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    /// Serves a model that continues every prompt as `script` says.
    pub(crate) fn scripted(script: &str) -> Self {
        Self::start(served(Arc::new(ScriptedLm::new(script))), Limits::default())
    }

    pub(crate) fn start(model: ServedModel, limits: Limits) -> Self {
        Self::with(model, ServerConfig { limits, ..ServerConfig::default() })
    }

    pub(crate) fn with(model: ServedModel, config: ServerConfig) -> Self {
        let server = Server::new(model, ServerConfig { seed: Some(7), ..config }).expect("starts");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).expect("a free port");
        let address = listener.local_addr().expect("bound");
        let (shutdown, signal) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            runtime.block_on(server.run(listener, async {
                signal.await.ok();
            }))
        });
        Self { client: Client::new(address), shutdown: Some(shutdown), thread: Some(thread) }
    }

    /// Asks the server to stop, without waiting for it.
    pub(crate) fn ask_to_stop(&mut self) {
        if let Some(shutdown) = self.shutdown.take() {
            shutdown.send(()).ok();
        }
    }

    /// Waits for the end of a server that was asked to stop.
    pub(crate) fn wait(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.ask_to_stop();
        if !std::thread::panicking() {
            self.wait();
        }
    }
}
