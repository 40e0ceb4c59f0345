//! The loss and its gradients against ordinary candle operations in f64, which central differences check in `moe-core`.

use super::*;
use crate::cross_entropy::linear_cross_entropy;
use crate::output_loss::on_parts::on_parts;
use crate::packed::PackedMatrices;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use moe_core::ops::{CandleOps, LossOps, VocabularyPart};
use moe_core::testing::{assert_close, random, random_var, values};
use moe_core::{ParamInit, ParamSpec, Weight, WeightSource, WeightUse};
use std::collections::HashMap;
use std::sync::Arc;

/// A student and a teacher of other widths, over one vocabulary.
struct Case {
    tokens: usize,
    vocab: usize,
    widths: [usize; 2],
}

const CASES: [Case; 4] = [
    Case { tokens: 1, vocab: 2, widths: [1, 3] },
    Case { tokens: 5, vocab: 40, widths: [8, 5] },
    Case { tokens: 400, vocab: 130, widths: [17, 20] },
    Case { tokens: 0, vocab: 11, widths: [4, 4] },
];

impl Case {
    fn targets(&self) -> Vec<u32> {
        (0..self.tokens).map(|t| if t % 7 == 3 { IGNORED } else { (t * 31 % self.vocab) as u32 }).collect()
    }

    fn student(&self) -> [Var; 2] {
        let of = |seed, rows| random_var(seed, &[rows, self.widths[0]], 1.0, DType::F32);
        [of(1, self.tokens), of(2, self.vocab)]
    }

    fn teacher(&self) -> [Tensor; 2] {
        let of = |seed, rows| random(seed, &[rows, self.widths[1]], 1.0, DType::F32);
        [of(3, self.tokens), of(4, self.vocab)]
    }

    /// The likeliest `k` entries of every token, at a temperature.
    fn top(&self, k: usize, temperature: f64) -> (Vec<u32>, Vec<f32>) {
        let [hidden, weight] = self.teacher();
        let logits = values(&hidden.matmul(&weight.t().unwrap()).unwrap());
        let (mut ids, mut probs) = (Vec::new(), Vec::new());
        for row in logits.chunks(self.vocab) {
            let sum: f64 = row.iter().map(|z| (z / temperature).exp()).sum();
            let mut order: Vec<usize> = (0..self.vocab).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            for &entry in &order[..k] {
                ids.push(entry as u32);
                probs.push(((row[entry] / temperature).exp() / sum) as f32);
            }
        }
        (ids, probs)
    }
}

const HOW: [Distillation; 3] = [
    Distillation { weight: 1.0, temperature: 1.0 },
    Distillation { weight: 0.3, temperature: 2.5 },
    Distillation { weight: 0.0, temperature: 1.0 },
];

/// Runs `check` with every kind of soft targets, and their values as the reference reads them.
fn with_soft(case: &Case, how: Distillation, check: impl Fn(&str, SoftTargets<'_>, SoftTargets<'_>)) {
    let [hidden, weight] = case.teacher();
    let wide = [&hidden, &weight].map(|t| t.to_dtype(DType::F64).unwrap());
    let (plain, wide_weight): (Weight, Weight) = (weight.clone().into(), wide[1].clone().into());
    let layer = |hidden, weight| SoftTargets::Layer { hidden, weight };
    check("layer", layer(&hidden, &plain), layer(&wide[0], &wide_weight));
    for k in [1, case.vocab.min(9), case.vocab] {
        let (ids, probs) = case.top(k, how.temperature);
        let soft = SoftTargets::TopK { k, ids: &ids, probs: &probs };
        check(&format!("top {k}"), soft, soft);
    }
}

fn gradients(loss: Tensor, vars: &[Var; 2]) -> [Option<Tensor>; 2] {
    // A gradient that reaches the loss scaled.
    let grads = (loss * 3.0).unwrap().backward().unwrap();
    vars.each_ref().map(|var| grads.get(var).cloned())
}

#[test]
fn values_and_gradients_equal_the_reference() {
    for case in &CASES {
        for how in HOW {
            with_soft(case, how, |name, soft, wide_soft| {
                for (precision, tolerance) in [(Precision::F32, 2e-5), (Precision::Bf16, 4e-2)] {
                    let vars = case.student();
                    let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
                    let (targets, label) = (case.targets(), format!("{name} {} {how:?} {precision:?}", case.tokens));
                    let (weight, wide_weight) =
                        (vars[1].as_tensor().clone().into(), wide[1].as_tensor().clone().into());
                    let student = |hidden, weight| StudentOutput { hidden, weight, targets: &targets, part: None };
                    let got = linear_distillation(student(&vars[0], &weight), soft, how, precision).unwrap();
                    let want = CandleOps.linear_distillation(student(&wide[0], &wide_weight), wide_soft, how).unwrap();
                    assert_close(&got.loss, &want.loss, tolerance, &label);
                    for (got, want) in [(got.cross_entropy, want.cross_entropy), (got.kd, want.kd)] {
                        assert!((got - want).abs() <= tolerance * (1.0 + want.abs()), "{label}: {got} {want}");
                    }
                    // The cross-entropy is that of the loss without a teacher to the last bit.
                    let alone =
                        linear_cross_entropy(&vars[0].detach(), &vars[1].detach(), &targets, precision).unwrap();
                    assert_eq!(alone.to_scalar::<f32>().unwrap(), got.cross_entropy as f32, "{label}");
                    let (got, want) = (gradients(got.loss, &vars), gradients(want.loss, &wide));
                    for (got, want) in got.iter().zip(&want) {
                        let Some(want) = want else {
                            assert_eq!(case.tokens, 0, "{label}: candle leaves out sums of nothing");
                            continue;
                        };
                        assert_close(got.as_ref().unwrap(), want, tolerance, &label);
                    }
                }
            });
        }
    }
}

/// On every instruction set, with every temperature: the same within rounding.
#[test]
fn instruction_sets_agree() {
    let case = &CASES[2];
    let how = Distillation { weight: 0.7, temperature: 1.5 };
    let ([hidden, weight], targets) = (case.teacher(), case.targets());
    let vars = case.student();
    let student_weight = vars[1].as_tensor().clone().into();
    let student = StudentOutput { hidden: &vars[0], weight: &student_weight, targets: &targets, part: None };
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let values = [&vars[0], &vars[1]].map(|v| flat(v.as_tensor()));
    let of_teacher = [&hidden, &weight].map(flat);
    let run = |isa: Isa| {
        let pack = |weight: &[f32], width: usize, both| {
            packed_both_ways(isa, Precision::F32, weight, [case.vocab, width], both)
        };
        let (forward, backward) = pack(&values[1], case.widths[0], true);
        let (teacher, _) = pack(&of_teacher[1], case.widths[1], false);
        let teacher = Teacher::Layer { hidden: &of_teacher[0], weight: &teacher };
        let loss = LinearDistillation { student, teacher, how, isa, wants_gradients: true };
        let (precision, backward) = (Precision::F32, backward.as_ref());
        loss.run(OutputLayer { isa, precision, hidden: &values[0], forward: &forward, backward }).unwrap()
    };
    let (want, grads) = run(Isa::Portable);
    for isa in Isa::available() {
        let (got, own) = run(isa);
        got.iter().zip(want).for_each(|(got, want)| assert!((got - want).abs() < 1e-5, "{isa}: {got} {want}"));
        for (got, want) in own.unwrap().iter().flatten().zip(grads.as_ref().unwrap().iter().flatten()) {
            assert!((got - want).abs() < 1e-5, "{isa}: {got} {want}");
        }
    }
}

/// Unequal parts, one without entries, several blocks of tokens: the loss of the whole vocabulary on each, and gradients that are
/// those of its entries or add up to those of the hidden states.
#[test]
fn parts_of_a_vocabulary_make_the_whole() {
    let cases: [(Case, &[usize]); 3] = [
        (Case { tokens: 7, vocab: 20, widths: [5, 3] }, &[13, 7]),
        (Case { tokens: 40, vocab: 48, widths: [8, 8] }, &[1, 30, 0, 17]),
        (Case { tokens: 801, vocab: 130, widths: [17, 9] }, &[60, 35, 35]),
    ];
    for (case, sizes) in &cases {
        for how in HOW {
            with_soft(case, how, |name, soft, _| {
                let (targets, label) = (case.targets(), format!("{name} {} {how:?}", case.tokens));
                let run = |part: Option<&VocabularyPart>| {
                    let rows = part.map_or(0..case.vocab, |part| part.held.clone());
                    let narrow = |t: &Tensor| t.narrow(0, rows.start, rows.len()).unwrap().contiguous().unwrap();
                    let [hidden, weight] = case.student();
                    let weight = Var::from_tensor(&narrow(&weight)).unwrap();
                    let as_weight = weight.as_tensor().clone().into();
                    let of_teacher;
                    let soft = match soft {
                        SoftTargets::Layer { hidden, weight } => {
                            of_teacher = Weight::from(narrow(weight.tensor().unwrap()));
                            SoftTargets::Layer { hidden, weight: &of_teacher }
                        }
                        named @ SoftTargets::TopK { .. } => named,
                    };
                    let student = StudentOutput { hidden: &hidden, weight: &as_weight, targets: &targets, part };
                    let got = linear_distillation(student, soft, how, Precision::F32).unwrap();
                    let parts = [got.cross_entropy, got.kd];
                    let [d_hidden, d_weight] = gradients(got.loss, &[hidden, weight]).map(Option::unwrap);
                    (parts, d_hidden, d_weight)
                };
                let (losses, d_hidden, d_weight) = run(None);
                let all = on_parts(sizes, |part| run(Some(&part)));
                for (parts, ..) in &all {
                    parts
                        .iter()
                        .zip(losses)
                        .for_each(|(got, want)| assert!((got - want).abs() < 1e-5, "{label}: {got} {want}"));
                }
                let mut sum = all[0].1.clone();
                all[1..].iter().for_each(|(_, own, _)| sum = (&sum + own).unwrap());
                assert_close(&sum, &d_hidden, 1e-5, &label);
                let rows: Vec<&Tensor> = all.iter().map(|(.., own)| own).collect();
                assert_close(&Tensor::cat(&rows, 0).unwrap(), &d_weight, 1e-5, &label);
            });
        }
    }
}

/// A teacher that is packed is followed to the same bits; NaN logits of either reach the loss.
#[test]
fn packed_teachers_and_bad_logits() {
    let case = &CASES[1];
    let [hidden, weight] = case.teacher();
    let targets = case.targets();
    let vars = case.student();
    let own = vars[1].as_tensor().clone().into();
    let run = |x: &Tensor, weight: &Weight| {
        let student = StudentOutput { hidden: x, weight: &own, targets: &targets, part: None };
        let soft = SoftTargets::Layer { hidden: &hidden, weight };
        linear_distillation(student, soft, HOW[0], Precision::Bf16).unwrap()
    };
    let spec = ParamSpec::new("w", weight.dims(), ParamInit::Zeros);
    let vb = VarBuilder::from_tensors(HashMap::from([("w".into(), weight.clone())]), DType::F32, &Device::Cpu);
    let source = WeightSource::new(&vb, &spec);
    let packed = PackedMatrices::fetch(&source, WeightUse::Output, select::current(), &Precision::Bf16.into()).unwrap();
    let packed = Weight::Packed(Arc::new(packed));
    let plain = weight.clone().into();
    assert_eq!(run(&vars[0], &plain).kd.to_bits(), run(&vars[0], &packed).kd.to_bits());
    let bad = |t: &Tensor| (t * f64::NAN).unwrap();
    assert!(run(&bad(&vars[0]), &plain).kd.is_nan());
    assert!(run(&vars[0], &bad(&weight).into()).kd.is_nan());
}
