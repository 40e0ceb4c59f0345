//! Each block against its form in ordinary candle operations and against central differences.

use super::*;
use candle_core::{DType, Tensor};
use moe_core::testing::{assert_close, check_gradients, random, random_var, values};

#[test]
fn layer_norm_equals_the_reference() {
    let x = random_var(1, &[4, 3, 19], 1.3, DType::F64);
    let w = random_var(2, &[19], 1.0, DType::F64);
    let b = random_var(3, &[19], 1.0, DType::F64);
    let want = layer_norm::reference(&x, &w, &b, 1e-5).unwrap();
    assert_close(&layer_norm(&x, &w, &b, 1e-5).unwrap(), &want, 1e-12, "layer norm");
    let factors = random(4, &[4, 3, 19], 1.0, DType::F64);
    check_gradients(&[("x", &x), ("w", &w), ("b", &b)], || {
        (layer_norm(&x, &w, &b, 1e-5).unwrap() * &factors).unwrap().sum_all().unwrap()
    });
    assert!(layer_norm(&x, &b.narrow(0, 0, 3).unwrap(), &b, 1e-5).is_err());
}

#[test]
fn attention_equals_the_reference() {
    // One block, a block border, several blocks.
    for (batch, seq) in [(2, 5), (1, 64), (2, 65), (1, 130)] {
        let qkv = random_var(5, &[batch, seq, 36], 1.0, DType::F64);
        let want = attention::reference(&qkv, 3).unwrap();
        let got = causal_attention(&qkv, 3).unwrap();
        assert_close(&got, &want, 1e-12, &format!("forward {batch}x{seq}"));
        let factors = random(6, &[batch, seq, 12], 1.0, DType::F64);
        let grad =
            |out: Tensor| (out * &factors).unwrap().sum_all().unwrap().backward().unwrap().get(&qkv).unwrap().clone();
        assert_close(&grad(got), &grad(want), 1e-11, &format!("backward {batch}x{seq}"));
    }
    assert!(
        causal_attention(&random(7, &[1, 2, 36], 1.0, DType::F32), 5).unwrap_err().to_string().contains("num_heads")
    );
}

#[test]
fn attention_by_central_differences() {
    let qkv = random_var(8, &[1, 5, 12], 1.0, DType::F64);
    check_gradients(&[("qkv", &qkv)], || causal_attention(&qkv, 2).unwrap().sqr().unwrap().sum_all().unwrap());
}

/// Decoding token by token, or in pieces, over the cache gives the rows of the whole pass.
#[test]
fn cached_attention_equals_the_whole_pass() {
    let qkv = random(9, &[1, 70, 24], 1.0, DType::F64);
    let want = causal_attention(&qkv, 2).unwrap().squeeze(0).unwrap();
    let part = |i: usize| qkv.squeeze(0).unwrap().narrow(1, i * 8, 8).unwrap();
    for (start, rows) in [(0, 70), (69, 1), (3, 1), (30, 40)] {
        let len = start + rows;
        let upto = |i| part(i).narrow(0, 0, len).unwrap();
        let got = causal_attention_cached(&part(0).narrow(0, start, rows).unwrap(), &upto(1), &upto(2), 2).unwrap();
        assert_close(&got, &want.narrow(0, start, rows).unwrap(), 1e-12, &format!("{start}+{rows}"));
    }
    assert!(causal_attention_cached(&part(0), &part(1).narrow(0, 0, 2).unwrap(), &part(2), 2).is_err());
}

#[test]
fn cross_entropy_by_hand_and_by_central_differences() {
    let z = random_var(10, &[4, 7], 2.0, DType::F64);
    let targets = [3, 0, IGNORED, 6];
    let host = values(&z);
    let want: f64 = [(0, 3), (1, 0), (3, 6)]
        .iter()
        .map(|&(row, t)| {
            let row = &host[row * 7..][..7];
            row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[t]
        })
        .sum::<f64>()
        / 3.0;
    let got = cross_entropy(&z, &targets).unwrap().to_scalar::<f64>().unwrap();
    assert!((got - want).abs() < 1e-12, "{got} {want}");
    check_gradients(&[("logits", &z)], || cross_entropy(&z, &targets).unwrap());
    assert!(cross_entropy(&z, &[1, 2, 3, 7]).unwrap_err().to_string().contains("target 7"));
    assert!(cross_entropy(&z, &[1]).is_err());
    assert_eq!(cross_entropy(&z, &[IGNORED; 4]).unwrap().to_scalar::<f64>().unwrap(), 0.0);
}
