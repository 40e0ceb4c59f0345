//! A run that was stopped and resumed ends with the bits of the run that was not; so does any number of threads.

use crate::toy::{MAX_SEQ, Toy, config, corpus};
use moe_core::CounterRng;
use moe_models::train::checkpoint::{CheckpointStore, read_state};
use moe_models::train::evaluate::evaluate;
use moe_models::train::{Event, Outcome, TrainConfig, TrainModel, Trainer};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Trains in `out` until `stop_after` steps are done (or to the end), resuming if `out` holds a checkpoint.
fn run(config: &TrainConfig, out: &Path, stop_after: Option<u64>) -> (Outcome, Trainer<Toy>) {
    let (corpus, tokenizer) = corpus(config);
    let latest = CheckpointStore::open(out, config.keep_last).unwrap().latest().unwrap();
    let mut trainer = match latest {
        None => Trainer::new(Toy::new(config.seed), config.clone(), corpus, tokenizer, out).unwrap(),
        Some(dir) => Trainer::resume(Toy::load(&dir), config.clone(), corpus, tokenizer, out, &dir).unwrap(),
    };
    let stop = AtomicBool::new(false);
    let mut observer = |event: &Event| {
        if let Event::Step { step, .. } = event
            && Some(*step) == stop_after
        {
            stop.store(true, Ordering::Relaxed);
        }
    };
    let outcome = trainer.run(&stop, &mut observer).unwrap();
    (outcome, trainer)
}

#[track_caller]
fn assert_same(a: &Trainer<Toy>, b: &Trainer<Toy>, what: &str) {
    assert_eq!(a.step(), b.step(), "{what}");
    assert_eq!(a.model().bits(), b.model().bits(), "{what}: weights");
    assert_eq!(a.optimizer(), b.optimizer(), "{what}: optimizer state");
}

#[test]
fn stopped_at_a_random_step_and_resumed_is_bit_identical() {
    let config = config();
    let whole_dir = tempfile::tempdir().unwrap();
    let (outcome, whole) = run(&config, whole_dir.path(), None);
    assert_eq!((outcome, whole.step()), (Outcome::Finished, 12));
    let mut rng = CounterRng::new(20_261_123, 0);
    for _ in 0..4 {
        let stop_after = u64::from(1 + rng.below(11));
        let dir = tempfile::tempdir().unwrap();
        let (outcome, stopped) = run(&config, dir.path(), Some(stop_after));
        assert_eq!((outcome, stopped.step()), (Outcome::Stopped, stop_after));
        assert_ne!(stopped.model().bits(), whole.model().bits());
        drop(stopped);
        let (outcome, resumed) = run(&config, dir.path(), None);
        assert_eq!(outcome, Outcome::Finished);
        assert_same(&whole, &resumed, &format!("stopped after {stop_after}"));
        let metrics = |dir: &Path| losses(&std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap());
        assert_eq!(metrics(whole_dir.path()), metrics(dir.path()), "stopped after {stop_after}");
    }
}

/// Every record without its timing, and without the most memory that the process of all tests has held.
fn losses(jsonl: &str) -> Vec<serde_json::Value> {
    let strip = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        for tag in ["train/tokens_per_second", "train/peak_memory_bytes"] {
            value.as_object_mut().unwrap().remove(tag);
        }
        value
    };
    jsonl.lines().map(strip).collect()
}

/// A killed run leaves its last periodic checkpoint (step 4 or 8) and metrics beyond it.
#[test]
fn killed_between_checkpoints_and_resumed_is_bit_identical() {
    let config = config();
    let (whole_dir, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (_, whole) = run(&config, whole_dir.path(), None);
    run(&config, dir.path(), Some(10));
    std::fs::remove_dir_all(dir.path().join("step-00000010")).unwrap();
    let store = CheckpointStore::open(dir.path(), 2).unwrap();
    assert_eq!(store.latest().unwrap().unwrap(), store.folder(8), "latest names a folder that is gone");
    let (_, resumed) = run(&config, dir.path(), None);
    assert_same(&whole, &resumed, "resumed from step 8");
    let steps: Vec<u64> = losses(&std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap())
        .iter()
        .map(|r| r["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=12).collect::<Vec<_>>(), "no record twice, none missing");
}

/// Loss and bits per byte of each validation, by step and tokens.
fn validations(dir: &Path) -> Vec<(u64, u64, f64, f64)> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let of = |record: &serde_json::Value| {
        let number = |tag: &str| record[tag].as_u64().unwrap();
        let (loss, bits) = (record["valid/loss"].as_f64()?, record["valid/bits_per_byte"].as_f64()?);
        Some((number("step"), number("tokens"), loss, bits))
    };
    losses(&text).iter().filter_map(of).collect()
}

/// The untrained model is measured once, whatever is resumed, and nothing else of the run changes.
#[test]
fn a_run_validates_before_its_first_step_where_it_is_asked_to() {
    let (plain, asked) = (config(), TrainConfig { eval_on_start: true, ..config() });
    let [plain_dir, whole_dir, cut_dir] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (_, without) = run(&plain, plain_dir.path(), None);
    let (_, whole) = run(&asked, whole_dir.path(), None);
    run(&asked, cut_dir.path(), Some(6));
    let (_, resumed) = run(&asked, cut_dir.path(), None);
    assert_same(&without, &whole, "validated first");
    assert_same(&without, &resumed, "validated first, resumed");

    let untrained = evaluate(&Toy::new(asked.seed), &corpus(&asked).0.valid, asked.micro_batch_size).unwrap();
    let first = (0, 0, untrained.loss(), untrained.bits_per_byte());
    let want: Vec<_> = std::iter::once(first).chain(validations(plain_dir.path())).collect();
    assert_eq!(validations(whole_dir.path()), want);
    // What was validated before it was stopped is there once.
    let cut = validations(cut_dir.path());
    assert_eq!((cut[0], cut.iter().filter(|v| v.0 == 0).count()), (first, 1));
    let text = std::fs::read_to_string(whole_dir.path().join("metrics.jsonl")).unwrap();
    let tags = losses(&text)[0].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let sources = ["valid/bits_per_byte/one", "valid/bits_per_byte/two"];
    let want = ["step", "tokens", "valid/loss", "valid/bits_per_byte"].into_iter().chain(sources);
    assert!(want.clone().all(|tag| tags.contains(&tag.to_owned())) && tags.len() == want.count(), "{tags:?}");
}

/// A model that was best before training has no checkpoint.
#[test]
fn the_best_checkpoint_is_one_of_a_step() {
    let dir = tempfile::tempdir().unwrap();
    let config =
        TrainConfig { eval_on_start: true, lr: 30.0, min_lr: Some(30.0), lr_warmup_tokens: Some(0), ..config() };
    let (_, trainer) = run(&config, dir.path(), None);
    let best = read_state(&trainer.last_checkpoint().unwrap()).unwrap().best.unwrap();
    assert!(validations(dir.path())[0].2 < best.valid_loss, "the test wants training to do harm");
    assert!(best.step > 0);
    let folder = CheckpointStore::open(dir.path(), 2).unwrap().folder(best.step);
    assert_eq!(trainer.best_checkpoint(), Some(folder));
}

#[test]
fn any_number_of_threads_is_bit_identical() {
    let dirs: Vec<_> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
    let on = |(threads, dir): (usize, &tempfile::TempDir)| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&config(), dir.path(), None).1)
    };
    let runs: Vec<_> = (1..=3).zip(&dirs).map(on).collect();
    assert_same(&runs[0], &runs[1], "two threads");
    assert_same(&runs[0], &runs[2], "three threads");
}

/// Every pass is told its place in the run, and no two have one seed.
#[test]
fn passes_know_their_place() {
    let (config, dir) = (config(), tempfile::tempdir().unwrap());
    let (corpus, tokenizer) = corpus(&config);
    let mut trainer = Trainer::new(Toy::new(config.seed), config.clone(), corpus, tokenizer, dir.path()).unwrap();
    trainer.run(&AtomicBool::new(false), &mut |_: &Event| ()).unwrap();
    let passes = trainer.model().passes.lock().unwrap().clone();
    let places: Vec<_> = passes.iter().map(|pass| (pass.step, pass.tokens, pass.micro_batch)).collect();
    let want = (0..12).flat_map(|step| (0..3).map(move |micro_batch| (step, step * 48, micro_batch)));
    assert_eq!(places, want.collect::<Vec<_>>());
    let seeds: std::collections::HashSet<u64> = passes.iter().map(|pass| pass.seed).collect();
    assert_eq!(seeds.len(), passes.len());
}

/// Runs of earlier versions had a number of workers in their state.
#[test]
fn a_state_with_workers_is_read() {
    let dir = tempfile::tempdir().unwrap();
    run(&config(), dir.path(), Some(4));
    let folder = dir.path().join("step-00000004");
    let want = read_state(&folder).unwrap();
    let path = folder.join("trainer_state.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replacen("\"lr\"", "\"workers\": 2, \"lr\"", 1)).unwrap();
    assert_eq!(read_state(&folder).unwrap(), want);
}

#[test]
fn the_loss_falls_and_the_seed_matters() {
    let config = TrainConfig { train_tokens: 60 * 48, lr_decay_tokens: None, min_lr: None, ..config() };
    let config = config.resolved(MAX_SEQ).unwrap();
    let train = |config: &TrainConfig| {
        let dir = tempfile::tempdir().unwrap();
        let (corpus, tokenizer) = corpus(config);
        let mut trainer = Trainer::new(Toy::new(config.seed), config.clone(), corpus, tokenizer, dir.path()).unwrap();
        let mut losses = Vec::new();
        let mut observer = |event: &Event| {
            if let Event::Step { loss, .. } = event {
                losses.push(*loss);
            }
        };
        trainer.run(&AtomicBool::new(false), &mut observer).unwrap();
        (losses, trainer.model().bits())
    };
    let (losses, bits) = train(&config);
    assert!((losses[0] - 5.6).abs() < 0.2, "ln 270 at the start, got {}", losses[0]);
    assert!(losses[59] < losses[0] - 0.5, "{losses:?}");
    assert_ne!(bits, train(&TrainConfig { seed: 99, ..config }).1);
}

#[test]
fn what_would_change_the_course_is_refused() {
    let config = config();
    let dir = tempfile::tempdir().unwrap();
    run(&config, dir.path(), Some(4));
    let folder = dir.path().join("step-00000004");
    let resume = |config: &TrainConfig, data: &TrainConfig| {
        let (corpus, tokenizer) = corpus(data);
        Trainer::resume(Toy::load(&folder), config.clone(), corpus, tokenizer, dir.path(), &folder)
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    let other_lr = TrainConfig { lr: 0.5, ..config.clone() };
    assert!(resume(&other_lr, &config).unwrap_err().contains("lr is 0.5"));
    let other_data = TrainConfig { valid_fraction: 0.3, ..config.clone() };
    assert!(resume(&config, &other_data).unwrap_err().contains("data changed"));
    let (corpus, tokenizer) = corpus(&config);
    let message = Trainer::new(Toy::new(1), config.clone(), corpus, tokenizer, dir.path()).unwrap_err().to_string();
    assert!(message.contains("already holds checkpoints"), "{message}");
}

/// Trains a toy that `breaks` until it ends with an error; what was skipped before, and the error.
fn broken_run(breaks: impl Fn(&Toy)) -> (Vec<(u64, String, u64)>, String) {
    let config = config();
    let dir = tempfile::tempdir().unwrap();
    let (corpus, tokenizer) = corpus(&config);
    let toy = Toy::new(1);
    breaks(&toy);
    let before = toy.bits();
    let mut trainer = Trainer::new(toy, config, corpus, tokenizer, dir.path()).unwrap();
    let mut skipped = Vec::new();
    let mut observer = |event: &Event| match event {
        Event::Skipped { step, what, in_a_row } => skipped.push((*step, what.to_string(), *in_a_row)),
        Event::Step { step, applied, .. } => assert!(!applied, "step {step}"),
        _ => {}
    };
    let message = trainer.run(&AtomicBool::new(false), &mut observer).unwrap_err().to_string();
    assert_eq!(trainer.model().bits(), before);
    (skipped, message)
}

#[track_caller]
fn check_broken(breaks: impl Fn(&Toy), words: &[&str]) {
    let (skipped, message) = broken_run(breaks);
    assert_eq!(skipped.iter().map(|s| (s.0, s.2)).collect::<Vec<_>>(), (1..8).map(|i| (i, i)).collect::<Vec<_>>());
    for text in skipped.iter().map(|s| &s.1).chain([&message]) {
        words.iter().for_each(|word| assert!(text.contains(word), "{word:?} is missing: {text}"));
    }
    assert!(message.starts_with("step 8:") && message.contains("8 steps in a row"), "{message}");
}

/// Event and error name the step, the micro-batch and the first tensor.
#[test]
fn what_is_not_finite_is_named_and_ends_the_run() {
    check_broken(
        |toy| toy.broken.store(true, Ordering::Relaxed),
        &["loss of micro-batch 0 is NaN", "gradient of embed"],
    );
    check_broken(|toy| toy.steep.store(true, Ordering::Relaxed), &["gradient of head is not finite"]);
    let poison = |toy: &Toy| {
        let (_, bias) = &toy.params()[2];
        bias.set(&(bias.as_tensor() * f64::INFINITY).unwrap()).unwrap();
    };
    check_broken(poison, &["parameter bias is not finite", "loss of micro-batch 0 is"]);
}

#[test]
fn a_run_keeps_others_out_of_its_folder() {
    let config = config();
    let dir = tempfile::tempdir().unwrap();
    let (_, first) = run(&config, dir.path(), Some(4));
    let folder = dir.path().join("step-00000004");
    let before = std::fs::read(dir.path().join("metrics.jsonl")).unwrap();
    let resume = || {
        let (corpus, tokenizer) = corpus(&config);
        Trainer::resume(Toy::load(&folder), config.clone(), corpus, tokenizer, dir.path(), &folder)
            .map(|_| ())
            .map_err(|e| e.to_string())
    };
    let message = resume().unwrap_err();
    assert!(message.contains(&format!("in use by process {}", std::process::id())), "{message}");
    assert_eq!(std::fs::read(dir.path().join("metrics.jsonl")).unwrap(), before, "nothing was touched");
    drop(first);
    resume().unwrap();
}
