//! Integers against PyTorch's, errors against those of the nearest, and moments against sums in f64.

use super::*;
use candle_core::{Device, Tensor};
use moe_core::CounterRng;
use moe_core::ops::ProductObserver;
use moe_core::ops::host::to_f32_vec;
use moe_kernels::quantized::{IntegerMatrix, QuantFormat};
use std::collections::HashMap;
use std::path::Path;

const FORMATS: [QuantFormat; 3] = [QuantFormat::Int8, QuantFormat::INT4, QuantFormat::Int4 { group_size: 64 }];

fn moments(rows: &[f32], width: usize) -> SecondMoments {
    let mut moments = SecondMoments::new(width);
    moments.add(rows).unwrap();
    moments
}

fn normal(seed: u64, count: usize, scale: f64) -> Vec<f32> {
    let mut rng = CounterRng::new(seed, 31);
    (0..count).map(|_| (rng.normal_f64() * scale) as f32).collect()
}

/// Inputs `[tokens, width]` of few directions, and some noise.
fn correlated(seed: u64, tokens: usize, width: usize) -> Vec<f32> {
    let directions = width / 3 + 1;
    let (along, basis) = (normal(seed, tokens * directions, 1.0), normal(seed + 1000, directions * width, 1.0));
    let mut rows = normal(seed + 2000, tokens * width, 0.3);
    for (row, along) in rows.chunks_mut(width).zip(along.chunks(directions)) {
        for (by, direction) in along.iter().zip(basis.chunks(width)) {
            row.iter_mut().zip(direction).for_each(|(x, d)| *x += by * d);
        }
    }
    rows
}

/// What quantizing changes in the outputs, squared and summed over the inputs of `moments`.
fn output_error(weights: &[f32], got: &IntegerMatrix, moments: &SecondMoments) -> f64 {
    let width = moments.width();
    let errors: Vec<f64> = weights.iter().zip(got.dequantize()).map(|(&w, q)| f64::from(w) - f64::from(q)).collect();
    let of_row = |e: &[f64]| -> f64 {
        let rows = moments.sums().chunks(width).zip(e);
        rows.map(|(row, ei)| ei * row.iter().zip(e).map(|(&h, ej)| f64::from(h) * ej).sum::<f64>()).sum()
    };
    errors.chunks(width).map(of_row).sum()
}

/// `fixtures/gptq/make.py` has the algorithm as the paper writes it, with the inverse of the moments.
#[test]
fn integers_and_scales_are_those_of_pytorch() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gptq/gptq.safetensors");
    let tensors: HashMap<String, Tensor> = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let values = |name: &str| to_f32_vec(&tensors[name]).unwrap();
    let (out, width) = tensors["weights"].dims2().unwrap();
    let factor = Factor::new(&moments(&values("inputs"), width)).unwrap();
    for (format, name) in FORMATS.into_iter().zip(["int8", "int4.32", "int4.64"]) {
        let weights = values("weights");
        let got = quantize(format, &weights, [out, width], &factor).unwrap();
        assert_eq!(got.scales(), values(&format!("{name}.scales")), "{format}");
        let want: Vec<i8> = values(&format!("{name}.integers")).iter().map(|&q| q as i8).collect();
        assert_eq!(got.integers(), want, "{format}");
        let nearest = IntegerMatrix::nearest(format, &weights, [out, width]).unwrap();
        let moved = got.integers().iter().zip(nearest.integers()).filter(|(a, b)| a != b).count();
        assert!(moved * 5 > out * width, "{format}: the case must not be that of the nearest integers");
    }
}

#[test]
fn the_factor_is_one_of_the_damped_moments() {
    for width in [1, 2, 33, 70] {
        // Fewer tokens than inputs, too: the damping makes up for it.
        for tokens in [5, 200] {
            let moments = moments(&correlated(7, tokens, width), width);
            let factor = Factor::new(&moments).unwrap();
            let mean = (0..width).map(|i| f64::from(moments.sums()[i * width + i])).sum::<f64>() / width as f64;
            for i in 0..width {
                for j in 0..width {
                    let product: f64 = (i.max(j)..width).map(|m| factor.at(i, m) * factor.at(j, m)).sum();
                    let damping = if i == j { gptq::DAMPING * mean } else { 0.0 };
                    let want = f64::from(moments.sums()[i * width + j]) + damping;
                    assert!((product - want).abs() < 1e-6 * mean, "{width}, {tokens}: [{i}, {j}] {product} {want}");
                }
            }
        }
    }
}

/// On the inputs it was made for no matrix changes its outputs more than the nearest integers do, and on others of their kind it
/// changes them less.
#[test]
fn outputs_change_less_than_with_the_nearest_integers() {
    let (out, width) = (12, 96);
    for format in FORMATS {
        let (mut of_text, mut of_others) = (0.0, 0.0);
        for seed in 0..20 {
            let weights = normal(seed + 500, out * width, 0.1);
            let rows = correlated(seed, 600, width);
            let [text, others] = [&rows[..400 * width], &rows[400 * width..]].map(|rows| moments(rows, width));
            let got = quantize(format, &weights, [out, width], &Factor::new(&text).unwrap()).unwrap();
            let nearest = IntegerMatrix::nearest(format, &weights, [out, width]).unwrap();
            let share = |moments| output_error(&weights, &got, moments) / output_error(&weights, &nearest, moments);
            assert!(share(&text) < 1.0, "{format}, seed {seed}: {}", share(&text));
            (of_text, of_others) = (of_text + share(&text) / 20.0, of_others + share(&others) / 20.0);
        }
        println!("{format}: error {of_text:.3} of the nearest's on the text, {of_others:.3} on others of its kind");
        assert!(of_text < 0.6 && of_others < 0.7, "{format}: {of_text} {of_others}");
    }
}

#[test]
fn inputs_that_have_nothing_in_common_give_the_nearest_integers() {
    let (out, width) = (9, 70);
    let weights = normal(3, out * width, 0.5);
    let mut alone = vec![0.0; width * width];
    (0..width).for_each(|i| alone[i * width + i] = 0.5 + i as f32);
    for rows in [alone, vec![0.0; 3 * width]] {
        let factor = Factor::new(&moments(&rows, width)).unwrap();
        for format in FORMATS {
            let got = quantize(format, &weights, [out, width], &factor).unwrap();
            assert_eq!(got, IntegerMatrix::nearest(format, &weights, [out, width]).unwrap(), "{format}");
        }
    }
}

#[test]
fn the_size_of_inputs_and_of_tasks_changes_nothing() {
    let (out, width) = (19, 40);
    let (weights, rows) = (normal(1, out * width, 0.2), correlated(2, 90, width));
    let scaled: Vec<f32> = rows.iter().map(|x| x * 4096.0).collect();
    for format in FORMATS {
        let run = |rows: &[f32], out: usize| {
            let factor = Factor::new(&moments(rows, width)).unwrap();
            quantize(format, &weights[..out * width], [out, width], &factor).unwrap()
        };
        let whole = run(&rows, out);
        assert_eq!(run(&scaled, out), whole, "{format}");
        // A row depends on itself alone.
        assert_eq!(run(&rows, 1).integers(), &whole.integers()[..width], "{format}");
    }
}

#[test]
fn zeros_stay_zeros_and_scales_are_finite() {
    let (out, width) = (3, 64);
    let rows = correlated(4, 80, width);
    let factor = Factor::new(&moments(&rows, width)).unwrap();
    let mut weights = normal(5, out * width, 0.3);
    weights[..width].fill(0.0);
    weights[width..width + 32].fill(f32::MIN_POSITIVE / 8.0);
    for format in FORMATS {
        let got = quantize(format, &weights, [out, width], &factor).unwrap();
        assert!(got.integers()[..width].iter().all(|&q| q == 0), "{format}");
        assert!(got.scales().iter().all(|scale| scale.is_finite()), "{format}");
    }
}

#[test]
fn moments_are_sums_over_all_rows() {
    let width = 37;
    let rows = correlated(9, 301, width);
    let mut in_parts = SecondMoments::new(width);
    rows.chunks(width * 50).for_each(|part| in_parts.add(part).unwrap());
    assert_eq!((in_parts.tokens(), in_parts.width(), in_parts.bytes()), (301, width, width * width * 4));
    for i in 0..width {
        for j in 0..width {
            let want: f64 = rows.chunks(width).map(|x| f64::from(x[i]) * f64::from(x[j])).sum();
            let got = f64::from(in_parts.sums()[i * width + j]);
            assert!((got - want).abs() < 1e-5 * (301.0 + want.abs()), "[{i}, {j}]: {got} {want}");
        }
    }
}

/// Matrices with the same inputs share their moments, which are added once.
#[test]
fn inputs_are_added_once_for_all_who_read_them() {
    let inputs = LayerInputs::default();
    let tensor = |seed| Tensor::from_vec(normal(seed, 24, 1.0), (2, 3, 4), &Device::Cpu).unwrap();
    for seed in [1, 2] {
        let x = tensor(seed);
        ["q", "k", "v"].iter().for_each(|name| inputs.observe(name, &x).unwrap());
        inputs.observe("o", &tensor(seed + 10)).unwrap();
    }
    let all = inputs.take();
    let [q, k, v, o] = ["q", "k", "v", "o"].map(|name| all.inputs_of(name).unwrap());
    assert!(q == k && k == v && q != o);
    let want = moments(&[normal(1, 24, 1.0), normal(2, 24, 1.0)].concat(), 4);
    assert_eq!(all.moments(q).tokens(), 12);
    for (got, want) in all.moments(q).sums().iter().zip(want.sums()) {
        assert!((got - want).abs() < 1e-4, "{got} {want}");
    }
    assert_eq!((all.bytes(), all.inputs_of("gate")), (2 * 16 * 4, None));
    assert_eq!(inputs.take().bytes(), 0, "a layer's moments are taken once");
}

#[test]
fn what_does_not_fit_is_refused() {
    let text = |error: crate::Error| error.to_string();
    let mut four = SecondMoments::new(4);
    assert!(text(four.add(&[1.0; 7]).unwrap_err()).contains("7 inputs are not a whole number of rows of width 4"));
    four.add(&normal(1, 40, 1.0)).unwrap();
    let factor = Factor::new(&four).unwrap();
    let refused = text(quantize(QuantFormat::Int8, &[1.0; 10], [2, 5], &factor).unwrap_err());
    assert!(refused.contains("a matrix of 5 inputs has moments of 4"), "{refused}");
    let refused = text(quantize(QuantFormat::Int8, &[1.0, f32::NAN, 0.0, 0.0], [1, 4], &factor).unwrap_err());
    assert!(refused.contains("weights[0, 1] is NaN"), "{refused}");
    let none = QuantFormat::Int4 { group_size: 0 };
    assert!(text(quantize(none, &[1.0; 4], [1, 4], &factor).unwrap_err()).contains("multiple of 32"));
    for format in FORMATS {
        assert_eq!(quantize(format, &[], [0, 4], &factor).unwrap().shape(), [0, 4]);
        let none = Factor::new(&SecondMoments::new(0)).unwrap();
        assert_eq!(quantize(format, &[], [2, 0], &none).unwrap().shape(), [2, 0]);
    }
    for bad in [f32::NAN, 1e30] {
        let refused = text(Factor::new(&moments(&[1.0, bad, 1.0, 1.0], 4)).unwrap_err());
        assert!(refused.contains("not finite"), "{refused}");
    }
}
