//! A tokenizer that tests can spell anything with.

use super::TextTokenizer;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer};

/// The end of text, token 0, these special tokens, and one token per byte.
pub(super) fn tokenizer(special: &[&str]) -> TextTokenizer {
    let tokens: Vec<AddedToken> =
        std::iter::once("<end>").chain(special.iter().copied()).map(|name| AddedToken::from(name, true)).collect();
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(256 + tokens.len())
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(tokens)
        .build()
        .into();
    let mut inner = Tokenizer::new(BPE::default());
    inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    inner.with_decoder(Some(ByteLevel::default()));
    inner.train(&mut trainer, ["a"].into_iter()).expect("trains on nothing much");
    TextTokenizer::new(inner, 300).expect("byte-level")
}
