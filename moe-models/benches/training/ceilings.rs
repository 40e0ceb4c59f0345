//! The multipliers that a type runs on.

use moe_kernels::machine::Peaks;
use moe_kernels::{Isa, select};

/// 10^9 operations per second that products of this type can reach; bf16 runs on those of f32 where it has none.
pub(crate) fn gflops(kind: &str, peaks: &Peaks) -> f64 {
    if kind == "bf16" && select::current() >= Isa::Avx512Bf16 { peaks.bf16_gflops } else { peaks.f32_gflops }
}
