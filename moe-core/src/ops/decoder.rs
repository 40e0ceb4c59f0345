//! [`DecoderOps`]: what a decoder needs of a backend besides its experts.

use super::{
    AttentionShape, Dropout, HeadDropout, KvShape, PagedKv, PagedSequence, Positions, RotaryLayout, RotaryTable,
    WeightOps,
};
use crate::{Result, Weight};
use candle_core::{DType, Device, Tensor};

/// Linear maps, norms, rotary positions, attention and the embedding.
pub trait DecoderOps: WeightOps {
    /// `x W^T + b` over the last dimension.
    ///
    /// # Shapes
    /// `x` `[.., in]`, `weight` `[out, in]`, `bias` `[out]` to `[.., out]`
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor>;

    /// `a + b` of one shape.
    ///
    /// # Errors
    /// If the shapes differ.
    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok((a + b)?)
    }

    /// `(x - mean) / sqrt(variance + epsilon) * weight + bias` over the last dimension.
    ///
    /// # Shapes
    /// `x` `[.., width]`, `weight` and `bias` `[width]`
    ///
    /// # Errors
    /// If a shape does not fit.
    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor>;

    /// `x / sqrt(mean(x^2) + epsilon) * weight` over the last dimension.
    ///
    /// # Shapes
    /// `x` `[.., width]`, `weight` `[width]`
    ///
    /// # Errors
    /// If a shape does not fit.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor>;

    /// `x + delta`, and its norm over the last dimension: LayerNorm, or RMSNorm without a bias.
    ///
    /// # Shapes
    /// `x` and `delta` `[.., width]`, `weight` and `bias` `[width]`; returns two of the shape of `x`
    ///
    /// # Errors
    /// If a shape does not fit.
    fn add_norm(
        &self,
        x: &Tensor,
        delta: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<[Tensor; 2]> {
        let sum = self.add(x, delta)?;
        let normed = match bias {
            Some(bias) => self.layer_norm(&sum, weight, bias, epsilon)?,
            None => self.rms_norm(&sum, weight, epsilon)?,
        };
        Ok([sum, normed])
    }

    /// A parameter that every head uses. A backend that computes some of the heads only gives it a gradient that is summed
    /// over all of them.
    ///
    /// # Errors
    /// If the tensor cannot be taken.
    fn for_heads(&self, parameter: &Tensor) -> Result<Tensor> {
        Ok(parameter.clone())
    }

    /// Turns the first columns of each head by the angles of the row's position.
    ///
    /// # Shapes
    /// `x` `[.., seq_len, heads * head_dim]`
    ///
    /// # Errors
    /// If the width is no whole number of heads or a position is not in the table.
    fn rotary(&self, x: &Tensor, table: &RotaryTable, layout: RotaryLayout, positions: Positions<'_>)
    -> Result<Tensor>;

    /// Attention of each token to itself and those before it in its sequence; sequences of `seq_len` tokens lie one after the
    /// other.
    ///
    /// # Shapes
    /// `queries` `[.., num_heads * head_dim]`, `keys` and `values` `[.., num_kv_heads * head_dim]`, as many tokens each; returns
    /// the shape of `queries`
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn attention(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
    ) -> Result<Tensor>;

    /// [`DecoderOps::attention`] of `[queries, keys, values]` where each head has a sink: a logit more in the softmax's denominator,
    /// of which nothing goes into the result; with probabilities dropped, if any are.
    ///
    /// # Shapes
    /// As there; `sinks` `[num_heads]`
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn attention_with_sinks(
        &self,
        qkv: [&Tensor; 3],
        sinks: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
        dropout: Option<HeadDropout>,
    ) -> Result<Tensor>;

    /// [`DecoderOps::attention`] of `[q | k | v]` with as many key heads as query heads, without taking it apart.
    ///
    /// # Shapes
    /// `[.., 3 * d_model]` to `[.., d_model]`
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn attention_fused(&self, qkv: &Tensor, num_heads: usize, seq_len: usize) -> Result<Tensor>;

    /// [`DecoderOps::attention`] of `[queries, keys, values]` with probabilities dropped, after the softmax: its gradient computes
    /// the same mask again.
    ///
    /// # Errors
    /// As there.
    fn attention_dropped(
        &self,
        qkv: [&Tensor; 3],
        shape: AttentionShape,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> Result<Tensor>;

    /// [`DecoderOps::attention_fused`] with probabilities dropped.
    ///
    /// # Errors
    /// As there.
    fn attention_fused_dropped(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> Result<Tensor>;

    /// Each element times its factor of `dropout`: a row's index is that among all rows before the last dimension.
    ///
    /// # Shapes
    /// `[.., width]` to the same
    ///
    /// # Errors
    /// If the tensor cannot be taken.
    fn dropout(&self, x: &Tensor, dropout: Dropout) -> Result<Tensor>;

    /// Keys and values of a pool of `num_blocks` blocks of `block_size` tokens, in the form that
    /// [`DecoderOps::write_pages`] writes and [`DecoderOps::paged_attention`] reads: by default rows of f32.
    ///
    /// # Errors
    /// If the device has too little memory.
    fn new_pages(&self, num_blocks: usize, block_size: usize, shape: KvShape, device: &Device) -> Result<[Tensor; 2]> {
        let zeros = || Tensor::zeros((num_blocks, block_size, shape.width()), DType::F32, device);
        Ok([zeros()?, zeros()?])
    }

    /// Writes keys and values of new tokens into their places in a pool, in place. No gradient.
    ///
    /// # Shapes
    /// `keys` and `values` `[tokens, width]`; `slots` `[tokens]`: `block * block_size + row` of each
    ///
    /// # Errors
    /// If a shape does not fit or a slot is outside the pool.
    fn write_pages(&self, pool: PagedKv<'_>, keys: &Tensor, values: &Tensor, slots: &[u32]) -> Result<()>;

    /// Attention of the new tokens of each sequence over all tokens of that sequence. No gradient.
    ///
    /// # Shapes
    /// `queries` `[sum of new, num_heads * head_dim]`, sequence after sequence; returns the same shape
    ///
    /// # Errors
    /// If the shapes do not fit.
    fn paged_attention(
        &self,
        queries: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> Result<Tensor>;

    /// [`DecoderOps::paged_attention`] where each head has a sink, as in [`DecoderOps::attention_with_sinks`].
    ///
    /// # Errors
    /// As there.
    fn paged_attention_with_sinks(
        &self,
        queries: &Tensor,
        sinks: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> Result<Tensor>;

    /// Runs `body`, a chain of operations of about `work` multiply-adds: a backend may keep its threads awake from one to the
    /// next. No operation waits for another process inside of it.
    fn chain(&self, work: usize, body: &mut dyn FnMut()) {
        let _ = work;
        body();
    }

    /// Into how many parts a chain over independent tokens is best divided, where every part reads all weights from a cache that
    /// the parts share: as many as [`DecoderOps::side_by_side`] runs at once.
    fn lanes(&self) -> usize {
        1
    }

    /// Runs `work(0)` to `work(count - 1)`, each with every operation in it on one thread. No operation waits for another
    /// process inside of it.
    fn side_by_side(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        (0..count).for_each(work);
    }

    /// Rows of a table.
    ///
    /// # Shapes
    /// `table` `[vocab_size, d_model]`, `ids` `[tokens]` to `[tokens, d_model]`
    ///
    /// # Errors
    /// If an id is outside the table.
    fn embedding(&self, table: &Weight, ids: &[u32]) -> Result<Tensor>;
}
