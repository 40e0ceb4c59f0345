//! A first table: one MoE layer forward, by table and by the original's one-hot einsum, and whole training steps.
//!
//! Everything runs in one process, on the same weights, after a warm-up; the median of the repetitions is printed beside
//! the machine's own matrix-product rate measured in the same run. `cargo xtask bench` keeps the output.

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use moe_core::testing::{assert_close, random};
use moe_core::{
    Activation, BranchConfig, CandleOps, Capacity, EinsumDispatcher, ExpertMlps, Gate, MlpConfig, MlpWeights, Mode,
    MoeBlock, MoeConfig, MoeLayer, Ops, ParamSpec, RouteContext, RouterConfig, SeededNoise, Top1Config, Top1Router,
};
use moe_kernels::{KernelOps, Precision};
use moe_models::gpt::{Gpt, GptConfig, Pass, TokenBatch};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

const REPETITIONS: usize = 7;

/// Median seconds of `body`, after one run that does not count.
fn median_seconds(mut body: impl FnMut() -> Result<()>) -> Result<f64> {
    body()?;
    let mut times = Vec::with_capacity(REPETITIONS);
    for _ in 0..REPETITIONS {
        let start = Instant::now();
        body()?;
        times.push(start.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(times[REPETITIONS / 2])
}

/// GFLOP/s of candle's own f32 product of two large square matrices: the ceiling of what follows.
fn peak_gflops() -> Result<f64> {
    let n = 1536;
    let (a, b) = (random(1, &[n, n], 1.0, DType::F32), random(2, &[n, n], 1.0, DType::F32));
    let seconds = median_seconds(|| {
        a.matmul(&b)?;
        Ok(())
    })?;
    Ok(2.0 * (n as f64).powi(3) / seconds / 1e9)
}

struct Shape {
    /// Where the sizes come from.
    name: &'static str,
    d_model: usize,
    d_ff: usize,
    num_experts: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "embedded model", d_model: 160, d_ff: 640, num_experts: 8 },
    Shape { name: "350m-moe-32, narrow", d_model: 256, d_ff: 1024, num_experts: 32 },
];

fn layer_forward(peak: f64) -> Result<()> {
    println!("MoE layer forward with its router, top-1, nothing dropped; weights packed before");
    println!(
        "{:<22}{:>8}  {:<14}{:>10}{:>12}{:>10}{:>10}",
        "shape", "tokens", "form", "ms", "tokens/s", "GFLOP/s", "of peak"
    );
    for shape in &SHAPES {
        let expert = MlpConfig {
            d_model: shape.d_model,
            d_ff: shape.d_ff,
            activation: Activation::GeluTanh,
            bias: true,
            in_std: 0.05,
            out_std: 0.05,
        };
        let router = Top1Config { capacity: Capacity::UNLIMITED, ..Top1Config::default() };
        let config = MoeConfig {
            num_experts: shape.num_experts,
            expert,
            router: RouterConfig::Top1(router),
            branch: BranchConfig::None,
            gate_bound: 1.0,
            load_balance_coef: 0.0,
            router_z_coef: 0.0,
        };
        let initial = |spec: ParamSpec| Ok((spec.name.clone(), spec.initial(3, &Device::Cpu)?));
        let tensors: HashMap<String, Tensor> = config.params().into_iter().map(initial).collect::<Result<_>>()?;
        for num_tokens in [1, 32, 512, 2048] {
            let tokens = random(8, &[num_tokens, shape.d_model], 1.0, DType::F32);
            let noise = SeededNoise::new(1, 0);
            let context = RouteContext::new(Mode::Eval, &noise);
            let flops = 4.0 * (num_tokens * shape.d_model * shape.d_ff) as f64;
            let report = |form: &str, forward: &dyn Fn() -> Result<Tensor>, want: Option<&Tensor>| -> Result<Tensor> {
                let hidden = forward()?;
                if let Some(want) = want {
                    assert_close(&hidden, want, if form.contains("bf16") { 5e-2 } else { 1e-4 }, form);
                }
                let seconds = median_seconds(|| forward().map(|_| ()))?;
                let rate = flops / seconds / 1e9;
                println!(
                    "{:<22}{num_tokens:>8}  {form:<14}{:>10.3}{:>12.0}{rate:>10.1}{:>9.1}%",
                    shape.name,
                    seconds * 1e3,
                    num_tokens as f64 / seconds,
                    100.0 * rate / peak
                );
                Ok(hidden)
            };
            let by_table = |ops: Arc<dyn Ops>| -> Result<Box<dyn Fn() -> Result<Tensor>>> {
                let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
                let layer = MoeBlock::new(&config, vb, ops)?;
                let tokens = tokens.clone();
                Ok(Box::new(move || Ok(layer.forward(&tokens, &RouteContext::infer())?.hidden)))
            };
            let want = report("candle", &by_table(Arc::new(CandleOps))?, None)?;
            report("kernels f32", &by_table(Arc::new(KernelOps::packing(Precision::F32)))?, Some(&want))?;
            report("kernels bf16", &by_table(Arc::new(KernelOps::packing(Precision::Bf16)))?, Some(&want))?;
            let part = |name: &str| tensors[name].clone();
            let weights = MlpWeights {
                fc_in: part("experts.fc_in.weight").into(),
                fc_in_bias: Some(part("experts.fc_in.bias")),
                fc_out: part("experts.fc_out.weight").into(),
                fc_out_bias: Some(part("experts.fc_out.bias")),
            };
            let experts = ExpertMlps::from_weights(weights, Activation::GeluTanh)?;
            let gate = Top1Router::new(Gate::new(part("gate.weight"))?, router)?;
            let einsum = MoeLayer::new(gate, EinsumDispatcher, experts)?;
            report("einsum", &|| Ok(einsum.forward(&tokens, &context)?.hidden), Some(&want))?;
        }
    }
    Ok(())
}

fn training_step(peak: f64) -> Result<()> {
    const BATCH: usize = 8;
    println!("\nTraining step (loss and gradients, one batch of {BATCH} sequences, without the optimizer)");
    println!("{:<28}{:>12}{:>10}{:>12}{:>10}{:>10}", "model", "parameters", "ms", "tokens/s", "GFLOP/s", "of peak");
    for name in ["tiny-dense", "tiny-moe", "tiny-pyramid-moe", "tiny-residual-moe", "tiny-pr-moe"] {
        let Some(config) = GptConfig::preset(name) else { anyhow::bail!("no preset {name}") };
        for precision in [Precision::F32, Precision::Bf16] {
            let model = Gpt::new(config.clone(), 1, &Device::Cpu)?.with_precision(precision)?;
            let seq_len = model.config().max_seq_len;
            let tokens = BATCH * seq_len;
            let mut rng = moe_core::CounterRng::new(2, 0);
            let mut ids = || (0..tokens).map(|_| rng.below(model.config().vocab_size as u32)).collect();
            let batch = TokenBatch { input_ids: ids(), target_ids: ids(), batch: BATCH, seq_len };
            let seconds = median_seconds(|| {
                model.loss(&batch, Pass::train(1))?.loss.backward()?;
                Ok(())
            })?;
            let rate = 3.0 * (model.config().flops_per_token() * tokens) as f64 / seconds / 1e9;
            println!(
                "{:<28}{:>12}{:>10.1}{:>12.0}{rate:>10.1}{:>9.1}%",
                format!("{name} {precision:?}"),
                model.config().parameter_count().total,
                seconds * 1e3,
                tokens as f64 / seconds,
                100.0 * rate / peak
            );
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let peak = peak_gflops()?;
    let threads = candle_core::utils::get_num_threads();
    println!("candle's matrix product 1536^3, f32, {threads} threads: {peak:.1} GFLOP/s (the peak below)\n");
    layer_forward(peak)?;
    training_step(peak)
}
