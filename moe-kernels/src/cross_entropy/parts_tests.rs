//! The loss over parts of a vocabulary, each on a thread of its own, against the whole one and against ordinary candle operations
//! in f64.

use super::*;
use crate::gemm::Operand;
use crate::output_loss::on_parts::on_parts;
use candle_core::{DType, Device, Var};
use moe_core::ops::{CandleOps, LossOps, VocabularyParts};
use moe_core::testing::{assert_close, random, values};
use std::ops::Range;
use std::sync::Arc;

struct Case {
    tokens: usize,
    width: usize,
    parts: &'static [usize],
}

/// Unequal parts, one without entries, one entry each, several blocks of tokens, none at all.
const CASES: [Case; 6] = [
    Case { tokens: 7, width: 5, parts: &[20] },
    Case { tokens: 7, width: 5, parts: &[13, 7] },
    Case { tokens: 40, width: 8, parts: &[1, 30, 0, 17] },
    Case { tokens: 1, width: 3, parts: &[1, 1, 1] },
    Case { tokens: 801, width: 17, parts: &[60, 35, 35] },
    Case { tokens: 0, width: 4, parts: &[6, 5] },
];

impl Case {
    fn vocab(&self) -> usize {
        self.parts.iter().sum()
    }

    /// Some ignored, among them a whole part's.
    fn targets(&self) -> Vec<u32> {
        (0..self.tokens).map(|t| if t % 7 == 3 { IGNORED } else { (t * 31 % self.vocab()) as u32 }).collect()
    }

    /// The last rows of the weight are zeros, as vocabularies are padded with.
    fn inputs(&self) -> [Tensor; 2] {
        let (vocab, width) = (self.vocab(), self.width);
        let mut weight: Vec<f32> = flat(&random(2, &[vocab, width], 1.0, DType::F32));
        weight[(vocab - vocab / 6) * width..].fill(0.0);
        [
            random(1, &[self.tokens, width], 1.0, DType::F32),
            Tensor::from_vec(weight, (vocab, width), &Device::Cpu).unwrap(),
        ]
    }

    fn name(&self) -> String {
        format!("{} tokens over {:?}", self.tokens, self.parts)
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Loss, gradient of hidden and of the weight of one part, or of a whole vocabulary without `part`.
fn run(case: &Case, isa: Isa, precision: Precision, part: Option<&VocabularyPart>) -> (f32, [Vec<f32>; 2]) {
    let (targets, [hidden, weight]) = (case.targets(), case.inputs());
    let held = part.map_or(0..case.vocab(), |part| part.held.clone());
    let weight = flat(&weight)[held.start * case.width..held.end * case.width].to_vec();
    let op = LinearCrossEntropy { isa, wants_gradients: true, ..LinearCrossEntropy::new(&targets, precision, part) };
    let (forward, backward) =
        packed_both_ways(op.isa, op.precision, &weight, [held.len(), case.width], op.wants_gradients);
    let (loss, gradients) = op.loss(&flat(&hidden), &forward, backward.as_ref()).unwrap();
    (loss, gradients.unwrap())
}

/// The reference, whole and in f64.
fn reference(case: &Case) -> (f64, [Vec<f64>; 2]) {
    let [hidden, weight] = case.inputs().map(|tensor| Var::from_tensor(&tensor.to_dtype(DType::F64).unwrap()).unwrap());
    let loss = CandleOps.linear_cross_entropy(&hidden, &weight.as_tensor().clone().into(), &case.targets()).unwrap();
    let grads = loss.backward().unwrap();
    let of = |var: &Var| grads.get(var).map_or_else(|| vec![0.0; var.elem_count()], values);
    (loss.to_scalar().unwrap(), [of(&hidden), of(&weight)])
}

#[track_caller]
fn near(got: &[f32], want: &[f64], tolerance: f64, label: &str) {
    let tensor = |values: Vec<f64>| Tensor::new(values, &Device::Cpu).unwrap();
    let got: Vec<f64> = got.iter().copied().map(f64::from).collect();
    assert_close(&tensor(got), &tensor(want.to_vec()), tolerance, label);
}

#[test]
fn parts_give_the_loss_and_the_gradients_of_the_whole_on_every_set() {
    for case in &CASES {
        let (want, [want_hidden, want_weight]) = reference(case);
        for (precision, tolerance) in [(Precision::F32, 1e-5), (Precision::Bf16, 2e-2)] {
            let mut first: Option<Vec<(f32, [Vec<f32>; 2])>> = None;
            for isa in Isa::available() {
                let label = format!("{} {precision:?} {isa}", case.name());
                let got = on_parts(case.parts, |part| run(case, isa, precision, Some(&part)));
                let losses: Vec<u32> = got.iter().map(|(loss, _)| loss.to_bits()).collect();
                assert!(losses.iter().all(|&loss| loss == losses[0]), "{label}: one loss on all parts, {losses:?}");
                near(&[got[0].0], &[want], tolerance, &label);
                // Hidden's gradient is summed over the parts; each has its rows of the weight's.
                let mut hidden = vec![0.0; want_hidden.len()];
                got.iter().for_each(|(_, [part, _])| hidden.iter_mut().zip(part).for_each(|(sum, d)| *sum += d));
                let weight: Vec<f32> = got.iter().flat_map(|(_, [_, part])| part.clone()).collect();
                if case.tokens > 0 {
                    near(&hidden, &want_hidden, tolerance, &label);
                    near(&weight, &want_weight, tolerance, &label);
                }
                assert_eq!((hidden.len(), weight.len()), (want_hidden.len(), want_weight.len()), "{label}");
                if let [only] = got.as_slice() {
                    assert_eq!(*only, run(case, isa, precision, None), "{label}: one part has the bits of the whole");
                }
                if isa.has_common_bits(precision) {
                    assert_eq!(*first.get_or_insert_with(|| got.clone()), got, "{label}: the bits of every set");
                }
            }
        }
    }
}

/// The reference over parts is the reference over the whole, and so are operations with their graph, on the tape and off it.
#[test]
fn operations_over_parts_equal_the_reference() {
    let hidden_and_weight = |case: &Case, held: &Range<usize>, dtype: DType| {
        let [hidden, weight] = case.inputs().map(|tensor| tensor.to_dtype(dtype).unwrap());
        let weight = weight.narrow(0, held.start, held.len()).unwrap().contiguous().unwrap();
        [hidden, weight].map(|tensor| Var::from_tensor(&tensor).unwrap())
    };
    for case in CASES.iter().filter(|case| case.tokens > 0 && !case.parts.contains(&0)) {
        let (want, [want_hidden, want_weight]) = reference(case);
        let got = on_parts(case.parts, |part| {
            let mut all = Vec::new();
            for dtype in [DType::F64, DType::F32] {
                let [hidden, weight] = hidden_and_weight(case, &part.held, dtype);
                let of = weight.as_tensor().clone().into();
                let ops: &dyn LossOps = if dtype == DType::F64 { &CandleOps } else { &crate::KernelOps::default() };
                let loss = ops.linear_cross_entropy_part(&hidden, &of, &case.targets(), &part).unwrap();
                let grads = (&loss * 3.0).unwrap().backward().unwrap();
                let of = |var: &Var| values(&(grads.get(var).unwrap() / 3.0).unwrap());
                all.push((values(&loss)[0], [of(&hidden), of(&weight)]));
            }
            let [hidden, weight] = hidden_and_weight(case, &part.held, DType::F32);
            let params = [("hidden", &hidden), ("weight", &weight)];
            let mut buffers = tape::GradBuffers::new(params).unwrap();
            let (loss, tape) = tape::Tape::record(|| {
                linear_cross_entropy_part(&hidden, &weight, &case.targets(), &part, Precision::F32).unwrap()
            });
            buffers.begin();
            tape.backward_of(&loss, &mut buffers.gradients()).unwrap();
            buffers.finish();
            let of = |index| buffers.of(index).iter().copied().map(f64::from).collect();
            all.push((values(&loss)[0], [of(0), of(1)]));
            all
        });
        for (way, tolerance) in [(0, 1e-12), (1, 1e-5), (2, 1e-5)] {
            let label = format!("{} way {way}", case.name());
            let tensor = |values: Vec<f64>| Tensor::new(values, &Device::Cpu).unwrap();
            let close =
                |got: Vec<f64>, want: &[f64]| assert_close(&tensor(got), &tensor(want.to_vec()), tolerance, &label);
            close(vec![got[0][way].0], &[want]);
            assert!(got.iter().all(|part| part[way].0.to_bits() == got[0][way].0.to_bits()), "{label}: one loss");
            let mut hidden = vec![0.0; want_hidden.len()];
            got.iter().for_each(|part| hidden.iter_mut().zip(&part[way].1[0]).for_each(|(sum, d)| *sum += d));
            close(hidden, &want_hidden);
            close(got.iter().flat_map(|part| part[way].1[1].clone()).collect(), &want_weight);
        }
    }
}

#[test]
fn what_does_not_fit_and_what_fails_between_parts_is_an_error() {
    #[derive(Debug)]
    struct Deaf(bool);
    impl VocabularyParts for Deaf {
        fn gather(&self, own: &[PartStatistics]) -> moe_core::Result<Vec<Vec<PartStatistics>>> {
            if self.0 {
                Ok(vec![own.to_vec(), own[1..].to_vec()])
            } else {
                Err(moe_core::Error::Input("nobody".into()))
            }
        }
    }
    let (x, w) = (random(1, &[4, 3], 1.0, DType::F32), random(2, &[5, 3], 1.0, DType::F32));
    let refused = |held: Range<usize>, target: u32, garbled: bool| {
        let part = VocabularyPart { held, size: 9, parts: Arc::new(Deaf(garbled)) };
        linear_cross_entropy_part(&x, &w, &[target; 4], &part, Precision::F32).unwrap_err().to_string()
    };
    assert!(refused(4..9, 2, false).contains("nobody"));
    assert!(refused(4..9, 2, true).contains("part 1"));
    assert!(refused(4..9, 9, false).contains("target 9"));
    assert!(refused(4..8, 2, false).contains("4..8"));
    assert!(refused(5..10, 2, false).contains("vocabulary of 9"));
}

#[test]
fn a_part_packed_before_has_the_bits_of_one_that_is_not() {
    for case in CASES.iter().filter(|case| case.tokens > 0 && !case.parts.contains(&0)) {
        for precision in [Precision::F32, Precision::Bf16] {
            let losses = on_parts(case.parts, |part| {
                let (targets, [hidden, weight]) = (case.targets(), case.inputs());
                let weight = weight.narrow(0, part.held.start, part.held.len()).unwrap().contiguous().unwrap();
                let values = flat(&weight);
                let operand = Operand::rows(&values, part.held.len(), case.width, case.width);
                let packed = PackedWeights::new(select::current(), precision, &operand);
                [
                    linear_cross_entropy_part(&hidden, &weight, &targets, &part, precision).unwrap(),
                    linear_cross_entropy_part_packed(&hidden, &packed, &targets, &part).unwrap(),
                ]
                .map(|loss| loss.to_scalar::<f32>().unwrap().to_bits())
            });
            assert!(
                losses.iter().flatten().all(|&loss| loss == losses[0][0]),
                "{} {precision:?}: {losses:?}",
                case.name()
            );
        }
    }
}
