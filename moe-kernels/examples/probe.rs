use moe_kernels::gemm::*;
use moe_kernels::*;
use std::time::Instant;
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let mut best = f64::MAX;
    for _ in 0..7 {
        let t = Instant::now();
        f();
        best = best.min(t.elapsed().as_secs_f64());
    }
    best
}
fn main() {
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        for (m, n, k) in [(2048, 480, 160), (2048, 640, 160), (2048, 160, 640), (2048, 4096, 160), (160, 640, 2048), (512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048)] {
            let a = vec![0.5f32; m * k];
            let b = vec![0.25f32; n * k];
            let mut out = vec![0.0; m * n];
            for isa in Isa::available() {
                if isa == Isa::Portable {
                    continue;
                }
                for precision in [Precision::F32, Precision::Bf16] {
                    let s = pool.install(|| {
                        time(|| {
                            let g = Group { a: Operand::rows(&a, m, k, k), b: Operand::rows(&b, n, k, k), bias: None, out_offset: 0, out_stride: n };
                            gemm(isa, precision, &[g], &mut out);
                        })
                    });
                    let s2 = pool.install(|| {
                        time(|| {
                            let g = Group { a: Operand::columns(&a, m, k, m), b: Operand::columns(&b, n, k, n), bias: None, out_offset: 0, out_stride: n };
                            gemm(isa, precision, &[g], &mut out);
                        })
                    });
                    let f = 2.0 * (m * n * k) as f64 / 1e9;
                    println!("{threads} thr {m}x{n}x{k} {isa} {precision:?}: {:.1} GFLOP/s; transposed {:.1}", f / s, f / s2);
                }
            }
        }
    }
}
