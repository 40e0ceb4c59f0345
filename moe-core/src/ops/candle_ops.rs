//! [`CandleOps`]: the reference, in ordinary candle operations with candle's own gradients.

use super::{MoeOps, check_grouped, check_permute, check_unpermute};
use crate::{DispatchTable, Result};
use candle_core::{D, Tensor};
use std::sync::Arc;

/// The reference implementation: correct on every device, not fast.
#[derive(Debug, Clone, Copy, Default)]
pub struct CandleOps;

impl MoeOps for CandleOps {
    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        let width = check_permute(tokens, table)?;
        if table.num_rows() == 0 {
            return Ok(Tensor::zeros((0, width), tokens.dtype(), tokens.device())?);
        }
        let ids = Tensor::new(table.row_tokens.as_slice(), tokens.device())?;
        Ok(tokens.contiguous()?.index_select(&ids, 0)?)
    }

    fn unpermute(&self, rows: &Tensor, combine_weights: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        let width = check_unpermute(rows, combine_weights, table)?;
        let zeros = Tensor::zeros((table.num_tokens, width), rows.dtype(), rows.device())?;
        if table.num_rows() == 0 {
            return Ok(zeros);
        }
        let choices = Tensor::new(table.row_choices.as_slice(), rows.device())?;
        let weights = combine_weights.flatten_all()?.index_select(&choices, 0)?.unsqueeze(D::Minus1)?;
        let ids = Tensor::new(table.row_tokens.as_slice(), rows.device())?;
        Ok(zeros.index_add(&ids, &rows.broadcast_mul(&weights)?, 0)?)
    }

    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> Result<Tensor> {
        check_grouped(rows, weight, bias, offsets)?;
        let mut outputs = Vec::with_capacity(offsets.len());
        for (expert, pair) in offsets.windows(2).enumerate().filter(|(_, pair)| pair[1] > pair[0]) {
            let group = rows.narrow(0, pair[0], pair[1] - pair[0])?.contiguous()?;
            let y = group.matmul(&weight.get(expert)?.t()?)?;
            outputs.push(match bias {
                Some(bias) => y.broadcast_add(&bias.get(expert)?)?,
                None => y,
            });
        }
        if outputs.is_empty() {
            return Ok(Tensor::zeros((0, weight.dim(1)?), rows.dtype(), rows.device())?);
        }
        Ok(Tensor::cat(&outputs, 0)?)
    }
}
