//! [`IntegerMatrix`]: a quantized matrix row by row, as files hold it; and the rounding that makes one.

use super::QuantFormat;
use super::pack::{LEAST_SCALE, largest, nearest, scale_and_inverse};
use crate::gemm::bf16_round;
use crate::parallel::{self, SharedMut};
use crate::{Error, Result};

/// `[out, in]` integers, row-major, with their scales.
#[derive(Debug, Clone, PartialEq)]
pub struct IntegerMatrix {
    format: QuantFormat,
    shape: [usize; 2],
    integers: Vec<i8>,
    /// `[out, groups]`
    scales: Vec<f32>,
}

/// Most inputs of a row of 8 bits: sums of more products of 255 and 128 may not fit 32 bits.
const MOST_INPUTS: usize = 1 << 16;

impl IntegerMatrix {
    /// Integers and scales that were made before, by whatever rule.
    ///
    /// # Shapes
    /// `integers` `[out, in]`: -128 to 127, or -8 to 7 for [`QuantFormat::Int4`]; `scales` `[out, groups]`, finite, for
    /// [`QuantFormat::Int4`] values of bf16, which is what products read
    ///
    /// # Errors
    /// [`Error::Argument`] naming what does not fit.
    pub fn new(format: QuantFormat, shape: [usize; 2], integers: Vec<i8>, scales: Vec<f32>) -> Result<Self> {
        let matrix = Self { format, shape, integers, scales };
        matrix.check().map_err(Error::Argument)?;
        Ok(matrix)
    }

    /// What was checked before it was packed.
    pub(super) fn of_packed(format: QuantFormat, shape: [usize; 2], integers: Vec<i8>, scales: Vec<f32>) -> Self {
        let matrix = Self { format, shape, integers, scales };
        debug_assert_eq!(matrix.check(), Ok(()));
        matrix
    }

    fn check(&self) -> std::result::Result<(), String> {
        let (format, [n, k]) = (self.format, self.shape);
        format.validate(k)?;
        let groups = format.groups(k);
        if self.integers.len() != n * k || self.scales.len() != n * groups {
            let (integers, scales) = (self.integers.len(), self.scales.len());
            return Err(format!(
                "{n} x {k} weights in {format} need {} integers and {} scales, got {integers} and {scales}",
                n * k,
                n * groups
            ));
        }
        if format != QuantFormat::Int8
            && let Some(at) = self.integers.iter().position(|q| !(-8..8).contains(q))
        {
            return Err(format!("integer [{}, {}] of 4 bits is {}", at / k, at % k, self.integers[at]));
        }
        let fits = |scale: f32| scale.is_finite() && (format == QuantFormat::Int8 || bf16_round(scale) == scale);
        match self.scales.iter().position(|&scale| !fits(scale)) {
            Some(at) => {
                let (row, group, scale) = (at / groups, at % groups, self.scales[at]);
                let kind = if format == QuantFormat::Int8 { "a finite number" } else { "a finite value of bf16" };
                Err(format!("scale [{row}, {group}] must be {kind}, got {scale}"))
            }
            None => Ok(()),
        }
    }

    /// The nearest integers to row-major `[out, in]` weights. Scales are values of bf16 in either format: for 8 bits the
    /// largest magnitude of a row over 127, rounded up so that nothing is cut off; for 4 bits the value of largest magnitude
    /// of a group over -8, as there is one step more below zero than above it. A row or group of zeros has the scale 0.
    ///
    /// # Errors
    /// [`Error::Argument`] if `weights` has another size, a weight is not finite, or `format` cannot hold such a matrix.
    pub fn nearest(format: QuantFormat, weights: &[f32], [n, k]: [usize; 2]) -> Result<Self> {
        format.check(weights, [n, k])?;
        Ok(Self::rounded(format, weights, [n, k]))
    }

    /// The same of weights that have been checked.
    pub(super) fn rounded(format: QuantFormat, weights: &[f32], [n, k]: [usize; 2]) -> Self {
        let groups = format.groups(k);
        let (mut integers, mut scales) = (vec![0; n * k], vec![0.0; n * groups]);
        let (all_integers, all_scales) = (SharedMut::new(&mut integers), SharedMut::new(&mut scales));
        parallel::for_each_if(n * k, 1 << 16, n, |row| {
            let weights = &weights[row * k..][..k];
            // SAFETY: each task writes the integers and scales of its own row.
            let (integers, scales) =
                unsafe { (all_integers.slice(row * k, k), all_scales.slice(row * groups, groups)) };
            let size = format.group_size(k);
            let parts = weights.chunks(size).zip(integers.chunks_mut(size));
            parts.zip(scales).for_each(|((weights, integers), scale)| *scale = Grid::round(format, weights, integers));
        });
        Self { format, shape: [n, k], integers, scales }
    }

    /// How the weights are stored.
    pub fn format(&self) -> QuantFormat {
        self.format
    }

    /// `[out, in]`
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// `[out, in]`, row-major
    pub fn integers(&self) -> &[i8] {
        &self.integers
    }

    /// `[out, groups]`, row-major
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// The weights that the integers stand for, `[out, in]` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let [n, k] = self.shape;
        let (groups, size) = (self.format.groups(k), self.format.group_size(k));
        let value = |at: usize| {
            let scale = self.scales[at / k * groups + at % k / size];
            f32::from(self.integers[at]) * scale
        };
        (0..n * k).map(value).collect()
    }
}

impl QuantFormat {
    /// Refuses weights `[out, in]` that cannot be rounded to this format.
    ///
    /// # Errors
    /// [`Error::Argument`] if there are more or fewer of them, one is not finite, or the format cannot hold such a matrix.
    pub fn check(self, weights: &[f32], [n, k]: [usize; 2]) -> Result<()> {
        self.check_rows(weights, [n, k], 0)
    }

    /// The same of rows that are counted from `first` on.
    pub(super) fn check_rows(self, weights: &[f32], [n, k]: [usize; 2], first: usize) -> Result<()> {
        self.validate(k).map_err(Error::Argument)?;
        if weights.len() != n * k {
            return Err(Error::Argument(format!("weights of {n} x {k} need {} values, got {}", n * k, weights.len())));
        }
        match weights.iter().position(|w| !w.is_finite()) {
            Some(at) => Err(Error::Argument(format!("weights[{}, {}] is {}", first + at / k, at % k, weights[at]))),
            None => Ok(()),
        }
    }

    /// Whether matrices of `k` inputs can be stored so; if not, why.
    pub(super) fn validate(self, k: usize) -> std::result::Result<(), String> {
        match self {
            Self::Int4 { group_size } if group_size == 0 || !group_size.is_multiple_of(32) || group_size > 16384 => {
                Err(format!("group_size must be a multiple of 32 up to 16384, got {group_size}"))
            }
            Self::Int8 if k > MOST_INPUTS => Err(format!("rows of 8 bits have at most {MOST_INPUTS} inputs, got {k}")),
            _ => Ok(()),
        }
    }

    /// Inputs that share a scale, of a matrix of `k`; the last ones may be fewer.
    pub fn group_size(self, k: usize) -> usize {
        match self {
            Self::Int8 => k.max(1),
            Self::Int4 { group_size } => group_size,
        }
    }
}

/// The least value of bf16 that is not below a positive number.
fn bf16_up(value: f32) -> f32 {
    f32::from_bits(value.to_bits().next_multiple_of(1 << 16))
}

/// The values that the integers of one row or group stand for: multiples of its scale.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    scale: f32,
    /// Its inverse; 0 for the scale 0.
    factor: f32,
    /// The first and the last integer.
    bounds: [f32; 2],
}

impl Grid {
    /// The grid that [`IntegerMatrix::nearest`] lays over these weights: a row's for 8 bits, a group's for 4.
    pub fn of(format: QuantFormat, weights: &[f32]) -> Self {
        let (scale, bounds) = match format {
            QuantFormat::Int8 => {
                let (scale, _) = scale_and_inverse(f32::from_bits(largest(weights)), 127.0);
                (bf16_up(scale), [-127.0, 127.0])
            }
            QuantFormat::Int4 { .. } => {
                let most = weights.iter().fold(0.0f32, |most, &w| if w.abs() > most.abs() { w } else { most });
                let scale = bf16_round(most.abs().max(8.0 * LEAST_SCALE).copysign(most) / -8.0);
                (if most == 0.0 { 0.0 } else { scale }, [-8.0, 7.0])
            }
        };
        let factor = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        Self { scale, factor, bounds }
    }

    /// What the integers are multiplied by, a value of bf16.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The integer nearest to a finite weight, ties to even; beyond the ends of the grid the first or the last.
    #[inline(always)]
    pub fn nearest(&self, weight: f32) -> i8 {
        nearest((weight * self.factor).clamp(self.bounds[0], self.bounds[1])) as i8
    }

    /// The scale of `weights`, whose integers it writes.
    fn round(format: QuantFormat, weights: &[f32], integers: &mut [i8]) -> f32 {
        let grid = Self::of(format, weights);
        integers.iter_mut().zip(weights).for_each(|(q, &w)| *q = grid.nearest(w));
        grid.scale
    }
}
