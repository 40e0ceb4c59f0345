//! One pass against two operations, bit for bit.

use super::*;
use crate::ops::KernelOps;
use candle_core::{DType, Var};
use moe_core::DecoderOps;
use moe_core::tape::{GradBuffers, Tape};
use moe_core::testing::{random_var, values};

/// Values of both results, and the gradients of all of `vars`, as bits.
fn run(vars: &[&Var], both: impl Fn() -> moe_core::Result<[Tensor; 2]>) -> Vec<Vec<u64>> {
    let names = ["x", "delta", "weight", "bias"];
    let params = names.iter().zip(vars).map(|(name, var)| (*name, *var));
    let mut buffers = GradBuffers::new(params).unwrap();
    buffers.begin();
    let (outputs, tape) = Tape::record(|| both().unwrap());
    let [sum, normed] = &outputs;
    let loss = (sum.sqr().unwrap().sum_all().unwrap() + normed.powf(3.0).unwrap().sum_all().unwrap()).unwrap();
    tape.backward_of(&loss, &mut buffers.gradients()).unwrap();
    buffers.finish();
    let bits = |all: Vec<f64>| all.into_iter().map(f64::to_bits).collect();
    let outputs = outputs.iter().map(|t| bits(values(t)));
    outputs.chain(buffers.all().into_iter().map(|g| g.iter().map(|v| u64::from(v.to_bits())).collect())).collect()
}

#[test]
fn it_has_the_bits_of_a_sum_and_a_norm() {
    let ops = KernelOps::default();
    for (rows, width) in [(1, 1), (3, 33), (200, 64)] {
        let [x, delta] = [1, 2].map(|seed| random_var(seed, &[rows, width], 1.0, DType::F32));
        let [weight, bias] = [3, 4].map(|seed| random_var(seed, &[width], 1.0, DType::F32));
        let layer = [&x, &delta, &weight, &bias];
        let want = run(&layer, || {
            let sum = ops.add(&x, &delta)?;
            let normed = ops.layer_norm(&sum, &weight, &bias, 1e-5)?;
            Ok([sum, normed])
        });
        let got = run(&layer, || Ok(add_norm(&x, &delta, &weight, Some(&bias), 1e-5)?));
        assert_eq!(got, want, "{rows} x {width}");
        let want = run(&layer[..3], || {
            let sum = ops.add(&x, &delta)?;
            let normed = ops.rms_norm(&sum, &weight, 1e-5)?;
            Ok([sum, normed])
        });
        let got = run(&layer[..3], || Ok(add_norm(&x, &delta, &weight, None, 1e-5)?));
        assert_eq!(got, want, "{rows} x {width}");
    }
}

/// Without a tape both results have candle's gradients: neither is a leaf that nothing leads back from.
#[test]
fn without_a_tape_gradients_are_candles() {
    let [x, delta] = [1, 2].map(|seed| random_var(seed, &[3, 5], 1.0, DType::F32));
    let [weight, bias] = [3, 4].map(|seed| random_var(seed, &[5], 1.0, DType::F32));
    for (bias, params) in
        [(Some(bias.as_tensor()), vec![&x, &delta, &weight, &bias]), (None, vec![&x, &delta, &weight])]
    {
        let taped = run(&params, || Ok(add_norm(&x, &delta, &weight, bias, 1e-5)?));
        let [sum, normed] = add_norm(&x, &delta, &weight, bias, 1e-5).unwrap();
        let loss = (sum.sqr().unwrap().sum_all().unwrap() + normed.powf(3.0).unwrap().sum_all().unwrap()).unwrap();
        let grads = loss.backward().unwrap();
        for (index, var) in params.iter().enumerate() {
            let want: Vec<f64> = taped[2 + index].iter().map(|&bits| f64::from(f32::from_bits(bits as u32))).collect();
            let got = values(grads.get(var).unwrap());
            let close = |(g, w): (&f64, &f64)| (g - w).abs() <= 1e-5 * (1.0 + w.abs());
            assert!(got.iter().zip(&want).all(close), "parameter {index}: {got:?} want {want:?}");
        }
    }
}

#[test]
fn nothing_is_recorded_without_gradients_and_shapes_are_named() {
    let x = random_var(1, &[3, 5], 1.0, DType::F32).detach();
    let weight = random_var(2, &[5], 1.0, DType::F32).detach();
    let [sum, normed] = add_norm(&x, &x, &weight, None, 1e-5).unwrap();
    assert!(!sum.track_op() && !normed.track_op());
    assert_eq!(values(&sum), values(&(&x + &x).unwrap()));
    assert!(add_norm(&x, &weight, &weight, None, 1e-5).unwrap_err().to_string().contains("one shape"));
    assert!(add_norm(&x, &x, &x, None, 1e-5).unwrap_err().to_string().contains("norm weight"));
}
