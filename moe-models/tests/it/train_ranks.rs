//! The trainer over ranks: replicas of a PR-MoE on threads, with whole moments and with divided ones, against one rank on the same
//! global batch.

use crate::toy::{self, Toy};
use crate::train_gpt::{config, corpus, shape};
use candle_core::Device;
use moe_models::gpt::Gpt;
use moe_models::train::shards::{Kind, Reader};
use moe_models::train::{Event, MeshRanks, Outcome, Ranks, ReduceConfig, RunFolder, TrainConfig, Trainer, Zero};
use moe_models::{Error, ParamTable, Precision, Result};
use moe_parallel::comm::Communicator;
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::tensor_box::{Place, copy_box};
use moe_parallel::{Collectives, ExchangeConfig, Extent, Mesh, ParallelDims};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Ranks of a run, and how they add up gradients.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) dims: ParallelDims,
    pub(crate) reduce: ReduceConfig,
}

impl Layout {
    pub(crate) fn new(dims: ParallelDims, zero: Zero) -> Self {
        // Buckets of a few parameters each, some of them in chunks of several ranks; most have to wait for others.
        Self { dims, reduce: ReduceConfig { zero, bucket_elements: 700, most_under_way: 1500, overlap: true } }
    }

    /// Whole models, each with micro-batches of its own.
    fn replicas(ranks: usize, zero: Zero) -> Self {
        Self::new(ParallelDims::new(ranks, 1, 1, 1), zero)
    }

    pub(crate) fn mesh(&self, comm: &Arc<dyn Communicator>) -> Result<Arc<Mesh>> {
        Ok(Arc::new(Mesh::new(Arc::clone(comm), self.dims, 2, ExchangeConfig::default())?))
    }

    pub(crate) fn ranks(&self, mesh: &Arc<Mesh>, table: &ParamTable) -> Result<Box<dyn Ranks>> {
        Ok(Box::new(MeshRanks::new(mesh, table, self.reduce)?))
    }
}

const ZERO: [Zero; 3] = [Zero::Off, Zero::Moments, Zero::Gradients];

/// Ranks of whole models of any kind.
fn replicas(comm: &Arc<dyn Communicator>, zero: Zero) -> Result<Box<dyn Ranks>> {
    let config = ReduceConfig { zero, ..ReduceConfig::default() };
    Ok(Box::new(MeshRanks::data_parallel(Arc::clone(comm), config)?))
}

/// How a run or a part of one ended: weights of whole tensors, and the losses and norms of its steps.
#[derive(Debug, PartialEq)]
struct End {
    outcome: Outcome,
    weights: BTreeMap<String, Vec<f32>>,
    steps: Vec<(u64, u64, u64)>,
    valid: Vec<(u64, u64)>,
}

/// What a rank holds, where it belongs in the whole tensors; what several hold must be the same.
pub(crate) fn weights(models: &[&Gpt]) -> BTreeMap<String, Vec<f32>> {
    let mut whole: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    for model in models {
        for (name, var) in model.params() {
            let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let mut rest = values.as_slice();
            for extent in model.placement().extents(model.table().get(name).unwrap()) {
                let (own, others) = rest.split_at(extent.elements());
                rest = others;
                let elements: usize = extent.shape.iter().product();
                let tensor = whole.entry(extent.name.clone()).or_insert_with(|| vec![f32::NAN; elements]);
                let before = tensor.clone();
                for piece in extent.boxes(0..own.len()) {
                    let from = Place { shape: &extent.local_shape(), start: &piece.local };
                    let to = Place { shape: &extent.shape, start: &piece.whole.start };
                    copy_box(&piece.whole.size, (own, from), (tensor, to));
                }
                let same = before.iter().zip(&*tensor).all(|(old, new)| old.is_nan() || old == new);
                assert!(same, "ranks have different values of {}", extent.name);
            }
        }
    }
    assert!(whole.values().flatten().all(|value| !value.is_nan()), "all is held");
    whole
}

/// What a test runs.
struct Case {
    config: TrainConfig,
}

impl Case {
    fn following(&self, model: Gpt) -> Gpt {
        model.with_precision(self.config.precision).unwrap()
    }

    fn model(&self, resume: Option<&Path>) -> Gpt {
        self.following(match resume {
            None => Gpt::new(shape(), self.config.seed, &Device::Cpu).unwrap(),
            Some(folder) => Gpt::load_checkpoint(folder, None).unwrap(),
        })
    }

    fn model_over(&self, mesh: &Arc<Mesh>, resume: Option<&Path>) -> Gpt {
        self.following(match resume {
            None => Gpt::new_over(shape(), self.config.seed, Arc::clone(mesh)).unwrap(),
            Some(folder) => Gpt::load_checkpoint(folder, Some(Arc::clone(mesh))).unwrap(),
        })
    }
}

/// A run over these ranks, or what is left of it; rank 1 (or the only one) raises its flag after step `stop_after`.
fn run(case: &Case, model: Gpt, folder: RunFolder, resume: Option<&Path>, stop_after: u64, stops: bool) -> (End, Gpt) {
    let config = &case.config;
    let (corpus, tokenizer) = corpus(config);
    let mut trainer = match resume {
        None => Trainer::new_in(model, config.clone(), corpus, tokenizer, folder).unwrap(),
        Some(from) => Trainer::resume_in(model, config.clone(), corpus, tokenizer, folder, from).unwrap(),
    };
    let stop = AtomicBool::new(false);
    let (mut steps, mut valid) = (Vec::new(), Vec::new());
    let mut observer = |event: &Event| match event {
        Event::Step { step, loss, grad_norm, .. } => {
            steps.push((*step, loss.to_bits(), grad_norm.to_bits()));
            stop.store(stops && *step == stop_after, Ordering::Relaxed);
        }
        Event::Validated { step, loss, .. } => valid.push((*step, loss.to_bits())),
        _ => {}
    };
    let outcome = trainer.run(&stop, &mut observer).unwrap();
    (End { outcome, weights: BTreeMap::new(), steps, valid }, trainer.into_model())
}

/// The same end on every rank.
fn over(case: &Case, out: &Path, layout: Layout, resume: Option<&Path>, stop_after: u64) -> End {
    let end = |comm: Arc<dyn Communicator>| {
        let mesh = layout.mesh(&comm).unwrap();
        let model = case.model_over(&mesh, resume);
        let folder = RunFolder::shared(out, layout.ranks(&mesh, model.table()).unwrap()).unwrap();
        run(case, model, folder, resume, stop_after, comm.rank() + 1 == comm.size())
    };
    let (mut ends, models): (Vec<End>, Vec<Gpt>) =
        ThreadWorld::new(layout.dims.world_size()).run(end).into_iter().unzip();
    let last = ends.pop().unwrap();
    assert!(ends.iter().all(|end| *end == last), "ranks end alike");
    End { weights: weights(&models.iter().collect::<Vec<_>>()), ..last }
}

fn alone(case: &Case, out: &Path, resume: Option<&Path>, stop_after: u64) -> End {
    let lock = moe_models::train::RunLock::acquire(out).unwrap();
    let (end, model) = run(case, case.model(resume), lock.into(), resume, stop_after, true);
    End { weights: weights(&[&model]), ..end }
}

/// Weights and moments of a checkpoint, as bits.
fn everything(folder: &Path) -> Vec<Vec<u32>> {
    let reader = Reader::open(folder).unwrap();
    let mut all = Vec::new();
    for (name, info) in reader.tensors() {
        let extent = Extent::whole(name.as_str(), &info.shape);
        for kind in [Kind::Weight, Kind::ExpAvg, Kind::ExpAvgSq] {
            let mut values = vec![0.0f32; extent.elements()];
            let whole = 0..values.len();
            reader.read(kind, std::slice::from_ref(&extent), std::slice::from_ref(&whole), &mut values).unwrap();
            all.push(values.into_iter().map(f32::to_bits).collect());
        }
    }
    all
}

fn bytes(folder: &Path, name: &str) -> Vec<u8> {
    std::fs::read(folder.join(name)).unwrap()
}

/// As many ranks as micro-batches add gradients up in the order in which one rank does: the bits of the whole run are the same,
/// with divided moments too, over a checkpoint, and its files.
#[test]
fn a_rank_for_each_micro_batch_gives_the_bits_of_one_rank() {
    let case = Case { config: config() };
    assert_eq!(case.config.grad_accum(), 3);
    let dir = tempfile::tempdir().unwrap();
    let whole = alone(&case, &dir.path().join("one"), None, u64::MAX);
    assert_eq!((whole.outcome, whole.steps.len()), (Outcome::Finished, 12));
    assert!(!whole.valid.is_empty());
    for zero in ZERO {
        let out = dir.path().join(format!("three-{zero:?}"));
        let end = over(&case, &out, Layout::replicas(3, zero), None, u64::MAX);
        assert!(end == whole, "{zero:?}");
        let of = |run: &Path| everything(&run.join("step-00000012"));
        assert!(of(&out) == of(&dir.path().join("one")), "{zero:?}: checkpoints");
        let metrics = |run: &Path| {
            let text = String::from_utf8(bytes(run, "metrics.jsonl")).unwrap();
            let record = |line: &str| {
                let mut record: serde_json::Value = serde_json::from_str(line).unwrap();
                let of_ranks = |tag: &str| {
                    ["moe/a2a", "train/gradient_", "train/peak_"].iter().any(|start| tag.starts_with(start))
                };
                record.as_object_mut().unwrap().retain(|tag, _| tag != "train/tokens_per_second" && !of_ranks(tag));
                record
            };
            text.lines().map(record).collect::<Vec<_>>()
        };
        assert_eq!(metrics(&out), metrics(&dir.path().join("one")), "one record of each step, over all ranks");
    }
}

/// Stopped on three ranks by the last of them, resumed on one, stopped, and resumed on three with the other kind of moments.
#[test]
fn a_run_changes_its_number_of_ranks() {
    let case = Case { config: config() };
    let dir = tempfile::tempdir().unwrap();
    let whole = alone(&case, &dir.path().join("one"), None, u64::MAX);
    for (zero, then) in [(Zero::Off, Zero::Gradients), (Zero::Moments, Zero::Off)] {
        let out = dir.path().join(format!("run-{zero:?}"));
        let folder = |step: u64| out.join(format!("step-{step:08}"));
        assert_eq!(over(&case, &out, Layout::replicas(3, zero), None, 4).outcome, Outcome::Stopped);
        assert_eq!(alone(&case, &out, Some(&folder(4)), 7).outcome, Outcome::Stopped);
        let end = over(&case, &out, Layout::replicas(3, then), Some(&folder(7)), u64::MAX);
        assert_eq!(end.outcome, Outcome::Finished);
        assert!(end.weights == whole.weights, "{zero:?}");
        assert!(end.steps == whole.steps[7..], "{zero:?}: {:?} {:?}", end.steps, whole.steps);
    }
}

/// A run that is saved by one layout and resumed by the next, six times, has the curve and the weights of one rank, but for the
/// order of sums.
#[test]
fn a_run_goes_on_in_any_layout() {
    let three = TrainConfig { eps: 1e-2, precision: Precision::F32, ..config() };
    let derived = TrainConfig { lr_warmup_tokens: None, lr_decay_tokens: None, min_lr: None, ..three };
    let four = TrainConfig { global_batch_size: 8, train_tokens: 14 * 128, ..derived }.resolved(16).unwrap();
    let case = Case { config: four };
    let dir = tempfile::tempdir().unwrap();
    let one = alone(&case, &dir.path().join("one"), None, u64::MAX);
    let out = dir.path().join("many");
    let stations = [
        Layout::new(ParallelDims::new(4, 1, 4, 1), Zero::Off),
        Layout::new(ParallelDims::new(4, 1, 2, 1), Zero::Moments),
        Layout::new(ParallelDims::new(2, 2, 2, 1), Zero::Moments),
        Layout::replicas(4, Zero::Gradients),
        Layout::new(ParallelDims::new(3, 1, 3, 1), Zero::Off),
        Layout::new(ParallelDims::new(2, 1, 1, 2), Zero::Gradients),
    ];
    let (mut steps, mut valid) = (Vec::new(), Vec::new());
    for (station, layout) in stations.into_iter().enumerate() {
        let last = 2 * station as u64;
        let from = (last > 0).then(|| out.join(format!("step-{last:08}")));
        let end = over(&case, &out, layout, from.as_deref(), last + 2);
        assert_eq!(end.outcome, Outcome::Stopped, "{layout:?}");
        steps.extend(end.steps);
        valid.extend(end.valid);
    }
    let end = alone(&case, &out, Some(&out.join("step-00000012")), u64::MAX);
    steps.extend(end.steps);
    let curve = |steps: &[(u64, u64, u64)]| {
        steps.iter().map(|s| (s.0, f64::from_bits(s.1), f64::from_bits(s.2))).collect::<Vec<_>>()
    };
    let (got, want) = (curve(&steps), curve(&one.steps));
    assert_eq!(got.len(), 14);
    for ((step, loss, norm), (want_step, want_loss, want_norm)) in got.iter().zip(&want) {
        assert_eq!(step, want_step);
        let close = |got: &f64, want: &f64| (got - want).abs() < 1e-5 * want.abs();
        assert!(close(loss, want_loss) && close(norm, want_norm), "step {step}: {got:?} {want:?}");
    }
    valid.extend(end.valid);
    let mut compared = 0;
    for (step, loss) in &valid {
        let Some((_, want)) = one.valid.iter().find(|(at, _)| at == step) else { continue };
        let (loss, want) = (f64::from_bits(*loss), f64::from_bits(*want));
        assert!((loss - want).abs() < 1e-5 * want, "step {step}: validation {loss}, want {want}");
        compared += 1;
    }
    assert!(compared >= 3, "{valid:?} {:?}", one.valid);
    for (name, got) in &end.weights {
        let want = &one.weights[name];
        let largest = want.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        let differ = got.iter().zip(want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        assert!(differ <= 1e-5 * largest, "{name}: {differ:e} of {largest:e}");
    }
}

/// Two ranks have micro-batches 0, 1 and 2: their sum is (g0 + g1) + g2 still, and keeps the bits.
#[test]
fn the_last_micro_batch_alone_on_a_rank_keeps_the_bits() {
    let case = Case { config: config() };
    let dir = tempfile::tempdir().unwrap();
    let one = alone(&case, &dir.path().join("one"), None, u64::MAX);
    // Gradients that are added up after every pass are (g0 + g2) + g1.
    for zero in [Zero::Off, Zero::Moments] {
        let two = over(&case, &dir.path().join(format!("two-{zero:?}")), Layout::replicas(2, zero), None, u64::MAX);
        assert!(two == one, "{zero:?}");
    }
}

/// Of a tensor's largest value after 12 steps; 3.2e-7 was measured.
const TOLERANCE: f32 = 3e-6;

/// Another order of sums: four micro-batches on two ranks are (g0 + g1) + (g2 + g3).
#[test]
fn another_order_of_sums_differs_by_rounding_alone() {
    // Without a large epsilon a gradient that is zero but for rounding, as that of the keys' biases, moves by a whole step.
    let three = TrainConfig { eps: 1e-2, precision: Precision::F32, ..config() };
    let derived = TrainConfig { lr_warmup_tokens: None, lr_decay_tokens: None, min_lr: None, ..three };
    let four = TrainConfig { global_batch_size: 8, train_tokens: 12 * 128, ..derived }.resolved(16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let case = Case { config: four };
    let one = alone(&case, &dir.path().join("one"), None, u64::MAX);
    let more = over(&case, &dir.path().join("more"), Layout::replicas(2, Zero::Moments), None, u64::MAX);
    let mut worst = 0f32;
    for ((name, got), (_, want)) in more.weights.iter().zip(&one.weights) {
        let largest = want.iter().fold(0f32, |most, v| most.max(v.abs()));
        let differ = got.iter().zip(want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
        worst = worst.max(differ / largest);
        assert!(differ <= TOLERANCE * largest, "{name}: {differ:e} of {largest:e}");
    }
    assert!(worst > 0.0, "the test wants another order of sums");
}

/// A rank that fails, in its own work or as the one that writes, ends the run on all with its words.
#[test]
fn an_error_of_one_rank_is_one_on_all() {
    let case = Case { config: config() };
    let dir = tempfile::tempdir().unwrap();
    let fails = |out: &Path, breaks: &(dyn Fn(usize) + Sync)| -> Vec<String> {
        ThreadWorld::new(3).run(|comm: Arc<dyn Communicator>| {
            let start = || -> Result<()> {
                let folder = RunFolder::shared(out, replicas(&comm, Zero::Moments)?)?;
                let (corpus, tokenizer) = corpus(&case.config);
                let mut trainer = Trainer::new_in(case.model(None), case.config.clone(), corpus, tokenizer, folder)?;
                let mut observer = |event: &Event| {
                    if matches!(event, Event::Step { step: 2, .. }) {
                        breaks(comm.rank());
                    }
                };
                trainer.run(&AtomicBool::new(false), &mut observer).map(drop)
            };
            start().unwrap_err().to_string()
        })
    };
    // 1. A folder that cannot be.
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let messages = fails(&file.join("run"), &|_| ());
    assert!(messages[1] == messages[2] && messages[1] == format!("rank 0: {}", messages[0]), "{messages:?}");
    // 2. A folder that is gone when the first checkpoint is due.
    let out = dir.path().join("gone");
    let messages = fails(&out, &|rank| {
        if rank == 0 {
            std::fs::remove_dir_all(&out).unwrap();
            std::fs::write(&out, "").unwrap();
        }
    });
    assert!(messages[1] == messages[2] && messages[1] == format!("rank 0: {}", messages[0]), "{messages:?}");
    assert!(messages[0].contains("gone"), "{messages:?}");
    // 3. A run of the same name.
    let out = dir.path().join("run");
    over(&case, &out, Layout::replicas(2, Zero::Off), None, 1);
    let messages = fails(&out, &|_| ());
    assert!(messages.iter().all(|message| message.contains("already holds checkpoints")), "{messages:?}");
    assert!(matches!(
        RunFolder::shared(&file.join("run"), Box::new(moe_models::train::OneRank)),
        Err(Error::Io { .. })
    ));
}

/// A toy over three ranks, of which rank 1 `breaks`: the error of each, and what each was told before.
fn broken_run(breaks: impl Fn(&Toy) + Sync) -> Vec<(String, Vec<(u64, String)>)> {
    let (config, dir) = (toy::config(), tempfile::tempdir().unwrap());
    assert_eq!(config.grad_accum(), 3);
    ThreadWorld::new(3).run(|comm: Arc<dyn Communicator>| {
        let (corpus, tokenizer) = toy::corpus(&config);
        let toy = Toy::new(1);
        if comm.rank() == 1 {
            breaks(&toy);
        }
        let before = toy.bits();
        let folder = RunFolder::shared(dir.path(), replicas(&comm, Zero::Off).unwrap()).unwrap();
        let mut trainer = Trainer::new_in(toy, config.clone(), corpus, tokenizer, folder).unwrap();
        let mut skipped = Vec::new();
        let mut observer = |event: &Event| {
            if let Event::Skipped { step, what, .. } = event {
                skipped.push((*step, what.to_string()));
            }
        };
        let message = trainer.run(&AtomicBool::new(false), &mut observer).unwrap_err().to_string();
        assert_eq!(trainer.model().bits(), before, "rank {} updates nothing", comm.rank());
        (message, skipped)
    })
}

/// A loss, or a gradient alone, that is not finite on one rank skips the step on all; a panic of one ends all.
#[test]
fn what_goes_wrong_on_one_rank_is_decided_on_by_all() {
    let broken = broken_run(|toy| toy.broken.store(true, Ordering::Relaxed));
    for (message, skipped) in &broken {
        assert_eq!(skipped.iter().map(|s| s.0).collect::<Vec<_>>(), (1..8).collect::<Vec<_>>());
        assert!(skipped.iter().all(|s| s.1.contains("loss of micro-batch 1 is NaN")), "{skipped:?}");
        assert!(message.starts_with("step 8:"), "{message}");
    }
    for (message, skipped) in broken_run(|toy| toy.steep.store(true, Ordering::Relaxed)) {
        assert!(
            skipped.len() == 7 && skipped.iter().all(|s| s.1 == "the gradient of head is not finite"),
            "{skipped:?}"
        );
        assert!(message.starts_with("step 8:"), "{message}");
    }
    let panicked = broken_run(|toy| toy.panics.store(true, Ordering::Relaxed));
    let own = &panicked[1].0;
    assert!(own.contains("micro-batch 1") && own.contains("out of bounds"), "{own}");
    for rank in [0, 2] {
        let told = &panicked[rank].0;
        assert!(told.contains("rank 1") && told.contains(own), "{told}");
    }
}
