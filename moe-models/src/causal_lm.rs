//! [`CausalLm`]: token ids in, logits out, for many sequences at once. What a generator or a server needs of a model.

use crate::cache::{CacheLayout, CachedSequence, KvPool, PagedStep, PoolConfig};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_core::CandleOps;

/// The experts one MoE layer used, token by token.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerExperts {
    /// Index of the transformer layer, from 0.
    pub layer: usize,
    /// Experts of this layer.
    pub num_experts: usize,
    /// Experts per token; `expert_ids` and `weights` are `[tokens, top_k]`, row by row.
    pub top_k: usize,
    /// Chosen experts; [`moe_core::DROPPED`] where a choice was dropped for capacity.
    pub expert_ids: Vec<u32>,
    /// Factors applied to each expert's output (0 where dropped).
    pub weights: Vec<f32>,
}

/// After which of a step's tokens logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsOf {
    /// None: more of the prompt follows.
    None,
    /// The last one.
    Last,
    /// Every one.
    All,
}

/// New tokens of one sequence: its prompt, a part of that, or the token sampled last.
#[derive(Debug)]
pub struct SequenceStep<'a> {
    /// Grows by the tokens if all goes well.
    pub sequence: &'a mut CachedSequence,
    /// At least one.
    pub token_ids: &'a [u32],
    /// Rows of the output.
    pub logits: LogitsOf,
}

/// What one forward step returns.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// `[rows asked for, vocab_size]`, f32: the next-token logits, sequence after sequence.
    pub logits: Tensor,
    /// One entry per MoE layer, in layer order, over all new tokens of all sequences.
    pub experts: Vec<LayerExperts>,
}

/// A decoder-only language model for inference (no gradients are kept).
pub trait CausalLm: Send + Sync {
    /// Entries of the vocabulary, padding included.
    fn vocab_size(&self) -> usize;
    /// Longest sequence, prompt and generated tokens together.
    fn max_seq_len(&self) -> usize;
    /// Transformer layers.
    fn num_layers(&self) -> usize;
    /// `(layer, num_experts)` of each MoE layer, in layer order.
    fn moe_layers(&self) -> Vec<(usize, usize)>;
    /// What a token takes in a cache.
    fn cache_layout(&self) -> CacheLayout;
    /// Where the weights live.
    fn device(&self) -> &Device;
    /// A pool for sequences of this model, in the form its backend reads fastest; by default rows of f32.
    ///
    /// # Errors
    /// As [`KvPool::new`].
    fn new_pool(&self, config: PoolConfig) -> Result<KvPool> {
        KvPool::new(self.cache_layout(), config, &CandleOps, self.device())
    }
    /// Whether routers draw in inference, so that keys and values depend on the seed of a sequence too.
    fn draws(&self) -> bool {
        false
    }

    /// Runs a step whose pages lie in `pool` and are copied already ([`KvPool::copy_pages`]). A step without tokens is a pass in
    /// which this rank only takes part. The logits of a sequence are the same to the last bit as if it were alone and whatever
    /// chunks its tokens came in.
    ///
    /// # Errors
    /// [`Error::Argument`] for an id outside the vocabulary, a sequence longer than [`CausalLm::max_seq_len`], or a pool of
    /// another model.
    fn run(&self, step: &PagedStep, pool: &KvPool) -> Result<StepOutput>;

    /// [`CausalLm::run`] for sequences of `pool`, prompts and single tokens mixed, which grow by their tokens.
    ///
    /// # Errors
    /// [`Error::Argument`] for no sequence, a sequence without tokens or of another pool, and as [`CausalLm::run`];
    /// [`Error::OutOfPages`]. No sequence has grown then.
    fn forward(&self, batch: &mut [SequenceStep<'_>], pool: &KvPool) -> Result<StepOutput> {
        if batch.is_empty() || batch.iter().any(|part| part.token_ids.is_empty()) {
            return Err(Error::Argument("forward needs at least one token of each sequence".into()));
        }
        if batch.iter().any(|part| !pool.pages().owns(part.sequence)) {
            return Err(Error::Argument("a sequence belongs to another pool; make it with KvPool::sequence".into()));
        }
        let mut step = PagedStep::default();
        let added =
            batch.iter_mut().try_for_each(|part| step.add(part.sequence, part.token_ids, part.logits, pool.pages()));
        // Pages that were exchanged are filled whatever follows.
        pool.copy_pages(&step)?;
        added?;
        let output = self.run(&step, pool)?;
        batch.iter_mut().for_each(|part| part.sequence.grow(part.token_ids.len()));
        Ok(output)
    }
}
