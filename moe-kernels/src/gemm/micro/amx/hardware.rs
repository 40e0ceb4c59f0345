//! The tile instructions, as inline assembly: stable Rust has no intrinsics for them.
//!
//! Tiles 0 to 3 hold sums, 4 and 5 tiles of A, 6 and 7 tiles of B. The compiler knows nothing of tile registers and never
//! touches them, so what one block leaves there the next one finds.

use super::{PANEL_COLS, SIDE, Sums, TileUnit, check};
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// Bytes between the rows of a tile of sums.
const SUM_STRIDE: usize = SIDE * 4;
/// Bytes between the rows of a tile of B.
const B_STRIDE: usize = PANEL_COLS * 4;

pub(super) struct Hardware;

/// Whether this process may use tiles of bf16: the processor has them, the kernel grants them (asked for at the first
/// call), and every variant of the kernel comes out right.
pub(in crate::gemm) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && kernel_grants() && products_are_right())
}

fn has_instructions() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    if __cpuid(0).eax < 7 || __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) == AMX_BF16 | AMX_TILE
}

/// Asks the kernel for the tile registers; it grants them to the whole process.
fn kernel_grants() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let result: i64;
    // SAFETY: a system call with two integer arguments that reads and writes no memory of ours.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Whether every variant of the kernel comes out right. Otherwise one line says so, and the next best set is used.
fn products_are_right() -> bool {
    // SAFETY: asked last of three: the processor has tiles, and the kernel granted them.
    match unsafe { check::every_variant(&mut Hardware) } {
        Ok(()) => true,
        Err(variant) => {
            tracing::warn!("this machine's AMX tiles give wrong sums ({variant}); using AVX-512 instead");
            false
        }
    }
}

/// The 64 bytes that `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    /// Bytes per row of each tile.
    col_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileUnit for Hardware {
    fn configure(&mut self, rows: [usize; 2], wide: bool) {
        let (first, second) = (rows[0] as u8, rows[1].max(1) as u8);
        let lower = if wide { first } else { second };
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], col_bytes: [0; 16], rows: [0; 16] };
        config.col_bytes[..8].fill(64);
        config.rows[..8].copy_from_slice(&[first, first, lower, lower, first, second, SIDE as u8, SIDE as u8]);
        // SAFETY: the instruction reads the 64 bytes of `config`; the machine has it, as `is_available` found.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly)) };
    }

    unsafe fn load(&mut self, sums: &Sums, count: usize) {
        let at = |index: usize| sums.0[index].as_ptr();
        // SAFETY: each tile of sums is at most 16 rows of 64 bytes.
        unsafe {
            asm!("tileloadd tmm0, [{0} + {2}*1]", "tileloadd tmm1, [{1} + {2}*1]", in(reg) at(0), in(reg) at(1),
                in(reg) SUM_STRIDE, options(nostack, readonly));
            if count > 2 {
                asm!("tileloadd tmm2, [{0} + {2}*1]", "tileloadd tmm3, [{1} + {2}*1]", in(reg) at(2), in(reg) at(3),
                    in(reg) SUM_STRIDE, options(nostack, readonly));
            }
        }
    }

    unsafe fn store(&mut self, sums: &mut Sums, count: usize) {
        let [first, second, third, fourth] = sums.0.each_mut().map(|s| s.as_mut_ptr());
        // SAFETY: each tile of sums is at most 16 rows of 64 bytes.
        unsafe {
            asm!("tilestored [{0} + {2}*1], tmm0", "tilestored [{1} + {2}*1], tmm1", in(reg) first, in(reg) second,
                in(reg) SUM_STRIDE, options(nostack));
            if count > 2 {
                asm!("tilestored [{0} + {2}*1], tmm2", "tilestored [{1} + {2}*1], tmm3", in(reg) third, in(reg) fourth,
                    in(reg) SUM_STRIDE, options(nostack));
            }
            asm!("tilerelease", options(nostack, nomem));
        }
    }

    unsafe fn one_by_two<const SECOND: bool>(&mut self, a: *const u32, a_stride: usize, b: *const u32) {
        // SAFETY: passed on from the caller.
        unsafe {
            asm!("tileloadd tmm4, [{0} + {1}*1]", "tileloadd tmm6, [{2} + {4}*1]", "tileloadd tmm7, [{3} + {4}*1]",
                in(reg) a, in(reg) a_stride * 4, in(reg) b, in(reg) b.add(SIDE), in(reg) B_STRIDE,
                options(nostack, readonly));
            if SECOND {
                asm!("tdpbf16ps tmm2, tmm4, tmm6", "tdpbf16ps tmm3, tmm4, tmm7", options(nostack, nomem));
            } else {
                asm!("tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7", options(nostack, nomem));
            }
        }
    }

    unsafe fn two_by_two(&mut self, [first, second]: [*const u32; 2], a_stride: usize, b: *const u32) {
        // SAFETY: passed on from the caller.
        unsafe {
            asm!(
                "tileloadd tmm4, [{0} + {2}*1]",
                "tileloadd tmm6, [{3} + {5}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{4} + {5}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{1} + {2}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                in(reg) first, in(reg) second, in(reg) a_stride * 4, in(reg) b, in(reg) b.add(SIDE), in(reg) B_STRIDE,
                options(nostack, readonly)
            );
        }
    }
}

/// `rounds` times four products of zero tiles from registers; returns the operations done. For measuring the ceiling.
pub(in crate::gemm) fn peak_rounds(rounds: usize) -> f64 {
    assert!(is_available(), "this machine has no tiles");
    let mut unit = Hardware;
    unit.configure([SIDE, SIDE], false);
    // SAFETY: the machine has tiles, as was just asked; configured ones are zero.
    unsafe {
        for _ in 0..rounds {
            asm!(
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                options(nostack, nomem)
            );
        }
        asm!("tilerelease", options(nostack, nomem));
    }
    (rounds * 4 * SIDE * SIDE * 2 * SIDE * 2) as f64
}
