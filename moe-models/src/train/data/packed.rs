//! A tokenised source as the trainer reads it: a stretch of a file of tokens. Decides no order; [`super::sampler`] does.

use super::token_file::TokenFile;
use crate::train::files::Crc32c;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::Arc;

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
///
/// A view, cheap to clone: the tokens lie in a mapped file, or in memory if they were made from [`super::Documents`].
#[derive(Debug, Clone)]
pub struct PackedSource {
    /// The source's name.
    pub name: String,
    /// The user's weight, if any.
    pub weight: Option<f64>,
    file: Arc<TokenFile>,
    /// The tokens of `file` that belong to this source.
    range: Range<usize>,
}

impl PackedSource {
    /// All tokens of `file`.
    pub(crate) fn new(name: String, weight: Option<f64>, file: TokenFile) -> Self {
        let range = 0..file.tokens();
        Self { name, weight, file: Arc::new(file), range }
    }

    /// Tokens, end-of-document tokens included.
    pub fn num_tokens(&self) -> usize {
        self.range.len()
    }

    /// Whole sequences of `seq_len` inputs and as many targets.
    pub fn num_sequences(&self, seq_len: usize) -> usize {
        self.range.len().saturating_sub(1) / seq_len
    }

    /// Appends inputs and targets of sequence `index` (`seq_len` each) to the two lists.
    pub fn append_sequence(&self, index: usize, seq_len: usize, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
        let start = index * seq_len;
        inputs.extend(self.file.ids(self.within(start..start + seq_len)));
        targets.extend(self.file.ids(self.within(start + 1..start + seq_len + 1)));
    }

    /// Bytes of text behind the targets of sequence `index`.
    pub fn target_bytes(&self, index: usize, seq_len: usize) -> u64 {
        let start = index * seq_len + 1;
        self.file.text_bytes(self.within(start..start + seq_len)).map(u64::from).sum()
    }

    /// Where the tokens `range` of this source lie in the file.
    fn within(&self, range: Range<usize>) -> Range<usize> {
        assert!(range.end <= self.range.len(), "tokens {range:?} of {}", self.range.len());
        self.range.start + range.start..self.range.start + range.end
    }

    /// Cuts the last `fraction` of the tokens off as a source of their own (for validation).
    pub fn split_tail(&mut self, fraction: f64) -> Self {
        let cut = self.range.end - (self.range.len() as f64 * fraction).floor() as usize;
        let tail = Self { range: cut..self.range.end, ..self.clone() };
        self.range.end = cut;
        tail
    }

    /// Name, length and checksum of the stream, of which every token is read once.
    pub fn fingerprint(&self) -> Fingerprint {
        let mut crc = Crc32c::default();
        let mut bytes = Vec::new();
        for start in self.range.clone().step_by(FINGERPRINTED_TOKENS) {
            let part = start..self.range.end.min(start + FINGERPRINTED_TOKENS);
            bytes.clear();
            bytes.extend(self.file.ids(part).flat_map(u32::to_le_bytes));
            crc.update(&bytes);
        }
        Fingerprint { name: self.name.clone(), tokens: self.range.len() as u64, crc32c: crc.finish() }
    }
}

/// Tokens widened at once for the checksum.
const FINGERPRINTED_TOKENS: usize = 1 << 14;

#[cfg(test)]
#[path = "packed_tests.rs"]
mod tests;
