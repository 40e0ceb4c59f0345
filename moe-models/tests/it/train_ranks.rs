//! The trainer over ranks: replicas of a PR-MoE on threads, with whole moments and with divided ones, against one rank on the same
//! global batch.

use crate::toy::{self, Toy};
use crate::train_gpt::{config, corpus, shape};
use candle_core::{Device, Tensor, Var};
use moe_core::tape::GradGroup;
use moe_models::gpt::Gpt;
use moe_models::train::optimizer::{ChunkSum, Moments, Owned, PartOf, Units};
use moe_models::train::{Event, Outcome, Ranks, RunFolder, Threads, TrainConfig, Trainer};
use moe_models::{Error, Precision, Result};
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::comm::{Communicator, Reduction};
use moe_parallel::dims::part;
use moe_parallel::{Collectives, Phase, Site};
use std::borrow::Cow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

const SITE: Site = Site::new(Phase::Update);

/// Every rank has the whole model and computes some of the micro-batches.
#[derive(Debug)]
struct Replicas {
    comm: Arc<dyn Communicator>,
    /// Whether each rank owns a part of the moments only.
    divided: bool,
    /// What each rank owns.
    plan: OnceLock<Vec<Owned>>,
}

impl Replicas {
    fn new(comm: &Arc<dyn Communicator>, divided: bool) -> Box<Self> {
        Box::new(Self { comm: Arc::clone(comm), divided, plan: OnceLock::new() })
    }

    /// A whole parameter's values from what every rank owns of it.
    fn whole(&self, param: usize, own: &[f32]) -> Result<Vec<f32>> {
        let plan = self.plan.get().expect("a plan");
        let counts: Vec<usize> = plan.iter().map(|owned| owned.elements(param)).collect();
        let parts = self.comm.start_all_gather_v(SITE, own, &counts)?.wait_parts()?;
        let mut whole = vec![f32::NAN; plan[0].units().elements(param)];
        plan.iter().zip(parts).for_each(|(owned, part)| owned.paste(param, &part, &mut whole));
        Ok(whole)
    }
}

impl Ranks for Replicas {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn share(&self, count: usize) -> std::ops::Range<usize> {
        part(count, self.comm.rank(), self.comm.size())
    }

    fn exchange(&self, own: Vec<u64>) -> Result<Vec<Vec<u64>>> {
        let counts = self.comm.all_gather(SITE, &[own.len() as u64])?;
        let counts: Vec<usize> = counts.into_iter().map(|count| count as usize).collect();
        Ok(self.comm.start_all_gather_v(SITE, &own, &counts)?.wait_parts()?)
    }

    fn reduce(&self, groups: &mut [GradGroup]) -> Result<()> {
        for group in groups {
            group.values = self.comm.all_reduce(SITE, &group.values, Reduction::Sum)?;
        }
        Ok(())
    }

    fn threads(&self) -> Threads {
        Threads::OnDemand
    }

    fn owned(&self, units: Units, groups: &[String]) -> Result<Owned> {
        if !self.divided {
            return Ok(Owned::everything(units));
        }
        let parts = self.comm.size();
        let names: std::collections::BTreeSet<&String> = groups.iter().collect();
        let list = |name: &String| (0..groups.len()).filter(|&param| groups[param] == *name).collect::<Vec<_>>();
        let of = |index| {
            let lists: Vec<_> = names.iter().map(|name| PartOf { params: list(name), index, parts }).collect();
            Owned::parts(units.clone(), &lists)
        };
        let plan = (0..parts).map(of).collect::<Result<Vec<_>>>()?;
        Ok(self.plan.get_or_init(|| plan)[self.comm.rank()].clone())
    }

    fn gather_squares(&self, own: Vec<ChunkSum>) -> Result<Vec<ChunkSum>> {
        if !self.divided {
            return Ok(own);
        }
        let words = own.iter().flat_map(|s| [s.chunk as u64, s.sum.to_bits()]).collect();
        let all = self.exchange(words)?.concat();
        Ok(all.chunks(2).map(|pair| ChunkSum { chunk: pair[0] as usize, sum: f64::from_bits(pair[1]) }).collect())
    }

    fn gather_params(&self, owned: &Owned, params: &[(String, Var)]) -> Result<Vec<usize>> {
        if !self.divided {
            return Ok(Vec::new());
        }
        for (param, (_, var)) in params.iter().enumerate() {
            let values = var.flatten_all()?.to_vec1::<f32>()?;
            let whole = self.whole(param, &owned.cut(param, &values))?;
            var.set(&Tensor::from_vec(whole, var.shape(), var.device())?)?;
        }
        Ok((0..params.len()).collect())
    }

    fn gather_moments<'a>(&self, _: &Owned, own: &'a [Moments]) -> Result<Cow<'a, [Moments]>> {
        if !self.divided {
            return Ok(Cow::Borrowed(own));
        }
        let whole = |(param, moments): (usize, &Moments)| {
            let exp_avg = self.whole(param, &moments.exp_avg)?;
            Ok(Moments { exp_avg, exp_avg_sq: self.whole(param, &moments.exp_avg_sq)? })
        };
        own.iter().enumerate().map(whole).collect::<Result<Vec<_>>>().map(Cow::Owned)
    }
}

/// How a run or a part of one ended: weights and moments of whole parameters, and the losses and norms of its steps.
#[derive(Debug, PartialEq)]
struct End {
    outcome: Outcome,
    weights: Vec<(String, Vec<f32>)>,
    steps: Vec<(u64, u64, u64)>,
    valid: Vec<u64>,
}

fn weights(model: &Gpt) -> Vec<(String, Vec<f32>)> {
    let read = |(name, var): &(String, Var)| (name.clone(), var.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    model.params().iter().map(read).collect()
}

/// What a test runs.
struct Case {
    config: TrainConfig,
}

impl Case {
    fn model(&self, resume: Option<&Path>) -> Gpt {
        let model = match resume {
            None => Gpt::new(shape(), self.config.seed, &Device::Cpu),
            Some(folder) => Gpt::load(folder, &Device::Cpu),
        };
        model.unwrap().with_precision(self.config.precision).unwrap()
    }
}

/// A run over these ranks, or what is left of it; rank 1 (or the only one) raises its flag after step `stop_after`.
fn run(case: &Case, folder: RunFolder, resume: Option<&Path>, stop_after: u64, stops: bool) -> End {
    let (config, model) = (&case.config, case.model(resume));
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
        Event::Validated { loss, .. } => valid.push(loss.to_bits()),
        _ => {}
    };
    let outcome = trainer.run(&stop, &mut observer).unwrap();
    End { outcome, weights: weights(trainer.model()), steps, valid }
}

/// The same end on every rank.
fn over(case: &Case, out: &Path, (ranks, divided): (usize, bool), resume: Option<&Path>, stop_after: u64) -> End {
    let end = |comm: Arc<dyn Communicator>| {
        let folder = RunFolder::shared(out, Replicas::new(&comm, divided)).unwrap();
        run(case, folder, resume, stop_after, comm.rank() + 1 == comm.size())
    };
    let mut ends = ThreadWorld::new(ranks).run(end);
    let last = ends.pop().unwrap();
    assert!(ends.iter().all(|end| *end == last), "ranks end alike");
    last
}

fn alone(case: &Case, out: &Path, resume: Option<&Path>, stop_after: u64) -> End {
    let lock = moe_models::train::RunLock::acquire(out).unwrap();
    run(case, lock.into(), resume, stop_after, true)
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
    for divided in [false, true] {
        let out = dir.path().join(format!("three-{divided}"));
        let end = over(&case, &out, (3, divided), None, u64::MAX);
        assert!(end == whole, "divided {divided}");
        for file in ["model.safetensors", "optimizer.safetensors"] {
            let of = |run: &Path| bytes(&run.join("step-00000012"), file);
            assert!(of(&out) == of(&dir.path().join("one")), "divided {divided}: {file}");
        }
        let metrics = |run: &Path| {
            let text = String::from_utf8(bytes(run, "metrics.jsonl")).unwrap();
            let record = |line: &str| {
                let mut record: serde_json::Value = serde_json::from_str(line).unwrap();
                record.as_object_mut().unwrap().remove("train/tokens_per_second");
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
    for divided in [false, true] {
        let out = dir.path().join(format!("run-{divided}"));
        let folder = |step: u64| out.join(format!("step-{step:08}"));
        assert_eq!(over(&case, &out, (3, divided), None, 4).outcome, Outcome::Stopped);
        assert_eq!(alone(&case, &out, Some(&folder(4)), 7).outcome, Outcome::Stopped);
        let end = over(&case, &out, (3, !divided), Some(&folder(7)), u64::MAX);
        assert_eq!(end.outcome, Outcome::Finished);
        assert!(end.weights == whole.weights, "divided {divided}");
        assert!(end.steps == whole.steps[7..], "divided {divided}: {:?} {:?}", end.steps, whole.steps);
    }
}

/// Two ranks have micro-batches 0, 1 and 2: their sum is (g0 + g1) + g2 still, and keeps the bits.
#[test]
fn the_last_micro_batch_alone_on_a_rank_keeps_the_bits() {
    let case = Case { config: config() };
    let dir = tempfile::tempdir().unwrap();
    let one = alone(&case, &dir.path().join("one"), None, u64::MAX);
    for divided in [false, true] {
        let two = over(&case, &dir.path().join(format!("two-{divided}")), (2, divided), None, u64::MAX);
        assert!(two == one, "divided {divided}");
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
    let more = over(&case, &dir.path().join("more"), (2, true), None, u64::MAX);
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
                let folder = RunFolder::shared(out, Replicas::new(&comm, true))?;
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
    over(&case, &out, (2, false), None, 1);
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
        let folder = RunFolder::shared(dir.path(), Replicas::new(&comm, false)).unwrap();
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
        assert_eq!(panicked[rank].0, format!("rank 1: {own}"));
    }
}
