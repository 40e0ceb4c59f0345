//! Gate, dispatch and combine of one MoE layer, without its experts: fused gate and table against the one-hot einsums of
//! the original code.
//!
//! The paper's section 5.4 claims a factor of 6 for this exchange. Both sides run the same matrix product for the router
//! logits, the same capacity (factor 1.0, at least 4 rows) and the same threads, in f32; their results are compared
//! before timing starts. Prints a table, and one JSON line per row with `--json`.

use candle_core::{Device, Tensor};
use moe_core::{
    Capacity, CounterRng, Dispatcher, DroplessConfig, EinsumDispatcher, ExpertRows, Gate, Mode, RouteContext, Router,
    SeededNoise, Top1Config, Top1Router,
};
use moe_kernels::gate::FusedGate;
use moe_kernels::permute::{permute, unpermute};
use moe_kernels::{KernelOps, Result, machine, select};
use std::sync::Arc;
use std::time::Instant;

const EXPERTS: usize = 128;
const D_MODEL: usize = 1024;
const TOKENS: [usize; 4] = [1, 32, 512, 2048];
/// DeepSpeed's capacity.
const CAPACITY: Capacity = Capacity::DEEPSPEED;

fn normal(seed: u64, shape: &[usize]) -> candle_core::Result<Tensor> {
    let mut rng = CounterRng::new(seed, 0);
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal_f64() as f32).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// One layer's routing in both forms, over the same gate.
struct Layer {
    fused: FusedGate,
    router: Top1Router,
}

impl Layer {
    fn new() -> Result<Self> {
        let weight = (normal(1, &[EXPERTS, D_MODEL])? * 0.03)?;
        let values = weight.flatten_all()?.to_vec1::<f32>()?;
        let settings = DroplessConfig::softmax(1, false);
        let fused = FusedGate::new(select::current(), settings, &values, [EXPERTS, D_MODEL], None)?;
        let gate = Gate::with_ops(weight.into(), Arc::new(KernelOps::default()))?;
        let config = Top1Config { capacity: CAPACITY, use_rts: false, noisy_gate: None };
        Ok(Self { fused: fused.with_capacity(CAPACITY)?, router: Top1Router::new(gate, config)? })
    }

    /// Fused gate, gather by table, weighted sum by table; identity experts.
    fn by_table(&self, values: &[f32], tokens: &Tensor) -> Result<Tensor> {
        let gated = self.fused.forward(values)?;
        let table = Arc::new(gated.table);
        let rows = permute(tokens, &table)?;
        let shape = (table.num_tokens, table.top_k);
        unpermute(&rows, &Tensor::from_vec(gated.combine_weights, shape, &Device::Cpu)?, &table)
    }

    /// The original form: top-1 gating, two einsums over one-hot masks; identity experts.
    fn by_einsum(&self, tokens: &Tensor) -> Result<Tensor> {
        let noise = SeededNoise::new(0, 0);
        let routing = self.router.route(tokens, &RouteContext::new(Mode::Eval, &noise))?;
        let (ExpertRows { rows, offsets }, receipt) = EinsumDispatcher.dispatch(tokens, &routing)?;
        Ok(EinsumDispatcher.combine(ExpertRows { rows, offsets }, receipt)?)
    }
}

/// Median seconds of one call.
fn median(calls: usize, mut call: impl FnMut() -> Result<Tensor>) -> Result<f64> {
    let mut times = Vec::with_capacity(calls);
    for _ in 0..calls {
        let start = Instant::now();
        std::hint::black_box(call()?);
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[calls / 2])
}

/// Largest difference of the two results.
fn difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()?)
}

fn main() -> Result<()> {
    let json = std::env::args().any(|a| a == "--json");
    if let Ok(name) = std::env::var(select::ENV) {
        select::force(name.parse()?)?;
    }
    println!("machine: {}; kernels: {}; {} threads", machine::name(), select::current(), rayon::current_num_threads());
    println!("{EXPERTS} experts, d_model {D_MODEL}, top-1, capacity factor 1.0, f32, experts excluded\n");
    println!(
        "{:>7}{:>12}{:>14}{:>14}{:>9}{:>12}",
        "tokens", "gate ms", "by table ms", "by einsum ms", "ratio", "difference"
    );
    let layer = Layer::new()?;
    for tokens in TOKENS {
        let x = normal(2, &[tokens, D_MODEL])?;
        let values = x.flatten_all()?.to_vec1::<f32>()?;
        let difference = difference(&layer.by_table(&values, &x)?, &layer.by_einsum(&x)?)?;
        assert!(difference < 1e-5, "both forms must agree, they differ by {difference}");
        let calls = if tokens <= 32 { 51 } else { 15 };
        let table = median(calls, || layer.by_table(&values, &x))?;
        let einsum = median(if tokens <= 32 { 21 } else { 3 }, || layer.by_einsum(&x))?;
        let gate = median(calls, || {
            std::hint::black_box(layer.fused.forward(&values)?);
            Ok(x.clone())
        })?;
        println!(
            "{tokens:>7}{:>12.3}{:>14.3}{:>14.3}{:>9.1}{difference:>12.1e}",
            gate * 1e3,
            table * 1e3,
            einsum * 1e3,
            einsum / table
        );
        if json {
            let line = serde_json::json!({
                "bench": "gating", "experts": EXPERTS, "d_model": D_MODEL, "tokens": tokens,
                "gate_seconds": gate, "table_seconds": table, "einsum_seconds": einsum, "ratio": einsum / table,
            });
            println!("json {line}");
        }
    }
    Ok(())
}
