//! The other operations of a decoder.

use super::{CandleOps, attention, rotary};
use crate::ops::{
    AttentionShape, DecoderOps, Dropout, HeadDropout, PagedKv, PagedSequence, Positions, RotaryLayout, RotaryTable,
    host,
};
use crate::{Error, Result, Weight};
use candle_core::{D, DType, Tensor};

impl DecoderOps for CandleOps {
    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
        let weight = weight.tensor()?;
        let (out, inner) = weight.dims2()?;
        let Some((&last, leading)) = x.dims().split_last() else {
            return Err(Error::Input("linear needs an input of at least one dimension".into()));
        };
        if last != inner {
            return Err(Error::Input(format!("linear with weight [{out}, {inner}] got an input of width {last}")));
        }
        let rows: usize = leading.iter().product();
        let y = x.reshape((rows, inner))?.matmul(&weight.t()?)?;
        let y = bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))?;
        Ok(y.reshape([leading, &[out]].concat())?)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
        let width = x.dim(D::Minus1)?;
        host::expect_shape("layer norm weight", weight, &[width])?;
        host::expect_shape("layer norm bias", bias, &[width])?;
        let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centered.broadcast_div(&(variance + epsilon)?.sqrt()?)?;
        Ok(normed.broadcast_mul(weight)?.broadcast_add(bias)?)
    }

    /// Half types are computed in f32 and rounded once, at the end.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
        host::expect_shape("rms norm weight", weight, &[x.dim(D::Minus1)?])?;
        let compute = if matches!(x.dtype(), DType::BF16 | DType::F16) { DType::F32 } else { x.dtype() };
        let (wide, weight) = (x.to_dtype(compute)?, weight.to_dtype(compute)?);
        let mean_square = wide.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = wide.broadcast_div(&(mean_square + epsilon)?.sqrt()?)?;
        Ok(normed.broadcast_mul(&weight)?.to_dtype(x.dtype())?)
    }

    fn rotary(
        &self,
        x: &Tensor,
        table: &RotaryTable,
        layout: RotaryLayout,
        positions: Positions<'_>,
    ) -> Result<Tensor> {
        rotary::rotate(x, table, layout, &table.resolve(x.dims(), positions)?)
    }

    fn attention(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
    ) -> Result<Tensor> {
        attend([queries, keys, values], None, shape, seq_len, None)
    }

    fn attention_with_sinks(
        &self,
        qkv: [&Tensor; 3],
        sinks: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
        dropout: Option<HeadDropout>,
    ) -> Result<Tensor> {
        host::expect_shape("sinks", sinks, &[shape.num_heads])?;
        attend(qkv, Some(sinks), shape, seq_len, dropout)
    }

    fn attention_fused(&self, qkv: &Tensor, num_heads: usize, seq_len: usize) -> Result<Tensor> {
        let [q, k, v] = parts(qkv, num_heads)?;
        attend([&q, &k, &v], None, AttentionShape::equal(num_heads), seq_len, None)
    }

    fn attention_dropped(
        &self,
        qkv: [&Tensor; 3],
        shape: AttentionShape,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> Result<Tensor> {
        attend(qkv, None, shape, seq_len, Some(dropout))
    }

    fn attention_fused_dropped(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> Result<Tensor> {
        let [q, k, v] = parts(qkv, num_heads)?;
        attend([&q, &k, &v], None, AttentionShape::equal(num_heads), seq_len, Some(dropout))
    }

    fn dropout(&self, x: &Tensor, dropout: Dropout) -> Result<Tensor> {
        crate::ops::dropout::reference(x, &dropout)
    }

    fn write_pages(&self, pool: PagedKv<'_>, keys: &Tensor, values: &Tensor, slots: &[u32]) -> Result<()> {
        pool.check_write(keys, values, slots)?;
        check_rows(pool)?;
        for (pages, rows) in [(pool.keys, keys), (pool.values, values)] {
            // A view that shares memory with the pool, one row per slot.
            let flat = pages.flatten(0, 1)?;
            let rows = rows.contiguous()?;
            for (row, &slot) in slots.iter().enumerate() {
                flat.slice_set(&rows.narrow(0, row, 1)?, 0, slot as usize)?;
            }
        }
        Ok(())
    }

    fn paged_attention(
        &self,
        queries: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> Result<Tensor> {
        attend_pages(queries, None, pool, sequences, shape)
    }

    fn paged_attention_with_sinks(
        &self,
        queries: &Tensor,
        sinks: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> Result<Tensor> {
        host::expect_shape("sinks", sinks, &[shape.num_heads])?;
        attend_pages(queries, Some(sinks), pool, sequences, shape)
    }

    fn embedding(&self, table: &Weight, ids: &[u32]) -> Result<Tensor> {
        let table = table.tensor()?;
        let rows = table.dim(0)?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
            return Err(Error::Input(format!("id {id} is outside an embedding of {rows} rows")));
        }
        Ok(table.contiguous()?.index_select(&Tensor::new(ids, table.device())?, 0)?)
    }
}

/// Queries, keys and values.
fn parts(qkv: &Tensor, num_heads: usize) -> Result<[Tensor; 3]> {
    let d_model = AttentionShape::fused_head_dim(qkv.dim(D::Minus1)?, num_heads)? * num_heads;
    let part = |part: usize| qkv.narrow(D::Minus1, part * d_model, d_model);
    Ok([part(0)?, part(1)?, part(2)?])
}

fn attend(
    [queries, keys, values]: [&Tensor; 3],
    sinks: Option<&Tensor>,
    shape: AttentionShape,
    seq_len: usize,
    dropout: Option<HeadDropout>,
) -> Result<Tensor> {
    shape.check(queries, keys, values, seq_len)?;
    let sequences = |x: &Tensor| x.reshape(((), seq_len, x.dim(D::Minus1)?));
    let qkv = [sequences(queries)?, sequences(keys)?, sequences(values)?];
    Ok(attention::grouped_query_attention(qkv.each_ref(), sinks, shape, dropout)?.reshape(queries.shape())?)
}

fn attend_pages(
    queries: &Tensor,
    sinks: Option<&Tensor>,
    pool: PagedKv<'_>,
    sequences: &[PagedSequence<'_>],
    shape: AttentionShape,
) -> Result<Tensor> {
    pool.check_read(queries, sequences, shape)?;
    check_rows(pool)?;
    let mut first = 0;
    let mut outputs = Vec::new();
    for &PagedSequence { blocks, len, new } in sequences.iter().filter(|sequence| sequence.new > 0) {
        let used = len.div_ceil(pool.block_size);
        let ids = Tensor::from_slice(&blocks[..used], used, queries.device())?;
        let gather = |pool: &Tensor| pool.contiguous()?.index_select(&ids, 0)?.flatten(0, 1)?.narrow(0, 0, len);
        let [q, k, v] = [queries.narrow(0, first, new)?, gather(pool.keys)?, gather(pool.values)?];
        first += new;
        let [q, k, v] = [q.unsqueeze(0)?, k.unsqueeze(0)?, v.unsqueeze(0)?];
        outputs.push(attention::grouped_query_attention([&q, &k, &v], sinks, shape, None)?.squeeze(0)?);
    }
    if outputs.is_empty() { Ok(queries.clone()) } else { Ok(Tensor::cat(&outputs, 0)?) }
}

fn check_rows(pool: PagedKv<'_>) -> Result<()> {
    if pool.is_in_rows() {
        return Ok(());
    }
    Err(Error::Input(format!(
        "pages {:?} are in another backend's form; use the operations that made them",
        pool.keys.dims()
    )))
}
