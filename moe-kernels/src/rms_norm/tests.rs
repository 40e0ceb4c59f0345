//! The norm and its gradients against ordinary candle operations in f64, which central differences check in `moe-core`.

use super::*;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, DecoderOps};
use moe_core::testing::{assert_close, random, random_var, values};

#[test]
fn values_and_gradients_equal_the_reference() {
    for shape in [&[1, 1][..], &[1, 15], &[4, 3, 17], &[65, 33], &[130, 64]] {
        let width = shape[shape.len() - 1];
        let vars = [random_var(1, shape, 1.3, DType::F32), random_var(2, &[width], 1.0, DType::F32)];
        let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
        let got = rms_norm(&vars[0], &vars[1], 1e-5).unwrap();
        let want = CandleOps.rms_norm(&wide[0], &wide[1], 1e-5).unwrap();
        assert_close(&got, &want, 2e-6, &format!("{shape:?}"));
        let factors = random(4, shape, 1.0, DType::F32);
        let backward = |y: &Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (backward(&got, &factors), backward(&want, &factors.to_dtype(DType::F64).unwrap()));
        for (i, (var, wide)) in vars.iter().zip(&wide).enumerate() {
            assert_close(got.get(var).unwrap(), want.get(wide).unwrap(), 1e-5, &format!("{shape:?} d{i}"));
        }
    }
}

#[test]
fn no_rows_are_fine_and_bad_arguments_are_named() {
    let (none, w) = (random(4, &[0, 7], 1.0, DType::F32), random_var(2, &[7], 1.0, DType::F32));
    let y = rms_norm(&none, &w, 1e-5).unwrap();
    assert_eq!(y.dims(), [0, 7]);
    assert_eq!(values(y.sum_all().unwrap().backward().unwrap().get(&w).unwrap()), [0.0; 7]);
    for (weight, epsilon, name) in [(&w.narrow(0, 0, 3).unwrap(), 1e-5, "weight"), (&w, f64::NAN, "epsilon")] {
        let error = rms_norm(&none, weight, epsilon).unwrap_err();
        assert!(matches!(&error, Error::Argument(text) if text.contains(name)), "{error}");
    }
}

#[test]
fn neither_threads_nor_instruction_sets_nor_other_rows_change_anything() {
    let [x, grad] = [1, 3].map(|seed| values(&random(seed, &[1000 * 97], 1.0, DType::F32)));
    let [x, grad] = [x, grad].map(|v| v.into_iter().map(|v| v as f32).collect::<Vec<_>>());
    let w: Vec<f32> = (0..97).map(|i| (i * 37 % 101) as f32 * 0.02 - 1.0).collect();
    let run = |threads: usize, isa: Isa| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let op = RmsNorm { epsilon: 1e-6, isa };
            (op.normed(&x, &w), op.gradients(&x, &w, &grad))
        })
    };
    let one = run(1, Isa::Portable);
    for isa in Isa::available() {
        for threads in [1, 2, 3, 5] {
            assert!(run(threads, isa) == one, "{threads} threads, {isa}");
        }
    }
    let op = RmsNorm { epsilon: 1e-6, isa: select::current() };
    assert_eq!(op.normed(&x[97 * 70..97 * 71], &w), one.0[97 * 70..97 * 71]);
}

#[test]
fn nan_stays_in_its_row_and_fills_it_on_every_set() {
    for isa in Isa::available() {
        for at in 0..37 {
            let mut x: Vec<f32> = (0..3 * 37).map(|i| (i % 11) as f32).collect();
            x[37 + at] = -f32::NAN;
            let out = RmsNorm { epsilon: 1e-5, isa }.normed(&x, &[1.0; 37]);
            for (i, v) in out.iter().enumerate() {
                assert_eq!(v.is_nan(), i / 37 == 1, "{isa}: NaN in column {at}, output {i}");
            }
        }
    }
}
