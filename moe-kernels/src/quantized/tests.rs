use super::*;
use moe_core::CounterRng;
use proptest::prelude::*;

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = CounterRng::new(seed, 0);
    (0..len).map(|_| rng.below(2001) as f32 * 1e-3 - 1.0).collect()
}

const FORMATS: [QuantFormat; 4] =
    [QuantFormat::Int8, QuantFormat::INT4, QuantFormat::Int4 { group_size: 64 }, QuantFormat::Int4 { group_size: 128 }];

#[test]
fn every_isa_gives_the_bits_of_the_plain_loops() {
    // Rows of each group (idle and full ones too), outputs, inputs.
    let cases: [(&[usize], usize, usize); 7] = [
        (&[1], 1, 1),
        (&[0, 1, 0], 33, 31),
        (&[12, 13, 1], 31, 33),
        (&[2, 3, 4, 5, 6], 130, 65),
        (&[7, 8, 9, 10, 11], 64, 128),
        (&[30, 0, 0], 65, 257),
        (&[0, 0], 5, 7),
    ];
    for format in FORMATS {
        for (rows, n, k) in cases {
            let weights: Vec<QuantizedWeights> = (0..rows.len())
                .map(|g| QuantizedWeights::new(format, &random(g as u64, n * k), [n, k]).unwrap())
                .collect();
            let total: usize = rows.iter().sum();
            let (x, bias) = (random(7, total * k), random(8, n));
            let mut first = 0;
            let groups: Vec<QuantGroup<'_>> = (rows.iter().zip(&weights).enumerate())
                .map(|(g, (&m, weights))| {
                    let at = first;
                    first += m;
                    let bias = (g % 2 == 0).then_some(bias.as_slice());
                    QuantGroup { rows: &x[at * k..first * k], weights, bias, out_offset: at * n }
                })
                .collect();
            let mut want = vec![0.0; total * n];
            quantized_gemm_reference(&groups, &mut want);
            for isa in Isa::available() {
                let mut got = vec![f32::NAN; total * n];
                quantized_gemm(isa, &groups, &mut got);
                assert_eq!(got, want, "{isa} {format:?} {rows:?} {n}x{k}");
            }
        }
    }
}

#[test]
fn products_are_those_of_the_weights_within_the_formats_error() {
    let (m, n, k) = (9, 40, 256);
    let (x, w) = (random(1, m * k), random(2, n * k));
    for (format, bound) in [(QuantFormat::Int8, 0.01), (QuantFormat::INT4, 0.12)] {
        let weights = QuantizedWeights::new(format, &w, [n, k]).unwrap();
        let mut out = vec![0.0; m * n];
        quantized_gemm(
            Isa::fastest(),
            &[QuantGroup { rows: &x, weights: &weights, bias: None, out_offset: 0 }],
            &mut out,
        );
        let (mut error, mut size) = (0.0, 0.0);
        for i in 0..m {
            for j in 0..n {
                let exact: f64 = (0..k).map(|p| f64::from(x[i * k + p]) * f64::from(w[j * k + p])).sum();
                error += (f64::from(out[i * n + j]) - exact).powi(2);
                size += exact.powi(2);
            }
        }
        let relative = (error / size).sqrt();
        assert!(relative < bound && relative > 0.0, "{format:?}: {relative}");
    }
}

#[test]
fn dequantized_weights_are_the_nearest_of_their_scale() {
    let (n, k) = (33, 70);
    let w = random(3, n * k);
    for format in FORMATS {
        let weights = QuantizedWeights::new(format, &w, [n, k]).unwrap();
        for (at, (q, w)) in weights.dequantize().iter().zip(&w).enumerate() {
            let scale = weights.value(at / k, at % k).1.abs();
            // The positive end of 4 bits is one step short, and a scale rounded to bf16 may be 0.4 % too small for 8 steps.
            let steps = if format == QuantFormat::Int8 { 0.5001 } else { 1.04 };
            assert!((q - w).abs() <= steps * scale, "{format:?}: {q} for {w} with scale {scale}");
        }
    }
    let int4 = QuantizedWeights::new(QuantFormat::INT4, &random(4, 64 * 256), [64, 256]).unwrap();
    assert_eq!(int4.bytes() * 8, 64 * 256 * 9 / 2, "4.5 bits per weight");
}

#[test]
fn zeros_and_tiny_values_stay_finite_and_bad_ones_show() {
    for format in FORMATS {
        let mut w = random(5, 4 * 64);
        w[..64].fill(0.0);
        w[64..128].fill(1e-42);
        let weights = QuantizedWeights::new(format, &w, [4, 64]).unwrap();
        let mut x = random(6, 5 * 64);
        x[..64].fill(0.0);
        x[64..128].fill(-1e-42);
        x[2 * 64 + 3] = f32::INFINITY;
        x[3 * 64 + 63] = f32::NAN;
        for isa in Isa::available() {
            let mut out = vec![0.0; 5 * 4];
            quantized_gemm(isa, &[QuantGroup { rows: &x, weights: &weights, bias: None, out_offset: 0 }], &mut out);
            assert_eq!(out[..4], [0.0; 4], "{isa} {format:?}");
            assert!(out[4..8].iter().all(|v| v.is_finite()) && out[16..].iter().all(|v| v.is_finite()));
            assert!(out[8..16].iter().all(|v| v.is_nan()), "{isa} {format:?}: {out:?}");
        }
    }
}

/// Rows whose scale would be subnormal, with zeros among the values: an infinite inverse took those to NaN.
fn tiny_rows() -> Vec<Vec<f32>> {
    let row = |value: fn(usize) -> f32| (0..64).map(value).collect();
    vec![
        row(|_| 0.0),
        row(|i| if i % 3 == 0 { -0.0 } else { 0.0 }),
        row(|_| f32::from_bits(1)),
        row(|i| if i % 2 == 0 { 0.0 } else { 1e-42 }),
        row(|i| if i == 40 { -1e-38 } else { 0.0 }),
        row(|i| [0.0, 3e-37, -2e-38, 1e-44][i % 4]),
        row(|i| [-1.4e-36, 0.0, f32::MIN_POSITIVE, -f32::MIN_POSITIVE][i % 4]),
        // A group of 32 tiny values beside one of ordinary values.
        row(|i| if i < 32 { 1e-40 * (i % 5) as f32 } else { i as f32 * 0.01 - 0.5 }),
    ]
}

#[test]
fn tiny_rows_are_quantized_to_half_a_step_and_stay_finite() {
    let rows = tiny_rows();
    let (n, k) = (rows.len(), 64);
    let flat = rows.concat();
    for format in FORMATS {
        let weights = QuantizedWeights::new(format, &flat, [n, k]).unwrap();
        for (at, (q, w)) in weights.dequantize().iter().zip(&flat).enumerate() {
            let (integer, scale) = weights.value(at / k, at % k);
            assert!((-127..=127).contains(&integer), "{format:?} [{}, {}]: {integer}", at / k, at % k);
            assert!(scale == 0.0 || scale.abs() >= f32::MIN_POSITIVE, "{format:?}: scale {scale}");
            let steps = if format == QuantFormat::Int8 { 0.5001 } else { 1.04 };
            assert!((q - w).abs() <= steps * scale.abs(), "{format:?} row {}: {q} for {w}, scale {scale}", at / k);
        }
        // As weights with ordinary inputs, and as inputs of ordinary weights.
        let ordinary = random(12, n * k);
        let ordinary_weights = QuantizedWeights::new(format, &ordinary, [n, k]).unwrap();
        for (x, weights) in [(&ordinary, &weights), (&flat, &ordinary_weights), (&flat, &weights)] {
            let groups = [QuantGroup { rows: x, weights, bias: None, out_offset: 0 }];
            let mut want = vec![0.0; n * n];
            quantized_gemm_reference(&groups, &mut want);
            assert!(want.iter().all(|v| v.is_finite()), "{format:?}");
            for isa in Isa::available() {
                let mut got = vec![f32::NAN; n * n];
                quantized_gemm(isa, &groups, &mut got);
                assert_eq!(got, want, "{isa} {format:?}");
            }
        }
    }
}

/// The rule for rows whose scale is an ordinary number, word for word: the least scale changes none of them. Scales of 8 bits are
/// rounded up to bf16, by less than 1 part in 128, and cut nothing off.
#[test]
fn ordinary_rows_keep_their_scales_and_integers() {
    let (n, k) = (33, 70);
    for factor in [1.0f32, 1e-30, 2e-36, 1e30] {
        let w: Vec<f32> = random(13, n * k).iter().map(|v| v * factor).collect();
        for format in FORMATS {
            let weights = QuantizedWeights::new(format, &w, [n, k]).unwrap();
            let size = if let QuantFormat::Int4 { group_size } = format { group_size } else { k };
            for (row, values) in w.chunks_exact(k).enumerate() {
                for (group, values) in values.chunks(size).enumerate() {
                    let most = values.iter().fold(0.0f32, |most, &v| if v.abs() > most.abs() { v } else { most });
                    let (scale, range) = match format {
                        QuantFormat::Int8 => {
                            let (exact, bits) = (most.abs() / 127.0, (most.abs() / 127.0).to_bits());
                            let up =
                                f32::from_bits(if bits & 0xffff == 0 { bits } else { (bits >> 16 << 16) + 0x1_0000 });
                            assert!(up >= exact && up <= exact * (1.0 + 1.0 / 128.0), "{up} for {exact}");
                            (up, [-127.0, 127.0])
                        }
                        QuantFormat::Int4 { .. } => (crate::gemm::bf16_round(most / -8.0), [-8.0, 7.0]),
                    };
                    for (p, v) in values.iter().enumerate() {
                        let integer = (v * (1.0 / scale)).clamp(range[0], range[1]).round_ties_even() as i32;
                        let got = weights.value(row, group * size + p);
                        assert_eq!(got, (integer, scale), "{format:?} {factor} [{row}, {}]", group * size + p);
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch_nor_on_the_threads() {
    let (m, n, k) = (29, 96, 160);
    let x = random(9, m * k);
    for format in FORMATS {
        let weights = QuantizedWeights::new(format, &random(10, n * k), [n, k]).unwrap();
        let run = |rows: &[f32]| {
            let mut out = vec![0.0; rows.len() / k * n];
            quantized_gemm(
                Isa::fastest(),
                &[QuantGroup { rows, weights: &weights, bias: None, out_offset: 0 }],
                &mut out,
            );
            out
        };
        let all = run(&x);
        for row in 0..m {
            assert_eq!(run(&x[row * k..][..k]), all[row * n..][..n], "{format:?} row {row}");
        }
        for threads in [1, 2, 3, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert_eq!(pool.install(|| run(&x)), all, "{format:?} {threads} threads");
        }
    }
}

/// Integers and scales that no rounding of ours gives: the ends of the ranges, scales below zero and of zero.
fn foreign(format: QuantFormat, seed: u64, [n, k]: [usize; 2]) -> IntegerMatrix {
    let mut rng = CounterRng::new(seed, 3);
    let (range, groups) = if format == QuantFormat::Int8 { (256, 1) } else { (16, format.groups(k)) };
    let mut integers: Vec<i8> = (0..n * k).map(|_| (rng.below(range) as i32 - range as i32 / 2) as i8).collect();
    integers[0] = -(range as i32 / 2) as i8;
    let mut scales: Vec<f32> = (0..n * groups).map(|_| (rng.below(513) as f32 - 256.0) / 1024.0).collect();
    scales[0] = 0.0;
    IntegerMatrix::new(format, [n, k], integers, scales.into_iter().map(crate::gemm::bf16_round).collect()).unwrap()
}

#[test]
fn stored_integers_are_packed_and_given_back_as_they_are() {
    for format in FORMATS {
        for (n, k) in [(1, 1), (33, 31), (31, 33), (40, 130), (64, 256)] {
            let matrix = foreign(format, 21, [n, k]);
            let weights = QuantizedWeights::pack(&matrix);
            assert_eq!(weights.unpack(), matrix, "{format} {n} x {k}");
            assert_eq!(weights.dequantize(), matrix.dequantize());
            let mut row = vec![0.0; k];
            weights.copy_row(n - 1, &mut row);
            assert_eq!(row, matrix.dequantize()[(n - 1) * k..]);
            let x = random(22, 5 * k);
            let groups = [QuantGroup { rows: &x, weights: &weights, bias: None, out_offset: 0 }];
            let mut want = vec![0.0; 5 * n];
            quantized_gemm_reference(&groups, &mut want);
            for isa in Isa::available() {
                let mut got = vec![f32::NAN; 5 * n];
                quantized_gemm(isa, &groups, &mut got);
                assert_eq!(got, want, "{isa} {format} {n} x {k}");
            }
        }
    }
    let rounded = IntegerMatrix::nearest(QuantFormat::INT4, &random(23, 40 * 70), [40, 70]).unwrap();
    let stored =
        IntegerMatrix::new(rounded.format(), rounded.shape(), rounded.integers().to_vec(), rounded.scales().to_vec());
    assert_eq!(stored.unwrap(), rounded, "what is rounded here can be stored");
}

/// The longest row of 8 bits at the ends of both ranges: the sum nearest to the end of 32 bits.
#[test]
fn the_longest_rows_do_not_overflow() {
    let k = 1 << 16;
    let matrix = IntegerMatrix::new(QuantFormat::Int8, [1, k], vec![-128; k], vec![1.0]).unwrap();
    let (weights, x) = (QuantizedWeights::pack(&matrix), vec![127.0; k]);
    for isa in Isa::available() {
        let mut out = [0.0];
        quantized_gemm(isa, &[QuantGroup { rows: &x, weights: &weights, bias: None, out_offset: 0 }], &mut out);
        assert_eq!(out[0], -128.0 * 127.0 * k as f32, "{isa}");
    }
    let text = IntegerMatrix::new(QuantFormat::Int8, [1, k + 1], vec![0; k + 1], vec![1.0]).unwrap_err().to_string();
    assert!(text.contains("at most 65536 inputs, got 65537"), "{text}");
}

#[test]
fn integers_that_no_product_can_read_are_refused() {
    let of = |format, integers: &[i8], scales: &[f32]| {
        IntegerMatrix::new(format, [1, integers.len()], integers.to_vec(), scales.to_vec()).unwrap_err().to_string()
    };
    assert!(of(QuantFormat::INT4, &[0, 8], &[1.0]).contains("integer [0, 1] of 4 bits is 8"));
    assert!(of(QuantFormat::INT4, &[0, 1], &[1.001]).contains("scale [0, 0] must be a finite value of bf16"));
    assert!(of(QuantFormat::Int8, &[0, 1], &[f32::NAN]).contains("must be a finite number, got NaN"));
    assert!(of(QuantFormat::Int8, &[0, 1], &[1.0, 1.0]).contains("2 integers and 1 scales, got 2 and 2"));
    assert!(of(QuantFormat::Int4 { group_size: 48 }, &[0], &[1.0]).contains("group_size"));
}

#[test]
fn bad_arguments_are_refused() {
    let of = |format, weights: &[f32], shape| QuantizedWeights::new(format, weights, shape).unwrap_err().to_string();
    assert!(of(QuantFormat::Int8, &[1.0; 5], [2, 3]).contains("2 x 3"));
    assert!(of(QuantFormat::Int8, &[1.0, f32::NAN], [1, 2]).contains("weights[0, 1]"));
    for group_size in [0, 33, 32768] {
        assert!(of(QuantFormat::Int4 { group_size }, &[1.0; 2], [1, 2]).contains("group_size"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_groups_agree_on_every_isa(
        rows in prop::collection::vec(0usize..20, 1..5), n in 1usize..100, k in 1usize..200, seed in 0u64..1000, kind in 0usize..4,
    ) {
        let weights = QuantizedWeights::new(FORMATS[kind], &random(seed, n * k), [n, k]).unwrap();
        let total: usize = rows.iter().sum();
        let x = random(seed + 1, total * k);
        let mut first = 0;
        let groups: Vec<QuantGroup<'_>> = rows.iter().map(|m| {
            let at = first;
            first += m;
            QuantGroup { rows: &x[at * k..first * k], weights: &weights, bias: None, out_offset: at * n }
        }).collect();
        let mut want = vec![0.0; total * n];
        quantized_gemm_reference(&groups, &mut want);
        for isa in Isa::available() {
            let mut got = vec![0.0; total * n];
            quantized_gemm(isa, &groups, &mut got);
            prop_assert_eq!(&got, &want);
        }
    }
}

#[test]
fn groups_that_are_none_are_refused_before_rows_are_read() {
    let rows = |_: std::ops::Range<usize>| -> crate::Result<Vec<f32>> { panic!("no row is asked for") };
    for group_size in [0, 33] {
        let error =
            QuantizedWeights::from_rows(QuantFormat::Int4 { group_size }, [2, 64], rows).unwrap_err().to_string();
        assert!(error.contains("multiple of 32"), "{error}");
    }
}
