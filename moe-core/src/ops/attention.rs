//! How many heads an attention has, and keys and values in pages.

use crate::{Error, Result};
use candle_core::Tensor;

/// How many heads an attention has. Query head `h` uses key and value head `h * num_kv_heads / num_heads`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Heads of the queries.
    pub num_heads: usize,
    /// Heads of the keys and of the values; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Most tokens that a query sees, itself included (`sliding_window`); all before it if `None`.
    pub window: Option<usize>,
    /// Tokens of a chunk, if a query sees only those before it in the chunk it is in (Llama 4).
    pub chunk: Option<usize>,
    /// Factor on the product of a query and a key; `head_dim^-1/2` if `None`.
    pub scale: Option<f32>,
}

impl AttentionShape {
    /// Without a window, with the usual scale.
    pub const fn new(num_heads: usize, num_kv_heads: usize) -> Self {
        Self { num_heads, num_kv_heads, window: None, chunk: None, scale: None }
    }

    /// As many key heads as query heads, without a window.
    pub const fn equal(num_heads: usize) -> Self {
        Self::new(num_heads, num_heads)
    }

    /// The factor on the product of a query and a key of `head_dim` columns.
    pub fn scale(self, head_dim: usize) -> f32 {
        self.scale.unwrap_or_else(|| 1.0 / (head_dim as f32).sqrt())
    }

    /// The tokens that the query at `position` sees.
    #[inline(always)]
    pub fn seen(self, position: usize) -> std::ops::Range<usize> {
        let end = position + 1;
        let start = end.saturating_sub(self.window.unwrap_or(end));
        match self.chunk {
            Some(chunk) => start.max(position / chunk * chunk)..end,
            None => start..end,
        }
    }

    /// The width of a head of queries `d_model` wide with keys and values `kv_width` wide.
    ///
    /// # Errors
    /// [`Error::Input`] if the heads do not divide the widths.
    pub fn head_dim(self, d_model: usize, kv_width: usize) -> Result<usize> {
        let Self { num_heads, num_kv_heads, window, chunk, scale } = self;
        if let Some(scale) = scale.filter(|scale| !(*scale > 0.0 && scale.is_finite())) {
            return Err(Error::Input(format!("scale must be a positive number, got {scale}")));
        }
        if window == Some(0) {
            return Err(Error::Input("window must be at least 1, got 0; leave it out to see all tokens".into()));
        }
        if chunk == Some(0) {
            return Err(Error::Input("chunk must be at least 1, got 0; leave it out to see all tokens".into()));
        }
        if num_heads == 0 || num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::Input(format!(
                "num_kv_heads {num_kv_heads} must divide num_heads {num_heads}, and neither may be 0"
            )));
        }
        let head_dim = d_model / num_heads;
        if head_dim == 0 || head_dim * num_heads != d_model || head_dim * num_kv_heads != kv_width {
            return Err(Error::Input(format!(
                "queries of width {d_model} and keys of width {kv_width} must be num_heads {num_heads} and \
                 num_kv_heads {num_kv_heads} heads of one head_dim"
            )));
        }
        Ok(head_dim)
    }

    /// The width of a head of `[q | k | v]`, with as many key heads as query heads.
    ///
    /// # Errors
    /// [`Error::Input`] if the width is not three times a whole number of heads.
    pub fn fused_head_dim(qkv_width: usize, num_heads: usize) -> Result<usize> {
        let d_model = qkv_width / 3;
        if num_heads == 0 || !qkv_width.is_multiple_of(3) || !d_model.is_multiple_of(num_heads) {
            return Err(Error::Input(format!(
                "num_heads {num_heads} must divide the d_model of a [q | k | v] of width {qkv_width}"
            )));
        }
        Ok(d_model / num_heads)
    }

    /// Checks queries, keys and values of whole sequences of `seq_len` tokens; returns the width of a head.
    ///
    /// # Errors
    /// [`Error::Input`] if the shapes do not fit.
    pub fn check(self, queries: &Tensor, keys: &Tensor, values: &Tensor, seq_len: usize) -> Result<usize> {
        let (Some((&d_model, leading)), Some((&kv_width, kv_leading))) =
            (queries.dims().split_last(), keys.dims().split_last())
        else {
            return Err(Error::Input("attention needs queries and keys of at least one dimension".into()));
        };
        check_sequences(leading.iter().product(), seq_len)?;
        let head_dim = self.head_dim(d_model, kv_width)?;
        if keys.dims() != values.dims() || leading != kv_leading {
            return Err(Error::Input(format!(
                "keys {:?} and values {:?} must have one shape, and the tokens of the queries {:?}",
                keys.dims(),
                values.dims(),
                queries.dims()
            )));
        }
        Ok(head_dim)
    }
}

/// Refuses tokens that are not whole sequences.
///
/// # Errors
/// [`Error::Input`] naming both numbers.
pub fn check_sequences(tokens: usize, seq_len: usize) -> Result<()> {
    if seq_len == 0 || !tokens.is_multiple_of(seq_len) {
        return Err(Error::Input(format!("{tokens} tokens must be whole sequences of seq_len {seq_len}")));
    }
    Ok(())
}

/// What a token takes in one layer's pool: keys of this many heads, and values of as many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvShape {
    /// Heads of the keys and of the values.
    pub num_kv_heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Columns of the keys and of the values.
    pub fn width(self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}

/// The pool of one layer: blocks of tokens, as the backend that made it keeps them.
#[derive(Debug, Clone, Copy)]
pub struct PagedKv<'a> {
    /// `[num_blocks, block_size, width]` in rows, or `[num_blocks, ..]` in a backend's own form.
    pub keys: &'a Tensor,
    /// As the keys.
    pub values: &'a Tensor,
    /// Tokens per block.
    pub block_size: usize,
    /// What a token takes.
    pub shape: KvShape,
}

/// One sequence of a batch over a [`PagedKv`].
#[derive(Debug, Clone, Copy)]
pub struct PagedSequence<'a> {
    /// Blocks in the order of the sequence's tokens: token `t` is row `t % block_size` of block
    /// `blocks[t / block_size]`. Blocks past its last token are not read.
    pub blocks: &'a [u32],
    /// Tokens, the new ones included, whose keys and values are in the pool.
    pub len: usize,
    /// Tokens at its end that have a query in this call.
    pub new: usize,
}

impl PagedKv<'_> {
    /// Blocks.
    pub fn num_blocks(&self) -> usize {
        self.keys.dims().first().copied().unwrap_or(0)
    }

    /// Whether keys and values lie in rows, `[num_blocks, block_size, width]`.
    pub fn is_in_rows(&self) -> bool {
        let rows = [self.num_blocks(), self.block_size, self.shape.width()];
        self.keys.dims() == rows && self.values.dims() == rows
    }

    fn check_pool(&self) -> Result<()> {
        let blocks = self.values.dims().first().copied().unwrap_or(0);
        if self.block_size == 0 || self.shape.width() == 0 || blocks != self.num_blocks() {
            return Err(Error::Input(format!(
                "keys {:?} and values {:?} of a pool must be of as many blocks, of a block_size above 0 and heads {:?}",
                self.keys.dims(),
                self.values.dims(),
                self.shape
            )));
        }
        Ok(())
    }

    /// Checks new rows and the slots they go to.
    ///
    /// # Errors
    /// [`Error::Input`] naming what does not fit.
    pub fn check_write(&self, keys: &Tensor, values: &Tensor, slots: &[u32]) -> Result<()> {
        self.check_pool()?;
        let (num_blocks, block_size, width) = (self.num_blocks(), self.block_size, self.shape.width());
        super::host::expect_shape("keys", keys, &[slots.len(), width])?;
        super::host::expect_shape("values", values, &[slots.len(), width])?;
        match slots.iter().find(|&&slot| slot as usize >= num_blocks * block_size) {
            Some(slot) => {
                Err(Error::Input(format!("slot {slot} is outside a pool of {num_blocks} blocks of {block_size}")))
            }
            None => Ok(()),
        }
    }

    /// Checks queries and the sequences they belong to.
    ///
    /// # Errors
    /// [`Error::Input`] naming what does not fit.
    pub fn check_read(&self, queries: &Tensor, sequences: &[PagedSequence<'_>], shape: AttentionShape) -> Result<()> {
        self.check_pool()?;
        shape.head_dim(queries.dims2()?.1, self.shape.width())?;
        if shape.num_kv_heads != self.shape.num_kv_heads {
            return Err(Error::Input(format!(
                "the attention has {} key heads, its pool was made for {}",
                shape.num_kv_heads, self.shape.num_kv_heads
            )));
        }
        let (num_blocks, block_size) = (self.num_blocks(), self.block_size);
        let mut rows = 0;
        for (index, PagedSequence { blocks, len, new }) in sequences.iter().enumerate() {
            if new > len {
                return Err(Error::Input(format!(
                    "new of sequence {index} must be at most its len of {len}, got {new}"
                )));
            }
            let Some(used) = blocks.get(..len.div_ceil(block_size)) else {
                return Err(Error::Input(format!(
                    "blocks of sequence {index} must hold its {len} tokens, got {} blocks of {block_size}",
                    blocks.len()
                )));
            };
            if let Some(bad) = used.iter().find(|&&block| block as usize >= num_blocks) {
                return Err(Error::Input(format!(
                    "blocks of sequence {index} name block {bad}, but the pool has {num_blocks}"
                )));
            }
            rows += new;
        }
        if queries.dim(0)? != rows {
            return Err(Error::Input(format!(
                "queries must have one row per new token of the sequences, {rows}, got {}",
                queries.dim(0)?
            )));
        }
        Ok(())
    }
}
