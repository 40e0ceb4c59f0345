//! The tokenizer of a run: trained here as a byte-level BPE, or read from a `tokenizer.json`. Checks that it fits the
//! model; does not pack text ([`super::data`] does).

use super::data::Documents;
use super::data::documents::SEPARATOR;
use super::data::pieces::pieces;
use crate::{Error, Result};
use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder};

/// The end-of-document token of tokenizers trained here; it gets id 0.
pub const END_OF_TEXT: &str = SEPARATOR;

/// Bytes and the end token: no byte-level vocabulary is smaller.
pub const MIN_VOCAB_SIZE: usize = 257;

fn error(e: impl std::fmt::Display) -> Error {
    Error::Tokenizer(e.to_string())
}

/// Trains a byte-level BPE with GPT-2's pre-tokenizer. Id 0 is `<|endoftext|>`; every byte has a token, so any text can
/// be encoded and decodes back exactly. The result is a function of the documents alone. Words longer than a kilobyte, as
/// text without spaces has them, are learned from in parts.
///
/// # Errors
/// [`Error::Config`] for a `vocab_size` below [`MIN_VOCAB_SIZE`]; [`Error::Tokenizer`] if training fails or the text
/// is too small or uniform to give `vocab_size` tokens.
pub fn train_bpe(documents: &[Documents], vocab_size: usize) -> Result<Tokenizer> {
    train_bpe_watched(documents, vocab_size, &AtomicU64::new(0))
}

/// As [`train_bpe`], counting in `read` the bytes of text that have been read. Reading is the first part of the work;
/// joining tokens is the rest.
///
/// # Errors
/// As [`train_bpe`].
pub fn train_bpe_watched(documents: &[Documents], vocab_size: usize, read: &AtomicU64) -> Result<Tokenizer> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(Error::Config(format!(
            "vocab_size {vocab_size} is below {MIN_VOCAB_SIZE} (256 bytes and {END_OF_TEXT}); raise it"
        )));
    }
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let mut trainer = BpeTrainerBuilder::new()
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
    let texts = training_pieces(documents).inspect(|piece| _ = read.fetch_add(piece.len() as u64, Ordering::Relaxed));
    tokenizer.train(&mut trainer, texts).map_err(error)?;
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

/// What the trainer is handed: whole words, but for those that are too long.
fn training_pieces(documents: &[Documents]) -> impl Iterator<Item = &str> + Send {
    documents.iter().flat_map(|d| &d.texts).flat_map(|text| pieces(text))
}

/// Reads a `tokenizer.json`.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Format`] if it is not a tokenizer.
pub fn load(path: &Path) -> Result<Tokenizer> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    Tokenizer::from_bytes(&bytes).map_err(|e| Error::format(path, format!("not a tokenizer.json: {e}")))
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
    use crate::train::data::pieces::MAX_RUN_BYTES;

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

    #[test]
    fn the_trainer_is_handed_pieces_of_bounded_length() {
        let one_letter = Documents { name: "a".into(), weight: None, texts: vec!["a".repeat(20 << 20)] };
        let documents = [one_letter, documents().remove(0)];
        assert_eq!(training_pieces(&documents).map(str::len).max(), Some(MAX_RUN_BYTES));
        assert_eq!(
            training_pieces(&documents[1..]).collect::<Vec<_>>(),
            documents[1].texts,
            "ordinary text stays whole"
        );
        let read = AtomicU64::new(0);
        train_bpe_watched(&documents, 262, &read).unwrap();
        assert_eq!(read.into_inner(), documents.iter().map(Documents::text_bytes).sum::<u64>());
    }
}
