//! Weights of integers behind `moe-core`'s operations: the bits of the products on slices, and how far they are from floats.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use moe_core::ops::{DecoderOps, IGNORED, LossOps, MoeOps, WeightOps};
use moe_core::testing::{random, values};
use moe_core::{Activation, MlpWeights, ParamInit, ParamSpec, StoredIntegers, Weight, WeightSource, WeightUse};
use moe_kernels::quantized::{IntegerMatrix, QuantFormat, QuantGroup, QuantizedWeights, quantized_gemm_reference};
use moe_kernels::{KernelOps, PackedForms, PackedMatrices, Precision};
use std::collections::HashMap;

const FORMATS: [QuantFormat; 3] = [QuantFormat::Int8, QuantFormat::INT4, QuantFormat::Int4 { group_size: 64 }];

fn ops(format: QuantFormat) -> KernelOps {
    let mut forms = PackedForms::from(Precision::F32);
    for purpose in [WeightUse::Product, WeightUse::Table, WeightUse::Output] {
        forms = forms.with(purpose, format).unwrap();
    }
    KernelOps::packing(forms)
}

fn kept(ops: &KernelOps, tensors: &[(&str, Tensor)], dims: &[usize], purpose: WeightUse) -> moe_core::Result<Weight> {
    let mut spec = ParamSpec::new("w", &dims[dims.len() - 2..], ParamInit::Zeros);
    if dims.len() == 3 {
        spec = spec.stacked(dims[0]);
    }
    let tensors: HashMap<String, Tensor> = tensors.iter().map(|(name, t)| ((*name).to_owned(), t.clone())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    ops.weight(&WeightSource::new(&vb, &spec), purpose)
}

fn plain(ops: &KernelOps, w: &Tensor, purpose: WeightUse) -> Weight {
    let name = if w.rank() == 3 { "experts.w" } else { "w" };
    kept(ops, &[(name, w.clone())], w.dims(), purpose).unwrap()
}

fn f32s(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn quantized(format: QuantFormat, w: &Tensor) -> QuantizedWeights {
    QuantizedWeights::new(format, &f32s(w), [w.dim(0).unwrap(), w.dim(1).unwrap()]).unwrap()
}

/// `x w^T + b` in plain loops over the integers.
fn reference(x: &[f32], w: &QuantizedWeights, bias: Option<&[f32]>) -> Vec<f32> {
    let [out, inner] = w.shape();
    let mut y = vec![0.0; x.len() / inner * out];
    quantized_gemm_reference(&[QuantGroup { rows: x, weights: w, bias, out_offset: 0 }], &mut y);
    y
}

#[test]
fn linear_maps_have_the_bits_of_the_plain_loops_whatever_the_batch() {
    let (x, w, experts) = (
        random(1, &[9, 70], 1.0, DType::F32),
        random(2, &[45, 70], 0.3, DType::F32),
        random(3, &[3, 45, 70], 0.3, DType::F32),
    );
    let (b, bs) = (random(4, &[45], 1.0, DType::F32), random(5, &[3, 45], 1.0, DType::F32));
    let offsets = [0, 2, 2, 9];
    for format in FORMATS {
        let ops = ops(format);
        let (linear, stack) = (plain(&ops, &w, WeightUse::Product), plain(&ops, &experts, WeightUse::Product));
        assert_eq!(linear.form(), format.to_string());
        let want = reference(&f32s(&x), &quantized(format, &w), Some(&f32s(&b)));
        assert_eq!(f32s(&ops.linear(&x, &linear, Some(&b)).unwrap()), want, "{format}");
        for row in 0..9 {
            let alone = ops.linear(&x.narrow(0, row, 1).unwrap(), &linear, Some(&b)).unwrap();
            assert_eq!(f32s(&alone), want[row * 45..][..45], "{format} row {row}");
        }
        let grouped = f32s(&ops.grouped_linear(&x, &stack, Some(&bs), &offsets).unwrap());
        for (expert, pair) in offsets.windows(2).enumerate() {
            let weights = quantized(format, &experts.get(expert).unwrap());
            let (rows, bias) = (&f32s(&x)[pair[0] * 70..pair[1] * 70], f32s(&bs.get(expert).unwrap()));
            assert_eq!(
                grouped[pair[0] * 45..pair[1] * 45],
                reference(rows, &weights, Some(&bias)),
                "{format} {expert}"
            );
        }
    }
}

#[test]
fn the_chain_of_experts_has_the_bits_of_its_steps() {
    for activation in [Activation::GeluTanh, Activation::SwiGlu] {
        let width = 40 * activation.inputs();
        let x = random(1, &[11, 33], 1.0, DType::F32);
        let (fc_in, fc_out) = (random(2, &[3, width, 33], 0.3, DType::F32), random(3, &[3, 33, 40], 0.3, DType::F32));
        let biases = [random(4, &[3, width], 1.0, DType::F32), random(5, &[3, 33], 1.0, DType::F32)];
        for format in FORMATS {
            let ops = ops(format);
            let weights = MlpWeights {
                fc_in: plain(&ops, &fc_in, WeightUse::Product),
                fc_in_bias: Some(biases[0].clone()),
                fc_out: plain(&ops, &fc_out, WeightUse::Product),
                fc_out_bias: Some(biases[1].clone()),
            };
            let offsets = [0, 4, 4, 11];
            let got = ops.experts(&x, &weights, activation, &offsets).unwrap();
            let want = moe_core::ops::experts_stepwise(&ops, &x, &weights, activation, &offsets).unwrap();
            assert_eq!(f32s(&got), f32s(&want), "{format} {activation:?}");
        }
    }
}

/// Each factor of a term is off by no more than half a step of its scale (a weight of 4 bits by 1.04 steps: the positive end is one
/// short, and a scale rounded to bf16 up to 0.4 % small over 8 steps), so a sum of `x w` is off by no more than the sum of
/// `dx |w| + (|x| + dx) dw`; sums in f32 add little to that.
#[test]
fn products_are_as_near_to_floats_as_steps_of_the_scales_allow() {
    let (rows, out, inner) = (7, 40, 160);
    let (x, w) = (random(1, &[rows, inner], 1.0, DType::F32), random(2, &[out, inner], 0.3, DType::F32));
    for format in FORMATS {
        let ops = ops(format);
        let got = values(&ops.linear(&x, &plain(&ops, &w, WeightUse::Product), None).unwrap());
        let (weights, x, w) = (quantized(format, &w).unpack(), values(&x), values(&w));
        let (size, steps) = match format {
            QuantFormat::Int8 => (inner, 0.5),
            QuantFormat::Int4 { group_size } => (group_size, 1.04),
        };
        let groups = inner.div_ceil(size);
        let mut closest = f64::INFINITY;
        for i in 0..rows {
            let x = &x[i * inner..][..inner];
            let dx = x.iter().fold(0f64, |most, v| most.max(v.abs())) / 127.0 / 2.0;
            for j in 0..out {
                let (mut exact, mut bound) = (0.0, 0.0);
                for p in 0..inner {
                    let (x, w) = (x[p], w[j * inner + p]);
                    let dw = steps * f64::from(weights.scales()[j * groups + p / size].abs());
                    exact += x * w;
                    bound += dx * w.abs() + (x.abs() + dx) * dw;
                }
                let off = (got[i * out + j] - exact).abs();
                assert!(off <= bound * (1.0 + 1e-5), "{format} [{i}, {j}]: off by {off}, bound {bound}");
                closest = closest.min(bound / off.max(1e-12));
            }
        }
        assert!(closest < 1e3, "{format}: nothing is quantized");
    }
}

#[test]
fn gates_stay_floats_and_tables_give_the_rows_they_were_given() {
    let (x, w) = (random(1, &[6, 33], 1.0, DType::F32), random(2, &[40, 33], 1.0, DType::F32));
    let bf16 = w.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
    for format in FORMATS {
        let ops = ops(format);
        let floats = KernelOps::packing(Precision::F32);
        let gate = plain(&ops, &w, WeightUse::Gate);
        let want = f32s(&floats.gate(&x, &plain(&floats, &w, WeightUse::Gate), None).unwrap());
        assert_eq!((f32s(&ops.gate(&x, &gate, None).unwrap()), gate.form().as_str()), (want, "f32"));
        for rows in [&w, &bf16] {
            let table = plain(&ops, rows, WeightUse::Table);
            let looked_up = f32s(&ops.embedding(&table, &[39, 0, 39]).unwrap());
            let want: Vec<f32> = [39, 0, 39].iter().flat_map(|&id| f32s(&rows.get(id).unwrap())).collect();
            assert_eq!(looked_up, want, "{format}");
            let logits = f32s(&ops.linear(&x, &table, None).unwrap());
            assert_eq!(logits, reference(&f32s(&x), &quantized(format, rows), None), "{format}");
        }
        let beside = |rows| plain(&ops, rows, WeightUse::Table).bytes() - quantized(format, rows).bytes();
        assert_eq!([beside(&w), beside(&bf16)], [40 * 33 * 4, 40 * 33 * 2], "rows that are bf16 are kept as such");
    }
    let refused = PackedForms::from(Precision::F32).with(WeightUse::Gate, QuantFormat::Int8).unwrap_err();
    assert!(refused.to_string().contains("gates are f32 always, not int8"), "{refused}");
}

#[test]
fn the_loss_of_a_quantized_output_layer_is_that_of_its_logits() {
    let (x, w) = (random(1, &[150, 33], 1.0, DType::F32), random(2, &[40, 33], 1.0, DType::F32));
    let targets: Vec<u32> = (0..150).map(|i| if i % 7 == 3 { IGNORED } else { i * 11 % 40 }).collect();
    for format in FORMATS {
        let ops = ops(format);
        let head = plain(&ops, &w, WeightUse::Output);
        let logits = values(&ops.linear(&x, &head, None).unwrap());
        let (mut sum, mut counted) = (0.0, 0.0);
        for (row, &target) in targets.iter().enumerate().filter(|(_, target)| **target != IGNORED) {
            let row = &logits[row * 40..][..40];
            sum += row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target as usize];
            counted += 1.0;
        }
        let got = f64::from(ops.linear_cross_entropy(&x, &head, &targets).unwrap().to_scalar::<f32>().unwrap());
        assert!((got - sum / counted).abs() < 1e-5 * (sum / counted), "{format}: {got} want {}", sum / counted);
        assert!(ops.linear_cross_entropy(&x, &head, &[40; 150]).is_err(), "a target outside the vocabulary");
    }
}

fn stored(matrix: &IntegerMatrix) -> [Tensor; 2] {
    let [out, inner] = matrix.shape();
    let bytes: Vec<u8> = matrix.integers().iter().map(|&q| (q as u8).wrapping_add(StoredIntegers::ZERO)).collect();
    let groups = matrix.scales().len() / out;
    [
        Tensor::from_vec(bytes, (out, inner), &Device::Cpu).unwrap(),
        Tensor::from_vec(matrix.scales().to_vec(), (out, groups), &Device::Cpu).unwrap(),
    ]
}

/// Integers that a source holds are kept as they are, for every use but gates.
#[test]
fn stored_integers_are_kept_as_they_are() {
    for format in FORMATS {
        let ops = KernelOps::packing(PackedForms::from(Precision::F32).with_stored(format));
        let matrices: Vec<IntegerMatrix> =
            (0..2).map(|e| quantized(format, &random(e, &[40, 70], 1.0, DType::F32)).unpack()).collect();
        let [q0, s0] = stored(&matrices[0]);
        let [q1, s1] = stored(&matrices[1]);
        let tensors = [
            ("w_integers", q0.clone()),
            ("w_scales", s0.clone()),
            ("experts.0.w_integers", q0),
            ("experts.0.w_scales", s0),
            ("experts.1.w_integers", q1),
            ("experts.1.w_scales", s1),
        ];
        for purpose in [WeightUse::Product, WeightUse::Output, WeightUse::Table] {
            let weight = kept(&ops, &tensors, &[40, 70], purpose).unwrap();
            assert_eq!(weight.bytes(), QuantizedWeights::pack(&matrices[0]).bytes());
            let packed = PackedMatrices::of(&weight).unwrap().unwrap().matrices();
            let moe_kernels::PackedStack::Quantized(_, all) = &*packed else {
                panic!("{purpose:?} is not of integers")
            };
            assert_eq!(all[0].unpack(), matrices[0], "{format} {purpose:?}");
        }
        let table = kept(&ops, &tensors, &[40, 70], WeightUse::Table).unwrap();
        assert_eq!(f32s(&ops.embedding(&table, &[39]).unwrap()), matrices[0].dequantize()[39 * 70..]);
        let stack = kept(&ops, &tensors, &[2, 40, 70], WeightUse::Product).unwrap();
        let packed = PackedMatrices::of(&stack).unwrap().unwrap().matrices();
        let moe_kernels::PackedStack::Quantized(_, all) = &*packed else { panic!("not of integers") };
        assert_eq!(all.iter().map(QuantizedWeights::unpack).collect::<Vec<_>>(), matrices);
        // A gate asks for floats, which are not there; half a stack and another shape are refused.
        assert!(kept(&ops, &tensors, &[40, 70], WeightUse::Gate).is_err());
        let half = kept(&ops, &tensors[..4], &[2, 40, 70], WeightUse::Product).unwrap_err().to_string();
        assert!(half.contains("matrix 1 of experts.w is not there as integers"), "{half}");
        let other = kept(&ops, &tensors, &[40, 71], WeightUse::Product).unwrap_err().to_string();
        assert!(other.contains("w has [40, 70] integers, but a layer asks for [40, 71]"), "{other}");
    }
}

#[test]
fn a_quantized_weight_that_is_rewritten_gives_the_new_results() {
    let (old, new) = (random(1, &[2, 40, 33], 1.0, DType::F32), random(2, &[2, 40, 33], 1.0, DType::F32));
    let (ops, x) = (ops(QuantFormat::INT4), random(3, &[5, 33], 1.0, DType::F32));
    let weight = plain(&ops, &old, WeightUse::Product);
    let packed = PackedMatrices::of(&weight).unwrap().unwrap();
    for expert in 0..2 {
        packed.rewrite(expert, moe_kernels::select::current(), &f32s(&new.get(expert).unwrap())).unwrap();
    }
    let run = |weight: &Weight| f32s(&ops.grouped_linear(&x, weight, None, &[0, 1, 5]).unwrap());
    assert_eq!(run(&weight), run(&plain(&ops, &new, WeightUse::Product)));
    assert!(packed.rewrite(0, moe_kernels::select::current(), &[f32::NAN; 40 * 33]).is_err());
}
