//! Every operation in f32, forward and backward, against the same in ordinary candle calls: with AVX2 forced and with the
//! fastest instruction set of this machine. Ours run as the trainer runs them, on a tape and with the pool's threads awake; candle's
//! with its own graph and its own threads.
//!
//! Built by itself (`--package moe-kernels`), candle's matrix product has no AVX-512 path (its `x86-v4` feature is off).

use candle_core::{Device, Tensor, Var};
use moe_core::ops::{CandleOps, DecoderOps, LossOps, MoeOps};
use moe_core::tape::{GradBuffers, Tape};
use moe_core::{Activation, CounterRng, DispatchTable};
use moe_kernels::attention::causal_attention;
use moe_kernels::cross_entropy::linear_cross_entropy;
use moe_kernels::layer_norm::layer_norm;
use moe_kernels::permute::{permute, unpermute};
use moe_kernels::rms_norm::rms_norm;
use moe_kernels::rotary::{Positions, RotaryLayout, RotaryTable, rotary};
use moe_kernels::{Isa, Precision, Result, activation, embedding, grouped_linear, machine, parallel, select};
use std::sync::Arc;
use std::time::Instant;

const TOKENS: usize = 1024;
const D_MODEL: usize = 512;
const EXPERTS: usize = 8;
const HEADS: usize = 8;
const VOCAB: usize = 4096;
const SEQ: usize = 256;

fn random(seed: u64, shape: &[usize]) -> Result<Tensor> {
    let mut rng = CounterRng::new(seed, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal_f64() as f32 * 0.3).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

type Run<'a> = Box<dyn Fn(&[Tensor]) -> Result<Tensor> + 'a>;

struct Operation<'a> {
    name: &'static str,
    inputs: Vec<Var>,
    ours: Run<'a>,
    candle: Run<'a>,
}

/// Rounds of a measurement; candle and our instruction sets take turns in each, so that other work on the machine hits all.
const ROUNDS: usize = 15;

/// Milliseconds of one call.
fn once(body: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    body()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// Least milliseconds of a forward pass, and of forward and backward together: candle's, and ours on each set.
fn time(operation: &Operation<'_>, isas: [Isa; 2]) -> Result<[[f64; 2]; 3]> {
    let plain: Vec<Tensor> = operation.inputs.iter().map(|v| v.as_tensor().detach()).collect();
    let tracked: Vec<Tensor> = operation.inputs.iter().map(|v| v.as_tensor().clone()).collect();
    let named = operation.inputs.iter().map(|var| (operation.name, var));
    let mut buffers = GradBuffers::new(named)?;
    let mut least = [[f64::INFINITY; 2]; 3];
    for _ in 0..ROUNDS {
        for (least, isa) in least.iter_mut().zip([None, Some(isas[0]), Some(isas[1])]) {
            if isa.is_some_and(|isa| !isa.is_available()) {
                continue;
            }
            isa.map_or(Ok(()), select::force)?;
            let [forward, both] = if isa.is_some() {
                let run = &operation.ours;
                parallel::together(|| -> Result<[f64; 2]> {
                    let forward = once(|| run(&plain).map(drop))?;
                    let both = once(|| {
                        buffers.begin();
                        let (loss, tape) = Tape::record(|| -> Result<Tensor> { Ok(run(&tracked)?.sum_all()?) });
                        Ok(tape.backward_of(&loss?, &mut buffers.gradients())?)
                    })?;
                    Ok([forward, both])
                })?
            } else {
                let run = &operation.candle;
                let forward = once(|| run(&plain).map(drop))?;
                [forward, once(|| Ok(run(&tracked)?.sum_all()?.backward().map(drop)?))?]
            };
            *least = [least[0].min(forward), least[1].min(both)];
        }
    }
    Ok(least)
}

fn operations<'a>(
    table: &'a Arc<DispatchTable>,
    ids: &'a [u32],
    angles: &'a RotaryTable,
) -> Result<Vec<Operation<'a>>> {
    let vars = |shapes: &[&[usize]]| -> Result<Vec<Var>> {
        let var = |(i, shape): (usize, &&[usize])| Ok(Var::from_tensor(&random(i as u64, shape)?)?);
        shapes.iter().enumerate().map(var).collect()
    };
    let rows = table.num_rows();
    let f32 = Precision::F32;
    let mut all = Vec::new();
    let mut add = |name, shapes: &[&[usize]], ours: Run<'a>, candle: Run<'a>| -> Result<()> {
        all.push(Operation { name, inputs: vars(shapes)?, ours, candle });
        Ok(())
    };
    add(
        "linear",
        &[&[TOKENS, D_MODEL], &[4 * D_MODEL, D_MODEL], &[4 * D_MODEL]],
        Box::new(move |x| grouped_linear::linear(&x[0], &x[1], Some(&x[2]), f32)),
        Box::new(move |x| Ok(x[0].matmul(&x[1].t()?)?.broadcast_add(&x[2])?)),
    )?;
    add(
        "grouped linear",
        &[&[rows, D_MODEL], &[EXPERTS, 2 * D_MODEL, D_MODEL]],
        Box::new(move |x| grouped_linear::grouped_linear(&x[0], &x[1], None, &table.expert_offsets, f32)),
        Box::new(move |x| Ok(CandleOps.grouped_linear(&x[0], &x[1].clone().into(), None, &table.expert_offsets)?)),
    )?;
    for (name, which) in [("GELU", Activation::GeluTanh), ("SwiGLU", Activation::SwiGlu)] {
        add(
            name,
            &[&[TOKENS, 4 * D_MODEL]],
            Box::new(move |x| activation::activation(which, &x[0])),
            Box::new(move |x| Ok(CandleOps.activation(which, &x[0])?)),
        )?;
    }
    add(
        "layer norm",
        &[&[TOKENS, D_MODEL], &[D_MODEL], &[D_MODEL]],
        Box::new(move |x| layer_norm(&x[0], &x[1], &x[2], 1e-5)),
        Box::new(move |x| Ok(CandleOps.layer_norm(&x[0], &x[1], &x[2], 1e-5)?)),
    )?;
    add(
        "RMS norm",
        &[&[TOKENS, D_MODEL], &[D_MODEL]],
        Box::new(move |x| rms_norm(&x[0], &x[1], 1e-5)),
        Box::new(move |x| Ok(CandleOps.rms_norm(&x[0], &x[1], 1e-5)?)),
    )?;
    add(
        "rotary",
        &[&[TOKENS / SEQ, SEQ, D_MODEL]],
        Box::new(move |x| rotary(&x[0], angles, RotaryLayout::Halves, Positions::From(0))),
        Box::new(move |x| Ok(CandleOps.rotary(&x[0], angles, RotaryLayout::Halves, Positions::From(0))?)),
    )?;
    add(
        "attention",
        &[&[TOKENS / SEQ, SEQ, 3 * D_MODEL]],
        Box::new(move |x| causal_attention(&x[0], HEADS, SEQ, f32)),
        Box::new(move |x| Ok(CandleOps.attention_fused(&x[0], HEADS, SEQ)?)),
    )?;
    add(
        "permute",
        &[&[TOKENS, D_MODEL]],
        Box::new(move |x| permute(&x[0], table)),
        Box::new(move |x| Ok(CandleOps.permute(&x[0], table)?)),
    )?;
    add(
        "unpermute",
        &[&[rows, D_MODEL], &[TOKENS, 2]],
        Box::new(move |x| unpermute(&x[0], &x[1], table)),
        Box::new(move |x| Ok(CandleOps.unpermute(&x[0], &x[1], table)?)),
    )?;
    add(
        "embedding",
        &[&[VOCAB, D_MODEL]],
        Box::new(move |x| embedding::embedding(&x[0], ids)),
        Box::new(move |x| Ok(x[0].index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?)),
    )?;
    add(
        "loss",
        &[&[TOKENS, D_MODEL], &[VOCAB, D_MODEL]],
        Box::new(move |x| linear_cross_entropy(&x[0], &x[1], ids, f32)),
        Box::new(move |x| Ok(CandleOps.linear_cross_entropy(&x[0], &x[1].clone().into(), ids)?)),
    )?;
    Ok(all)
}

fn main() -> Result<()> {
    let mut rng = CounterRng::new(3, 0);
    let ids: Vec<u32> = (0..TOKENS).map(|_| rng.below(VOCAB as u32)).collect();
    let experts: Vec<u32> = (0..TOKENS)
        .flat_map(|_| {
            let first = rng.below(EXPERTS as u32);
            [first, (first + 1 + rng.below(EXPERTS as u32 - 1)) % EXPERTS as u32]
        })
        .collect();
    let table = Arc::new(DispatchTable::from_expert_ids(TOKENS, 2, EXPERTS, &experts));
    let angles = RotaryTable::new(D_MODEL / HEADS, D_MODEL / HEADS, 1e4, SEQ)?;
    println!("machine: {}; {TOKENS} tokens of width {D_MODEL}, f32, best of {ROUNDS}, ms", machine::name());
    println!("{:<16}{:>34}{:>34}", "", "forward", "forward and backward");
    println!(
        "{:<16}{:>9}{:>9}{:>7}{:>9}{:>9}{:>9}{:>7}{:>9}",
        "operation", "candle", "avx2", "ratio", "fastest", "candle", "avx2", "ratio", "fastest"
    );
    for operation in operations(&table, &ids, &angles)? {
        let [candle, avx2, best] = time(&operation, [Isa::Avx2, Isa::fastest()])?;
        print!("{:<16}", operation.name);
        for pass in 0..2 {
            let (candle, avx2, best) = (candle[pass], avx2[pass], best[pass]);
            print!("{candle:>9.2}{avx2:>9.2}{:>6.1}x{best:>9.2}", candle / avx2);
        }
        println!();
    }
    Ok(())
}
