//! Values and gradients against `moe-core`'s in f64, which central differences check there.

use super::*;
use candle_core::{DType, Var};
use moe_core::testing::{assert_close, random, random_var, values};

#[test]
fn values_and_gradients_equal_the_reference() {
    for (act, scale) in [(Activation::GeluTanh, 2.5), (Activation::SwiGlu, 2.5), (Activation::SwiGluBounded, 6.0)] {
        for shape in [&[1, 2][..], &[3, 5, 8], &[700, 130], &[0, 6]] {
            let x = random_var(1, shape, scale, DType::F32);
            let wide = Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap();
            let (got, want) = (activation(act, &x).unwrap(), act.apply(&wide).unwrap());
            assert_close(&got, &want, 1e-6, &format!("{act:?} {shape:?}"));
            let factors = random(2, want.dims(), 1.0, DType::F32);
            let backward = |y: Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
            let (got, want) = (backward(got, &factors), backward(want, &factors.to_dtype(DType::F64).unwrap()));
            assert_close(got.get(&x).unwrap(), want.get(&wide).unwrap(), 2e-6, &format!("{act:?} {shape:?} gradient"));
        }
    }
    assert!(activation(Activation::SwiGlu, &random(3, &[2, 3], 1.0, DType::F32)).is_err());
}

/// Beyond its bounds the form of gpt-oss stays where it is, and has no gradient.
#[test]
fn bounds_hold() {
    let x = |values: &[f32]| Tensor::from_slice(values, (1, values.len()), &candle_core::Device::Cpu).unwrap();
    // gate, gate, gate | up, up, up
    let far = x(&[9.0, 7.0, -30.0, 20.0, 7.0, -20.0]);
    let got = values(&activation(Activation::SwiGluBounded, &far).unwrap());
    assert!(got[0] == got[1] && (got[0] - 56.0).abs() < 1e-3, "{got:?}");
    let op = Elementwise { activation: Activation::SwiGluBounded, isa: crate::select::current() };
    let grad = op.gradient(&[9.0, 1.0, 8.0, 0.5], &[1.0, 1.0], 4);
    assert!(grad[0] == 0.0 && grad[1] > 0.0 && grad[2] == 0.0 && grad[3] > 0.0, "{grad:?}");
}

#[test]
fn large_values_saturate() {
    let x = Tensor::new(&[[-100f32, -20.0, 0.0, 20.0, 100.0, 3e38]], &candle_core::Device::Cpu).unwrap();
    assert_eq!(values(&activation(Activation::GeluTanh, &x).unwrap())[2..5], [0.0, 20.0, 100.0]);
    assert!(values(&activation(Activation::GeluTanh, &x).unwrap()).iter().all(|v| !v.is_nan()));
}

/// At every place of a vector and in what is left over behind the last whole one.
#[test]
fn nan_stays_nan_on_every_set() {
    for isa in Isa::available() {
        for (act, nan) in
            [(Activation::GeluTanh, f32::NAN), (Activation::SwiGlu, -f32::NAN), (Activation::SwiGluBounded, f32::NAN)]
        {
            let (width, inputs) = (37 * act.inputs(), act.inputs());
            let op = Elementwise { activation: act, isa };
            for at in 0..width {
                let mut x = vec![0.5; width];
                x[at] = nan;
                let (mut out, grad) = (vec![0.0; 37], op.gradient(&x, &vec![1.0; width / inputs], width));
                op.forward_into(&x, width, &mut out);
                for (i, v) in out.iter().enumerate() {
                    assert_eq!(v.is_nan(), i == at % 37, "{isa} {act:?}: NaN at {at}, output {i}");
                }
                assert!(grad[at % 37].is_nan(), "{isa} {act:?}: gradient of NaN at {at}");
            }
        }
    }
}
