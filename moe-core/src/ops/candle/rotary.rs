//! Rotation of pairs of columns.

use crate::Result;
use crate::ops::{RotaryLayout, RotaryTable};
use candle_core::{D, Tensor};

/// One position per row, all leading dimensions flattened.
pub(super) fn rotate(x: &Tensor, table: &RotaryTable, layout: RotaryLayout, positions: &[u32]) -> Result<Tensor> {
    let (rows, head_dim, rotary_dim) = (positions.len(), table.head_dim(), table.rotary_dim());
    if x.elem_count() == 0 {
        return Ok(x.clone());
    }
    let pairs = rotary_dim / 2;
    let per_pair = |values: Vec<f32>| Tensor::from_vec(values, (rows, 1, pairs, 1), x.device())?.to_dtype(x.dtype());
    let cos = per_pair(positions.iter().flat_map(|&p| table.at(p).0.to_vec()).collect())?;
    let sin = per_pair(positions.iter().flat_map(|&p| table.at(p).1.to_vec()).collect())?;
    let heads = x.reshape((rows, (), head_dim))?;
    let num_heads = heads.dim(1)?;
    // 1. Both columns of each pair, [rows, heads, pairs, 1].
    let turning = heads.narrow(D::Minus1, 0, rotary_dim)?;
    let (a, b, dim) = match layout {
        RotaryLayout::Halves => {
            let halves = turning.reshape((rows, num_heads, 2, pairs))?;
            let half = |i| halves.narrow(2, i, 1)?.reshape((rows, num_heads, pairs, 1));
            (half(0)?, half(1)?, 2)
        }
        RotaryLayout::Interleaved => {
            let columns = turning.reshape((rows, num_heads, pairs, 2))?;
            (columns.narrow(3, 0, 1)?, columns.narrow(3, 1, 1)?, 3)
        }
    };
    // 2. Turned, put back where they were, and the rest behind them.
    let to_a = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
    let to_b = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
    let turned = Tensor::cat(&[to_a, to_b], dim)?.reshape((rows, num_heads, rotary_dim))?;
    if rotary_dim == head_dim {
        return Ok(turned.reshape(x.shape())?);
    }
    let rest = heads.narrow(D::Minus1, rotary_dim, head_dim - rotary_dim)?;
    Ok(Tensor::cat(&[turned, rest], D::Minus1)?.reshape(x.shape())?)
}
