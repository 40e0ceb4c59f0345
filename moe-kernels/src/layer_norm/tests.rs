//! The norm and its gradients against ordinary candle operations in f64, which central differences check in `moe-core`.

use super::*;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, DecoderOps};
use moe_core::testing::{assert_close, random, random_var};

#[test]
fn values_and_gradients_equal_the_reference() {
    for shape in [&[1, 1][..], &[4, 3, 19], &[130, 64]] {
        let width = shape[shape.len() - 1];
        let vars = [
            random_var(1, shape, 1.3, DType::F32),
            random_var(2, &[width], 1.0, DType::F32),
            random_var(3, &[width], 1.0, DType::F32),
        ];
        let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
        let got = layer_norm(&vars[0], &vars[1], &vars[2], 1e-5).unwrap();
        let want = CandleOps.layer_norm(&wide[0], &wide[1], &wide[2], 1e-5).unwrap();
        assert_close(&got, &want, 2e-6, &format!("{shape:?}"));
        let factors = random(4, shape, 1.0, DType::F32);
        let backward = |y: &Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
        let (got, want) = (backward(&got, &factors), backward(&want, &factors.to_dtype(DType::F64).unwrap()));
        for (i, (var, wide)) in vars.iter().zip(&wide).enumerate() {
            // With one column the input's gradient is the difference of equal numbers over a tiny deviation.
            let tolerance = if width == 1 { 1e-3 } else { 1e-5 };
            assert_close(got.get(var).unwrap(), want.get(wide).unwrap(), tolerance, &format!("{shape:?} d{i}"));
        }
    }
}

#[test]
fn no_rows_are_fine_and_bad_arguments_are_named() {
    let (none, w) = (random(4, &[0, 7], 1.0, DType::F32), random(2, &[7], 1.0, DType::F32));
    assert_eq!(layer_norm(&none, &w, &w, 1e-5).unwrap().dims(), [0, 7]);
    let refused = |x: &Tensor, w: &Tensor| layer_norm(x, w, &random(2, &[7], 1.0, DType::F32), 1e-5).unwrap_err();
    assert!(refused(&none, &w.narrow(0, 0, 3).unwrap()).to_string().contains("weight"));
    assert!(refused(&none.to_dtype(DType::F64).unwrap(), &w).to_string().contains("F64"));
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let x = random_var(1, &[1000, 96], 1.0, DType::F32);
    let (w, b) = (random_var(2, &[96], 1.0, DType::F32), random_var(3, &[96], 1.0, DType::F32));
    let run = |threads: usize| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let y = layer_norm(&x, &w, &b, 1e-5).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [&x, &w, &b].map(|v| grads.get(v).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap())
        })
    };
    let one = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

#[test]
fn nan_stays_in_its_row_and_fills_it_on_every_set() {
    for isa in Isa::available() {
        for at in 0..37 {
            let mut x: Vec<f32> = (0..3 * 37).map(|i| (i % 11) as f32).collect();
            x[37 + at] = -f32::NAN;
            let out = LayerNorm { epsilon: 1e-5, isa }.normed(&x, &[1.0; 37], &[0.0; 37]);
            for (i, v) in out.iter().enumerate() {
                assert_eq!(v.is_nan(), i / 37 == 1, "{isa}: NaN in column {at}, output {i}");
            }
        }
    }
}
