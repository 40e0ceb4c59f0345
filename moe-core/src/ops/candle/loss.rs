//! The loss over whole logits.

use super::CandleOps;
use crate::ops::{IGNORED, LossOps, PartStatistics, VocabularyPart, check_targets};
use crate::{Result, Weight};
use candle_core::{D, DType, Tensor};

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

    fn linear_cross_entropy_part(
        &self,
        hidden: &Tensor,
        weight: &Weight,
        targets: &[u32],
        part: &VocabularyPart,
    ) -> Result<Tensor> {
        part.check(hidden.dims(), weight.dims(), targets)?;
        let logits = hidden.matmul(&weight.tensor()?.t()?)?;
        if targets.is_empty() {
            return Ok(logits.sum_all()?); // of nothing, with its graph
        }
        // 1. What this part says of each token.
        let wide = logits.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let own: Vec<PartStatistics> =
            wide.iter().zip(targets).map(|(row, &target)| statistics(row, part.local(target))).collect();
        let parts = part.parts.gather(&own)?;
        let all = PartStatistics::merged(&parts, targets.len())?;
        // 2. Sums over all parts of which those of this one have a graph; the others' are numbers.
        let values = |of: &dyn Fn(usize) -> f64| -> Result<Tensor> {
            Ok(Tensor::from_iter((0..targets.len()).map(of), logits.device())?.to_dtype(logits.dtype())?)
        };
        let exp = logits.broadcast_sub(&values(&|t| all[t].max)?.unsqueeze(1)?)?.exp()?.sum(D::Minus1)?;
        let others = values(&|t| all[t].sum - own[t].sum * (own[t].max - all[t].max).exp())?;
        let here: Vec<f64> = (0..targets.len() * part.held.len())
            .map(|i| f64::from(u8::from(part.local(targets[i / part.held.len()]) == Some(i % part.held.len()))))
            .collect();
        let here = Tensor::from_vec(here, logits.dims(), logits.device())?.to_dtype(logits.dtype())?;
        let target = ((&logits * here)?.sum(D::Minus1)? + values(&|t| all[t].target - own[t].target)?)?;
        let each = (((exp + others)?.log()? - target)? + values(&|t| all[t].max)?)?;
        // 3. The mean over those that count.
        let counted = targets.iter().filter(|&&target| target != IGNORED).count().max(1);
        let each = (each * values(&|t| f64::from(u8::from(targets[t] != IGNORED)))?)?;
        Ok((each.sum_all()? / counted as f64)?)
    }
}

/// Of one row of logits.
fn statistics(row: &[f64], target: Option<usize>) -> PartStatistics {
    let max = row.iter().fold(f64::NEG_INFINITY, |max, &z| if z > max { z } else { max });
    let sum = row.iter().map(|z| (z - max).exp()).sum();
    PartStatistics { max, sum, target: target.map_or(0.0, |at| row[at]) }
}
