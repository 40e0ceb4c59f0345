//! Linear maps and their gradients against ordinary candle operations in f64.

use super::*;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, MoeOps};
use moe_core::testing::{assert_close, random, random_var};

struct Case {
    name: &'static str,
    offsets: &'static [usize],
}

const CASES: [Case; 6] = [
    Case { name: "even", offsets: &[0, 3, 6, 9] },
    Case { name: "one expert takes everything", offsets: &[0, 0, 40, 40] },
    Case { name: "one row", offsets: &[0, 0, 0, 1] },
    Case { name: "no row", offsets: &[0, 0, 0, 0] },
    Case { name: "ragged", offsets: &[0, 1, 1, 29] },
    Case { name: "one off a tile", offsets: &[0, 11, 24, 49] },
];

fn tolerance(precision: Precision) -> f64 {
    if precision == Precision::F32 { 1e-5 } else { 3e-2 }
}

fn as_f64(var: &Tensor) -> Var {
    Var::from_tensor(&var.to_dtype(DType::F64).unwrap()).unwrap()
}

#[test]
fn values_and_gradients_equal_the_reference() {
    for case in &CASES {
        let rows = case.offsets[3];
        for precision in [Precision::F32, Precision::Bf16] {
            let vars = [
                random_var(1, &[rows, 37], 1.0, DType::F32),
                random_var(2, &[3, 45, 37], 0.2, DType::F32),
                random_var(3, &[3, 45], 1.0, DType::F32),
            ];
            let wide: Vec<Var> = vars.iter().map(|v| as_f64(v)).collect();
            let factors = random(4, &[rows, 45], 0.3, DType::F32);
            for with_bias in [true, false] {
                let bias = with_bias.then_some(vars[2].as_tensor());
                let got = grouped_linear(&vars[0], &vars[1], bias, case.offsets, precision).unwrap();
                let bias = with_bias.then_some(wide[2].as_tensor());
                let want = CandleOps
                    .grouped_linear(&wide[0], &wide[1].as_tensor().clone().into(), bias, case.offsets)
                    .unwrap();
                let label = format!("{} {precision:?}", case.name);
                assert_close(&got, &want, tolerance(precision), &label);

                let backward = |y: &Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
                let got_grads = backward(&got, &factors);
                let want_grads = backward(&want, &factors.to_dtype(DType::F64).unwrap());
                for (i, (var, wide)) in vars.iter().zip(&wide).enumerate().take(if with_bias { 3 } else { 2 }) {
                    // The reference leaves experts without rows out of the graph; zeros are the same gradient.
                    let zeros = var.zeros_like().unwrap();
                    let want = want_grads.get(wide).unwrap_or(&zeros);
                    assert_close(got_grads.get(var).unwrap(), want, tolerance(precision), &format!("{label} d{i}"));
                }
            }
        }
    }
}

#[test]
fn linear_takes_any_leading_dimensions_and_refuses_other_widths() {
    let x = random(1, &[2, 3, 5], 1.0, DType::F32);
    let w = random(2, &[4, 5], 1.0, DType::F32);
    let y = linear(&x, &w, None, Precision::F32).unwrap();
    let want = x.reshape((6, 5)).unwrap().matmul(&w.t().unwrap()).unwrap().reshape((2, 3, 4)).unwrap();
    assert_close(&y, &want, 1e-6, "linear");
    let message = linear(&w, &random(3, &[4, 6], 1.0, DType::F32), None, Precision::F32).unwrap_err().to_string();
    assert!(message.contains("[4, 6]") && message.contains("width 5"), "{message}");
    let weight = w.unsqueeze(0).unwrap();
    assert!(grouped_linear(&x.reshape((6, 5)).unwrap(), &weight, None, &[0, 5], Precision::F32).is_err());
    assert!(grouped_linear(&x.reshape((6, 5)).unwrap(), &weight, Some(&w), &[0, 6], Precision::F32).is_err());
}

/// The bits of batches that are run one after the other: outputs and gradients of rows side by side, gradients of weights
/// summed in order.
#[test]
fn batches_of_an_expert_are_summed_as_if_run_one_after_the_other() {
    // Three experts with two batches each.
    let offsets = [0, 3, 20, 20, 20, 21, 50];
    let batches: [Vec<std::ops::Range<usize>>; 2] =
        [0, 1].map(|b| (0..3).map(|e| offsets[2 * e + b]..offsets[2 * e + b + 1]).collect());
    let rows = random_var(1, &[50, 37], 1.0, DType::F32);
    let (weight, bias) = (random_var(2, &[3, 300, 37], 0.2, DType::F32), random_var(3, &[3, 300], 1.0, DType::F32));
    let factors = random(4, &[50, 300], 0.3, DType::F32);
    let pick = |t: &Tensor, batch: &[std::ops::Range<usize>]| {
        let ids: Vec<u32> = batch.iter().flat_map(|r| r.start as u32..r.end as u32).collect();
        t.index_select(&Tensor::new(ids, t.device()).unwrap(), 0).unwrap()
    };
    let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for precision in [Precision::F32, Precision::Bf16] {
        let run = |x: &Tensor, f: &Tensor, offsets: &[usize]| {
            let y = grouped_linear(x, &weight, Some(&bias), offsets, precision).unwrap();
            let grads = (&y * f).unwrap().sum_all().unwrap().backward().unwrap();
            (y, [&weight, &bias].map(|v| grads.get(v).unwrap().clone()), grads.get(x).cloned())
        };
        let (y, [dw, db], dx) = run(&rows, &factors, &offsets);
        let mut sums: Vec<Option<Tensor>> = vec![None, None];
        for batch in &batches {
            let x = Var::from_tensor(&pick(&rows, batch)).unwrap();
            let mut ends = vec![0];
            batch.iter().for_each(|r| ends.push(ends[ends.len() - 1] + r.len()));
            let (part, grads, part_dx) = run(&x, &pick(&factors, batch), &ends);
            assert_eq!(values(&part), values(&pick(&y, batch)));
            assert_eq!(values(&part_dx.unwrap()), values(&pick(dx.as_ref().unwrap(), batch)));
            for (sum, grad) in sums.iter_mut().zip(grads) {
                *sum = Some(sum.as_ref().map_or(grad.clone(), |sum| (sum + grad).unwrap()));
            }
        }
        assert_eq!(values(&dw), values(sums[0].as_ref().unwrap()), "{precision:?}");
        assert_eq!(values(&db), values(sums[1].as_ref().unwrap()), "{precision:?}");
        let wide: Vec<Var> = [&rows, &weight, &bias].map(|v| as_f64(v)).to_vec();
        let want = CandleOps.grouped_linear(&wide[0], &wide[1].as_tensor().clone().into(), Some(&wide[2]), &offsets);
        assert_close(&y, &want.unwrap(), tolerance(precision), "the reference");
    }
}
