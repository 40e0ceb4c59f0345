//! Access to tensors on the CPU as plain slices, and vectorised loops over them: what custom operations are written with.
//! Knows no model.

use crate::{Error, Result};
use candle_core::{CpuStorage, Layout, Storage, Tensor, WithDType};

/// The element types the custom operations compute in: f32, and f64 for gradient checks.
pub trait Real: WithDType + std::ops::Neg<Output = Self> {
    /// `e^x`. For f32 a polynomial without branches (about 2 ulp) that gives the same bits on every instruction set. NaN
    /// stays NaN.
    fn exp_(self) -> Self;
    /// Square root.
    fn sqrt_(self) -> Self;
    /// The larger of the two. NaN may be lost: only for a maximum that is subtracted from the values it came from, where
    /// [`Real::exp_`] of the difference keeps it.
    fn max_(self, other: Self) -> Self;
    /// Natural logarithm.
    fn ln_(self) -> Self;
}

impl Real for f32 {
    #[inline(always)]
    fn exp_(self) -> Self {
        exp_f32(self)
    }
    #[inline(always)]
    fn sqrt_(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn max_(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
    #[inline(always)]
    fn ln_(self) -> Self {
        self.ln()
    }
}

impl Real for f64 {
    #[inline(always)]
    fn exp_(self) -> Self {
        self.exp()
    }
    #[inline(always)]
    fn sqrt_(self) -> Self {
        self.sqrt()
    }
    #[inline(always)]
    fn max_(self, other: Self) -> Self {
        self.max(other)
    }
    #[inline(always)]
    fn ln_(self) -> Self {
        self.ln()
    }
}

/// `e^x` as `2^n * e^r` with `r` in ±ln(2)/2 and a degree-7 polynomial; inputs are clamped to ±87.
///
/// The clamps compare the bound with `x`, in this order, because a comparison with NaN is false: NaN goes through both, and
/// through the polynomial, at the price of no instruction. A diverged model must not look like one with a finite loss.
///
/// Written without fused multiply-add, so that every instruction set rounds alike.
#[inline(always)]
fn exp_f32(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer kept in the low mantissa bits.
    let x = if 87.0 < x { 87.0 } else { x };
    let x = if -87.0 > x { -87.0 } else { x };
    let shifted = x * LOG2_E + ROUND;
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let tail = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2) * r + 1.666_666_6e-1)
        * r
        + 0.5;
    let mantissa = (tail * r) * r + r + 1.0;
    mantissa * f32::from_bits(exponent.wrapping_add(127) << 23)
}

/// `tanh(x)` from [`Real::exp_`]: `1 - 2 / (e^2x + 1)`; absolute error about 1e-7 in f32.
#[inline(always)]
pub fn tanh<T: Real>(x: T) -> T {
    let one = T::from_f64(1.0);
    let two = T::from_f64(2.0);
    one - two / ((two * x).exp_() + one)
}

/// Runs `body` compiled for the widest instruction set of this CPU (AVX-512, AVX2 or the baseline).
///
/// `body` and everything it calls must be inlined; the loops in it are then vectorised for that set. Results do not
/// depend on the set as long as `body` does not let the compiler reorder sums, which Rust never does by itself.
#[inline(always)]
pub fn dispatch<R, F: FnOnce() -> R>(body: F) -> R {
    struct Run<F>(F);
    impl<R, F: FnOnce() -> R> pulp::WithSimd for Run<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: pulp::Simd>(self, simd: S) -> R {
            simd.vectorize(self.0)
        }
    }
    pulp::Arch::new().dispatch(Run(body))
}

/// Number of partial sums a reduction keeps; fixed, so that the order of summation never changes.
const LANES: usize = 16;

/// Sum of `f(i)` for `i` in `0..len`, in a fixed order of 16 interleaved partial sums.
#[inline(always)]
pub fn sum_by<T: Real>(len: usize, f: impl Fn(usize) -> T) -> T {
    let zero = T::from_f64(0.0);
    let mut lanes = [zero; LANES];
    let whole = len / LANES * LANES;
    let mut start = 0;
    while start < whole {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(start + lane);
        }
        start += LANES;
    }
    for i in whole..len {
        lanes[i - whole] += f(i);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            let upper = lanes[lane + width];
            lanes[lane] += upper;
        }
        width /= 2;
    }
    lanes[0]
}

/// The elements of a contiguous CPU tensor.
///
/// # Errors
/// If the layout is not contiguous or the storage holds another type.
pub fn elements<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [T]> {
    let all = storage.as_slice::<T>()?;
    match layout.contiguous_offsets() {
        // A part of a tensor without elements may begin past its end.
        Some((start, end)) if start < end => Ok(&all[start..end]),
        Some(_) => Ok(&[]),
        None => candle_core::bail!("expected a contiguous tensor, got strides {:?}", layout.stride()),
    }
}

/// Calls `body` with the elements of `tensor`, made contiguous first.
///
/// # Errors
/// If the tensor is not on the CPU or holds another type than `T`.
pub fn with_elements<T: Real, R>(
    tensor: &Tensor,
    body: impl FnOnce(&[T]) -> candle_core::Result<R>,
) -> candle_core::Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) => body(elements(cpu, layout)?),
        _ => candle_core::bail!("expected a tensor on the CPU, got {:?}", tensor.device()),
    }
}

/// Copies a tensor's values to the host as f32, whatever its type and device.
///
/// # Errors
/// If the copy fails.
pub fn to_f32_vec(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.detach().to_dtype(candle_core::DType::F32)?.flatten_all()?.to_vec1::<f32>()?)
}

/// Checks that `tensor` has exactly `shape`, naming it in the error.
///
/// # Errors
/// [`Error::Input`] with both shapes.
pub fn expect_shape(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
    if tensor.dims() == shape {
        return Ok(());
    }
    Err(Error::Input(format!("{name} must have shape {shape:?}, got {:?}", tensor.dims())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Columns of a tensor without rows are a view that begins behind its storage.
    #[test]
    fn a_part_of_nothing_has_no_elements() {
        let none = Tensor::zeros((0, 4), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let part = none.narrow(1, 2, 2).unwrap();
        assert_eq!(with_elements::<f32, _>(&part, |values| Ok(values.len())).unwrap(), 0);
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        let mut worst = 0f64;
        for i in -8600..8600 {
            let x = i as f32 * 0.01;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(x.exp_()) - want).abs() / want);
        }
        assert!(worst < 3e-7, "relative error {worst}");
        assert_eq!(0f32.exp_(), 1.0);
        assert!(f32::NEG_INFINITY.exp_() < 1e-37);
        assert!(f32::INFINITY.exp_() > 1e37);
    }

    #[test]
    fn nan_stays_nan_and_bounds_stay_bounds() {
        // Both signs: the processor's own NaN, of 0 / 0 or infinity - infinity, has its sign bit set.
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7f80_0001)] {
            let values = [nan; 37];
            let wide = dispatch(|| values.map(|v| (v.exp_(), tanh(v))));
            assert!(wide.iter().chain(&[(nan.exp_(), tanh(nan))]).all(|(e, t)| e.is_nan() && t.is_nan()), "{nan:?}");
        }
        assert!(f64::NAN.exp_().is_nan() && tanh(f64::NAN).is_nan());
        for (x, bound) in [(f32::INFINITY, 87.0), (88.0, 87.0), (f32::NEG_INFINITY, -87.0), (-1e30, -87.0)] {
            assert_eq!(x.exp_().to_bits(), f32::exp_(bound).to_bits(), "{x}");
        }
    }

    /// Against a sum over the bits of the exponential as it was when its clamps took NaN for 87: saved models keep theirs.
    #[test]
    fn ordinary_numbers_keep_their_bits() {
        let mut sum = 0u64;
        for i in -9000..9000 {
            sum = sum.wrapping_mul(31).wrapping_add(u64::from((i as f32 * 0.01).exp_().to_bits()));
        }
        assert_eq!(sum, 0x83f2_8b6b_fad1_983d);
    }

    #[test]
    fn sums_do_not_depend_on_the_instruction_set() {
        let values: Vec<f32> = (0..1003).map(|i| ((i * 37) % 101) as f32 * 0.013 - 0.5).collect();
        let wide = dispatch(|| sum_by(values.len(), |i| values[i].exp_()));
        let plain = sum_by(values.len(), |i| values[i].exp_());
        assert_eq!(wide.to_bits(), plain.to_bits());
        let exact: f64 = values.iter().map(|v| f64::from(*v).exp()).sum();
        assert!((f64::from(wide) - exact).abs() / exact < 1e-6);
    }
}
