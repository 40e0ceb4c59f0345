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
    let params = names.iter().zip(vars).map(|(name, var)| (*name, *var, "all".to_owned()));
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
