//! A whole model from its folder: loading, a prompt, and decoding one, eight and 32 sequences, beside the machine's ceilings.
//!
//! Arguments: a model folder, the form of its weights (bf16, f32, int8, int4), and perhaps a folder to keep them packed in. `cargo xtask bench models` makes folders, runs
//! this for each, and sets peers beside it.

use anyhow::{Context, Result, bail};
use moe_core::CounterRng;
use moe_core::Weight;
use moe_kernels::machine::{self, Peaks};
use moe_kernels::select;
use moe_models::train::memory;
use moe_models::{
    CachedSequence, CausalLm, Decoder, KvPool, LogitsOf, PackedForms, PoolConfig, Precision, QuantFormat, SequenceStep,
    StepOutput,
};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const PROMPT: usize = 512;
const CONTEXT: usize = 128;
const STEPS: usize = 32;
const ROUNDS: usize = 5;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn forms(name: &str) -> Result<PackedForms> {
    Ok(match name {
        "f32" => Precision::F32.into(),
        "bf16" => Precision::Bf16.into(),
        // The output layer is of 8 bits in either, as OpenVINO has it.
        "int8" => PackedForms::from(Precision::Bf16).with_products(QuantFormat::Int8).with_output(QuantFormat::Int8),
        "int4" => PackedForms::from(Precision::Bf16).with_products(QuantFormat::INT4).with_output(QuantFormat::Int8),
        other => bail!("{other:?} is not a form of weights: f32, bf16, int8 or int4"),
    })
}

struct Bench {
    decoder: Decoder,
    rng: CounterRng,
}

/// What a case took, and what it had to read and compute.
struct Case {
    name: &'static str,
    tokens: usize,
    seconds: f64,
    best: f64,
    /// Of weights, in one pass.
    bytes: f64,
    flops: f64,
}

impl Bench {
    fn ids(&mut self, count: usize) -> Vec<u32> {
        let vocab = self.decoder.vocab_size() as u32;
        (0..count).map(|_| self.rng.below(vocab)).collect()
    }

    fn pass(&self, sequences: &mut [CachedSequence], ids: &[Vec<u32>], pool: &KvPool) -> Result<StepOutput> {
        let step = |(sequence, token_ids)| SequenceStep { sequence, token_ids, logits: LogitsOf::Last };
        let mut batch: Vec<_> = sequences.iter_mut().zip(ids.iter().map(Vec::as_slice)).map(step).collect();
        Ok(self.decoder.forward(&mut batch, pool)?)
    }

    /// Bytes of weights that a pass of `rows` tokens reads, each once, and multiply-adds' operations.
    fn work(&self, output: &StepOutput, rows: usize) -> (f64, f64) {
        let weights = self.decoder.weights();
        // Latent attention has stacks too, of heads.
        let is_experts = |weight: &Weight| {
            weight.dims().len() == 3 && output.experts.iter().any(|layer| layer.num_experts == weight.dims()[0])
        };
        let experts: Vec<&&Weight> = weights.iter().filter(|weight| is_experts(weight)).collect();
        let per_layer = experts.len() / output.experts.len().max(1);
        let (mut bytes, mut flops) = (0.0, 0.0);
        for (layer, weights) in output.experts.iter().zip(experts.chunks(per_layer.max(1))) {
            let touched = layer.expert_ids.iter().collect::<BTreeSet<_>>().len();
            for weight in weights {
                bytes += weight.bytes() as f64 * touched as f64 / layer.num_experts as f64;
                flops += 2.0 * (weight.dims()[1] * weight.dims()[2] * layer.top_k * rows) as f64;
            }
        }
        // The first table is looked up. The output layer sees the last rows alone.
        let [vocab, width] = [self.decoder.vocab_size(), self.decoder.config().d_model];
        let is_table = |weight: &&&Weight| weight.dims() == [vocab, width];
        let heads = output.logits.dims()[0];
        let mut tables = weights.iter().filter(is_table);
        if let Some(head) = tables.next_back() {
            bytes += head.bytes() as f64;
            flops += 2.0 * (vocab * width * heads) as f64;
        }
        for weight in weights.iter().filter(|weight| !is_experts(weight) && !is_table(weight)) {
            bytes += weight.bytes() as f64;
            flops += 2.0 * (weight.dims().iter().product::<usize>() * rows) as f64;
        }
        (bytes, flops)
    }

    fn prefill(&mut self) -> Result<Case> {
        let pool = self.decoder.new_pool(PoolConfig::for_tokens(1, PROMPT))?;
        let (mut times, mut work) = (Vec::new(), (0.0, 0.0));
        for round in 0..ROUNDS + 1 {
            let ids = [self.ids(PROMPT)];
            let mut sequences = [pool.sequence()];
            let start = Instant::now();
            let output = self.pass(&mut sequences, &ids, &pool)?;
            if round > 0 {
                times.push(start.elapsed().as_secs_f64());
                work = self.work(&output, PROMPT);
            }
        }
        Ok(Case::new("prefill512", PROMPT, times, work))
    }

    fn decode(&mut self, name: &'static str, count: usize) -> Result<Case> {
        let pool = self.decoder.new_pool(PoolConfig::for_tokens(count, CONTEXT + STEPS + 2))?;
        let mut sequences: Vec<CachedSequence> = (0..count).map(|_| pool.sequence()).collect();
        let prompts: Vec<Vec<u32>> = (0..count).map(|_| self.ids(CONTEXT)).collect();
        self.pass(&mut sequences, &prompts, &pool)?;
        let (mut times, mut works) = (Vec::new(), Vec::new());
        for step in 0..STEPS + 2 {
            let ids: Vec<Vec<u32>> = (0..count).map(|_| self.ids(1)).collect();
            let start = Instant::now();
            let output = self.pass(&mut sequences, &ids, &pool)?;
            if step >= 2 {
                times.push(start.elapsed().as_secs_f64());
                works.push(self.work(&output, count));
            }
        }
        let mean = |part: fn(&(f64, f64)) -> f64| works.iter().map(part).sum::<f64>() / works.len() as f64;
        Ok(Case::new(name, count, times, (mean(|work| work.0), mean(|work| work.1))))
    }
}

impl Case {
    fn new(name: &'static str, tokens: usize, times: Vec<f64>, (bytes, flops): (f64, f64)) -> Self {
        let best = times.iter().copied().fold(f64::INFINITY, f64::min);
        Self { name, tokens, seconds: median(times), best, bytes, flops }
    }
}

fn main() -> Result<()> {
    if let Ok(name) = std::env::var(select::ENV) {
        select::force(name.parse()?)?;
    }
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let ([folder, form] | [folder, form, _]) = arguments.as_slice() else {
        bail!("give a model folder and a form of weights: `cargo bench -p moe-models --bench models -- DIR bf16`");
    };
    let start = Instant::now();
    let decoder = match arguments.get(2) {
        Some(cache) => {
            let (decoder, kept) = Decoder::load_kept(Path::new(folder), forms(form)?, Path::new(cache))?;
            println!("{kept:?}");
            decoder
        }
        None => Decoder::load(Path::new(folder), forms(form)?).context(folder.clone())?,
    };
    let load = start.elapsed().as_secs_f64();
    let peak = memory::peak_bytes().unwrap_or(0);
    let packed: usize = decoder.weights().iter().map(|weight| weight.bytes()).sum();
    println!("{} {form}: {}, {}", folder, machine::name(), select::current());
    println!(
        "loaded in {load:.2} s; {:.2} GB packed, {:.2} GB at most ({:.2} times)",
        packed as f64 / 1e9,
        peak as f64 / 1e9,
        peak as f64 / packed as f64,
    );
    let before = Peaks::measure();
    let mut bench = Bench { decoder, rng: CounterRng::new(1, 0) };
    let cases = [
        bench.prefill()?,
        bench.decode("decode_b1", 1)?,
        bench.decode("decode_b8", 8)?,
        bench.decode("decode_b32", 32)?,
    ];
    let peaks = before.highest(Peaks::measure());
    println!("read rate {:.1} GB/s, bf16 {:.0} GFLOP/s", peaks.read_gbps, peaks.bf16_gflops);
    println!("{:>12}{:>12}{:>12}{:>12}{:>10}{:>12}", "case", "tokens/s", "best", "GB/s", "of read", "GFLOP/s");
    for Case { name, tokens, seconds, best, bytes, flops } in &cases {
        let (rate, gbps) = (*tokens as f64 / seconds, bytes / seconds / 1e9);
        println!(
            "{name:>12}{rate:>12.1}{:>12.1}{gbps:>12.1}{:>9.0}%{:>12.1}",
            *tokens as f64 / best,
            100.0 * gbps / peaks.read_gbps,
            flops / seconds / 1e9
        );
        let row = serde_json::json!({
            "case": name, "form": form, "tokens_per_second": rate, "best_tokens_per_second": *tokens as f64 / best,
            "gbps": gbps, "read_gbps": peaks.read_gbps, "gflops": flops / seconds / 1e9,
            "bf16_gflops": peaks.bf16_gflops, "load_seconds": load, "peak_bytes": peak, "packed_bytes": packed,
        });
        println!("json {row}");
    }
    Ok(())
}
