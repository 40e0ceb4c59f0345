//! Attention and its gradient against ordinary candle operations in f64, which central differences check in `moe-core`.

use super::*;
use crate::Isa;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, DecoderOps, Dropout};
use moe_core::testing::{assert_close, random, random_var, values};

#[test]
fn values_and_gradients_equal_the_reference() {
    // One query, one block, a block border, several blocks.
    for (batch, seq) in [(1, 1), (2, 5), (1, 48), (2, 49), (1, 130)] {
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 4e-2)] {
            let qkv = random_var(5, &[batch, seq, 36], 1.0, DType::F32);
            let wide = Var::from_tensor(&qkv.to_dtype(DType::F64).unwrap()).unwrap();
            let want = CandleOps.attention_fused(&wide, 3, seq).unwrap();
            let got = causal_attention(&qkv, 3, seq, precision).unwrap();
            assert_close(&got, &want, tolerance, &format!("forward {batch}x{seq} {precision:?}"));
            let factors = random(6, &[batch, seq, 12], 1.0, DType::F32);
            let backward = |y: Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
            let got = backward(got, &factors);
            let want = backward(want, &factors.to_dtype(DType::F64).unwrap());
            let label = format!("backward {batch}x{seq} {precision:?}");
            assert_close(got.get(&qkv).unwrap(), want.get(&wide).unwrap(), 2.0 * tolerance, &label);
        }
    }
    let refused = causal_attention(&random(7, &[1, 2, 36], 1.0, DType::F32), 5, 2, Precision::F32).unwrap_err();
    assert!(refused.to_string().contains("num_heads"), "{refused}");
}

/// Decoding token by token, or in pieces, over the cache gives the rows of the whole pass, bit for bit.
#[test]
fn cached_attention_has_the_bits_of_the_whole_pass() {
    let qkv = random(9, &[1, 110, 48], 1.0, DType::F32);
    let part = |i: usize| qkv.squeeze(0).unwrap().narrow(1, i * 16, 16).unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let want = causal_attention(&qkv, 2, 110, precision).unwrap().squeeze(0).unwrap();
        for (start, rows) in [(0, 110), (69, 1), (3, 1), (0, 1), (30, 60), (47, 2)] {
            let upto = |i| part(i).narrow(0, 0, start + rows).unwrap();
            let queries = part(0).narrow(0, start, rows).unwrap();
            let got = grouped_query_attention_cached(&queries, &upto(1), &upto(2), AttentionShape::equal(2), precision)
                .unwrap();
            assert_eq!(values(&got), values(&want.narrow(0, start, rows).unwrap()), "{start}+{rows} {precision:?}");
        }
    }
    let short = part(1).narrow(0, 0, 2).unwrap();
    let shape = AttentionShape::equal(2);
    assert!(grouped_query_attention_cached(&part(0), &short, &part(2), shape, Precision::F32).is_err());
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let qkv = random_var(1, &[3, 200, 96], 1.0, DType::F32);
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let y = causal_attention(&qkv, 4, 200, Precision::Bf16).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            (values(&y), values(grads.get(&qkv).unwrap()))
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

/// Query heads and key heads: equal, shared by two and by many, one key head for all.
const SHAPES: [AttentionShape; 4] =
    [AttentionShape::new(4, 4), AttentionShape::new(6, 3), AttentionShape::new(10, 2), AttentionShape::new(50, 1)];

/// Queries, keys and values of heads of `head_dim`.
fn grouped(shape: AttentionShape, batch: usize, seq: usize, head_dim: usize, dtype: DType) -> [Var; 3] {
    let AttentionShape { num_heads, num_kv_heads, .. } = shape;
    let part = |seed, heads| random_var(seed, &[batch, seq, heads * head_dim], 1.0, dtype);
    [part(1, num_heads), part(2, num_kv_heads), part(3, num_kv_heads)]
}

#[test]
fn grouped_values_and_gradients_equal_the_reference() {
    for shape in SHAPES {
        // One query, a border of the blocks of 48 / group queries, several blocks.
        for (batch, seq) in [(1, 1), (2, 5), (1, 25), (1, 49), (2, 66)] {
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 4e-2)] {
                let vars = grouped(shape, batch, seq, 9, DType::F32);
                let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
                let [q, k, v] = &vars;
                let got = grouped_query_attention(q, k, v, shape, seq, precision).unwrap();
                let [q, k, v] = &wide;
                let want = CandleOps.attention(q, k, v, shape, seq).unwrap();
                let label = format!("{shape:?} {batch}x{seq} {precision:?}");
                assert_close(&got, &want, tolerance, &label);
                let factors = random(6, got.dims(), 1.0, DType::F32);
                let backward = |y: Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
                let got = backward(got, &factors);
                let want = backward(want, &factors.to_dtype(DType::F64).unwrap());
                for (i, (var, wide)) in vars.iter().zip(&wide).enumerate() {
                    // A key head's gradient is the sum of its query heads'.
                    let tolerance = tolerance * (shape.num_heads / shape.num_kv_heads) as f64;
                    assert_close(
                        got.get(var).unwrap(),
                        want.get(wide).unwrap(),
                        2.0 * tolerance,
                        &format!("{label} d{i}"),
                    );
                }
            }
        }
    }
}

/// Scores weaker and stronger than usual.
#[test]
fn scales_have_the_values_and_gradients_of_the_reference() {
    for scale in [0.01, 1.5] {
        let shape = AttentionShape { scale: Some(scale), ..AttentionShape::new(4, 2) };
        let vars = grouped(shape, 2, 60, 9, DType::F32);
        let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
        let [q, k, v] = &vars;
        let got = grouped_query_attention(q, k, v, shape, 60, Precision::F32).unwrap();
        let usual = grouped_query_attention(q, k, v, AttentionShape::new(4, 2), 60, Precision::F32).unwrap();
        assert!(values(&got) != values(&usual), "scale {scale} changes something");
        let [q, k, v] = &wide;
        let want = CandleOps.attention(q, k, v, shape, 60).unwrap();
        assert_close(&got, &want, 1e-5, &format!("scale {scale}"));
        let all = square_gradients(&got, &vars).concat();
        for (got, want) in all.iter().zip(square_gradients(&want, &wide).concat()) {
            assert!((got - want).abs() <= 5e-5 * (1.0 + want.abs()), "scale {scale}: {got} want {want}");
        }
    }
    for scale in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let shape = AttentionShape { scale: Some(scale), ..AttentionShape::new(4, 2) };
        let [q, k, v] = grouped(AttentionShape::new(4, 2), 1, 3, 4, DType::F32);
        let error = grouped_query_attention(&q, &k, &v, shape, 3, Precision::F32).unwrap_err();
        assert!(error.to_string().contains("scale must be a positive number"), "{error}");
    }
}

/// Windows and chunks of one token, of some, and beyond the sequence.
#[test]
fn windows_have_the_values_and_gradients_of_the_reference() {
    let windows = [1, 7, 48, 500].map(|window| (Some(window), None));
    let chunks = [1, 16, 50, 500].map(|chunk| (None, Some(chunk)));
    for (window, chunk) in windows.into_iter().chain(chunks) {
        let shape = AttentionShape { window, chunk, ..AttentionShape::new(4, 2) };
        let vars = grouped(shape, 2, 70, 9, DType::F32);
        let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
        let [q, k, v] = &vars;
        let got = grouped_query_attention(q, k, v, shape, 70, Precision::F32).unwrap();
        let [q, k, v] = &wide;
        let want = CandleOps.attention(q, k, v, shape, 70).unwrap();
        assert_close(&got, &want, 1e-5, &format!("{shape:?}"));
        let all = square_gradients(&got, &vars).concat();
        for (got, want) in all.iter().zip(square_gradients(&want, &wide).concat()) {
            assert!((got - want).abs() <= 5e-5 * (1.0 + want.abs()), "{shape:?}: {got} want {want}");
        }
    }
    let none = AttentionShape { window: Some(0), ..AttentionShape::new(4, 2) };
    let [q, k, v] = grouped(AttentionShape::new(4, 2), 1, 3, 4, DType::F32);
    let error = grouped_query_attention(&q, &k, &v, none, 3, Precision::F32).unwrap_err();
    assert!(error.to_string().contains("window"), "{error}");
}

/// The gradients of `sum(y^2)` for all of `vars`.
fn square_gradients(y: &Tensor, vars: &[Var]) -> Vec<Vec<f64>> {
    let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    vars.iter().map(|v| values(grads.get(v).unwrap())).collect()
}

#[test]
fn with_a_key_head_per_query_head_the_bits_are_those_of_the_fused_form() {
    for precision in [Precision::F32, Precision::Bf16] {
        let vars = grouped(SHAPES[0], 2, 70, 8, DType::F32);
        let qkv = Tensor::cat(&vars.each_ref().map(|v| v.as_tensor()), 2).unwrap();
        let fused = causal_attention(&qkv, 4, 70, precision).unwrap();
        let [q, k, v] = &vars;
        let parts = grouped_query_attention(q, k, v, SHAPES[0], 70, precision).unwrap();
        assert_eq!(values(&parts), values(&fused), "{precision:?}");
        assert_eq!(square_gradients(&parts, &vars), square_gradients(&fused, &vars), "{precision:?}");
    }
}

/// Shared heads give the bits of the same heads written out, and decoding those of the whole pass.
#[test]
fn grouped_heads_have_the_bits_of_repeated_ones_and_decoding_those_of_the_whole_pass() {
    for shape in SHAPES {
        for precision in [Precision::F32, Precision::Bf16] {
            let [q, k, v] = grouped(shape, 1, 60, 8, DType::F32);
            let whole = grouped_query_attention(&q, &k, &v, shape, 60, precision).unwrap();
            let group = shape.num_heads / shape.num_kv_heads;
            let repeat = |x: &Tensor| {
                let heads = x.reshape((60, shape.num_kv_heads, 1, 8)).unwrap().repeat((1, 1, group, 1)).unwrap();
                heads.reshape((1, 60, shape.num_heads * 8)).unwrap()
            };
            let qkv = Tensor::cat(&[q.as_tensor(), &repeat(&k), &repeat(&v)], 2).unwrap();
            let want = causal_attention(&qkv, shape.num_heads, 60, precision).unwrap();
            assert_eq!(values(&whole), values(&want), "{shape:?} {precision:?}");
            for (start, rows) in [(0, 60), (59, 1), (0, 1), (4, 1), (7, 30)] {
                let upto = |x: &Tensor| x.get(0).unwrap().narrow(0, 0, start + rows).unwrap();
                let queries = q.get(0).unwrap().narrow(0, start, rows).unwrap();
                let got = grouped_query_attention_cached(&queries, &upto(&k), &upto(&v), shape, precision).unwrap();
                let want = whole.get(0).unwrap().narrow(0, start, rows).unwrap();
                assert_eq!(values(&got), values(&want), "{shape:?} {start}+{rows} {precision:?}");
            }
        }
    }
}

#[test]
fn neither_threads_nor_instruction_sets_change_grouped_attention() {
    for shape in [SHAPES[0], SHAPES[2]] {
        let parts = grouped(shape, 2, 101, 17, DType::F32).map(|v| v.flatten_all().unwrap().to_vec1::<f32>().unwrap());
        let [q, k, v] = parts.each_ref().map(Vec::as_slice);
        for precision in [Precision::F32, Precision::Bf16] {
            let run = |isa: Isa, threads: usize| {
                let op = Grouped(Heads::new(shape, 17, precision).on(isa), 101);
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| {
                    let out = op.0.forward_batch(op.parts([q, k, v]), None, (2, 101));
                    let gradients = op.gradient([q, k, v], [&out, q], (2, 101));
                    (out, gradients)
                })
            };
            for isa in Isa::available() {
                // Tiles have bits of their own in bf16.
                let one = run(if isa.has_common_bits(precision) { Isa::Portable } else { isa }, 1);
                for threads in [1, 2, 3, 5] {
                    assert!(run(isa, threads) == one, "{shape:?} {isa}, {threads} threads, {precision:?}");
                }
            }
        }
    }
}

#[test]
fn no_tokens_are_fine_and_bad_heads_are_named() {
    let empty = |batch, seq| grouped(SHAPES[1], batch, seq, 4, DType::F32);
    let vars = empty(0, 3);
    let [q, k, v] = &vars;
    let y = grouped_query_attention(q, k, v, SHAPES[1], 3, Precision::F32).unwrap();
    assert_eq!(y.dims(), [0, 3, 24]);
    assert!(square_gradients(&y, &vars).iter().all(Vec::is_empty));
    for seq_len in [0, 3] {
        let [q, k, v] = empty(2, 2);
        let error = grouped_query_attention(&q, &k, &v, SHAPES[1], seq_len, Precision::F32).unwrap_err().to_string();
        assert!(error.contains(&format!("4 tokens must be whole sequences of seq_len {seq_len}")), "{error}");
    }
    let [q, k, v] = empty(1, 3);
    let refused = |num_heads, num_kv_heads, q: &Tensor, v: &Tensor, name: &str| {
        let shape = AttentionShape::new(num_heads, num_kv_heads);
        let error = grouped_query_attention(q, &k, v, shape, 1, Precision::F32).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    };
    refused(6, 4, &q, &v, "num_kv_heads");
    refused(6, 0, &q, &v, "num_kv_heads");
    refused(6, 2, &q, &v, "head_dim");
    refused(6, 3, &q, &v.narrow(1, 0, 2).unwrap(), "values");
    refused(6, 3, &q.narrow(1, 0, 2).unwrap(), &v, "queries");
}

/// A lost query, key or value reaches every row that sees it. A lost value also reaches the rows before it in its block,
/// which multiply it by 0; never another block's.
#[test]
fn nan_reaches_the_rows_that_see_it_on_every_set() {
    let (len, width, at) = (70, 16, 60);
    let shape = AttentionShape::new(1, 1);
    let part = |i: usize| random(i as u64, &[len, width], 1.0, DType::F32).flatten_all().unwrap().to_vec1().unwrap();
    for isa in Isa::available() {
        for lost in 0..3 {
            let mut qkv: [Vec<f32>; 3] = std::array::from_fn(part);
            qkv[lost][at * width + 5] = -f32::NAN;
            let parts = qkv.each_ref().map(|values| Strip::new(values, width));
            let out = Heads::new(shape, width, Precision::F32).on(isa).forward_batch(parts, None, (1, len));
            for (row, values) in out.chunks_exact(width).enumerate() {
                let nans = values.iter().filter(|v| v.is_nan()).count();
                let want = match lost {
                    0 => {
                        if row == at {
                            width
                        } else {
                            0
                        }
                    }
                    1 => {
                        if row >= at {
                            width
                        } else {
                            0
                        }
                    }
                    _ => usize::from(row >= 48),
                };
                assert_eq!(nans, want, "{isa}: NaN in part {lost}, row {row}");
            }
        }
    }
}

/// Probabilities dropped: values and gradients of the reference, which has the same masks, for heads alone and shared, for all
/// heads and for those of a rank.
#[test]
fn dropped_values_and_gradients_equal_the_reference() {
    let dropout = |first_head| HeadDropout { first_head, ..HeadDropout::of_all(Dropout::new(0.3, 5).unwrap()) };
    for (shape, first_head) in SHAPES.into_iter().zip([0, 12, 0, 7]) {
        for (batch, seq) in [(1, 1), (2, 5), (2, 66)] {
            for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 4e-2)] {
                let vars = grouped(shape, batch, seq, 9, DType::F32);
                let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
                let [qkv, wide_qkv] = [&vars, &wide].map(|vars| vars.each_ref().map(|var| var.as_tensor()));
                let got = grouped_query_attention_dropped(qkv, shape, seq, dropout(first_head), precision).unwrap();
                let want = CandleOps.attention_dropped(wide_qkv, shape, seq, dropout(first_head)).unwrap();
                let label = format!("{shape:?} {batch}x{seq} {precision:?}");
                assert_close(&got, &want, tolerance, &label);
                let plain = CandleOps.attention(wide_qkv[0], wide_qkv[1], wide_qkv[2], shape, seq).unwrap();
                assert_ne!(values(&want), values(&plain), "{label}: something is dropped");
                let factors = random(6, got.dims(), 1.0, DType::F32);
                let backward = |y: Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
                let got = backward(got, &factors);
                let want = backward(want, &factors.to_dtype(DType::F64).unwrap());
                for (i, (var, wide)) in vars.iter().zip(&wide).enumerate() {
                    let tolerance = 2.0 * tolerance * (shape.num_heads / shape.num_kv_heads) as f64;
                    let (got, want) = (got.get(var).unwrap(), want.get(wide).unwrap());
                    assert_close(got, want, tolerance, &format!("{label} d{i}"));
                }
            }
        }
    }
}

/// Fused is the same as apart; a part of the heads has the bits of those heads in the whole, as a rank of several computes them.
#[test]
fn a_part_of_the_heads_drops_what_the_whole_drops() {
    let dropout = HeadDropout::of_all(Dropout::new(0.4, 8).unwrap());
    let qkv = random(9, &[2, 70, 72], 1.0, DType::F32);
    let part = |part: usize, first: usize, heads: usize| qkv.narrow(2, part * 24 + first * 6, heads * 6).unwrap();
    let apart = |first: usize, heads: usize| {
        let [q, k, v] = [0, 1, 2].map(|i| part(i, first, heads));
        let dropout = HeadDropout { first_head: first, ..dropout };
        grouped_query_attention_dropped([&q, &k, &v], AttentionShape::equal(heads), 70, dropout, Precision::F32)
            .unwrap()
    };
    let whole = causal_attention_dropped(&qkv, 4, 70, dropout, Precision::F32).unwrap();
    assert_eq!(values(&apart(0, 4)), values(&whole));
    let halves = Tensor::cat(&[apart(0, 2), apart(2, 2)], 2).unwrap();
    assert_eq!(values(&halves), values(&whole));
    let refused = causal_attention_dropped(&qkv, 5, 70, dropout, Precision::F32).unwrap_err().to_string();
    assert!(refused.contains("num_heads"), "{refused}");
}

/// Not the set, nor the threads; and none dropped gives the bits of attention without dropout.
#[test]
fn neither_set_nor_threads_change_a_bit_of_what_is_dropped() {
    let shape = AttentionShape::new(6, 3);
    let flat = |seed, width| -> Vec<f32> {
        random(seed, &[2 * 66, width], 1.0, DType::F32).flatten_all().unwrap().to_vec1().unwrap()
    };
    let (q, k, v, grad) = (flat(1, 24), flat(2, 12), flat(3, 12), flat(4, 24));
    let run = |probability: Option<f64>, isa: Isa, precision: Precision, threads: usize| {
        let heads = Heads::new(shape, 4, precision).on(isa);
        let dropout = probability.map(|p| HeadDropout::of_all(Dropout::new(p, 3).unwrap()));
        let op = Grouped(dropout.map_or(heads, |dropout| heads.dropping(dropout)), 66);
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let out = op.0.forward_batch(op.parts([&q, &k, &v]), None, (2, 66));
            let gradients = op.gradient([&q, &k, &v], [&out, &grad], (2, 66));
            let all = [&out].into_iter().chain(&gradients).flatten();
            all.map(|value| value.to_bits()).collect::<Vec<u32>>()
        })
    };
    for precision in [Precision::F32, Precision::Bf16] {
        let want = run(Some(0.2), Isa::Portable, precision, 1);
        for isa in Isa::available().into_iter().filter(|isa| isa.has_common_bits(precision)) {
            for threads in [1, 3] {
                assert_eq!(run(Some(0.2), isa, precision, threads), want, "{isa} {precision:?}, {threads} threads");
            }
            let plain = run(None, isa, precision, 2);
            assert_eq!(run(Some(0.0), isa, precision, 2), plain, "{isa} {precision:?}: a factor of 1");
            assert_ne!(plain, want);
        }
    }
}
