//! From named sources to a tokenizer and packed tokens: the slow part before the first step.

use super::data::{DataCache, PackedSource, Packer, SourceSpec, TextSource};
use super::observer::{Event, Observer, Progress, REPORT_INTERVAL};
use super::tokenizer::Vocabulary;
use super::{excerpt, tokenizer};
use crate::Result;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use tokenizers::Tokenizer;

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

/// The text of a run. It is not held: every step below reads it again, unless its tokens are in the cache.
#[derive(Debug)]
pub struct RunText {
    /// Training sources.
    pub train: Vec<TextSource>,
    /// Validation sources; may be empty.
    pub valid: Vec<TextSource>,
}

impl RunText {
    /// Opens the sources named by `data` and `valid`; without `data`, the embedded excerpt. Each is read once, for the hash
    /// of its content.
    ///
    /// # Errors
    /// If a source cannot be read. Whether it is text shows when it is tokenised.
    pub fn read(data: &[String], valid: &[String], observer: &mut dyn Observer) -> Result<Self> {
        let train = if data.is_empty() { excerpt::sources() } else { SourceSpec::parse_list(data)? };
        let valid = SourceSpec::parse_valid_list(valid)?;
        Ok(Self { train: open_all(&train, observer)?, valid: open_all(&valid, observer)? })
    }

    /// Opens validation text alone.
    ///
    /// # Errors
    /// As [`RunText::read`].
    pub fn read_valid(valid: &[String], observer: &mut dyn Observer) -> Result<Self> {
        Ok(Self { train: Vec::new(), valid: open_all(&SourceSpec::parse_valid_list(valid)?, observer)? })
    }

    /// Trains or loads the tokenizer.
    ///
    /// # Errors
    /// As [`tokenizer::train_bpe_watched`] and [`tokenizer::load`].
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
        let total = self.train.iter().map(TextSource::stored_bytes).sum();
        let read = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let (sender, receiver) = mpsc::channel::<()>();
            let (sources, read) = (&self.train, &read);
            let training = scope.spawn(move || {
                // Dropped when the training ends, however it ends.
                let _ended = sender;
                tokenizer::train_bpe_watched(sources, vocab_size, read)
            });
            while receiver.recv_timeout(REPORT_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                observer.event(&Event::Prepared { done: read.load(Ordering::Relaxed), total });
            }
            training.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Tokenises and packs everything that is not in `cache` yet: training sources, then validation sources.
    ///
    /// # Errors
    /// If a source cannot be read, has a broken line or no text, or was changed since it was opened; if the tokenizer has no
    /// end-of-document token and the model names none, or gives an id outside the vocabulary; if `cache` cannot be written to.
    pub fn pack(
        self,
        tokenizer: &Tokenizer,
        vocabulary: impl Into<Vocabulary>,
        cache: &DataCache,
        observer: &mut dyn Observer,
    ) -> Result<(Vec<PackedSource>, Vec<PackedSource>)> {
        let vocabulary = vocabulary.into();
        tokenizer::check_fits(tokenizer, vocabulary.size)?;
        let packer = Packer::new(tokenizer, vocabulary.end_of_document(tokenizer)?, vocabulary.size)?;
        let mut pack_all = |sources: Vec<TextSource>| -> Result<Vec<PackedSource>> {
            sources.iter().map(|source| cache.pack(&packer, source, observer)).collect()
        };
        Ok((pack_all(self.train)?, pack_all(self.valid)?))
    }
}

fn open_all(specs: &[SourceSpec], observer: &mut dyn Observer) -> Result<Vec<TextSource>> {
    let mut open = |spec: &SourceSpec| {
        observer.event(&Event::Preparing { what: format!("reading {}", spec.path().display()) });
        let mut progress = Progress::new(observer);
        TextSource::open(spec, &mut |done, total| progress.report(done, total))
    };
    specs.iter().map(&mut open).collect()
}
