//! `ln sum_i e^(x_i)`, what log-probabilities are told from logits with.

use crate::attention::row_max;
use crate::select::vectorize;
use crate::{Isa, select};
use moe_core::ops::host::{self, Real};

/// Values whose exponentials are added in f32; the sums of such runs are added in f64.
const RUN: usize = 1024;

/// The natural logarithm of the sum of the exponentials, those that the training loss is computed with: the same bits on every
/// instruction set. Minus infinity for no values; NaN if one is NaN or plus infinity, or all are minus infinity.
pub fn log_sum_exp(values: &[f32]) -> f64 {
    on(select::current(), values)
}

fn on(isa: Isa, values: &[f32]) -> f64 {
    if values.is_empty() {
        return f64::NEG_INFINITY;
    }
    let (max, sum) = vectorize!(isa, (values: &[f32]) -> (f32, f64) {
        let (max, mut exponentials, mut sum) = (row_max(values), [0.0f32; RUN], 0.0);
        for run in values.chunks(RUN) {
            for (to, value) in exponentials.iter_mut().zip(run) {
                *to = (*value - max).exp_();
            }
            sum += f64::from(host::sum_by(run.len(), |i| exponentials[i]));
        }
        (max, sum)
    });
    f64::from(max) + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::CounterRng;

    #[test]
    fn it_is_that_of_f64() {
        let mut rng = CounterRng::new(3, 0);
        for len in [1, 2, 15, 16, 17, 1023, 1024, 1025, 150_000] {
            for scale in [0.0, 1.0, 30.0] {
                let values: Vec<f32> = (0..len).map(|_| ((rng.uniform_f64() - 0.5) * scale) as f32).collect();
                let max = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = values.iter().map(|x| (f64::from(*x) - f64::from(max)).exp()).sum();
                let (got, want) = (log_sum_exp(&values), f64::from(max) + sum.ln());
                assert!((got - want).abs() < 1e-6, "{len} times {scale}: {got} {want}");
                assert!(Isa::available().into_iter().all(|isa| on(isa, &values) == got), "{len} times {scale}");
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so_and_masked_values_count_nothing() {
        assert_eq!(log_sum_exp(&[]), f64::NEG_INFINITY);
        assert!(log_sum_exp(&[1.0, f32::NAN, 2.0]).is_nan());
        assert!(log_sum_exp(&[1.0, f32::INFINITY]).is_nan());
        assert!((log_sum_exp(&[f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY]) - 2.0).abs() < 1e-12);
    }
}
