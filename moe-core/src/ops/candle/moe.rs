//! The operations of an MoE layer.

use super::CandleOps;
use crate::ops::moe::{check_grouped, check_permute, check_unpermute, parts_per_expert};
use crate::ops::{Activation, DecoderOps, MoeOps};
use crate::{DispatchTable, Result, Weight};
use candle_core::{D, DType, Tensor};
use std::sync::Arc;

impl MoeOps for CandleOps {
    fn gate(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
        let weight = weight.tensor()?;
        let dtype = if weight.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
        let bias = bias.map(|b| b.to_dtype(dtype)).transpose()?;
        self.linear(&x.to_dtype(dtype)?, &weight.to_dtype(dtype)?.into(), bias.as_ref())
    }

    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        check_permute(tokens, table)?;
        if table.num_rows() == 0 {
            return Ok(tokens.narrow(0, 0, 0)?);
        }
        let ids = Tensor::new(table.row_tokens.as_slice(), tokens.device())?;
        Ok(tokens.contiguous()?.index_select(&ids, 0)?)
    }

    fn unpermute(&self, rows: &Tensor, combine_weights: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        let width = check_unpermute(rows, combine_weights, table)?;
        if table.num_rows() == 0 {
            // Sums of nothing, which keep both arguments in the graph; candle leaves element-wise operations on nothing out.
            let weights = combine_weights.flatten_all()?.narrow(0, 0, 0)?;
            let zero = (rows.sum_all()? + weights.sum_all()?)?;
            return Ok(zero.broadcast_as((table.num_tokens, width))?.contiguous()?);
        }
        let zeros = Tensor::zeros((table.num_tokens, width), rows.dtype(), rows.device())?;
        let choices = Tensor::new(table.row_choices.as_slice(), rows.device())?;
        let weights = combine_weights.flatten_all()?.index_select(&choices, 0)?.unsqueeze(D::Minus1)?;
        let ids = Tensor::new(table.row_tokens.as_slice(), rows.device())?;
        Ok(zeros.index_add(&ids, &rows.broadcast_mul(&weights)?, 0)?)
    }

    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> Result<Tensor> {
        check_grouped(rows.dims2()?, weight.dims(), bias, offsets)?;
        let weight = weight.tensor()?;
        let parts = parts_per_expert(offsets, weight.dim(0)?).unwrap_or(1);
        let mut outputs = Vec::with_capacity(offsets.len());
        for (group, pair) in offsets.windows(2).enumerate().filter(|(_, pair)| pair[1] > pair[0]) {
            let expert = group / parts;
            let batch = rows.narrow(0, pair[0], pair[1] - pair[0])?.contiguous()?;
            let y = batch.matmul(&weight.get(expert)?.t()?)?;
            outputs.push(match bias {
                Some(bias) => y.broadcast_add(&bias.get(expert)?)?,
                None => y,
            });
        }
        if outputs.is_empty() {
            let out = weight.dim(1)?;
            return Ok(rows.sum_keepdim(D::Minus1)?.broadcast_as((0, out))?);
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }

    fn activation(&self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        activation.apply(x)
    }
}
