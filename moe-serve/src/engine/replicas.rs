//! [`Replicas`]: where steps run. The engine plans with numbers of pages; what has the pages and the model is behind this.

use crate::Result;
use moe_models::{CausalLm, KvPool, PagedStep, Pages, PoolConfig, StepOutput};
use std::sync::Arc;
use std::time::Duration;

/// One or several copies of a model, each with pages of its own.
pub trait Replicas: Send {
    /// The pages of each replica, all free.
    fn pages(&self) -> Vec<Pages>;
    /// Runs a step of each replica, which may be without tokens; the outputs in the same order.
    ///
    /// # Errors
    /// Those of the model. Pages that the steps write to then hold anything.
    fn run(&mut self, steps: &[PagedStep]) -> Result<Vec<StepOutput>>;
    /// How long nothing may be run before [`Replicas::idle`] is called; `None` where it never needs to be.
    fn idle_limit(&self) -> Option<Duration> {
        None
    }
    /// Keeps what runs steps alive while there is none.
    ///
    /// # Errors
    /// If it has failed.
    fn idle(&mut self) -> Result<()> {
        Ok(())
    }
    /// Whether no step can be run any more.
    fn has_failed(&self) -> bool {
        false
    }
}

/// Pages for as many tokens as go into `kv_cache_bytes`, but at least for one sequence of the model's length and at most for
/// `max_sequences` of them.
///
/// # Errors
/// If there is no memory for a page.
pub(super) fn pool_config(lm: &dyn CausalLm, kv_cache_bytes: usize, max_sequences: usize) -> Result<PoolConfig> {
    let least = PoolConfig::for_tokens(1, lm.max_seq_len());
    let page_bytes = lm.new_pool(PoolConfig { num_pages: 1, ..least })?.bytes().max(1);
    let most = least.num_pages.saturating_mul(max_sequences.max(1));
    Ok(PoolConfig { num_pages: (kv_cache_bytes / page_bytes).clamp(least.num_pages, most), ..least })
}

/// A model in this process, with its pages.
pub struct LocalReplica {
    lm: Arc<dyn CausalLm>,
    pool: KvPool,
}

impl LocalReplica {
    /// With pages for as many tokens as go into `kv_cache_bytes`, but at least for one sequence of the model's length and at most
    /// for `max_sequences` of them.
    ///
    /// # Errors
    /// If there is no memory for the pages.
    pub fn new(lm: Arc<dyn CausalLm>, kv_cache_bytes: usize, max_sequences: usize) -> Result<Self> {
        let pool = lm.new_pool(pool_config(lm.as_ref(), kv_cache_bytes, max_sequences)?)?;
        Ok(Self { lm, pool })
    }
}

impl Replicas for LocalReplica {
    fn pages(&self) -> Vec<Pages> {
        vec![self.pool.pages().clone()]
    }

    fn run(&mut self, steps: &[PagedStep]) -> Result<Vec<StepOutput>> {
        let run = |step: &PagedStep| {
            self.pool.copy_pages(step)?;
            Ok(self.lm.run(step, &self.pool)?)
        };
        steps.iter().map(run).collect()
    }
}
