//! The loss over whole logits.

use super::CandleOps;
use crate::ops::{IGNORED, LossOps, check_targets};
use crate::{Result, Weight};
use candle_core::{D, Tensor};

impl LossOps for CandleOps {
    fn linear_cross_entropy(&self, hidden: &Tensor, weight: &Weight, targets: &[u32]) -> Result<Tensor> {
        check_targets(hidden.dims(), weight.dims(), targets)?;
        let weight = weight.tensor()?;
        let counted: Vec<u32> = (0..targets.len() as u32).filter(|&t| targets[t as usize] != IGNORED).collect();
        if counted.is_empty() {
            return Ok(Tensor::zeros((), hidden.dtype(), hidden.device())?);
        }
        let ids: Vec<u32> = counted.iter().map(|&t| targets[t as usize]).collect();
        let (rows, count) = (Tensor::new(counted, hidden.device())?, ids.len());
        let logits = hidden.index_select(&rows, 0)?.matmul(&weight.t()?)?;
        let picked = logits.gather(&Tensor::from_vec(ids, (count, 1), logits.device())?, 1)?.squeeze(1)?;
        Ok((logits.log_sum_exp(D::Minus1)? - picked)?.mean_all()?)
    }
}
