//! [`TextTokenizer`]: a `tokenizer.json` with the exact bytes of every token.

use crate::{Error, Result};
use std::collections::HashMap;
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
    /// Bytes of each token in a text; empty for special tokens.
    bytes: Vec<Vec<u8>>,
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
    /// Reads the content of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::ModelFile`] if it is not one, or if its decoder is neither byte-level nor metaspace.
    pub fn from_bytes(json: &[u8]) -> Result<Self> {
        let inner = Tokenizer::from_bytes(json).map_err(|e| Error::model_file("tokenizer.json", e.to_string()))?;
        Self::new(inner)
    }

    /// Wraps a tokenizer.
    ///
    /// # Errors
    /// As [`TextTokenizer::from_bytes`].
    pub fn new(mut inner: Tokenizer) -> Result<Self> {
        // A file may carry the trainer's padding or truncation; a server wants the tokens as they are.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let spelling = spelling(&inner)?;
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, t)| t.special).map(|(&id, t)| (id, t.content.clone())).collect();
        let vocab = inner.get_vocab(true);
        let num_tokens = vocab.values().max().map_or(0, |&id| id as usize + 1);
        let mut bytes = vec![Vec::new(); num_tokens];
        for (name, id) in vocab {
            bytes[id as usize] = match added.get(&id) {
                Some(token) if token.special => Vec::new(),
                Some(token) => token.content.clone().into_bytes(),
                None => token_bytes(&name, spelling),
            };
        }
        let longest_special = added.values().map(|t| t.content.len()).max().unwrap_or(0);
        let longest_token_bytes = bytes.iter().map(Vec::len).max().unwrap_or(0).max(longest_special).max(1);
        Ok(Self { inner, bytes, special, longest_token_bytes })
    }

    /// One more than the highest id.
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
    /// [`Error::Tokenizer`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, true).map_err(|e| Error::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The id of a token by its name.
    pub fn id_of(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
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
}
