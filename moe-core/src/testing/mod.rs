//! Tolerances, skewed-routing generators and finite-difference checks for the tests of this and other crates.

use crate::CounterRng;
use candle_core::{DType, Device, Tensor, Var};

/// Values `[rows, cols]` from a seeded normal distribution, in `dtype`.
///
/// # Panics
/// If the tensor cannot be made.
pub fn random(seed: u64, shape: &[usize], scale: f64, dtype: DType) -> Tensor {
    let mut rng = CounterRng::new(seed, 77);
    let values: Vec<f64> = (0..shape.iter().product()).map(|_| rng.normal_f64() * scale).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).and_then(|t| t.to_dtype(dtype)).expect("a random tensor")
}

/// [`random`] as a variable.
///
/// # Panics
/// If the tensor cannot be made.
pub fn random_var(seed: u64, shape: &[usize], scale: f64, dtype: DType) -> Var {
    Var::from_tensor(&random(seed, shape, scale, dtype)).expect("a variable")
}

/// All values as f64.
///
/// # Panics
/// If the copy fails.
pub fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).and_then(|t| t.flatten_all()?.to_vec1()).expect("values")
}

/// Panics unless both tensors have one shape and differ nowhere by more than `tolerance * (1 + |want|)`.
///
/// # Panics
/// With the worst place.
#[track_caller]
pub fn assert_close(got: &Tensor, want: &Tensor, tolerance: f64, what: &str) {
    assert_eq!(got.dims(), want.dims(), "{what}: shapes");
    let (got, want) = (values(got), values(want));
    let worst = (0..got.len())
        .map(|i| ((got[i] - want[i]).abs() / (1.0 + want[i].abs()), i))
        .fold((0.0, 0), |a, b| if b.0 > a.0 || b.0.is_nan() { b } else { a });
    assert!(
        worst.0 <= tolerance,
        "{what}: at {} got {} want {} (error {:e}, tolerance {tolerance:e})",
        worst.1,
        got[worst.1],
        want[worst.1],
        worst.0
    );
}

/// Compares the gradients of `loss` for every variable with central differences; the variables must be f64.
///
/// # Panics
/// If a gradient is missing or wrong, or `loss` fails.
#[track_caller]
pub fn check_gradients(vars: &[(&str, &Var)], loss: impl Fn() -> Tensor) {
    const STEP: f64 = 1e-5;
    let grads = loss().backward().expect("backward");
    for (name, var) in vars {
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        let (analytic, start, shape) = (values(grad), values(var), var.shape().clone());
        let scale = analytic.iter().fold(0f64, |a, b| a.max(b.abs())).max(1e-3);
        let at = |i: usize, delta: f64| {
            let mut moved = start.clone();
            moved[i] += delta;
            var.set(&Tensor::from_vec(moved, &shape, &Device::Cpu).expect("tensor")).expect("set");
            loss().to_scalar::<f64>().expect("a scalar")
        };
        for (i, analytic) in analytic.iter().enumerate() {
            let numeric = (at(i, STEP) - at(i, -STEP)) / (2.0 * STEP);
            assert!(
                (numeric - analytic).abs() < 1e-5 * scale,
                "{name}[{i}]: gradient {analytic} but central difference {numeric}"
            );
        }
        var.set(&Tensor::from_vec(start, &shape, &Device::Cpu).expect("tensor")).expect("set");
    }
}

/// Expert ids `[tokens]` where expert `e` is as likely as `skew^e`: 1 is even, small values pile onto expert 0.
pub fn skewed_expert_ids(seed: u64, num_tokens: usize, num_experts: usize, skew: f64) -> Vec<u32> {
    let weights: Vec<f64> = (0..num_experts).map(|e| skew.powi(e as i32)).collect();
    let total: f64 = weights.iter().sum();
    let mut rng = CounterRng::new(seed, 78);
    let draw = |rng: &mut CounterRng| {
        let mut left = rng.uniform_f64() * total;
        weights.iter().position(|w| {
            left -= w;
            left < 0.0
        })
    };
    (0..num_tokens).map(|_| draw(&mut rng).unwrap_or(num_experts - 1) as u32).collect()
}
