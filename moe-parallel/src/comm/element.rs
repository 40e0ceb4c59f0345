//! [`Element`]: what messages are made of, as little-endian bytes.

use half::bf16;
use std::fmt::Debug;

/// A number that can be sent.
pub trait Element: Copy + Debug + PartialEq + Send + Sync + 'static {
    /// Zero.
    const ZERO: Self;
    /// What sums are carried in: bf16 is rounded once, at the end.
    type Sum: Copy;

    /// Appends the bytes of `values`.
    fn write(values: &[Self], to: &mut Vec<u8>);
    /// Fills `to` from as many bytes as it takes.
    fn read(bytes: &[u8], to: &mut [Self]);
    /// As a term of a sum.
    fn to_sum(self) -> Self::Sum;
    /// The next term.
    fn add(sum: Self::Sum, term: Self) -> Self::Sum;
    /// The end of a sum.
    fn from_sum(sum: Self::Sum) -> Self;
    /// The larger; a NaN stays.
    fn max(self, other: Self) -> Self;
}

macro_rules! bytes {
    ($type:ty) => {
        fn write(values: &[Self], to: &mut Vec<u8>) {
            let start = to.len();
            to.resize(start + size_of_val(values), 0);
            for (bytes, value) in to[start..].chunks_exact_mut(size_of::<Self>()).zip(values) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
        fn read(bytes: &[u8], to: &mut [Self]) {
            let mut array = [0; size_of::<Self>()];
            for (value, bytes) in to.iter_mut().zip(bytes.chunks_exact(size_of::<Self>())) {
                array.copy_from_slice(bytes);
                *value = <$type>::from_le_bytes(array);
            }
        }
    };
}

macro_rules! number {
    ($type:ty, $zero:expr, $add:expr, $max:expr) => {
        impl Element for $type {
            const ZERO: Self = $zero;
            type Sum = Self;
            bytes!($type);
            fn to_sum(self) -> Self {
                self
            }
            fn add(sum: Self, term: Self) -> Self {
                $add(sum, term)
            }
            fn from_sum(sum: Self) -> Self {
                sum
            }
            fn max(self, other: Self) -> Self {
                $max(self, other)
            }
        }
    };
}

number!(f32, 0.0, |a, b| a + b, |a: f32, b: f32| if b > a || b.is_nan() { b } else { a });
number!(f64, 0.0, |a, b| a + b, |a: f64, b: f64| if b > a || b.is_nan() { b } else { a });
number!(u8, 0, u8::wrapping_add, Ord::max);
number!(u32, 0, u32::wrapping_add, Ord::max);
number!(u64, 0, u64::wrapping_add, Ord::max);
number!(i64, 0, i64::wrapping_add, Ord::max);

impl Element for bf16 {
    const ZERO: Self = bf16::ZERO;
    type Sum = f32;
    bytes!(bf16);
    fn to_sum(self) -> f32 {
        self.to_f32()
    }
    fn add(sum: f32, term: Self) -> f32 {
        sum + term.to_f32()
    }
    fn from_sum(sum: f32) -> Self {
        Self::from_f32(sum)
    }
    fn max(self, other: Self) -> Self {
        if other > self || other.is_nan() { other } else { self }
    }
}
