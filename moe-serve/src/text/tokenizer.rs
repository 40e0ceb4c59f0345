//! [`TextTokenizer`]: a `tokenizer.json` with the exact bytes of every token.

use crate::{Error, Result};
use moe_models::train::tokenizer::parse;
use std::collections::HashMap;
use std::path::Path;
use tokenizers::Tokenizer;

/// How a vocabulary entry is written as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: each byte is one printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` is a byte.
    Metaspace,
}

/// A tokenizer whose tokens are byte strings, so that text is their concatenation.
pub struct TextTokenizer {
    inner: Tokenizer,
    /// Bytes of each token in a text; empty for special tokens. No longer than the model's vocabulary, whatever ids the
    /// file names.
    bytes: Vec<Vec<u8>>,
    vocab_size: usize,
    /// Names of special tokens, such as `<|endoftext|>`.
    special: HashMap<u32, String>,
    longest_token_bytes: usize,
}

impl std::fmt::Debug for TextTokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextTokenizer").field("num_tokens", &self.num_tokens()).finish_non_exhaustive()
    }
}

impl TextTokenizer {
    /// Reads the content of a `tokenizer.json` for a model of `vocab_size` tokens.
    ///
    /// An ordinary token that the model does not have is refused when a prompt needs it.
    ///
    /// # Errors
    /// [`Error::Model`] if it is not one; [`Error::ModelFile`] if its decoder is neither byte-level nor metaspace, or if it has more tokens
    /// than the model or a special token that the model does not have.
    pub fn from_bytes(json: &[u8], vocab_size: usize) -> Result<Self> {
        Self::new(parse(json, Path::new("tokenizer.json"))?, vocab_size)
    }

    /// Wraps a tokenizer for a model of `vocab_size` tokens.
    ///
    /// # Errors
    /// As [`TextTokenizer::from_bytes`].
    pub fn new(mut inner: Tokenizer, vocab_size: usize) -> Result<Self> {
        // A file may carry the trainer's padding or truncation; a server wants the tokens as they are.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let spelling = spelling(&inner)?;
        let added = inner.get_added_tokens_decoder();
        let special: HashMap<u32, String> =
            added.iter().filter(|(_, t)| t.special).map(|(&id, t)| (id, t.content.clone())).collect();
        let vocab = inner.get_vocab(true);
        check_size(&vocab, &special, vocab_size)?;
        let known = |id: &u32| (*id as usize) < vocab_size;
        let num_tokens = vocab.values().filter(|id| known(id)).max().map_or(0, |&id| id as usize + 1);
        let mut bytes = vec![Vec::new(); num_tokens];
        for (name, id) in vocab.into_iter().filter(|(_, id)| known(id)) {
            bytes[id as usize] = match added.get(&id) {
                Some(token) if token.special => Vec::new(),
                Some(token) => token.content.clone().into_bytes(),
                None => token_bytes(&name, spelling),
            };
        }
        let longest_special = added.values().map(|t| t.content.len()).max().unwrap_or(0);
        let longest_token_bytes = bytes.iter().map(Vec::len).max().unwrap_or(0).max(longest_special).max(1);
        Ok(Self { inner, bytes, vocab_size, special, longest_token_bytes })
    }

    /// One more than the highest id that the model has.
    pub fn num_tokens(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes of the longest token: a text of more than `n` times as many bytes cannot be `n` tokens.
    pub fn longest_token_bytes(&self) -> usize {
        self.longest_token_bytes
    }

    /// Token ids of a text, with whatever the tokenizer's post-processor adds.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]; [`Error::UnknownToken`] if the model does not have one of the tokens.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_as(text, true)
    }

    /// Token ids of a text that says all special tokens itself, as models' own chat templates do.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_as(text, false)
    }

    /// Token ids as of [`Self::encode`], and for each the characters of the text before it.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<usize>)> {
        let encoding = self.inner.encode_char_offsets(text, true).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let ids = self.known(encoding.get_ids())?;
        let chars: Vec<char> = text.chars().collect();
        // A token that the text does not have, such as one that begins it, is empty and stands where the last one ended. Some
        // tokenizers leave out the white space that a token begins with.
        let place = |ended: &mut usize, &(begin, end): &(usize, usize)| {
            let skipped = chars.get(*ended..begin).is_some_and(|skipped| skipped.iter().all(|c| c.is_whitespace()));
            let begin = if skipped || begin >= end { *ended } else { begin };
            *ended = end.min(chars.len()).max(*ended);
            Some(begin)
        };
        Ok((ids, encoding.get_offsets().iter().scan(0, place).collect()))
    }

    fn encode_as(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(|e| Error::Tokenizer(e.to_string()))?;
        self.known(encoding.get_ids())
    }

    /// Ids that the model has.
    fn known(&self, ids: &[u32]) -> Result<Vec<u32>> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(&token_id) => Err(Error::UnknownToken { token_id, vocab_size: self.vocab_size }),
            None => Ok(ids.to_vec()),
        }
    }

    /// The id of a token by its name, if the model has it.
    pub fn id_of(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name).filter(|&id| (id as usize) < self.vocab_size)
    }

    /// The id of a special token by its name.
    pub fn special_id(&self, name: &str) -> Option<u32> {
        self.id_of(name).filter(|id| self.special.contains_key(id))
    }

    /// Whether a token is special, so that it adds nothing to a text.
    pub fn is_special(&self, token_id: u32) -> bool {
        self.special.contains_key(&token_id)
    }

    /// Bytes the token adds to a text: none for a special token or an unknown id.
    pub fn bytes(&self, token_id: u32) -> &[u8] {
        self.bytes.get(token_id as usize).map_or(&[], Vec::as_slice)
    }

    /// The token as shown to a person: its bytes, or its name if it is special.
    pub fn shown_bytes(&self, token_id: u32) -> &[u8] {
        self.special.get(&token_id).map_or_else(|| self.bytes(token_id), |name| name.as_bytes())
    }

    /// The token as shown to a person; bytes that are not UTF-8 are written `bytes:\xe2\x80`, as OpenAI does.
    pub fn shown(&self, token_id: u32) -> String {
        let bytes = self.shown_bytes(token_id);
        match std::str::from_utf8(bytes) {
            Ok(text) => text.to_owned(),
            Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
        }
    }
}

/// Refuses a tokenizer that is another model's, and special tokens that this one does not have.
fn check_size(vocab: &HashMap<String, u32>, special: &HashMap<u32, String>, vocab_size: usize) -> Result<()> {
    let refused = |reason: String| Err(Error::model_file("tokenizer.json", reason));
    if vocab.len() > vocab_size {
        let num_tokens = vocab.len();
        return refused(format!(
            "has {num_tokens} tokens, but the model's vocab_size is {vocab_size}; use the tokenizer it was trained with"
        ));
    }
    match special.iter().filter(|(id, _)| **id as usize >= vocab_size).min() {
        Some((id, name)) => refused(format!(
            "special token {name:?} has id {id}, but the model's vocab_size is {vocab_size}; use the tokenizer it was trained with"
        )),
        None => Ok(()),
    }
}

/// Finds how tokens are spelled from the decoder's description.
fn spelling(tokenizer: &Tokenizer) -> Result<Spelling> {
    let refused = |found: &str| {
        Error::model_file(
            "tokenizer.json",
            format!(
                "expected a ByteLevel, Metaspace or ByteFallback decoder, found {found}; convert the tokenizer to one of them"
            ),
        )
    };
    let decoder = tokenizer.get_decoder().ok_or_else(|| refused("none"))?;
    let json = serde_json::to_value(decoder).map_err(|e| Error::Tokenizer(e.to_string()))?;
    let nested = json["decoders"].as_array().map_or(&[][..], Vec::as_slice);
    let kinds: Vec<&str> = std::iter::once(&json).chain(nested).filter_map(|d| d["type"].as_str()).collect();
    if kinds.contains(&"ByteLevel") {
        Ok(Spelling::ByteLevel)
    } else if kinds.contains(&"Metaspace") || kinds.contains(&"ByteFallback") {
        Ok(Spelling::Metaspace)
    } else {
        Err(refused(&kinds.join(", ")))
    }
}

fn token_bytes(name: &str, spelling: Spelling) -> Vec<u8> {
    match spelling {
        Spelling::ByteLevel => {
            let bytes: Option<Vec<u8>> = name.chars().map(byte_of_char).collect();
            bytes.unwrap_or_else(|| name.as_bytes().to_vec())
        }
        Spelling::Metaspace => {
            let hex = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
            match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                Some(byte) => vec![byte],
                None => name.replace('\u{2581}', " ").into_bytes(),
            }
        }
    }
}

/// Undoes GPT-2's byte alphabet: printable Latin-1 stands for itself, the 68 other bytes for U+0100 and up, in order.
fn byte_of_char(c: char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    match u8::try_from(u32::from(c)) {
        Ok(byte) => printable(byte).then_some(byte),
        Err(_) => (0..=u8::MAX).filter(|&b| !printable(b)).nth((u32::from(c) - 0x100) as usize),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_byte_alphabet_is_a_bijection() {
        let mut bytes: Vec<u8> = ByteLevel::alphabet().into_iter().filter_map(byte_of_char).collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=u8::MAX).collect::<Vec<_>>());
        assert_eq!(byte_of_char('Ġ'), Some(b' '));
        assert_eq!(byte_of_char('Ċ'), Some(b'\n'));
        assert_eq!(byte_of_char('漢'), None);
    }

    #[test]
    fn metaspace_tokens() {
        assert_eq!(token_bytes("\u{2581}the", Spelling::Metaspace), b" the");
        assert_eq!(token_bytes("<0xE2>", Spelling::Metaspace), [0xe2]);
    }

    #[test]
    fn a_file_that_breaks_off_in_the_decoder_is_an_error() {
        for json in [
            r#"{"version": "1.0", "decoder": "#,
            r#"{"version": "1.0", "decoder": {"type": "#,
            r#"{"decoder": {"a": 1e999}}"#,
        ] {
            let error = TextTokenizer::from_bytes(json.as_bytes(), 8).expect_err(json).to_string();
            assert!(error.starts_with("tokenizer.json: "), "{error}");
        }
    }

    /// Two words with ids of their own; the second is special if its name is `<end>`.
    fn two_words(words: [(&str, u32); 2]) -> Tokenizer {
        let [(first, first_id), (second, second_id)] = words;
        let added = serde_json::json!({"id": second_id, "content": second, "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false});
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": if second == "<end>" { vec![added] } else { Vec::new() },
            "pre_tokenizer": {"type": "Whitespace"},
            "decoder": {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": true},
            "model": {"type": "WordLevel", "vocab": {first: first_id, second: second_id}, "unk_token": first},
        });
        Tokenizer::from_bytes(json.to_string()).expect("a tokenizer")
    }

    #[test]
    fn tables_are_as_long_as_the_models_vocabulary_and_ids_beyond_are_refused_in_use() {
        for id in [8, 1 << 31, u32::MAX] {
            let tokenizer = TextTokenizer::new(two_words([("cat", 1), ("dog", id)]), 8).expect("one stray id");
            assert_eq!((tokenizer.num_tokens(), tokenizer.id_of("cat"), tokenizer.id_of("dog")), (2, Some(1), None));
            assert_eq!(tokenizer.encode("cat cat").expect("known"), [1, 1]);
            let error = tokenizer.encode("cat dog").expect_err("not known");
            assert!(matches!(error, Error::UnknownToken { token_id, vocab_size: 8 } if token_id == id), "{error}");
            assert_eq!(tokenizer.bytes(id), b"");
        }
        assert_eq!(
            TextTokenizer::new(two_words([("cat", 1), ("dog", 7)]), 8).expect("fits").encode("dog").expect("known"),
            [7]
        );
    }

    #[test]
    fn special_tokens_and_tokenizers_of_other_models_are_refused_at_once() {
        assert!(TextTokenizer::new(two_words([("cat", 0), ("<end>", 7)]), 8).is_ok());
        let refused = |tokenizer, vocab_size, part: &str| {
            let error = TextTokenizer::new(tokenizer, vocab_size).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        };
        refused(two_words([("cat", 0), ("<end>", 1 << 31)]), 8, "special token \"<end>\" has id 2147483648");
        refused(two_words([("cat", 0), ("dog", 1)]), 1, "has 2 tokens, but the model's vocab_size is 1");
    }

    #[test]
    fn offsets_survive_what_leaves_out_white_space() {
        use tokenizers::models::TrainerWrapper;
        use tokenizers::models::bpe::{BPE, BpeTrainer};
        let alphabet = ByteLevel::alphabet().into_iter().collect();
        let mut trainer: TrainerWrapper =
            BpeTrainer::builder().vocab_size(256).initial_alphabet(alphabet).build().into();
        let mut inner = Tokenizer::new(BPE::default());
        inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        inner.with_decoder(Some(ByteLevel::default()));
        inner.train(&mut trainer, ["a b"].into_iter()).expect("trains on nothing much");
        let offsets = |inner: &Tokenizer| {
            let tokenizer = TextTokenizer::new(inner.clone(), 300).expect("byte-level");
            let (ids, offsets) = tokenizer.encode_with_offsets("a  bé c").expect("encodes");
            assert_eq!(ids, tokenizer.encode("a  bé c").expect("encodes"));
            offsets
        };
        // A token for each byte; both of the letter of two begin where it does.
        let want = [0, 1, 2, 3, 4, 4, 5, 6];
        assert_eq!(offsets(&inner), want);
        inner.with_post_processor(Some(ByteLevel::new(false, true, true)));
        assert_eq!(offsets(&inner), want);
    }
}
