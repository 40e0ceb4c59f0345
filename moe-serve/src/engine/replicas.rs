//! [`Replicas`]: where steps run. The engine plans with numbers of pages; what has the pages and the model is behind this.

use super::plain_draw::{PlainDraw, PlainDrawn};
use crate::Result;
use candle_core::Tensor;
use moe_models::{CausalLm, KvPool, LayerExperts, PagedStep, Pages, PoolConfig, StepOutput};
use std::sync::Arc;
use std::time::Duration;

/// What a replica is to run.
#[derive(Debug, Clone, Default)]
pub struct ReplicaStep {
    /// The tokens to read.
    pub step: PagedStep,
    /// Of each row of logits, how a token is drawn from it; `None`: the row itself is wanted. Empty where replicas do not draw.
    pub draws: Vec<Option<PlainDraw>>,
}

/// What a replica's step gave.
#[derive(Debug, Clone)]
pub struct ReplicaOutput {
    /// `[rows, vocab_size]`, f32: the rows that no token was drawn from, in their order.
    pub logits: Tensor,
    /// What was drawn from each row of logits, if something was; empty where replicas do not draw.
    pub drawn: Vec<Option<PlainDrawn>>,
    /// The experts of its tokens, layer by layer.
    pub experts: Vec<LayerExperts>,
}

impl From<StepOutput> for ReplicaOutput {
    fn from(StepOutput { logits, experts }: StepOutput) -> Self {
        Self { logits, drawn: Vec::new(), experts }
    }
}

/// One or several copies of a model, each with pages of its own.
pub trait Replicas: Send {
    /// The pages of each replica, all free.
    fn pages(&self) -> Vec<Pages>;
    /// Runs a step of each replica, which may be without tokens; the outputs in the same order.
    ///
    /// # Errors
    /// Those of the model. Pages that the steps write to then hold anything.
    fn run(&mut self, steps: &[ReplicaStep]) -> Result<Vec<ReplicaOutput>>;
    /// Whether it draws the tokens that [`ReplicaStep::draws`] describes: logits of another process are better drawn from there.
    fn draws(&self) -> bool {
        false
    }
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

    fn run(&mut self, steps: &[ReplicaStep]) -> Result<Vec<ReplicaOutput>> {
        let run = |ReplicaStep { step, .. }: &ReplicaStep| {
            self.pool.copy_pages(step)?;
            Ok(self.lm.run(step, &self.pool)?.into())
        };
        steps.iter().map(run).collect()
    }
}
