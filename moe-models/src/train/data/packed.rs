//! Tokenises documents and packs them into one stream per source. Decides no order; [`super::sampler`] does.

use super::documents::Documents;
use super::pieces::pieces;
use crate::train::files::crc32c;
use crate::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

/// Token ids in the narrowest type that holds the vocabulary.
#[derive(Debug, Clone, PartialEq)]
enum TokenStore {
    Narrow(Vec<u16>),
    Wide(Vec<u32>),
}

impl TokenStore {
    fn new(vocab_size: usize) -> Self {
        if vocab_size <= 1 << 16 { Self::Narrow(Vec::new()) } else { Self::Wide(Vec::new()) }
    }

    fn len(&self) -> usize {
        match self {
            Self::Narrow(ids) => ids.len(),
            Self::Wide(ids) => ids.len(),
        }
    }

    /// `id` is below the vocabulary size the store was made for, so the narrowing loses nothing.
    fn push(&mut self, id: u32) {
        match self {
            Self::Narrow(ids) => ids.push(id as u16),
            Self::Wide(ids) => ids.push(id),
        }
    }

    fn extend_into(&self, range: std::ops::Range<usize>, out: &mut Vec<u32>) {
        match self {
            Self::Narrow(ids) => out.extend(ids[range].iter().map(|&id| u32::from(id))),
            Self::Wide(ids) => out.extend_from_slice(&ids[range]),
        }
    }

    fn split_off(&mut self, at: usize) -> Self {
        match self {
            Self::Narrow(ids) => Self::Narrow(ids.split_off(at)),
            Self::Wide(ids) => Self::Wide(ids.split_off(at)),
        }
    }
}

/// What identifies a tokenised source, so that a resumed run notices changed data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// The source's name.
    pub name: String,
    /// Tokens, end-of-document tokens included.
    pub tokens: u64,
    /// CRC32C of the ids as little-endian u32.
    pub crc32c: u32,
}

/// One source as a stream of token ids: every document followed by the end-of-document id.
///
/// Sequence `i` of length `seq_len` reads `seq_len + 1` tokens from `i * seq_len`: neighbours share one token, which is
/// the last target of one and the first input of the next, so every token but the first is predicted exactly once (the
/// last `(tokens - 1) % seq_len` tokens are left over).
#[derive(Debug, Clone, PartialEq)]
pub struct PackedSource {
    /// The source's name.
    pub name: String,
    /// The user's weight, if any.
    pub weight: Option<f64>,
    tokens: TokenStore,
    /// Bytes of text each token stands for; see [`Packer::pack`].
    token_bytes: Vec<u16>,
}

impl PackedSource {
    /// Tokens, end-of-document tokens included.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whole sequences of `seq_len` inputs and as many targets.
    pub fn num_sequences(&self, seq_len: usize) -> usize {
        self.tokens.len().saturating_sub(1) / seq_len
    }

    /// Appends inputs and targets of sequence `index` (`seq_len` each) to the two lists.
    pub fn append_sequence(&self, index: usize, seq_len: usize, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
        let start = index * seq_len;
        self.tokens.extend_into(start..start + seq_len, inputs);
        self.tokens.extend_into(start + 1..start + seq_len + 1, targets);
    }

    /// Bytes of text behind the targets of sequence `index`.
    pub fn target_bytes(&self, index: usize, seq_len: usize) -> u64 {
        let start = index * seq_len + 1;
        self.token_bytes[start..start + seq_len].iter().map(|&b| u64::from(b)).sum()
    }

    /// Cuts the last `fraction` of the tokens off as a source of their own (for validation).
    pub fn split_tail(&mut self, fraction: f64) -> Self {
        let keep = self.tokens.len() - (self.tokens.len() as f64 * fraction).floor() as usize;
        Self {
            name: self.name.clone(),
            weight: self.weight,
            tokens: self.tokens.split_off(keep),
            token_bytes: self.token_bytes.split_off(keep),
        }
    }

    /// Name, length and checksum of the stream.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut ids = Vec::with_capacity(self.tokens.len());
        self.tokens.extend_into(0..self.tokens.len(), &mut ids);
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        Fingerprint { name: self.name.clone(), tokens: ids.len() as u64, crc32c: crc32c(&bytes) }
    }
}

/// Tokenises with one tokenizer and one end-of-document id.
#[derive(Debug)]
pub struct Packer {
    tokenizer: Tokenizer,
    eos_id: u32,
    vocab_size: usize,
}

/// Text tokenised at once; bounds the memory of the encodings.
const BATCH_BYTES: usize = 4 << 20;

impl Packer {
    /// A packer whose ids lie below `vocab_size`. Special tokens spelled out in the text are read as ordinary text, so
    /// no document can forge an end-of-document token.
    ///
    /// # Errors
    /// [`Error::Config`] if `eos_id` is outside the vocabulary.
    pub fn new(tokenizer: &Tokenizer, eos_id: u32, vocab_size: usize) -> Result<Self> {
        if eos_id as usize >= vocab_size {
            return Err(Error::Config(format!(
                "the end-of-document id {eos_id} is outside the model's vocabulary of {vocab_size}"
            )));
        }
        let mut tokenizer = tokenizer.clone();
        tokenizer.set_encode_special_tokens(true);
        Ok(Self { tokenizer, eos_id, vocab_size })
    }

    /// Tokenises `documents` and packs them, in order.
    ///
    /// Bytes per token are exact in sum for any tokenizer that reports offsets: a token is credited with the bytes by
    /// which it moves the furthest offset of its piece forward, the last token of a piece also with whatever remains,
    /// and the end-of-document token with 0. A character split over several tokens is credited to the first of them.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a document cannot be encoded or gives an id outside the vocabulary.
    pub fn pack(&self, documents: &Documents) -> Result<PackedSource> {
        self.pack_watched(documents, &mut |_| ())
    }

    /// As [`Packer::pack`], telling `progress` the bytes of text done from time to time.
    ///
    /// # Errors
    /// As [`Packer::pack`].
    pub fn pack_watched(&self, documents: &Documents, progress: &mut dyn FnMut(u64)) -> Result<PackedSource> {
        let mut packed = PackedSource {
            name: documents.name.clone(),
            weight: documents.weight,
            tokens: TokenStore::new(self.vocab_size),
            token_bytes: Vec::new(),
        };
        let pieces: Vec<(&str, bool)> = documents.texts.iter().flat_map(|text| marked_pieces(text)).collect();
        let mut done = 0;
        for batch in batches(&pieces) {
            let encoded: Vec<Vec<(u32, u16)>> =
                batch.par_iter().map(|(piece, _)| self.encode(piece)).collect::<Result<_>>()?;
            for (tokens, (_, ends_document)) in encoded.into_iter().zip(batch) {
                for (id, bytes) in tokens.into_iter().chain(ends_document.then_some((self.eos_id, 0))) {
                    packed.tokens.push(id);
                    packed.token_bytes.push(bytes);
                }
            }
            done += batch.iter().map(|(piece, _)| piece.len() as u64).sum::<u64>();
            progress(done);
        }
        Ok(packed)
    }

    /// Ids of one piece with the bytes each stands for.
    fn encode(&self, piece: &str) -> Result<Vec<(u32, u16)>> {
        let encoding = self.tokenizer.encode(piece, false).map_err(|e| Error::Tokenizer(e.to_string()))?;
        let mut reached = 0;
        let mut tokens = Vec::with_capacity(encoding.len());
        for (&id, &(_, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            if id as usize >= self.vocab_size {
                let size = self.vocab_size;
                return Err(Error::Tokenizer(format!("gave id {id}, outside the model's vocabulary of {size}")));
            }
            let end = end.max(reached);
            tokens.push((id, narrow_bytes(end - reached)?));
            reached = end;
        }
        if let Some((_, bytes)) = tokens.last_mut() {
            *bytes = narrow_bytes(usize::from(*bytes) + piece.len() - reached)?;
        }
        Ok(tokens)
    }
}

fn narrow_bytes(bytes: usize) -> Result<u16> {
    u16::try_from(bytes).map_err(|_| {
        Error::Tokenizer(format!("one token stands for {bytes} bytes of text, expected at most {}", u16::MAX))
    })
}

/// The pieces of a document; the flag tells whether the piece ends it.
fn marked_pieces(text: &str) -> impl Iterator<Item = (&str, bool)> {
    let mut left = text.len();
    let empty = text.is_empty().then_some((text, true));
    let marked = pieces(text).map(move |piece| {
        left -= piece.len();
        (piece, left == 0)
    });
    marked.chain(empty)
}

/// Neighbours that reach [`BATCH_BYTES`] together.
fn batches<'a, 'b>(mut pieces: &'a [(&'b str, bool)]) -> impl Iterator<Item = &'a [(&'b str, bool)]> {
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let last = pieces.iter().position(|(piece, _)| {
            bytes += piece.len();
            bytes >= BATCH_BYTES
        });
        let (batch, rest) = pieces.split_at(last.map_or(pieces.len(), |last| last + 1));
        pieces = rest;
        (!batch.is_empty()).then_some(batch)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::tokenizer::train_bpe;

    fn documents(texts: &[&str]) -> Documents {
        Documents { name: "d".into(), weight: None, texts: texts.iter().map(|t| (*t).to_owned()).collect() }
    }

    fn tokenizer() -> Tokenizer {
        train_bpe(&[documents(&["the cat sat on the mat\n\n  and the cäse — of it\nwas closed 1234"; 8])], 280).unwrap()
    }

    fn stream(source: &PackedSource) -> Vec<u32> {
        let mut ids = Vec::new();
        source.tokens.extend_into(0..source.num_tokens(), &mut ids);
        ids
    }

    #[test]
    fn documents_are_joined_by_the_end_id_and_decode_back() {
        let tokenizer = tokenizer();
        let texts = ["the cat — sät\n", "on <|endoftext|> it"];
        let packed = Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents(&texts)).unwrap();
        let ids = stream(&packed);
        let parts: Vec<String> = ids.split(|&id| id == 0).map(|p| tokenizer.decode(p, false).unwrap()).collect();
        assert_eq!(parts, [texts[0], texts[1], ""], "a spelled-out separator must not become the end token");
        let bytes: u64 = packed.token_bytes.iter().map(|&b| u64::from(b)).sum();
        assert_eq!(bytes, texts.iter().map(|t| t.len() as u64).sum::<u64>());
    }

    #[test]
    fn sequences_share_one_token_and_predict_every_token_once() {
        let tokenizer = tokenizer();
        let packed = Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents(&["the cat sat on the mat"; 5])).unwrap();
        let (ids, seq_len) = (stream(&packed), 7);
        let (mut inputs, mut targets, mut bytes) = (Vec::new(), Vec::new(), 0);
        for i in 0..packed.num_sequences(seq_len) {
            packed.append_sequence(i, seq_len, &mut inputs, &mut targets);
            bytes += packed.target_bytes(i, seq_len);
        }
        let n = inputs.len();
        assert_eq!(n, (ids.len() - 1) / seq_len * seq_len);
        assert_eq!(inputs, ids[..n]);
        assert_eq!(targets, ids[1..=n]);
        assert_eq!(bytes, packed.token_bytes[1..=n].iter().map(|&b| u64::from(b)).sum::<u64>());
    }

    #[test]
    fn a_long_document_in_pieces_gives_the_ids_of_the_whole() {
        let tokenizer = tokenizer();
        let lines = "the cat sat\non the mat\n\n  and, the\n cäse\n— of it\nwas 12\n34\n".repeat(9000);
        let (spaces, code) = ("— of the cäse ".repeat(60_000), "it's=12;(the)".repeat(60_000));
        for text in [lines, spaces, code] {
            check_ids_of_the_whole(&tokenizer, &text);
        }
    }

    #[track_caller]
    fn check_ids_of_the_whole(tokenizer: &Tokenizer, text: &str) {
        assert!(pieces(text).count() > 1);
        let packed = Packer::new(tokenizer, 0, 280).unwrap().pack(&documents(&[text])).unwrap();
        let mut whole = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        whole.push(0);
        assert!(stream(&packed) == whole, "the ids differ");
    }

    #[test]
    fn the_tail_and_the_fingerprint() {
        let tokenizer = tokenizer();
        let mut packed = Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents(&["the cat sat"; 50])).unwrap();
        let (before, print) = (stream(&packed), packed.fingerprint());
        let tail = packed.split_tail(0.1);
        assert_eq!(tail.num_tokens(), before.len() / 10);
        assert_eq!([stream(&packed), stream(&tail)].concat(), before);
        assert_ne!(packed.fingerprint(), print);
        assert_eq!(tail.token_bytes.len(), tail.num_tokens());
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused() {
        let tokenizer = tokenizer();
        let packer = Packer::new(&tokenizer, 0, 260).unwrap();
        let message = packer.pack(&documents(&["the cat sat on the mat"])).unwrap_err().to_string();
        assert!(message.contains("260"), "{message}");
        assert!(Packer::new(&tokenizer, 280, 280).is_err());
    }
}
