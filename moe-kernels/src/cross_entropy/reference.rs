//! The loss in ordinary candle operations: any device and type, with candle's own gradients.

use super::IGNORED;
use crate::Result;
use candle_core::{D, Tensor};

/// [`super::linear_cross_entropy`] in ordinary operations; the arguments are checked there.
///
/// # Errors
/// If a tensor operation fails.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Tensor> {
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
