//! Bits per byte and perplexities of text, source by source, in windows of fixed length. Text is read, tokenised and cut as
//! for the trainer's validation, so the losses are those of `moe-train --evaluate`.

use super::report::TextReport;
use crate::{Error, Result};
use moe_models::train::data::{DataCache, PackedSource, ValidSource};
use moe_models::train::evaluate::{SourceLoss, evaluate_by};
use moe_models::train::tokenizer::Vocabulary;
use moe_models::train::{Observer, RunText};
use moe_models::{Decoder, Pass, TokenBatch};
use tokenizers::Tokenizer;

/// Tokens of a pass, unless one window is longer.
const BATCH_TOKENS: usize = 2048;

/// Which text is evaluated, and how it is cut.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextOptions {
    /// `.txt`, `.jsonl`, `.txt.xz` and `.jsonl.xz` files, and folders of them; each file is a source.
    pub paths: Vec<String>,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Targets of each source, rounded down to whole windows; `None` takes all windows.
    pub max_tokens: Option<usize>,
}

/// One source's losses.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceText {
    /// Tokens, bytes and nats.
    pub loss: SourceLoss,
    /// Runs of anything but white space that begin in the text that is counted.
    pub words: u64,
}

impl SourceText {
    /// Exponential of the nats per token, end-of-document tokens among them.
    pub fn token_perplexity(&self) -> f64 {
        self.loss.loss().exp()
    }

    /// Exponential of the nats per word; comparable between tokenizers.
    pub fn word_perplexity(&self) -> f64 {
        (self.loss.nats / self.words as f64).exp()
    }

    fn total(sources: &[Self]) -> Self {
        let mut total = Self { loss: SourceLoss { name: "all".into(), tokens: 0, bytes: 0, nats: 0.0 }, words: 0 };
        for source in sources {
            total.loss.tokens += source.loss.tokens;
            total.loss.bytes += source.loss.bytes;
            total.loss.nats += source.loss.nats;
            total.words += source.words;
        }
        total
    }
}

/// Evaluates a model on text, in whatever form its weights are. A window is read without what comes before it; the tokens at a source's end that fill no window
/// are left out, and so is the first token, which nothing comes before. What the report lists last is all sources together.
///
/// # Errors
/// If a source cannot be read, holds no text or is shorter than a window; if the tokenizer does not fit the model; what the
/// model returns.
pub fn evaluate_text(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    options: &TextOptions,
    observer: &mut dyn Observer,
) -> Result<TextReport> {
    let &TextOptions { ref paths, seq_len, max_tokens } = options;
    max_tokens.map_or(Ok(0), |tokens| windows(tokens, seq_len))?;
    let text = RunText::read_valid(paths, observer)?;
    let (_, packed) = text.pack(tokenizer, decoder.config(), &DataCache::Memory, observer)?;
    evaluate_sources(decoder, tokenizer, packed, seq_len, max_tokens)
}

/// [`evaluate_text`] of sources that are tokenised, cut into windows of `seq_len` tokens.
///
/// # Errors
/// If a source is shorter than a window; what the model returns.
pub fn evaluate_sources(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    sources: Vec<PackedSource>,
    seq_len: usize,
    max_tokens: Option<usize>,
) -> Result<TextReport> {
    let max_windows = max_tokens.map_or(Ok(0), |tokens| windows(tokens, seq_len))?;
    let windows = |source: PackedSource| match source.num_sequences(seq_len) {
        0 => Err(Error::Argument(format!(
            "{} has {} tokens, fewer than a window of {seq_len} and what comes before it; lower --max-length, or give longer text",
            source.name,
            source.num_tokens()
        ))),
        _ => Ok(ValidSource::new(source, seq_len, max_windows)?),
    };
    let sources = sources.into_iter().map(windows).collect::<Result<Vec<_>>>()?;
    let batch_size = (BATCH_TOKENS / seq_len).max(1);
    let losses = evaluate_by(|batch| decoder.loss(batch, Pass::Eval), &sources, batch_size)?.sources;
    let eos_id = Vocabulary::from(decoder.config()).end_of_document(tokenizer)?;
    let mut rows = Vec::new();
    for (loss, source) in losses.into_iter().zip(&sources) {
        let batches = source.batches(batch_size);
        let words = batches.iter().map(|batch| count_words(batch, tokenizer, eos_id)).sum::<Result<_>>()?;
        rows.push(SourceText { loss, words });
    }
    rows.push(SourceText::total(&rows));
    Ok(TextReport { counted: counted(seq_len, max_tokens), sources: rows })
}

/// Whole windows of at most `tokens`.
fn windows(tokens: usize, seq_len: usize) -> Result<usize> {
    match tokens / seq_len {
        0 => Err(Error::Argument(format!(
            "--max-tokens {tokens} is less than a window of {seq_len} tokens; raise it, or lower --max-length"
        ))),
        windows => Ok(windows),
    }
}

fn counted(seq_len: usize, max_tokens: Option<usize>) -> String {
    let part = match max_tokens {
        None => "the whole text of each source, but for what fills no window at its end".to_owned(),
        Some(tokens) => format!("of each source at most {tokens} tokens, in windows spread evenly over it"),
    };
    format!("{part}; windows of {seq_len} tokens")
}

/// Words that begin in the targets of the windows. The token before the first target tells whether that goes on with a word.
fn count_words(batch: &TokenBatch, tokenizer: &Tokenizer, eos_id: u32) -> Result<u64> {
    let starts = |ids: &[u32]| -> Result<u64> {
        let text = tokenizer.decode(ids, true).map_err(|e| moe_models::Error::Tokenizer(e.to_string()))?;
        Ok(text.split_whitespace().count() as u64)
    };
    let mut words = 0;
    let windows = batch.input_ids.chunks(batch.seq_len).zip(batch.target_ids.chunks(batch.seq_len));
    for (inputs, targets) in windows {
        let ids = [&inputs[..1], targets].concat();
        // A word ends with its document, which decoding alone would not show.
        for document in ids.split(|&id| id == eos_id) {
            words += starts(document)?;
        }
        words -= if inputs[0] == eos_id { 0 } else { starts(&inputs[..1])? };
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_models::train::data::{Documents, Packer};
    use moe_models::train::tokenizer::train_bpe;

    #[test]
    fn every_word_is_counted_once_wherever_windows_are_cut() {
        let texts = vec!["in the beginning there were  words,\nand more words ".repeat(4), "the end".to_owned()];
        let words: u64 = texts.iter().map(|text| text.split_whitespace().count() as u64).sum();
        let documents = Documents { name: "d".into(), weight: None, texts };
        let tokenizer = train_bpe(std::slice::from_ref(&documents), 266).unwrap();
        let packed = Packer::new(&tokenizer, 0, 266).unwrap().pack(&documents).unwrap();
        // The first token, which begins a word, is no target.
        let want = words - 1;
        let mut divisors = 0;
        for seq_len in 1..packed.num_tokens() {
            let source = ValidSource::new(packed.clone(), seq_len, 0).unwrap();
            let batches = source.batches(3);
            let got: u64 = batches.iter().map(|batch| count_words(batch, &tokenizer, 0).unwrap()).sum();
            if (packed.num_tokens() - 1).is_multiple_of(seq_len) {
                assert_eq!(got, want, "windows of {seq_len}");
                divisors += 1;
            }
            assert!(got <= want);
        }
        assert!(divisors > 1, "the case must have windows that cover it");
    }

    #[test]
    fn perplexities_of_known_sums() {
        let loss = |tokens, bytes, nats| SourceLoss { name: "s".into(), tokens, bytes, nats };
        let a = SourceText { loss: loss(4, 10, 8.0), words: 2 };
        let b = SourceText { loss: loss(12, 30, 8.0), words: 6 };
        assert!((a.token_perplexity() - 2f64.exp()).abs() < 1e-12);
        assert!((a.word_perplexity() - 4f64.exp()).abs() < 1e-12);
        let all = SourceText::total(&[a, b]);
        assert_eq!((all.loss.tokens, all.loss.bytes, all.words, all.loss.nats), (16, 40, 8, 16.0));
        assert!((all.word_perplexity() - 2f64.exp()).abs() < 1e-12);
    }

    #[test]
    fn fewer_tokens_than_a_window_are_refused() {
        assert_eq!(windows(1000, 256).unwrap(), 3);
        let message = windows(255, 256).unwrap_err().to_string();
        assert!(message.contains("--max-tokens 255") && message.contains("256"), "{message}");
    }
}
