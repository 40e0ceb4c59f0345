//! From named sources to a tokenizer and packed tokens: the slow part before the first step.

use super::data::{Documents, PackedSource, Packer, SourceSpec, read_documents};
use super::observer::{Event, Observer};
use super::{excerpt, tokenizer};
use crate::Result;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokenizers::Tokenizer;

/// Time between two [`Event::Prepared`].
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// Where the tokenizer comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenizerChoice {
    /// A `tokenizer.json`.
    File(PathBuf),
    /// A byte-level BPE trained on the training sources.
    Train {
        /// Entries, the end token included.
        vocab_size: usize,
    },
}

/// The text of a run.
#[derive(Debug)]
pub struct RunText {
    /// Training sources.
    pub train: Vec<Documents>,
    /// Validation sources; may be empty.
    pub valid: Vec<Documents>,
}

impl RunText {
    /// Reads the sources named by `data` and `valid`; without `data`, the embedded excerpt.
    ///
    /// # Errors
    /// If a source cannot be read, has a broken line or no text.
    pub fn read(data: &[String], valid: &[String], observer: &mut dyn Observer) -> Result<Self> {
        let train = if data.is_empty() { excerpt::sources() } else { SourceSpec::parse_list(data)? };
        let valid = SourceSpec::parse_valid_list(valid)?;
        Ok(Self { train: read_all(train, observer)?, valid: read_all(valid, observer)? })
    }

    /// Reads validation text alone.
    ///
    /// # Errors
    /// As [`RunText::read`].
    pub fn read_valid(valid: &[String], observer: &mut dyn Observer) -> Result<Self> {
        Ok(Self { train: Vec::new(), valid: read_all(SourceSpec::parse_valid_list(valid)?, observer)? })
    }

    /// Trains or loads the tokenizer.
    ///
    /// # Errors
    /// As [`tokenizer::train_bpe`] and [`tokenizer::load`].
    pub fn tokenizer(&self, choice: &TokenizerChoice, observer: &mut dyn Observer) -> Result<Tokenizer> {
        match choice {
            TokenizerChoice::File(path) => tokenizer::load(path),
            TokenizerChoice::Train { vocab_size } => {
                observer.event(&Event::Preparing { what: format!("training a tokenizer of {vocab_size} entries") });
                self.train_tokenizer(*vocab_size, observer)
            }
        }
    }

    /// Trains on a thread of its own and reports from this one, which the observer belongs to.
    fn train_tokenizer(&self, vocab_size: usize, observer: &mut dyn Observer) -> Result<Tokenizer> {
        let total = self.train.iter().map(Documents::text_bytes).sum();
        let read = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel::<()>();
            let (documents, read) = (&self.train, &read);
            let training = scope.spawn(move || {
                // Dropped when the training ends, however it ends.
                let _ended = sender;
                tokenizer::train_bpe_watched(documents, vocab_size, read)
            });
            while receiver.recv_timeout(REPORT_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                observer.event(&Event::Prepared { done: read.load(Ordering::Relaxed), total });
            }
            training.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Tokenises and packs everything: training sources, then validation sources.
    ///
    /// # Errors
    /// If the tokenizer has no end-of-document token or gives an id outside the vocabulary.
    pub fn pack(
        self,
        tokenizer: &Tokenizer,
        vocab_size: usize,
        observer: &mut dyn Observer,
    ) -> Result<(Vec<PackedSource>, Vec<PackedSource>)> {
        tokenizer::check_fits(tokenizer, vocab_size)?;
        let packer = Packer::new(tokenizer, tokenizer::eos_id(tokenizer)?, vocab_size)?;
        let mut pack_all = |documents: Vec<Documents>| -> Result<Vec<PackedSource>> {
            let mut pack = |one: Documents| {
                observer.event(&Event::Preparing { what: format!("tokenising {}", one.name) });
                let (total, mut reported) = (one.text_bytes(), Instant::now());
                packer.pack_watched(&one, &mut |done| {
                    if reported.elapsed() >= REPORT_INTERVAL {
                        observer.event(&Event::Prepared { done, total });
                        reported = Instant::now();
                    }
                })
            };
            documents.into_iter().map(&mut pack).collect()
        };
        Ok((pack_all(self.train)?, pack_all(self.valid)?))
    }
}

fn read_all(specs: Vec<SourceSpec>, observer: &mut dyn Observer) -> Result<Vec<Documents>> {
    let mut read = |spec: &SourceSpec| {
        observer.event(&Event::Preparing { what: format!("reading {}", spec.path().display()) });
        read_documents(spec)
    };
    specs.iter().map(&mut read).collect()
}
