//! Dropout against the reference, bit for bit, on every set and any number of threads.

use super::*;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, DecoderOps};
use moe_core::tape::{GradBuffers, Tape};
use moe_core::testing::{random, random_var, values};

fn some() -> Dropout {
    Dropout::new(0.3, 11).unwrap()
}

#[test]
fn values_and_gradients_are_those_of_the_reference() {
    for dims in [&[1, 1][..], &[3, 33], &[2, 5, 48], &[0, 4], &[700, 257], &[19]] {
        let x = random_var(1, dims, 1.0, DType::F32);
        let factors = random(2, dims, 1.0, DType::F32);
        let run = |dropped: Tensor| {
            let loss = (&dropped * &factors).unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            (values(&dropped), grads.get(&x).map(values))
        };
        let want = run(CandleOps.dropout(&x, some()).unwrap());
        assert_eq!(run(dropout(&x, some()).unwrap()), want, "{dims:?}");
        // On the tape.
        let mut buffers = GradBuffers::new([("x", &x)]).unwrap();
        let (loss, tape) = Tape::record(|| (dropout(&x, some()).unwrap() * &factors).unwrap().sum_all().unwrap());
        buffers.begin();
        tape.backward_of(&loss, &mut buffers.gradients()).unwrap();
        buffers.finish();
        let got: Vec<f64> = buffers.of(0).iter().copied().map(f64::from).collect();
        assert_eq!(got, want.1.unwrap_or_else(|| vec![0.0; got.len()]), "{dims:?} on the tape");
    }
}

#[test]
fn neither_set_nor_threads_change_a_bit() {
    let x: Vec<f32> = random(1, &[300, 129], 1.0, DType::F32).flatten_all().unwrap().to_vec1().unwrap();
    let want = Dropped { dropout: some(), isa: Isa::Portable }.apply(&x, 129);
    for isa in Isa::available() {
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let got = pool.install(|| Dropped { dropout: some(), isa }.apply(&x, 129));
            assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{isa}, {threads} threads");
        }
    }
    let tensor = Var::from_vec(x, (300, 129), &candle_core::Device::Cpu).unwrap();
    assert!(dropout(&tensor.to_dtype(DType::F64).unwrap(), some()).is_err());
}

/// A lost value stays lost, dropped or not.
#[test]
fn nan_stays_nan() {
    let nan = Tensor::full(f32::NAN, (40, 40), &candle_core::Device::Cpu).unwrap();
    assert!(values(&dropout(&nan, some()).unwrap()).iter().all(|value| value.is_nan()));
}
