//! The loss and its gradients against ordinary candle operations in f64, which central differences check in `moe-core`.

use super::*;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, LossOps};
use moe_core::testing::{assert_close, random, random_var};

fn targets(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|t| if t % 7 == 3 { IGNORED } else { (t * 31 % vocab) as u32 }).collect()
}

#[test]
fn values_and_gradients_equal_the_reference() {
    for (tokens, vocab, width) in [(1, 2, 1), (5, 40, 8), (400, 130, 17)] {
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 2e-2)] {
            let vars =
                [random_var(1, &[tokens, width], 1.0, DType::F32), random_var(2, &[vocab, width], 1.0, DType::F32)];
            let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
            let targets = targets(tokens, vocab);
            let got = linear_cross_entropy(&vars[0], &vars[1], &targets, precision).unwrap();
            let weight = wide[1].as_tensor().clone().into();
            let want = CandleOps.linear_cross_entropy(&wide[0], &weight, &targets).unwrap();
            let label = format!("{tokens} x {vocab} {precision:?}");
            assert_close(&got, &want, tolerance, &label);
            // A gradient that reaches the loss scaled.
            let backward = |loss: Tensor| (loss * 3.0).unwrap().backward().unwrap();
            let (got, want) = (backward(got), backward(want));
            for (var, wide) in vars.iter().zip(&wide) {
                assert_close(got.get(var).unwrap(), want.get(wide).unwrap(), tolerance, &label);
            }
        }
    }
}

#[test]
fn without_gradients_the_loss_is_the_same_and_bad_targets_are_refused() {
    let (x, w) = (random_var(1, &[60, 9], 1.0, DType::F32), random(2, &[33, 9], 1.0, DType::F32));
    let targets = targets(60, 33);
    let loss = |x: &Tensor| linear_cross_entropy(x, &w, &targets, Precision::Bf16).unwrap().to_scalar::<f32>().unwrap();
    assert_eq!(loss(&x).to_bits(), loss(&x.detach()).to_bits());
    let refused = |targets: &[u32]| linear_cross_entropy(&x, &w, targets, Precision::F32).unwrap_err().to_string();
    assert!(refused(&[33; 60]).contains("target 33"));
    assert!(refused(&[1]).contains("60 targets"));
    let none = linear_cross_entropy(&x, &w, &[IGNORED; 60], Precision::F32).unwrap();
    assert_eq!(none.to_scalar::<f32>().unwrap(), 0.0);
}

/// A NaN logit, wherever it is in the row, makes the loss and that row's gradient NaN; so does an infinite one.
#[test]
fn a_nan_logit_gives_a_nan_loss_on_every_set() {
    let vocab = 37;
    for isa in Isa::available() {
        for (at, bad) in (0..vocab).flat_map(|at| [f32::NAN, -f32::NAN, f32::INFINITY].map(|bad| (at, bad))) {
            let op = LinearCrossEntropy {
                isa,
                wants_gradients: true,
                ..LinearCrossEntropy::new(&[3, 5, 1], Precision::F32, None)
            };
            let mut logits: Vec<f32> = (0..3 * vocab).map(|i| (i % 13) as f32 * 0.25).collect();
            logits[vocab + at] = bad;
            let mut losses = [0.0; 3];
            op.softmax(&mut logits, vocab, 0, &mut losses).unwrap();
            assert_eq!(losses.map(f64::is_nan), [false, true, false], "{isa}: {bad} at {at}");
            for (i, v) in logits.iter().enumerate() {
                assert_eq!(v.is_nan(), i / vocab == 1, "{isa}: {bad} at {at}, gradient {i}");
            }
        }
    }
    // A lost weight reaches the loss through the product too.
    let x = random(1, &[4, 8], 1.0, DType::F32);
    let mut weight: Vec<f32> = random(2, &[vocab, 8], 1.0, DType::F32).flatten_all().unwrap().to_vec1().unwrap();
    weight[20 * 8] = f32::NAN;
    let weight = Tensor::from_vec(weight, (vocab, 8), x.device()).unwrap();
    let loss = linear_cross_entropy(&x, &weight, &[0, 1, 2, 3], Precision::Bf16).unwrap();
    assert!(loss.to_scalar::<f32>().unwrap().is_nan());
}
