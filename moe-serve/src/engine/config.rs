//! What the engine must know beside the model, and how it divides its time among sequences.

use crate::{Error, Result};
use std::time::Duration;

/// What the engine must know beside the model.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Jobs that may wait beyond those that could start at once.
    pub max_queue: usize,
    /// Ids below this are real tokens; the rest of the model's vocabulary is padding and is never sampled.
    pub num_tokens: usize,
    /// Tokens that end a sequence unless the job ignores them.
    pub eos_token_ids: Vec<u32>,
    /// Tokens never sampled.
    pub suppressed: Vec<u32>,
    /// How steps are made up.
    pub scheduling: SchedulingConfig,
    /// Memory for keys and values on each replica; at least one sequence of the model's length always fits.
    pub kv_cache_bytes: usize,
}

/// How steps are made up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulingConfig {
    /// New tokens in one step: one of every sequence that generates, and beside them parts of prompts.
    pub max_batch_tokens: usize,
    /// Sequences that are worked on at one time.
    pub max_sequences: usize,
    /// A job that has waited so long goes before all that have not, whatever their priorities.
    pub starvation: Duration,
    /// Keeps what has been read for the next prompt that begins the same way.
    pub prefix_caching: bool,
    /// Guesses of the next tokens.
    pub speculation: SpeculationConfig,
}

impl Default for SchedulingConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: 512,
            max_sequences: 64,
            starvation: Duration::from_secs(30),
            prefix_caching: true,
            speculation: SpeculationConfig::default(),
        }
    }
}

impl SchedulingConfig {
    /// Refuses what no step could be made up by.
    ///
    /// # Errors
    /// [`Error::Field`]
    pub fn validate(&self) -> Result<()> {
        let Self { max_batch_tokens, max_sequences, speculation, .. } = self;
        if *max_sequences == 0 {
            return Err(Error::field("max_sequences", "max_sequences (--max-num-seqs) must be at least 1"));
        }
        if max_batch_tokens < max_sequences {
            let message = format!(
                "max_batch_tokens (--max-num-batched-tokens) is {max_batch_tokens}, but {max_sequences} sequences generate a token each in a step; raise it \
                 or lower max_sequences (--max-num-seqs)"
            );
            return Err(Error::field("max_batch_tokens", message));
        }
        let SpeculationConfig { num_tokens, min_ngram, max_ngram } = *speculation;
        if num_tokens > 0 && !(1..=max_ngram).contains(&min_ngram) {
            let message = format!(
                "min_ngram (--prompt-lookup-min) must be from 1 to max_ngram (--prompt-lookup-max, {max_ngram}), got {min_ngram}"
            );
            return Err(Error::field("min_ngram", message));
        }
        Ok(())
    }
}

/// Prompt lookup: the last tokens of a sequence are looked for earlier in it, and what followed them there is the guess. The
/// model reads it with the token before it and what it would not have drawn itself is taken back, so that no token changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpeculationConfig {
    /// Tokens guessed at a time; 0 for none.
    pub num_tokens: usize,
    /// Fewest last tokens that must be found again.
    pub min_ngram: usize,
    /// Most last tokens that are looked for, longer ones first.
    pub max_ngram: usize,
}

impl Default for SpeculationConfig {
    fn default() -> Self {
        Self { num_tokens: 0, min_ngram: 2, max_ngram: 4 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_schedules_are_refused_by_name() {
        let base = SchedulingConfig::default;
        let speculation = SpeculationConfig { num_tokens: 3, min_ngram: 5, max_ngram: 4 };
        for (bad, name) in [
            (SchedulingConfig { max_sequences: 0, ..base() }, "max_sequences"),
            (SchedulingConfig { max_batch_tokens: 63, ..base() }, "max_batch_tokens"),
            (SchedulingConfig { speculation, ..base() }, "min_ngram"),
        ] {
            let error = bad.validate().expect_err(name).to_string();
            assert!(error.contains(name), "{error}");
        }
        base().validate().expect("the default is possible");
    }
}
