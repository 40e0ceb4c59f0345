//! Attention and its gradient against ordinary candle operations in f64, which central differences check.

use super::*;
use candle_core::{DType, Var};
use moe_core::testing::{assert_close, check_gradients, random, random_var, values};

#[test]
fn values_and_gradients_equal_the_reference() {
    // One query, one block, a block border, several blocks.
    for (batch, seq) in [(1, 1), (2, 5), (1, 48), (2, 49), (1, 130)] {
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 4e-2)] {
            let qkv = random_var(5, &[batch, seq, 36], 1.0, DType::F32);
            let wide = Var::from_tensor(&qkv.to_dtype(DType::F64).unwrap()).unwrap();
            let want = causal_attention(&wide, 3, precision).unwrap();
            let got = causal_attention(&qkv, 3, precision).unwrap();
            assert_close(&got, &want, tolerance, &format!("forward {batch}x{seq} {precision:?}"));
            let factors = random(6, &[batch, seq, 12], 1.0, DType::F32);
            let backward = |y: Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
            let got = backward(got, &factors);
            let want = backward(want, &factors.to_dtype(DType::F64).unwrap());
            let label = format!("backward {batch}x{seq} {precision:?}");
            assert_close(got.get(&qkv).unwrap(), want.get(&wide).unwrap(), 2.0 * tolerance, &label);
        }
    }
    let refused = causal_attention(&random(7, &[1, 2, 36], 1.0, DType::F32), 5, Precision::F32).unwrap_err();
    assert!(refused.to_string().contains("num_heads"), "{refused}");
}

#[test]
fn the_reference_by_central_differences() {
    let qkv = random_var(8, &[1, 5, 12], 1.0, DType::F64);
    check_gradients(&[("qkv", &qkv)], || {
        causal_attention(&qkv, 2, Precision::F32).unwrap().sqr().unwrap().sum_all().unwrap()
    });
}

/// Decoding token by token, or in pieces, over the cache gives the rows of the whole pass, bit for bit.
#[test]
fn cached_attention_has_the_bits_of_the_whole_pass() {
    let qkv = random(9, &[1, 110, 48], 1.0, DType::F32);
    let part = |i: usize| qkv.squeeze(0).unwrap().narrow(1, i * 16, 16).unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let want = causal_attention(&qkv, 2, precision).unwrap().squeeze(0).unwrap();
        for (start, rows) in [(0, 110), (69, 1), (3, 1), (0, 1), (30, 60), (47, 2)] {
            let upto = |i| part(i).narrow(0, 0, start + rows).unwrap();
            let queries = part(0).narrow(0, start, rows).unwrap();
            let got = causal_attention_cached(&queries, &upto(1), &upto(2), 2, precision).unwrap();
            assert_eq!(values(&got), values(&want.narrow(0, start, rows).unwrap()), "{start}+{rows} {precision:?}");
        }
    }
    assert!(causal_attention_cached(&part(0), &part(1).narrow(0, 0, 2).unwrap(), &part(2), 2, Precision::F32).is_err());
}

#[test]
fn cached_attention_equals_the_reference() {
    let (q, k) = (random(1, &[3, 12], 1.0, DType::F64), random(2, &[9, 12], 1.0, DType::F64));
    let v = random(3, &[9, 12], 1.0, DType::F64);
    let want = causal_attention_cached(&q, &k, &v, 3, Precision::F32).unwrap();
    let narrow = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
    let got = causal_attention_cached(&narrow(&q), &narrow(&k), &narrow(&v), 3, Precision::F32).unwrap();
    assert_close(&got, &want, 1e-5, "cached");
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let qkv = random_var(1, &[3, 200, 96], 1.0, DType::F32);
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let y = causal_attention(&qkv, 4, Precision::Bf16).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            (values(&y), values(grads.get(&qkv).unwrap()))
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}
