//! The real model under the trainer: resume, threads and recomputation bit for bit, every checkpoint a folder that serves.

use candle_core::{DType, Device};
use moe_core::CounterRng;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::data::{Documents, PackedSource, Packer};
use moe_models::train::export::export;
use moe_models::train::optimizer::{AdamW, Owned, Units, UpdateRule};
use moe_models::train::tokenizer::{to_json, train_bpe};
use moe_models::train::{Corpus, Event, Outcome, Silent, TrainConfig, Trainer};
use moe_models::{DropoutConfig, Pass, Precision, Recompute, TokenBatch};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A PR-MoE with two experts, then four; jitter and random token selection draw from the pass's seed.
pub(crate) fn shape() -> GptConfig {
    let mut shape = GptConfig::preset("tiny-pr-moe").unwrap();
    (shape.vocab_size, shape.max_seq_len, shape.d_model, shape.d_ff, shape.num_layers) = (262, 16, 16, 32, 4);
    let moe = shape.moe.as_mut().unwrap();
    moe.num_experts = vec![2, 4];
    moe.noisy_gate = Some(moe_core::NoisyGate::Jitter);
    moe.capacity.train_factor = Some(1.0);
    shape
}

pub(crate) fn config() -> TrainConfig {
    let config = TrainConfig {
        micro_batch_size: 2,
        global_batch_size: 6,
        train_tokens: 12 * 96,
        lr: 1e-2,
        eval_interval: 6,
        save_interval: 5,
        log_interval: 1,
        valid_fraction: 0.1,
        ..TrainConfig::default()
    };
    config.resolved(16).unwrap()
}

pub(crate) fn corpus(config: &TrainConfig) -> (Corpus, String) {
    static PACKED: OnceLock<(PackedSource, String)> = OnceLock::new();
    let (packed, tokenizer) = PACKED.get_or_init(|| {
        let text: String = (0..600).map(|i| format!("{} and {}, ", i * 37 % 91, i * i % 17)).collect();
        let documents = Documents { name: "numbers".into(), weight: None, texts: vec![text] };
        let tokenizer = train_bpe(std::slice::from_ref(&documents), 262).unwrap();
        let packed = Packer::new(&tokenizer, 0, 262).unwrap().pack(&documents).unwrap();
        (packed, to_json(&tokenizer).unwrap())
    });
    (Corpus::new(vec![packed.clone()], Vec::new(), config).unwrap(), tokenizer.clone())
}

fn new_model(shape: GptConfig, config: &TrainConfig) -> Gpt {
    let model = Gpt::new(shape, config.seed, &Device::Cpu).unwrap();
    following(model, config)
}

fn following(model: Gpt, config: &TrainConfig) -> Gpt {
    let model = model.with_precision(config.precision).unwrap().with_recompute(config.recompute);
    model.with_dropout(config.dropout()).unwrap()
}

fn run(config: &TrainConfig, out: &Path, resume: Option<&Path>, stop_after: u64) -> (Outcome, Trainer<Gpt>) {
    let (corpus, tokenizer) = corpus(config);
    let mut trainer = match resume {
        None => {
            let model = new_model(shape(), config);
            Trainer::new(model, config.clone(), corpus, tokenizer, out).unwrap()
        }
        Some(folder) => {
            let model = following(Gpt::load(folder, &Device::Cpu).unwrap(), config);
            Trainer::resume(model, config.clone(), corpus, tokenizer, out, folder).unwrap()
        }
    };
    (run_until(&mut trainer, stop_after), trainer)
}

/// Runs to the end, or raises the stop flag after a step.
pub(crate) fn run_until(trainer: &mut Trainer<Gpt>, stop_after: u64) -> Outcome {
    let stop = AtomicBool::new(false);
    let mut observer = |event: &Event| {
        if matches!(event, Event::Step { step, .. } if *step == stop_after) {
            stop.store(true, Ordering::Relaxed);
        }
    };
    trainer.run(&stop, &mut observer).unwrap()
}

fn bits(model: &Gpt) -> Vec<(String, Vec<u32>)> {
    let read = |(name, var): &(String, candle_core::Var)| {
        let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (name.clone(), values.iter().map(|x| x.to_bits()).collect())
    };
    model.params().iter().map(read).collect()
}

#[track_caller]
fn assert_same(a: &Trainer<Gpt>, b: &Trainer<Gpt>, what: &str) {
    for ((name, want), (_, got)) in bits(a.model()).iter().zip(&bits(b.model())) {
        assert_eq!(want, got, "{what}: {name}");
    }
    assert_eq!(a.optimizer(), b.optimizer(), "{what}: optimizer state");
}

#[test]
fn a_pr_moe_resumes_bit_exactly_whatever_it_computes_again() {
    resumes_bit_exactly(&config());
}

/// Masks are a function of the pass, so that a run that goes on drops what it would have dropped.
#[test]
fn a_run_with_dropout_resumes_bit_exactly_whatever_it_computes_again() {
    resumes_bit_exactly(&TrainConfig { attention_dropout: Some(0.2), hidden_dropout: 0.1, ..config() });
}

fn resumes_bit_exactly(config: &TrainConfig) {
    let dir = tempfile::tempdir().unwrap();
    let (outcome, whole) = run(config, &dir.path().join("whole"), None, u64::MAX);
    assert_eq!((outcome, whole.step()), (Outcome::Finished, 12));
    let mut rng = CounterRng::new(4_711, 0);
    for recompute in [Recompute::None, Recompute::Block, Recompute::Moe] {
        let stop_after = u64::from(1 + rng.below(11));
        let out = dir.path().join(format!("{recompute:?}"));
        let config = TrainConfig { recompute, ..config.clone() };
        assert_eq!(run(&config, &out, None, stop_after).0, Outcome::Stopped);
        let folder = out.join(format!("step-{stop_after:08}"));
        let (_, resumed) = run(&config, &out, Some(&folder), u64::MAX);
        assert_same(&whole, &resumed, &format!("{recompute:?}, stopped after {stop_after}"));
    }
}

/// Every pass of a training drops something else; evaluation drops nothing, and 0 changes no bit.
#[test]
fn training_alone_drops() {
    let mut shape = shape();
    shape.moe = None;
    let mut rng = CounterRng::new(5, 0);
    let mut ids = || (0..2 * 16).map(|_| rng.below(262)).collect();
    let batch = TokenBatch { input_ids: ids(), target_ids: ids(), batch: 2, seq_len: 16 };
    let loss = |attention: f64, hidden: f64, pass: Pass| {
        let model = Gpt::new(shape.clone(), 1, &Device::Cpu).unwrap();
        let model = model.with_dropout(DropoutConfig { attention, hidden }).unwrap();
        model.loss(&batch, pass).unwrap().loss.to_scalar::<f32>().unwrap().to_bits()
    };
    let plain = loss(0.0, 0.0, Pass::train(1));
    assert_eq!(plain, loss(0.0, 0.0, Pass::train(2)), "a dense model draws nothing else");
    let mut seen = vec![plain];
    for (attention, hidden) in [(0.2, 0.0), (0.0, 0.2), (0.2, 0.2)] {
        for seed in [1, 2] {
            let dropped = loss(attention, hidden, Pass::train(seed));
            assert_eq!(dropped, loss(attention, hidden, Pass::train(seed)), "the same again");
            assert!(!seen.contains(&dropped), "{attention} {hidden} {seed}");
            seen.push(dropped);
        }
        assert_eq!(loss(attention, hidden, Pass::Eval), loss(0.0, 0.0, Pass::Eval), "evaluation drops nothing");
    }
    let refused = Gpt::new(shape, 1, &Device::Cpu).unwrap().with_dropout(DropoutConfig { attention: 0.0, hidden: 1.0 });
    assert!(refused.unwrap_err().to_string().contains("hidden_dropout"));
}

/// A shape and settings at which every kernel of a step has enough work for several threads.
fn wide() -> (GptConfig, TrainConfig) {
    let mut shape = shape();
    (shape.max_seq_len, shape.d_model, shape.d_ff, shape.num_layers, shape.num_heads) = (128, 256, 512, 2, 4);
    shape.moe.as_mut().unwrap().num_experts = vec![4];
    let config = TrainConfig {
        micro_batch_size: 4,
        global_batch_size: 12,
        train_tokens: 2 * 12 * 128,
        lr_warmup_tokens: None,
        lr_decay_tokens: None,
        seq_length: None,
        eval_iters: 1,
        ..config()
    };
    (shape, config.resolved(128).unwrap())
}

/// Time each thread of `pool` has spent on a processor, in ns; `None` where the system does not tell.
fn thread_times(pool: &rayon::ThreadPool) -> Option<Vec<u64>> {
    let time = |_: rayon::BroadcastContext| {
        std::fs::read_to_string("/proc/thread-self/schedstat").ok()?.split(' ').next()?.parse().ok()
    };
    pool.broadcast(time).into_iter().collect()
}

#[test]
fn kernels_on_several_threads_and_recomputation_are_bit_identical() {
    let (shape, config) = wide();
    // Masks depend on neither.
    let config = TrainConfig { attention_dropout: Some(0.1), hidden_dropout: 0.1, ..config };
    let dir = tempfile::tempdir().unwrap();
    for precision in [Precision::Bf16, Precision::F32] {
        let train = |recompute: Recompute, threads: usize| {
            let config = TrainConfig { recompute, precision, ..config.clone() };
            let out = dir.path().join(format!("{precision:?}-{recompute:?}-{threads}"));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let (corpus, tokenizer) = corpus(&config);
            let model = new_model(shape.clone(), &config);
            let mut trainer = Trainer::new(model, config, corpus, tokenizer, &out).unwrap();
            let before = thread_times(&pool);
            let outcome = pool.install(|| trainer.run(&AtomicBool::new(false), &mut Silent)).unwrap();
            assert_eq!(outcome, Outcome::Finished);
            let spent = before.zip(thread_times(&pool));
            (trainer, spent.map(|(old, new)| new.iter().zip(old).map(|(new, old)| new - old).collect::<Vec<_>>()))
        };
        let (alone, _) = train(Recompute::None, 1);
        let (threaded, spent) = train(Recompute::None, 3);
        // Threads that have nothing to do come to 0.1 ms.
        if let Some(spent) = spent {
            assert!(spent.iter().all(|&ns| ns > 2_000_000), "the kernels stayed on one thread: {spent:?} ns");
        } else {
            eprintln!("not checked here: that the kernels use several threads");
        }
        assert_same(&alone, &threaded, &format!("{precision:?}, kernels on three threads"));
        for recompute in [Recompute::Block, Recompute::Moe] {
            assert_same(&alone, &train(recompute, 2).0, &format!("{precision:?}, {recompute:?}, two threads"));
        }
    }
}

/// What makes the next test able to fail: under its settings a parameter without a gradient stays where it is. With decay
/// the matrices would move by themselves.
#[test]
fn without_decay_nothing_moves_without_a_gradient() {
    for (weight_decay, moves) in [(0.0, false), (0.1, true)] {
        let config = TrainConfig { weight_decay, ..config() };
        let model = new_model(shape(), &config);
        let before = bits(&model);
        let grads: Vec<Vec<f32>> = model.params().iter().map(|(_, var)| vec![0.0; var.elem_count()]).collect();
        let owned = Owned::everything(Units::of_params(model.params()).unwrap());
        let rules = vec![UpdateRule::decays(true); grads.len()];
        let mut optimizer = AdamW::new(config.adamw(), owned, rules).unwrap();
        optimizer.step(model.params(), &grads, 1.0, config.lr).unwrap();
        assert_eq!(bits(&model) != before, moves, "decay {weight_decay}");
    }
}

#[test]
fn training_moves_every_parameter_and_lowers_the_loss() {
    let config = TrainConfig { train_tokens: 40 * 96, lr_decay_tokens: None, weight_decay: 0.0, ..config() };
    let config = config.resolved(16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let before = bits(&Gpt::new(shape(), config.seed, &Device::Cpu).unwrap());
    let (_, trainer) = run(&config, dir.path(), None, u64::MAX);
    for ((name, old), (_, new)) in before.iter().zip(&bits(trainer.model())) {
        assert_ne!(old, new, "{name} did not move");
    }
    let metrics = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let losses: Vec<f64> = metrics
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["train/lm_loss"].as_f64().unwrap())
        .collect();
    assert!(losses[39] < losses[0] - 1.0, "{losses:?}");
}

#[test]
fn the_exported_folder_is_the_trained_model() {
    let dir = tempfile::tempdir().unwrap();
    let (_, trainer) = run(&config(), &dir.path().join("run"), None, u64::MAX);
    let target = dir.path().join("model");
    export(trainer.model(), &trainer.tokenizer_json().to_owned().into(), &target, DType::BF16).unwrap();
    let loaded = Gpt::load(&target, &Device::Cpu).unwrap();
    assert_eq!(loaded.config(), trainer.model().config());
    for ((name, want), (_, got)) in trainer.model().params().iter().zip(loaded.params()) {
        let want = want.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        let difference =
            (want - got.as_tensor()).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        assert_eq!(difference, 0.0, "{name} is not the bf16 rounding of the trained weight");
    }
    tokenizers::Tokenizer::from_file(target.join("tokenizer.json")).unwrap();
}

/// The setting is part of every checkpoint, so it must be what the model does.
#[test]
fn a_precision_or_recomputation_that_is_not_the_models_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let start = |model: Precision, config: Precision| {
        let config = TrainConfig { precision: config, ..config_of_one_step() };
        let (corpus, tokenizer) = corpus(&config);
        let model = Gpt::new(shape(), config.seed, &Device::Cpu).unwrap().with_precision(model).unwrap();
        Trainer::new(model, config, corpus, tokenizer, &out).map(|_| ()).map_err(|e| e.to_string())
    };
    for (model, config) in [(Precision::F32, Precision::Bf16), (Precision::Bf16, Precision::F32)] {
        let message = start(model, config).unwrap_err();
        let (asked, computed) = (format!("is {config:?}"), format!("computes in {model:?}"));
        assert!(message.contains(&asked) && message.contains(&computed), "{message}");
        assert!(!out.exists(), "refused before anything is written");
    }
    let config = TrainConfig { recompute: Recompute::Block, ..config_of_one_step() };
    let (data, tokenizer) = corpus(&config);
    let model = Gpt::new(shape(), config.seed, &Device::Cpu).unwrap().with_precision(config.precision).unwrap();
    let message = Trainer::new(model, config, data, tokenizer, &out).unwrap_err().to_string();
    assert!(message.contains("recompute is Block") && message.contains("does None"), "{message}");
    assert!(!out.exists(), "refused before anything is written");
    let config = TrainConfig { hidden_dropout: 0.1, ..config_of_one_step() };
    let (data, tokenizer) = corpus(&config);
    let model = Gpt::new(shape(), config.seed, &Device::Cpu).unwrap().with_precision(config.precision).unwrap();
    let message = Trainer::new(model, config, data, tokenizer, &out).unwrap_err().to_string();
    assert!(message.contains("hidden_dropout are 0 and 0.1") && message.contains("with_dropout"), "{message}");
    start(Precision::Bf16, Precision::Bf16).unwrap();
    let config = config_of_one_step();
    let (_, trainer) = run(&config, &dir.path().join("saved"), None, u64::MAX);
    let (corpus, tokenizer) = corpus(&config);
    let folder = dir.path().join("saved/step-00000001");
    let model = Gpt::load(&folder, &Device::Cpu).unwrap();
    drop(trainer);
    let resumed = Trainer::resume(model, config, corpus, tokenizer, &dir.path().join("saved"), &folder);
    assert!(resumed.unwrap_err().to_string().contains("Model::with_precision"));
}

fn config_of_one_step() -> TrainConfig {
    TrainConfig { train_tokens: 96, lr_warmup_tokens: None, lr_decay_tokens: None, ..config() }.resolved(16).unwrap()
}
