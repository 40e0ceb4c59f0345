//! `moe-kernels`: prints the machine, the kernels chosen for it, and its measured ceilings.

use moe_kernels::machine::Peaks;
use moe_kernels::{Isa, select};
use std::process::ExitCode;

fn main() -> ExitCode {
    if let Some(argument) = std::env::args().nth(1) {
        eprintln!("error: moe-kernels takes no arguments, got {argument:?}; {} forces an instruction set", select::ENV);
        return ExitCode::FAILURE;
    }
    let forced = std::env::var(select::ENV).map_or(Ok(()), |name| name.parse().and_then(select::force));
    if let Err(error) = forced {
        eprintln!("error: {error}");
        return ExitCode::FAILURE;
    }
    println!("machine    {}", moe_kernels::machine::name());
    let names: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
    println!("can run    {}", names.join(", "));
    println!("uses       {}", select::current());
    let peaks = Peaks::measure();
    println!("threads    {}", peaks.threads);
    println!("f32        {:>8.1} GFLOP/s from registers", peaks.f32_gflops);
    if peaks.bf16_gflops > 0.0 {
        let unit = if Isa::Amx.is_available() { "AMX tiles" } else { "vdpbf16ps" };
        println!("bf16       {:>8.1} GFLOP/s from registers ({unit})", peaks.bf16_gflops);
    } else {
        println!("bf16       widened to f32: no AMX and no vdpbf16ps here");
    }
    if peaks.int8_gops > 0.0 {
        println!("int8       {:>8.1} GOP/s from registers (vpdpbusd)", peaks.int8_gops);
    } else {
        println!("int8       widened to 16 bits: no vpdpbusd here");
    }
    println!("memory     {:>8.1} GB/s read", peaks.read_gbps);
    ExitCode::SUCCESS
}
