//! [`Generator`]: greedy continuations of many prompts side by side.

use super::request::RequestEncoder;
use super::scorer::{finite_row, likeliest};
use crate::Result;
use moe_models::{CachedSequence, CausalLm, KvPool, LogitsOf, PoolConfig, SequenceStep};

/// Prompts side by side.
const BATCH: usize = 32;

/// Continues prompts with one model until a stop string.
pub struct Generator<'a> {
    /// The model.
    pub lm: &'a dyn CausalLm,
    /// Its tokenizer.
    pub encoder: &'a RequestEncoder,
    /// Where a text ends, not part of it; the end-of-document token ends it too.
    pub stops: &'a [&'a str],
    /// Tokens of a continuation at most.
    pub max_tokens: usize,
}

/// A continuation that grows.
struct Growing {
    sequence: CachedSequence,
    /// What the model has not read yet: the prompt, then the last token.
    unread: Vec<u32>,
    generated: Vec<u32>,
    text: String,
    ended: bool,
}

impl Growing {
    fn new(prompt: Vec<u32>, pool: &KvPool) -> Self {
        let (generated, text) = Default::default();
        Self { sequence: pool.sequence(), unread: prompt, generated, text, ended: false }
    }

    fn step(&mut self) -> SequenceStep<'_> {
        SequenceStep { sequence: &mut self.sequence, token_ids: &self.unread, logits: LogitsOf::Last }
    }
}

impl Generator<'_> {
    /// The text that greedily follows each prompt. A prompt loses its beginning where it and `max_tokens` are longer than the
    /// model reads; of a model that short, half is left to the prompt. `progress` hears how many are done.
    ///
    /// # Errors
    /// If a prompt cannot be encoded; what the model returns.
    pub fn generate(&self, prompts: &[&str], progress: &mut dyn FnMut(usize)) -> Result<Vec<String>> {
        let max_tokens = self.max_tokens.min(self.encoder.max_length() / 2).max(1);
        let room = (self.encoder.max_length() - max_tokens).max(1);
        let encode = |prompt: &&str| self.encoder.encode_prompt(prompt, room);
        let prompts = prompts.iter().map(encode).collect::<Result<Vec<_>>>()?;
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let pool = self.lm.new_pool(PoolConfig::for_tokens(BATCH.min(prompts.len()).max(1), longest + max_tokens))?;
        let mut texts = Vec::new();
        for batch in prompts.chunks(BATCH) {
            let mut batch: Vec<Growing> = batch.iter().map(|prompt| Growing::new(prompt.clone(), &pool)).collect();
            for _ in 0..max_tokens {
                if batch.iter().all(|growing| growing.ended) {
                    break;
                }
                self.grow(&mut batch, &pool)?;
            }
            texts.extend(batch.into_iter().map(|growing| growing.text));
            progress(texts.len());
        }
        Ok(texts)
    }

    /// One more token of each that has not ended.
    fn grow(&self, batch: &mut [Growing], pool: &KvPool) -> Result<()> {
        let mut steps: Vec<_> = batch.iter_mut().filter(|growing| !growing.ended).map(Growing::step).collect();
        let logits = self.lm.forward(&mut steps, pool)?.logits;
        for (row, growing) in batch.iter_mut().filter(|growing| !growing.ended).enumerate() {
            let logits = finite_row(&logits, row)?;
            let token_id = likeliest(&logits[..self.encoder.num_tokens().min(logits.len())]);
            growing.unread = vec![token_id];
            growing.ended = token_id == self.encoder.eos_id();
            if !growing.ended {
                growing.generated.push(token_id);
                growing.text = self.encoder.decode(&growing.generated)?;
                growing.ended = cut(&mut growing.text, self.stops);
            }
        }
        Ok(())
    }
}

/// Cuts `text` at the first stop string; whether there is one.
fn cut(text: &mut String, stops: &[&str]) -> bool {
    let first = stops.iter().filter_map(|stop| text.find(stop)).min();
    first.inspect(|&at| text.truncate(at)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_ends_before_the_first_stop() {
        for (text, want, ended) in [("a, b. c", "a", true), ("a b", "a b", false), ("\nx", "", true)] {
            let mut text = text.to_owned();
            assert_eq!(cut(&mut text, &["\n", ".", ","]), ended);
            assert_eq!(text, want);
        }
    }
}
