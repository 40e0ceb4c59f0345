//! Whole training steps of a GPT with experts: loss, gradients and AdamW, by the trainer's own code.
//!
//! The model of `peers.py`: 8 layers, every second one with 16 experts, top-1. Each batching runs in a process of its
//! own with the allocator and the settings of `moe-train`. Prints a table, and one JSON line per row with `--json`;
//! words choose rows, `--steps N` how many steps count. Reads no data: tokens are random, so nothing is learned.
//! `cargo xtask bench training` keeps the output and sets peers beside it.

use anyhow::{Context, Result, bail, ensure};
use candle_core::{DType, Device, Var};
use moe_core::tape::GradBuffers;
use moe_core::{Capacity, CounterRng};
use moe_kernels::{Precision, machine, select};
use moe_models::gpt::{Gpt, GptConfig, GptMoeConfig};
use moe_models::train::model::{LossOutput, Pass, TokenBatch};
use moe_models::train::optimizer::AdamW;
use moe_models::train::step::{BatchSums, accumulate, grad_buffers};
use moe_models::train::{TrainConfig, TrainModel};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// As in `moe-train`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEQ_LEN: usize = 256;
/// Sequences of a step.
const BATCH: usize = 8;
const LR: f64 = 1e-4;
/// Set for the process that measures: run the rows here.
const HERE: &str = "--here";

const PRECISIONS: [(&str, Precision); 2] = [("bf16", Precision::Bf16), ("f32", Precision::F32)];

/// The paper's router with DeepSpeed's bound on an expert's rows, and without any.
const ROUTERS: [(&str, Capacity); 2] = [
    ("capacity", Capacity { train_factor: Some(1.25), eval_factor: Some(1.25), min_capacity: 4 }),
    ("dropless", Capacity::UNLIMITED),
];

/// A way to cut the step's sequences into micro-batches.
struct Batching {
    name: &'static str,
    /// Sequences of each.
    micro_batch_size: usize,
}

const BATCHINGS: [Batching; 2] =
    [Batching { name: "1x8", micro_batch_size: 8 }, Batching { name: "2x4", micro_batch_size: 4 }];

fn model_config(capacity: Capacity) -> GptConfig {
    GptConfig {
        vocab_size: 8192,
        max_seq_len: SEQ_LEN,
        d_model: 512,
        num_layers: 8,
        num_heads: 8,
        d_ff: 2048,
        layer_norm_eps: 1e-5,
        init_std: 0.02,
        eos_token_id: None,
        moe: Some(GptMoeConfig { capacity, ..GptMoeConfig::paper(vec![16; 4], false) }),
    }
}

/// What positions start at, times [`GptConfig::init_std`]: 1.
const POSITION_SCALE: f64 = 50.0;

/// An untrained model that routes about as evenly as a trained one.
///
/// With positions as small as tokens, what every token gets from the first feed-forward network outweighs what sets
/// tokens apart, and a few experts are asked for most of them: 44 % dropped at capacity factor 1.25.
fn random_model(capacity: Capacity) -> Result<Gpt> {
    let model = Gpt::new(model_config(capacity), 1, &Device::Cpu)?;
    let positions = model.params().iter().find(|(name, _)| name == "model.embed_positions.weight");
    let (_, positions) = positions.context("the model has no positions")?;
    positions.set(&(positions.as_tensor() * POSITION_SCALE)?)?;
    Ok(model)
}

/// The command line: words that choose rows, and settings.
struct Options {
    words: Vec<String>,
    steps: usize,
    json: bool,
    here: bool,
}

impl Options {
    fn read() -> Result<Self> {
        let mut options = Self { words: Vec::new(), steps: 4, json: false, here: false };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--json" => options.json = true,
                HERE => options.here = true,
                // From cargo.
                "--bench" => (),
                "--steps" => {
                    let steps = arguments.next().context("--steps needs a number")?;
                    options.steps = steps.parse().with_context(|| format!("--steps needs a number, got {steps}"))?;
                }
                _ if Self::known().any(|word| word == argument) => options.words.push(argument),
                _ => bail!("{argument:?} is none of {:?}, --steps and --json", Self::known().collect::<Vec<_>>()),
            }
        }
        ensure!(options.steps >= 1, "--steps must be at least 1");
        Ok(options)
    }

    fn known() -> impl Iterator<Item = &'static str> {
        let [precisions, routers, batchings] =
            [PRECISIONS.map(|p| p.0), ROUTERS.map(|r| r.0), BATCHINGS.each_ref().map(|b| b.name)];
        [precisions, routers, batchings].into_iter().flatten()
    }

    /// Whether the words choose `name` among `all`; without a word of these, all are chosen.
    fn wants(&self, name: &str, all: &[&str]) -> bool {
        let mut chosen = self.words.iter().filter(|word| all.contains(&word.as_str())).peekable();
        chosen.peek().is_none() || chosen.any(|word| word == name)
    }
}

/// A model that counts the time of its losses.
struct Timed<'a> {
    model: &'a Gpt,
    forward_ns: AtomicU64,
}

impl TrainModel for Timed<'_> {
    fn vocab_size(&self) -> usize {
        TrainModel::vocab_size(self.model)
    }
    fn max_seq_len(&self) -> usize {
        TrainModel::max_seq_len(self.model)
    }
    fn params(&self) -> &[(String, Var)] {
        self.model.params()
    }
    fn has_weight_decay(&self, name: &str, shape: &[usize]) -> bool {
        self.model.has_weight_decay(name, shape)
    }
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> moe_models::Result<LossOutput> {
        let start = Instant::now();
        let output = self.model.loss(batch, pass);
        self.forward_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        output
    }
    fn save(&self, dir: &Path, dtype: DType) -> moe_models::Result<()> {
        self.model.save(dir, dtype)
    }
}

/// Times of one step, or the medians of several, each taken by itself.
#[derive(Clone, Copy)]
struct Times {
    step: Duration,
    forward: Duration,
    backward: Duration,
    optimizer: Duration,
}

/// What one step did.
struct Stepped {
    times: Times,
    lm_loss: f64,
    drop_rate: f64,
}

/// One run of the trainer's step over a model.
struct Run<'a> {
    model: Timed<'a>,
    config: TrainConfig,
    optimizer: AdamW,
    grads: GradBuffers,
    rng: CounterRng,
    step: u64,
}

impl<'a> Run<'a> {
    fn new(model: &'a Gpt, batching: &Batching) -> Result<Self> {
        let config = TrainConfig {
            micro_batch_size: batching.micro_batch_size,
            global_batch_size: BATCH,
            precision: model.precision(),
            ..TrainConfig::default()
        };
        let config = config.resolved(SEQ_LEN)?;
        let decays = model.params().iter().map(|(name, var)| model.has_weight_decay(name, var.dims())).collect();
        let optimizer = AdamW::new(config.adamw(), model.params(), decays)?;
        let grads = grad_buffers(model)?;
        let model = Timed { model, forward_ns: AtomicU64::new(0) };
        Ok(Self { model, config, optimizer, grads, rng: CounterRng::new(2, 0), step: 0 })
    }

    fn random_batches(&mut self) -> Vec<TokenBatch> {
        let (batch, vocab_size) = (self.config.micro_batch_size, self.model.vocab_size() as u32);
        let mut ids = || (0..batch * SEQ_LEN).map(|_| self.rng.below(vocab_size)).collect();
        let draw = |_| TokenBatch { input_ids: ids(), target_ids: ids(), batch, seq_len: SEQ_LEN };
        (0..self.config.grad_accum()).map(draw).collect()
    }

    /// What `Trainer` does between drawing a batch and reporting.
    fn step(&mut self) -> Result<Stepped> {
        let batches = self.random_batches();
        let seeds: Vec<u64> = (0..batches.len() as u64).map(|i| CounterRng::mix(3, &[self.step, i])).collect();
        self.model.forward_ns.store(0, Ordering::Relaxed);
        self.step += 1;

        let start = Instant::now();
        let sums = accumulate(&self.model, &batches, &seeds, &mut self.grads)?;
        let accumulated = start.elapsed();
        let scale = 1.0 / sums.micro_batches as f64;
        let report = self.optimizer.step(self.model.params(), &self.grads.all(), scale, LR)?;
        let optimizer = start.elapsed() - accumulated;
        let (lm_loss, drop_rate) = (sums.lm_loss, drop_rate(&sums));
        drop(sums);
        let step = start.elapsed();

        ensure!(report.applied, "the gradients of step {} are not finite", self.step);
        // Side by side, so a share of the sum passed by the clock; the rest is backward and adding up.
        let forward = Duration::from_nanos(self.model.forward_ns.load(Ordering::Relaxed));
        let backward = accumulated.saturating_sub(forward);
        Ok(Stepped { times: Times { step, forward, backward, optimizer }, lm_loss, drop_rate })
    }
}

fn drop_rate(sums: &BatchSums) -> f64 {
    sums.layers.iter().map(|layer| layer.load.drop_rate()).sum::<f64>() / sums.layers.len().max(1) as f64
}

/// A measured row.
struct Measured {
    median: Times,
    best: Duration,
    drop_rate: f64,
}

fn measure(model: &Gpt, batching: &Batching, steps: usize) -> Result<Measured> {
    let mut run = Run::new(model, batching)?;
    // The first step warms up, and is checked: random weights on random tokens know nothing.
    let (lm_loss, unknowing) = (run.step()?.lm_loss, (model.config().vocab_size as f64).ln());
    ensure!((lm_loss - unknowing).abs() < 0.5, "an untrained model's loss is {lm_loss}, expected about {unknowing}");
    let stepped = (0..steps).map(|_| run.step()).collect::<Result<Vec<_>>>()?;
    let median = |of: fn(&Times) -> Duration| {
        let mut times: Vec<Duration> = stepped.iter().map(|s| of(&s.times)).collect();
        times.sort();
        (times[(steps - 1) / 2] + times[steps / 2]) / 2
    };
    Ok(Measured {
        median: Times {
            step: median(|t| t.step),
            forward: median(|t| t.forward),
            backward: median(|t| t.backward),
            optimizer: median(|t| t.optimizer),
        },
        best: stepped.iter().map(|s| s.times.step).min().unwrap_or_default(),
        drop_rate: stepped.iter().map(|s| s.drop_rate).sum::<f64>() / steps as f64,
    })
}

const MS: f64 = 1e3;

fn print(precision: &str, router: &str, batching: &Batching, config: &GptConfig, row: &Measured, json: bool) {
    let Measured { median, best, drop_rate } = row;
    let tokens = (BATCH * SEQ_LEN) as f64;
    let [step, forward, backward, optimizer] =
        [median.step, median.forward, median.backward, median.optimizer].map(|t| t.as_secs_f64());
    let flops = 3.0 * config.flops_per_token() as f64 * tokens;
    println!(
        "{precision:<6}{router:<10}{:<6}{:>10.0}{:>10.0}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>9.1}%",
        batching.name,
        tokens / step,
        tokens / best.as_secs_f64(),
        step * MS,
        forward * MS,
        backward * MS,
        optimizer * MS,
        flops / step / 1e9,
        100.0 * drop_rate
    );
    if json {
        let parameters = config.parameter_count();
        let line = serde_json::json!({
            "type": precision, "router": router, "batches": batching.name,
            "tokens_per_second": tokens / step, "best": tokens / best.as_secs_f64(),
            "step_ms": step * MS, "forward_ms": forward * MS, "backward_ms": backward * MS,
            "optimizer_ms": optimizer * MS, "flops": flops, "drop_rate": drop_rate,
            "parameters": parameters.total, "active_parameters": parameters.active,
        });
        println!("json {line}");
    }
}

/// Measures the rows of one batching in this process.
fn measure_here(options: &Options) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads(cores).build_global()?;
    let (precisions, routers) = (PRECISIONS.map(|p| p.0), ROUTERS.map(|r| r.0));
    for batching in BATCHINGS.iter().filter(|b| options.words.iter().any(|word| word == b.name)) {
        for (router, capacity) in ROUTERS.into_iter().filter(|r| options.wants(r.0, &routers)) {
            let mut model = random_model(capacity)?;
            // The second precision goes on with the weights of the first: random tokens teach them nothing.
            for (name, precision) in PRECISIONS.into_iter().filter(|p| options.wants(p.0, &precisions)) {
                model = model.with_precision(precision)?;
                let row = measure(&model, batching, options.steps)?;
                print(name, router, batching, model.config(), &row, options.json);
            }
        }
    }
    Ok(())
}

/// Starts this program again for one batching. The allocator and candle read their settings before `main`: `moe-train`
/// has the one keep freed memory and, with several workers, the other use one thread per product.
fn measure_apart(batching: &Batching, options: &Options) -> Result<()> {
    let names = BATCHINGS.each_ref().map(|b| b.name);
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's file")?);
    command.arg(HERE).arg(batching.name).args(["--steps", &options.steps.to_string()]);
    command.args(options.words.iter().filter(|word| !names.contains(&word.as_str())));
    command.args(options.json.then_some("--json")).env("MIMALLOC_PURGE_DELAY", "-1");
    let status = command.status().context("cannot start again")?;
    ensure!(status.success(), "measuring {} failed: {status}", batching.name);
    Ok(())
}

fn print_head(options: &Options) {
    let config = model_config(Capacity::UNLIMITED);
    let parameters = config.parameter_count();
    println!("machine: {}; kernels: {}", machine::name(), select::current());
    println!(
        "{} layers of {}, {} with experts (16 of {}, top-1); {:.1} M parameters, {:.1} M active, embedding included",
        config.num_layers,
        config.d_model,
        config.moe_layers().len(),
        config.d_ff,
        parameters.total as f64 / 1e6,
        parameters.active as f64 / 1e6
    );
    println!("step: {BATCH} sequences of {SEQ_LEN} random tokens; medians of {} after one warm-up", options.steps);
    println!(
        "batches: micro-batches x sequences of each; backward includes adding up the gradients, optimizer their norm"
    );
    println!(
        "useful work: 6 x active weights that multiply + 6 x layers x length x d_model (causal attention) =\n\
         {:.1} MFLOP a token; dropped tokens count as if computed\n",
        3.0 * config.flops_per_token() as f64 / 1e6
    );
    println!(
        "{:<6}{:<10}{:<6}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
        "type",
        "router",
        "batch",
        "tokens/s",
        "best",
        "step, ms",
        "forward",
        "backward",
        "optimizer",
        "GFLOP/s",
        "dropped"
    );
}

fn main() -> Result<()> {
    let options = Options::read()?;
    if let Ok(name) = std::env::var(select::ENV) {
        select::force(name.parse()?)?;
    }
    if options.here {
        return measure_here(&options);
    }
    print_head(&options);
    let names = BATCHINGS.each_ref().map(|b| b.name);
    BATCHINGS.iter().filter(|b| options.wants(b.name, &names)).try_for_each(|b| measure_apart(b, &options))
}
