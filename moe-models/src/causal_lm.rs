//! [`CausalLm`]: token ids in, logits out. What a generator or a server needs of a model, and nothing else.

use crate::Result;
use candle_core::{Device, Tensor};

/// Cached keys and values of one sequence.
///
/// Created by [`CausalLm::new_cache`]; grows by the tokens of every [`CausalLm::forward`].
#[derive(Debug, Clone)]
pub struct KvCache {
    /// Per layer: keys and values `[len, d_model]` each; empty before the first token.
    pub(crate) layers: Vec<Option<(Tensor, Tensor)>>,
    /// Tokens held.
    pub(crate) len: usize,
}

impl KvCache {
    /// An empty cache for `num_layers` layers.
    pub fn new(num_layers: usize) -> Self {
        Self { layers: vec![None; num_layers], len: 0 }
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

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

/// What one forward step returns.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// `[tokens, vocab_size]`, f32: the next-token logits after each input token.
    pub logits: Tensor,
    /// One entry per MoE layer, in layer order.
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
    /// Where the weights live.
    fn device(&self) -> &Device;
    /// An empty cache.
    fn new_cache(&self) -> KvCache {
        KvCache::new(self.num_layers())
    }
    /// Runs `token_ids` after the tokens in `cache`, and appends them to it.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] for no tokens, an id outside the vocabulary, or more tokens than
    /// [`CausalLm::max_seq_len`]; the cache is then unchanged.
    fn forward(&self, token_ids: &[u32], cache: &mut KvCache) -> Result<StepOutput>;
}
