//! Which instruction set the kernels use: found once, printable, and forced by whoever owns the process.
//!
//! Libraries do not read the environment: binaries pass the value of [`ENV`] to [`force`].

use crate::{Error, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, Ordering};

/// Environment variable that binaries read to force an instruction set, e.g. `MOE_KERNELS_ISA=avx2`.
pub const ENV: &str = "MOE_KERNELS_ISA";

/// An instruction set with kernels of its own, weakest first.
///
/// All of them give the same bits, but for the bf16 products of [`Isa::Amx`]: every sum runs in one order with one rounding
/// per product (see [`crate::gemm`]). The bf16 products of [`Isa::Avx512Bf16`] take inputs below 1.2e-38 as zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Isa {
    /// Plain loops. Correct on every machine, and slow: the fused multiply-add may be a library call.
    Portable = 0,
    /// AVX2 and FMA.
    Avx2 = 1,
    /// AVX-512 F, BW, DQ and VL; bf16 is widened to f32.
    Avx512 = 2,
    /// AVX-512 with the bf16 dot product `vdpbf16ps`.
    Avx512Bf16 = 3,
    /// AVX-512 with tiles of bf16 (Linux only, whose kernel must grant them).
    Amx = 4,
}

const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx];
const UNSET: u8 = u8::MAX;
static CURRENT: AtomicU8 = AtomicU8::new(UNSET);

impl Isa {
    /// Every set this machine can run, weakest first.
    pub fn available() -> Vec<Self> {
        ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16"),
            // What goes into tiles is rounded by AVX-512's bf16. Tests run its kernels on a model of the tiles where the machine has none.
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_available() && (cfg!(test) || crate::gemm::has_amx()),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Whether its products of this precision have the bits of the other sets.
    pub fn has_common_bits(self, precision: crate::Precision) -> bool {
        self != Self::Amx || precision == crate::Precision::F32
    }

    /// Panics unless this machine can run it: the door of every function that takes a set.
    #[track_caller]
    pub(crate) fn require(self) {
        assert!(self.is_available(), "this machine cannot run {self} kernels; choose one of Isa::available()");
    }

    /// The fastest for this machine.
    ///
    /// Not always the strongest: `vdpbf16ps` has twice the rate of an f32 multiply-add on AMD's Zen 4, but half of it
    /// on Intel's server cores, where widening is faster.
    pub fn fastest() -> Self {
        let runs = |isa: &Self| *isa != Self::Amx || crate::gemm::has_amx();
        let strongest = Self::available().into_iter().rfind(runs).unwrap_or(Self::Portable);
        if strongest == Self::Avx512Bf16 && !vendor_is_amd() { Self::Avx512 } else { strongest }
    }

    /// The name [`force`] and [`ENV`] know.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }
}

/// Runs a block compiled for an [`Isa`]: plain loops in it and in what it inlines become vector loops.
///
/// ```ignore
/// vectorize!(isa, (into: &mut [f32], terms: &[f32] = &other[..]) -> f32 { .. })
/// ```
///
/// The block sees the values it names, which are variables of that name unless it gives them. No multiply and add are fused and no
/// sum is reordered by this, so the result is the same on every set.
///
/// The block becomes a function that is always inlined into a caller for each set. A closure would be nicer to write, but the
/// compiler leaves a large one a function of its own, for the oldest processor there is: until 2026-11-26 half of the loops
/// between the products ran with vectors of four.
macro_rules! vectorize {
    ($isa:expr, ($($name:ident: $type:ty $(= $value:expr)?),* $(,)?) $(-> $result:ty)? $body:block) => {{
        #[allow(clippy::too_many_arguments)]
        #[inline(always)]
        fn block($($name: $type),*) $(-> $result)? $body

        #[cfg(target_arch = "x86_64")]
        #[allow(clippy::too_many_arguments)]
        #[target_feature(enable = "avx2,fma")]
        fn avx2($($name: $type),*) $(-> $result)? {
            block($($name),*)
        }

        #[cfg(target_arch = "x86_64")]
        #[allow(clippy::too_many_arguments)]
        #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
        fn avx512($($name: $type),*) $(-> $result)? {
            block($($name),*)
        }

        $(let $name: $type = $crate::select::vectorize!(@value $name $($value)?);)*
        match $isa {
            $crate::Isa::Portable => block($($name),*),
            // SAFETY: a set in use is one that this machine can run.
            #[cfg(target_arch = "x86_64")]
            $crate::Isa::Avx2 => unsafe { avx2($($name),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            $crate::Isa::Avx512 | $crate::Isa::Avx512Bf16 | $crate::Isa::Amx => unsafe { avx512($($name),*) },
            #[cfg(not(target_arch = "x86_64"))]
            _ => block($($name),*),
        }
    }};
    (@value $name:ident) => { $name };
    (@value $name:ident $value:expr) => { $value };
}
pub(crate) use vectorize;

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            Error::Argument(format!("{ENV} must be one of {}, got {name:?}", ALL.map(Isa::name).join(", ")))
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn vendor_is_amd() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
}

#[cfg(not(target_arch = "x86_64"))]
fn vendor_is_amd() -> bool {
    false
}

/// The set in use: [`Isa::fastest`] unless [`force`] chose another.
pub fn current() -> Isa {
    let found = CURRENT.load(Ordering::Relaxed);
    if let Some(isa) = ALL.get(usize::from(found)) {
        return *isa;
    }
    let fastest = Isa::fastest();
    // Another thread may have forced one meanwhile.
    match CURRENT.compare_exchange(UNSET, fastest as u8, Ordering::Relaxed, Ordering::Relaxed) {
        Err(forced) => ALL.get(usize::from(forced)).copied().unwrap_or(fastest),
        Ok(_) => fastest,
    }
}

/// Makes the whole process use `isa`.
///
/// # Errors
/// [`Error::Argument`] if this machine cannot run it.
pub fn force(isa: Isa) -> Result<()> {
    if !isa.is_available() {
        let have = Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>().join(", ");
        return Err(Error::Argument(format!("this machine cannot run {isa} kernels; it can run {have}")));
    }
    CURRENT.store(isa as u8, Ordering::Relaxed);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back_and_others_are_refused() {
        for isa in ALL {
            assert_eq!(isa.name().parse::<Isa>().unwrap(), isa);
        }
        let message = "sse".parse::<Isa>().unwrap_err().to_string();
        assert!(message.contains("avx512-bf16") && message.contains("\"sse\""), "{message}");
    }

    #[test]
    fn the_portable_kernels_run_everywhere() {
        assert_eq!(Isa::available()[0], Isa::Portable);
        assert!(Isa::fastest().is_available());
    }
}
