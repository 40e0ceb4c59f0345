//! The loss over whole logits.

use super::CandleOps;
use crate::ops::{
    Distillation, DistilledLoss, IGNORED, LossOps, PartStatistics, SoftTargets, StudentOutput, VocabularyPart,
    check_targets,
};
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

    fn linear_distillation(
        &self,
        student: StudentOutput<'_>,
        soft: SoftTargets<'_>,
        how: Distillation,
    ) -> Result<DistilledLoss> {
        how.validate()?;
        student.check(&soft)?;
        let StudentOutput { hidden, weight, targets, part } = student;
        let cross_entropy = match part {
            None => self.linear_cross_entropy(hidden, weight, targets)?,
            Some(part) => self.linear_cross_entropy_part(hidden, weight, targets, part)?,
        };
        let kd = (divergence(student, soft, how.temperature)? * how.factor())?;
        let number = |t: &Tensor| t.to_dtype(DType::F64)?.to_scalar::<f64>();
        let (lm, scaled) = (number(&cross_entropy)?, number(&kd)?);
        Ok(DistilledLoss { loss: (cross_entropy + kd)?, cross_entropy: lm, kd: scaled })
    }
}

/// Mean over the counted targets of the divergence at temperature `t`. In terms of which each is a sum over the parts of the
/// vocabulary: `sum p ln p - sum p z + ln sum exp z`, and with entries that are not named `p_r (ln p_r - ln sum_rest exp z)`.
fn divergence(student: StudentOutput<'_>, soft: SoftTargets<'_>, t: f64) -> Result<Tensor> {
    let StudentOutput { hidden, weight, targets, .. } = student;
    let (tokens, held) = (targets.len(), weight.dims()[0]);
    let logits = (hidden.matmul(&weight.tensor()?.t()?)? / t)?;
    if tokens == 0 {
        return Ok(logits.sum_all()?); // of nothing, with its graph
    }
    let device = logits.device();
    let values = |of: Vec<f64>, dims: &[usize]| -> Result<Tensor> {
        Ok(Tensor::from_vec(of, dims, device)?.to_dtype(logits.dtype())?)
    };
    let rows = |t: &Tensor| -> Result<Vec<Vec<f64>>> { Ok(t.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?) };
    let wide = rows(&logits)?;
    let own: Vec<_> = wide.iter().map(|row| statistics(row, None)).collect();
    let all = student.merged(own.clone())?;
    // 1. What the teacher gives the entries here, and which of them share what is left.
    let (mut probs, mut entropy) = (vec![0.0; tokens * held], vec![0.0; tokens]);
    let (mut is_rest, mut rest) = (vec![0.0; tokens * held], vec![0.0; tokens]);
    match soft {
        SoftTargets::Layer { hidden, weight } => {
            let teacher = rows(&(hidden.detach().matmul(&weight.tensor()?.detach().t()?)? / t)?)?;
            let of = student.merged(teacher.iter().map(|row| statistics(row, None)).collect())?;
            for (token, row) in teacher.iter().enumerate() {
                for (entry, z) in row.iter().enumerate() {
                    let ln_p = z - of[token].max - of[token].sum.ln();
                    probs[token * held + entry] = ln_p.exp();
                    entropy[token] += ln_p.exp() * ln_p;
                }
            }
        }
        SoftTargets::TopK { k, ids, probs: of } => {
            is_rest.fill(1.0);
            for token in 0..tokens {
                let named = token * k..(token + 1) * k;
                rest[token] = student.rest(&of[named.clone()]);
                for (&id, &p) in ids[named.clone()].iter().zip(&of[named]) {
                    let Some(entry) = student.local(id) else { continue };
                    let at = token * held + entry;
                    (probs[at], is_rest[at]) = (p.into(), 0.0);
                    entropy[token] += if p > 0.0 { f64::from(p) * f64::from(p).ln() } else { 0.0 };
                }
            }
        }
    }
    // 2. Each sum: what is here with its graph, of the others a number.
    let summed = |here: &Tensor, max: &dyn Fn(usize) -> f64| -> Result<Tensor> {
        let own = here.detach().to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let parts = |(token, &sum): (usize, &f64)| PartStatistics { max: max(token), sum, target: 0.0 };
        let all = student.merged(own.iter().enumerate().map(parts).collect())?;
        Ok((here + values(all.iter().zip(&own).map(|(all, own)| all.sum - own).collect(), &[tokens])?)?)
    };
    let zero = |_: usize| 0.0;
    let moved = logits.broadcast_sub(&values(all.iter().map(|all| all.max).collect(), &[tokens, 1])?)?;
    let exp = moved.exp()?;
    let sum = summed(&exp.sum(D::Minus1)?, &zero)?;
    let followed = summed(&(moved * values(probs, &[tokens, held])?)?.sum(D::Minus1)?, &zero)?;
    let shared = summed(&(exp * values(is_rest, &[tokens, held])?)?.sum(D::Minus1)?, &zero)?;
    let entropy = summed(&values(entropy, &[tokens])?, &zero)?;
    let left = |of: &dyn Fn(f64) -> f64| {
        values(rest.iter().map(|&rest| if rest > 0.0 { of(rest) } else { 0.0 }).collect(), &[tokens])
    };
    // Where nothing is left, its logarithm does not count: it is taken of 1.
    let none = values(rest.iter().map(|&rest| f64::from(u8::from(rest == 0.0))).collect(), &[tokens])?;
    let some = (none.neg()? + 1.0)?;
    let ln_shared = ((shared * some)? + none)?.log()?;
    let of_rest = (left(&|rest| rest * rest.ln())? - (left(&|rest| rest)? * ln_shared)?)?;
    let each = (((entropy - followed)? + sum.log()?)? + of_rest)?;
    // 3. The mean over those that count.
    let counts: Vec<f64> = targets.iter().map(|&target| f64::from(u8::from(target != IGNORED))).collect();
    let counted = counts.iter().sum::<f64>().max(1.0);
    Ok(((each * values(counts, &[tokens])?)?.sum_all()? / counted)?)
}

/// Of one row of logits.
fn statistics(row: &[f64], target: Option<usize>) -> PartStatistics {
    let max = row.iter().fold(f64::NEG_INFINITY, |max, &z| if z > max { z } else { max });
    let sum = row.iter().map(|z| (z - max).exp()).sum();
    PartStatistics { max, sum, target: target.map_or(0.0, |at| row[at]) }
}
