//! Experts of one layer, forward, at the shapes of real models, beside the machine's ceilings measured around each shape.
//!
//! Weights come from memory: several layers are cycled, each call routes anew. Prints a table, and one JSON line per row
//! with `--json`; words pick shapes, types and numbers of tokens. `cargo xtask bench kernels` keeps the output and sets peers beside it.

use moe_core::{Activation, CounterRng, DispatchTable, DroplessConfig};
use moe_kernels::expert_mlp::{PackedExperts, WeightFormat};
use moe_kernels::gate::FusedGate;
use moe_kernels::machine::{self, Peaks};
use moe_kernels::quantized::QuantFormat;
use moe_kernels::{Isa, Precision, select};
use std::time::Instant;

struct Shape {
    name: &'static str,
    d_model: usize,
    d_ff: usize,
    num_experts: usize,
    top_k: usize,
    activation: Activation,
    /// Layers cycled, so that no cache holds the weights of the next call.
    layers: usize,
}

/// 350M-width experts of the paper with 32 and 128 experts; OLMoE-1B-7B; a small Mixtral.
const SHAPES: [Shape; 4] = [
    Shape {
        name: "gpt32",
        d_model: 1024,
        d_ff: 4096,
        num_experts: 32,
        top_k: 1,
        activation: Activation::GeluTanh,
        layers: 2,
    },
    Shape {
        name: "gpt128",
        d_model: 1024,
        d_ff: 4096,
        num_experts: 128,
        top_k: 1,
        activation: Activation::GeluTanh,
        layers: 1,
    },
    Shape {
        name: "olmoe",
        d_model: 2048,
        d_ff: 1024,
        num_experts: 64,
        top_k: 8,
        activation: Activation::SwiGlu,
        layers: 2,
    },
    Shape {
        name: "mixsmall",
        d_model: 1024,
        d_ff: 3584,
        num_experts: 8,
        top_k: 2,
        activation: Activation::SwiGlu,
        layers: 6,
    },
];
/// Measured from the last on: fresh memory is slower for its first seconds.
const TOKENS: [usize; 5] = [1, 4, 32, 512, 2048];
/// Tokens of the whole layers, gate included (bf16), which DeepSpeed's layer is set beside.
const LAYER_TOKENS: [usize; 3] = [1, 4, 32];

/// Tokens routed at random to `top_k` different experts each.
fn route(seed: u64, tokens: usize, shape: &Shape) -> (DispatchTable, usize) {
    let mut rng = CounterRng::new(seed, 0);
    let mut expert_ids = Vec::with_capacity(tokens * shape.top_k);
    for _ in 0..tokens {
        let start = expert_ids.len();
        while expert_ids.len() < start + shape.top_k {
            let expert = rng.below(shape.num_experts as u32);
            if !expert_ids[start..].contains(&expert) {
                expert_ids.push(expert);
            }
        }
    }
    let mut counts = vec![0u32; shape.num_experts];
    let slots = expert_ids.iter().map(|&e| {
        counts[e as usize] += 1;
        counts[e as usize] - 1
    });
    let slots: Vec<u32> = slots.collect();
    let table = DispatchTable::from_slots(tokens, shape.top_k, shape.num_experts, &expert_ids, &slots);
    (table, counts.iter().filter(|&&c| c > 0).count())
}

struct Row {
    /// Median and least time of one call.
    seconds: f64,
    best: f64,
    flops: f64,
    bytes: f64,
}

/// Median time of one call over several, each with its own routing and the next layer.
fn measure(shape: &Shape, layers: &[PackedExperts], tokens: usize) -> Row {
    let x: Vec<f32> = (0..tokens * shape.d_model).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.01).collect();
    let weights = vec![1.0 / shape.top_k as f32; tokens * shape.top_k];
    let calls = if tokens <= 32 { 40 } else { 8 };
    let mut times = Vec::new();
    let mut touched = 0;
    for call in 0..calls + 2 {
        let (table, experts) = route(call as u64, tokens, shape);
        let layer = &layers[call % layers.len()];
        let start = Instant::now();
        let out = layer.forward(&x, &table, &weights).expect("sizes fit");
        let seconds = start.elapsed().as_secs_f64();
        assert!(out.iter().all(|v| v.is_finite()));
        // The first calls warm up.
        if call >= 2 {
            times.push(seconds / experts as f64);
            touched += experts;
        }
    }
    // Routing varies from call to call: the median is of the time per expert touched.
    times.sort_by(f64::total_cmp);
    let experts = touched as f64 / calls as f64;
    let per_token = 2 * shape.d_model * shape.d_ff * (1 + shape.activation.inputs()) * shape.top_k;
    Row {
        seconds: times[times.len() / 2] * experts,
        best: times[0] * experts,
        flops: (per_token * tokens) as f64,
        bytes: experts * layers[0].expert_bytes() as f64,
    }
}

/// The whole layer: the gate's decision too, which routes each call's own tokens. Median of one call.
fn measure_layer(shape: &Shape, gate: &FusedGate, layers: &[PackedExperts], tokens: usize) -> Row {
    let mut rng = CounterRng::new(17, 0);
    let mut times = Vec::new();
    let mut touched = 0;
    const CALLS: usize = 24;
    for call in 0..CALLS + 2 {
        let x: Vec<f32> = (0..tokens * shape.d_model).map(|_| rng.normal_f64() as f32).collect();
        let start = Instant::now();
        let gated = gate.forward(&x).expect("sizes fit");
        let out = layers[call % layers.len()].forward(&x, &gated.table, &gated.combine_weights).expect("sizes fit");
        let seconds = start.elapsed().as_secs_f64();
        assert!(out.iter().all(|v| v.is_finite()));
        if call >= 2 {
            times.push(seconds);
            touched += gated.load.tokens_per_expert.iter().filter(|&&count| count > 0).count();
        }
    }
    times.sort_by(f64::total_cmp);
    let experts = touched as f64 / CALLS as f64;
    Row {
        seconds: times[times.len() / 2],
        best: times[0],
        flops: (2
            * shape.d_model
            * (shape.d_ff * (1 + shape.activation.inputs()) * shape.top_k + shape.num_experts)
            * tokens) as f64,
        bytes: experts * layers[0].expert_bytes() as f64 + (shape.num_experts * shape.d_model * 4) as f64,
    }
}

/// The multipliers that a type runs on.
#[derive(Clone, Copy)]
enum Unit {
    F32,
    Bf16,
    Int8,
}

/// What weights are kept as.
fn formats(isa: Isa) -> [(&'static str, WeightFormat, Unit); 4] {
    let bf16 = if isa >= Isa::Avx512Bf16 { Unit::Bf16 } else { Unit::F32 };
    [
        ("bf16", Precision::Bf16.into(), bf16),
        ("f32", Precision::F32.into(), Unit::F32),
        ("int8", QuantFormat::Int8.into(), Unit::Int8),
        ("int4", QuantFormat::INT4.into(), Unit::Int8),
    ]
}

/// A measured row: type, multipliers, tokens.
struct Measured(&'static str, Unit, usize, Row);

/// Prints the rows of one shape beside the ceilings measured before and after them.
fn print(shape: &str, rows: &[Measured], peaks: &Peaks, json: bool) {
    for Measured(name, unit, tokens, row) in rows {
        let rate = match unit {
            Unit::F32 => peaks.f32_gflops,
            Unit::Bf16 => peaks.bf16_gflops,
            Unit::Int8 => peaks.int8_gops,
        };
        let compute = if rate > 0.0 { row.flops / (rate * 1e9) } else { 0.0 };
        let floor = (row.bytes / (peaks.read_gbps * 1e9)).max(compute);
        println!(
            "{shape:<10}{name:<6}{tokens:>7}{:>11.3}{:>11.3}{:>12.0}{:>9.1}{:>10.1}{:>13.1}%{:>12.1}{:>12.1}",
            row.seconds * 1e3,
            row.best * 1e3,
            *tokens as f64 / row.seconds,
            row.bytes / row.seconds / 1e9,
            row.flops / row.seconds / 1e9,
            100.0 * floor / row.seconds,
            peaks.read_gbps,
            rate
        );
        if json {
            let line = serde_json::json!({
                "shape": shape, "type": name, "tokens": tokens, "seconds": row.seconds, "best": row.best,
                "weight_bytes": row.bytes, "flops": row.flops, "of_ceiling": floor / row.seconds, "read_gbps": peaks.read_gbps, "peak_gflops": rate,
            });
            println!("json {line}");
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let json = arguments.iter().any(|a| a == "--json");
    let only: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    if let Ok(name) = std::env::var(select::ENV) {
        name.parse().and_then(select::force).expect("a known instruction set");
    }
    let isa = select::current();
    println!("machine: {}; kernels: {isa}", machine::name());
    println!(
        "{:<10}{:<6}{:>7}{:>11}{:>11}{:>12}{:>9}{:>10}{:>14}{:>12}{:>12}",
        "shape",
        "type",
        "tokens",
        "ms",
        "best, ms",
        "tokens/s",
        "GB/s",
        "GFLOP/s",
        "of ceiling",
        "read, GB/s",
        "GFLOP/s max"
    );
    let mut before = Peaks::measure();
    // Words name shapes, types or numbers of tokens; without one of a kind, all of it runs.
    let formats = formats(isa);
    let wanted =
        |name: &str, all: &[&str]| only.iter().any(|o| *o == name) || !only.iter().any(|o| all.contains(&o.as_str()));
    let (types, shapes) = (formats.map(|f| f.0), SHAPES.each_ref().map(|s| s.name));
    let numbers: Vec<usize> = only.iter().filter_map(|word| word.parse().ok()).collect();
    let unknown = numbers.iter().find(|number| !TOKENS.contains(number));
    assert!(unknown.is_none(), "{unknown:?} tokens are not measured; {TOKENS:?} are");
    let has_tokens = |tokens: usize| numbers.is_empty() || numbers.contains(&tokens);
    for (name, format, unit) in formats.into_iter().filter(|f| wanted(f.0, &types)) {
        for shape in SHAPES.iter().filter(|s| wanted(s.name, &shapes)) {
            let width = shape.d_ff * shape.activation.inputs();
            let matrix = |len: usize| (0..len).map(|i| ((i * 31 % 97) as f32 - 48.0) * 1e-3).collect::<Vec<f32>>();
            let (fc_in, fc_out) = (matrix(width * shape.d_model), matrix(shape.d_model * shape.d_ff));
            let sizes = [shape.num_experts, shape.d_model, shape.d_ff];
            let layers = (0..shape.layers)
                .map(|_| PackedExperts::new(isa, format, shape.activation, sizes, |_| [fc_in.clone(), fc_out.clone()]));
            let layers: Vec<PackedExperts> = layers.collect::<Result<_, _>>().expect("sizes fit");
            let of = |&tokens: &usize| Measured(name, unit, tokens, measure(shape, &layers, tokens));
            let mut measured: Vec<Measured> = TOKENS.iter().rev().filter(|t| has_tokens(**t)).map(of).collect();
            measured.reverse();
            if name == "bf16" && shape.activation == Activation::GeluTanh {
                let mut rng = CounterRng::new(5, 0);
                let weight = (0..shape.num_experts * shape.d_model).map(|_| rng.normal_f64() as f32 * 0.03);
                let weight: Vec<f32> = weight.collect();
                let settings = DroplessConfig::softmax(shape.top_k, false);
                let gate = FusedGate::new(isa, settings, &weight, [shape.num_experts, shape.d_model], None);
                let gate = gate.expect("sizes fit");
                let of =
                    |&tokens: &usize| Measured("layer", unit, tokens, measure_layer(shape, &gate, &layers, tokens));
                measured.extend(LAYER_TOKENS.iter().filter(|t| has_tokens(**t)).map(of));
            }
            drop(layers);
            let after = Peaks::measure();
            print(shape.name, &measured, &before.highest(after), json);
            before = after;
        }
    }
}
