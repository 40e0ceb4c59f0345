//! Fixed validation windows: the same tokens in the same order at every evaluation.

use super::packed::PackedSource;
use crate::train::model::TokenBatch;
use crate::{Error, Result};

/// One validation source cut into windows; nothing is shuffled.
#[derive(Debug, Clone)]
pub struct ValidSource {
    source: PackedSource,
    seq_len: usize,
    /// Indices of the windows that are evaluated, ascending.
    windows: Vec<usize>,
}

impl ValidSource {
    /// Windows of `seq_len`, at most `max_windows` of them (0 means all), spread evenly over the source so that a
    /// short evaluation sees every part of it.
    ///
    /// # Errors
    /// [`Error::Config`] if the source is too short for one window.
    pub fn new(source: PackedSource, seq_len: usize, max_windows: usize) -> Result<Self> {
        let count = source.num_sequences(seq_len);
        if count == 0 {
            return Err(Error::Config(format!(
                "validation source {} has {} tokens, too few for one sequence of {seq_len}; add text, lower seq_length or hold out more",
                source.name,
                source.num_tokens()
            )));
        }
        let take = if max_windows == 0 { count } else { max_windows.min(count) };
        let windows = (0..take).map(|i| i * count / take).collect();
        Ok(Self { source, seq_len, windows })
    }

    /// The source's name.
    pub fn name(&self) -> &str {
        &self.source.name
    }

    /// Tokens of a window.
    pub fn seq_len(&self) -> usize {
        self.seq_len
    }

    /// Targets evaluated.
    pub fn num_targets(&self) -> usize {
        self.windows.len() * self.seq_len
    }

    /// Bytes of text behind the evaluated targets; an end-of-document target counts 0 bytes, though its loss counts.
    pub fn target_bytes(&self) -> u64 {
        self.windows.iter().map(|&w| self.source.target_bytes(w, self.seq_len)).sum()
    }

    /// The windows as batches of at most `batch` sequences.
    pub fn batches(&self, batch: usize) -> Vec<TokenBatch> {
        (0..self.num_batches(batch)).map(|index| self.batch(batch, index)).collect()
    }

    /// How many batches of at most `batch` sequences there are.
    pub fn num_batches(&self, batch: usize) -> usize {
        self.windows.len().div_ceil(batch.max(1))
    }

    /// One of [`ValidSource::batches`]; of no sequence past the last.
    pub fn batch(&self, batch: usize, index: usize) -> TokenBatch {
        let windows = self.windows.chunks(batch.max(1)).nth(index).unwrap_or_default();
        let (mut input_ids, mut target_ids) = (Vec::new(), Vec::new());
        for &window in windows {
            self.source.append_sequence(window, self.seq_len, &mut input_ids, &mut target_ids);
        }
        TokenBatch { input_ids, target_ids, batch: windows.len(), seq_len: self.seq_len }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::data::{Documents, Packer};
    use crate::train::tokenizer::train_bpe;

    fn packed() -> PackedSource {
        let texts = vec!["Häuser und Bäume, 42 of them.\n".repeat(10), "second text ".repeat(20)];
        let documents = Documents { name: "d".into(), weight: None, texts };
        let tokenizer = train_bpe(std::slice::from_ref(&documents), 280).unwrap();
        Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents).unwrap()
    }

    #[test]
    fn all_windows_cover_the_source_in_order() {
        let packed = packed();
        let valid = ValidSource::new(packed.clone(), 5, 0).unwrap();
        let batches = valid.batches(4);
        assert_eq!(valid.num_targets(), packed.num_sequences(5) * 5);
        assert_eq!(batches.iter().map(|b| b.target_ids.len()).sum::<usize>(), valid.num_targets());
        let bytes: u64 = (0..packed.num_sequences(5)).map(|i| packed.target_bytes(i, 5)).sum();
        assert_eq!(valid.target_bytes(), bytes);
        assert!(batches.iter().all(|b| b.input_ids.len() == b.batch * b.seq_len && b.batch <= 4));
    }

    #[test]
    fn few_windows_are_spread_and_fixed() {
        let packed = packed();
        let valid = ValidSource::new(packed.clone(), 5, 3).unwrap();
        let n = packed.num_sequences(5);
        assert_eq!(valid.windows, [0, n / 3, 2 * n / 3]);
        assert_eq!(valid.batches(8).len(), 1);
        assert_eq!(ValidSource::new(packed, 5, usize::MAX).unwrap().windows.len(), n);
    }

    #[test]
    fn too_short_is_refused() {
        let packed = packed();
        assert!(ValidSource::new(packed, 100_000, 0).unwrap_err().to_string().contains("too few"));
    }
}
