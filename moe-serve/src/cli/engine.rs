//! The engine's part of the command line.

use crate::api::DEFAULT_KV_CACHE_BYTES;
use crate::engine::{SchedulingConfig, SpeculationConfig};
use std::time::Duration;

/// How the engine divides its time and memory among requests.
#[derive(Debug, Clone, clap::Args)]
pub struct EngineArgs {
    /// Sequences that are worked on at one time; a request with n choices is n of them.
    #[arg(long, value_name = "N", default_value_t = SchedulingConfig::default().max_sequences)]
    max_num_seqs: usize,
    /// New tokens in one step of the model: one of every sequence that generates, and beside them parts of prompts. More reads
    /// prompts faster, fewer lets those that generate wait less.
    #[arg(long, value_name = "N", default_value_t = SchedulingConfig::default().max_batch_tokens)]
    max_num_batched_tokens: usize,
    /// Memory for keys and values, taken as it is used. One sequence of the model's length always fits.
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_KV_CACHE_BYTES)]
    pub(super) kv_cache_memory_bytes: usize,
    /// Reads every prompt from its begin, also where an earlier one began the same way.
    #[arg(long)]
    no_prefix_caching: bool,
    /// Seconds after which a waiting request goes before all others, whatever its priority.
    #[arg(long, value_name = "SECONDS", default_value_t = SchedulingConfig::default().starvation.as_secs())]
    starvation_s: u64,
    /// Tokens guessed at a time from what stands earlier in the sequence (prompt lookup); 0 guesses none. No output changes.
    #[arg(long, value_name = "N", default_value_t = SpeculationConfig::default().num_tokens)]
    num_speculative_tokens: usize,
    /// Fewest last tokens that must be found again for a guess.
    #[arg(long, value_name = "N", default_value_t = SpeculationConfig::default().min_ngram)]
    prompt_lookup_min: usize,
    /// Most last tokens that are looked for, longer ones first.
    #[arg(long, value_name = "N", default_value_t = SpeculationConfig::default().max_ngram)]
    prompt_lookup_max: usize,
}

impl EngineArgs {
    /// What the engine is told.
    pub(super) fn scheduling(&self) -> SchedulingConfig {
        SchedulingConfig {
            max_batch_tokens: self.max_num_batched_tokens,
            max_sequences: self.max_num_seqs,
            starvation: Duration::from_secs(self.starvation_s),
            prefix_caching: !self.no_prefix_caching,
            speculation: SpeculationConfig {
                num_tokens: self.num_speculative_tokens,
                min_ngram: self.prompt_lookup_min,
                max_ngram: self.prompt_lookup_max,
            },
        }
    }
}
