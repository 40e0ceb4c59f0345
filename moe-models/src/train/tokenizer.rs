//! The tokenizer of a run: trained here as a byte-level BPE, or read from a `tokenizer.json`. Checks that it fits the
//! model; does not pack text ([`super::data`] does).

use super::data::documents::SEPARATOR;
use super::data::pieces::Piece;
use super::data::{Documents, TextSource};
use crate::{DecoderConfig, Error, Result};
use std::collections::HashSet;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, PoisonError};
use tokenizers::models::bpe::{BPE, BpeTrainer, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder, Trainer};

/// The end-of-document token of tokenizers trained here; it gets id 0.
pub const END_OF_TEXT: &str = SEPARATOR;

/// Bytes and the end token: no byte-level vocabulary is smaller.
pub const MIN_VOCAB_SIZE: usize = 257;

fn error(e: impl std::fmt::Display) -> Error {
    Error::Tokenizer(e.to_string())
}

/// Trains a byte-level BPE with GPT-2's pre-tokenizer. Id 0 is `<|endoftext|>`; every byte has a token, so any text can
/// be encoded and decodes back exactly. The result is a function of the documents alone. Words longer than a kilobyte, as
/// text without spaces has them, are learned from in parts. What is held of the text is its different words.
///
/// # Errors
/// [`Error::Config`] for a `vocab_size` below [`MIN_VOCAB_SIZE`]; [`Error::Tokenizer`] if training fails or the text
/// is too small or uniform to give `vocab_size` tokens.
pub fn train_bpe(documents: &[Documents], vocab_size: usize) -> Result<Tokenizer> {
    train_on(documents.iter().flat_map(Documents::pieces).map(Ok), vocab_size)
}

/// As [`train_bpe`], from text that is read as it is needed. Counts in `read` the bytes of the files that have been read:
/// the first part of the work; joining tokens is the rest.
///
/// # Errors
/// As [`train_bpe`]; [`Error::Io`] and [`Error::Format`] if a source cannot be read or holds no text.
pub fn train_bpe_watched(sources: &[TextSource], vocab_size: usize, read: &AtomicU64) -> Result<Tokenizer> {
    train_on(sources.iter().flat_map(|source| source.pieces(read)), vocab_size)
}

fn train_on<S: AsRef<str> + Send>(
    pieces: impl Iterator<Item = Result<Piece<S>>> + Send,
    vocab_size: usize,
) -> Result<Tokenizer> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(Error::Config(format!(
            "vocab_size {vocab_size} is below {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}); raise it"
        )));
    }
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let trainer = BpeTrainerBuilder::new()
        .show_progress(false)
        .vocab_size(vocab_size)
        .min_frequency(2)
        .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
        .initial_alphabet(alphabet)
        .build();
    let byte_level = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer = TokenizerBuilder::new()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(byte_level))
        .with_post_processor(Some(byte_level.trim_offsets(false)))
        .with_decoder(Some(byte_level))
        .build()
        .map_err(error)?;
    let failure = Mutex::new(None);
    let texts = pieces.map_while(|piece| match piece {
        Ok(piece) => Some(piece.text),
        Err(e) => {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
            None
        }
    });
    let trained = tokenizer.train(&mut FallibleTrainer { trainer, failure: &failure }, texts).map(|_| ());
    if let Some(e) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(e);
    }
    trained.map_err(error)?;
    // Through JSON: the generic tokenizer becomes the plain `Tokenizer`, exactly as it will be read back from disk.
    let json = tokenizer.to_string(false).map_err(error)?;
    let tokenizer = Tokenizer::from_bytes(json.as_bytes()).map_err(error)?;
    let got = tokenizer.get_vocab_size(true);
    if got != vocab_size {
        return Err(Error::Tokenizer(format!(
            "the text gives only {got} tokens, {vocab_size} were asked for; lower vocab_size or add text"
        )));
    }
    Ok(tokenizer)
}

/// Trains on text that may fail while it is read, which the tokenizer's own trainer has no notion of: an error ends the
/// text, and this refuses to join tokens then, which may take minutes.
struct FallibleTrainer<'a> {
    trainer: BpeTrainer,
    failure: &'a Mutex<Option<Error>>,
}

impl Trainer for FallibleTrainer<'_> {
    type Model = BPE;

    fn should_show_progress(&self) -> bool {
        self.trainer.should_show_progress()
    }

    fn train(&self, model: &mut BPE) -> tokenizers::Result<Vec<AddedToken>> {
        self.trainer.train(model)
    }

    fn feed<I, S, F>(&mut self, iterator: I, process: F) -> tokenizers::Result<()>
    where
        I: Iterator<Item = S> + Send,
        S: AsRef<str> + Send,
        F: Fn(&str) -> tokenizers::Result<Vec<String>> + Sync,
    {
        self.trainer.feed(iterator, process)?;
        match &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(_) => Err("the text could not be read to its end".into()),
            None => Ok(()),
        }
    }
}

/// Reads a `tokenizer.json`.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Format`] if it is not a tokenizer.
pub fn load(path: &Path) -> Result<Tokenizer> {
    parse(&std::fs::read(path).map_err(|e| Error::io(path, e))?, path)
}

/// Reads the content of a `tokenizer.json`, of which `path` is the name for messages.
///
/// # Errors
/// [`Error::Format`] if it is not a tokenizer.
pub fn parse(json: &[u8], path: &Path) -> Result<Tokenizer> {
    let refused = |reason: String| Error::format(path, format!("not a tokenizer.json: {reason}"));
    super::tokenizer_file::check(json).map_err(refused)?;
    // Where the tokenizers crate panics at something else, the file is wrong and not the program.
    match catch_unwind(|| Tokenizer::from_bytes(json)) {
        Ok(read) => read.map_err(|e| refused(e.to_string())),
        Err(_) => Err(refused("its reader has panicked; save it again with a current version of tokenizers".into())),
    }
}

/// One more than the largest id the tokenizer can give: what the model's vocabulary must hold.
pub fn required_vocab_size(tokenizer: &Tokenizer) -> usize {
    tokenizer.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1)
}

/// Refuses a tokenizer with ids outside the model's vocabulary. A larger model vocabulary (padding) is fine.
///
/// # Errors
/// [`Error::Config`] with both sizes.
pub fn check_fits(tokenizer: &Tokenizer, model_vocab_size: usize) -> Result<()> {
    let needed = required_vocab_size(tokenizer);
    if needed > model_vocab_size {
        return Err(Error::Config(format!(
            "the tokenizer needs a vocabulary of {needed}, the model has {model_vocab_size}; raise the model's vocab_size or use a smaller tokenizer"
        )));
    }
    Ok(())
}

/// The end-of-document id: the first of the usual names that the tokenizer knows.
///
/// # Errors
/// [`Error::Tokenizer`] if it knows none of them.
pub fn eos_id(tokenizer: &Tokenizer) -> Result<u32> {
    const NAMES: [&str; 4] = [END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>"];
    NAMES
        .iter()
        .find_map(|name| tokenizer.token_to_id(name))
        .ok_or_else(|| Error::Tokenizer(format!("has no end-of-document token; expected one of {}", NAMES.join(", "))))
}

/// The vocabulary of a model, which text has to fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vocabulary {
    /// Entries, padding included.
    pub size: usize,
    /// What the model's configuration says that texts end with.
    pub eos_token_id: Option<u32>,
}

impl From<usize> for Vocabulary {
    fn from(size: usize) -> Self {
        Self { size, eos_token_id: None }
    }
}

impl From<&DecoderConfig> for Vocabulary {
    fn from(config: &DecoderConfig) -> Self {
        Self { size: config.vocab_size, eos_token_id: config.eos_token_id }
    }
}

impl Vocabulary {
    /// The end-of-document id: [`eos_id`], or else what the model says.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if neither knows one.
    pub fn end_of_document(&self, tokenizer: &Tokenizer) -> Result<u32> {
        eos_id(tokenizer).or_else(|error| self.eos_token_id.ok_or(error))
    }
}

/// The tokenizer as the text of a `tokenizer.json`.
///
/// # Errors
/// [`Error::Tokenizer`] if it cannot be written as JSON.
pub fn to_json(tokenizer: &Tokenizer) -> Result<String> {
    tokenizer.to_string(true).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::SourceSpec;

    fn documents() -> Vec<Documents> {
        let texts = vec!["It's the end of the thing, the other thing — 12 things.\n\nThe end.".repeat(3)];
        vec![Documents { name: "d".into(), weight: None, texts }]
    }

    #[test]
    fn trained_tokenizer_round_trips_any_text() {
        let tokenizer = train_bpe(&documents(), 275).unwrap();
        assert_eq!(eos_id(&tokenizer).unwrap(), 0);
        assert_eq!(required_vocab_size(&tokenizer), 275);
        for text in ["the thing", " leading\n\n\ttabs  ", "日本語 🦀 \u{1}\u{7f}", "a"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), text);
        }
    }

    #[test]
    fn training_is_deterministic_and_survives_its_file() {
        let (a, b) = (train_bpe(&documents(), 275).unwrap(), train_bpe(&documents(), 275).unwrap());
        assert_eq!(to_json(&a).unwrap(), to_json(&b).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        std::fs::write(&path, to_json(&a).unwrap()).unwrap();
        assert_eq!(to_json(&load(&path).unwrap()).unwrap(), to_json(&a).unwrap());
    }

    #[test]
    fn what_does_not_fit_is_refused_with_both_numbers() {
        let tokenizer = train_bpe(&documents(), 275).unwrap();
        check_fits(&tokenizer, 275).unwrap();
        let message = check_fits(&tokenizer, 274).unwrap_err().to_string();
        assert!(message.contains("275") && message.contains("274"), "{message}");
        assert!(train_bpe(&documents(), 256).unwrap_err().to_string().contains("257"));
        assert!(train_bpe(&documents(), 5000).unwrap_err().to_string().contains("5000"));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.json");
        assert!(matches!(load(&path), Err(Error::Io { .. })));
        std::fs::write(&path, "{\"version\":").unwrap();
        assert!(matches!(load(&path), Err(Error::Format { .. })));
    }

    fn source(path: &Path) -> TextSource {
        let list = SourceSpec::parse_list(&[path.display().to_string()]).unwrap();
        TextSource::open(&list[0], &mut |_, _| ()).unwrap()
    }

    #[test]
    fn text_from_files_trains_the_same_tokenizer() {
        let one_letter = Documents { name: "a".into(), weight: None, texts: vec!["a".repeat(20 << 20)] };
        let documents = [one_letter, documents().remove(0)];
        let dir = tempfile::tempdir().unwrap();
        let mut sources = Vec::new();
        for Documents { name, texts, .. } in &documents {
            let path = dir.path().join(format!("{name}.txt"));
            std::fs::write(&path, &texts[0]).unwrap();
            sources.push(source(&path));
        }
        let read = AtomicU64::new(0);
        let trained = train_bpe_watched(&sources, 262, &read).unwrap();
        assert_eq!(to_json(&trained).unwrap(), to_json(&train_bpe(&documents, 262).unwrap()).unwrap());
        assert_eq!(read.into_inner(), documents.iter().map(Documents::text_bytes).sum::<u64>());
    }

    #[test]
    fn a_broken_source_is_named_before_tokens_are_joined() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        // Too little text for so many tokens, which would be told if it came to joining them.
        std::fs::write(&path, "{\"text\": \"a b\"}\n{\"text\": 1}\n").unwrap();
        let message = train_bpe_watched(&[source(&path)], 9000, &AtomicU64::new(0)).unwrap_err().to_string();
        assert!(message.contains("a.jsonl") && message.contains("line 2"), "{message}");
    }
}
