//! Runs over ranks of which one is killed, answers no more, or sends nothing or too late, in any of their operations: what the
//! others return, what is on the disk then, and that the run goes on from it with the ranks that are left.

use crate::train_gpt::{config as gpt_config, corpus, shape};
use crate::train_ranks::Layout;
use moe_models::gpt::Gpt;
use moe_models::train::checkpoint::{CheckpointStore, read_state, verify};
use moe_models::train::shards::Reader;
use moe_models::train::{Event, RunFolder, TrainConfig, Trainer, Zero};
use moe_models::{Precision, Result};
use moe_parallel::comm::thread::{Clock, FaultPlan, Injection, Moment, ThreadWorld};
use moe_parallel::comm::{Cause, Expected, Fault, Group, Parcel, Pending, Stamp};
use moe_parallel::{Collectives, Communicator, ParallelDims, Phase, Site};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

/// Deadline of every operation, on the virtual clock, where waiting costs nothing.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);
const STEPS: u64 = 4;
const KEEP_LAST: usize = 2;

/// Four steps of four micro-batches, saved after every second one.
pub(crate) fn config() -> TrainConfig {
    // Without a large epsilon a gradient that is zero but for rounding moves by a whole step.
    let config = TrainConfig {
        global_batch_size: 8,
        train_tokens: STEPS * 128,
        eps: 1e-2,
        precision: Precision::F32,
        eval_interval: 100,
        eval_iters: 2,
        save_interval: 2,
        keep_last: KEEP_LAST,
        lr_warmup_tokens: None,
        lr_decay_tokens: None,
        min_lr: None,
        ..gpt_config()
    };
    config.resolved(16).unwrap()
}

/// An empty folder; in memory where the system has such a place, as runs flush all they write to the disk.
pub(crate) fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let copy = to.join(entry.file_name().unwrap());
        if entry.is_dir() { copy_folder(&entry, &copy) } else { _ = std::fs::copy(&entry, copy).unwrap() }
    }
}

/// Names of what is in a run's folder under a temporary name.
pub(crate) fn unfinished(out: &Path) -> Vec<String> {
    let names = std::fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with(".tmp-")).collect()
}

/// Step and losses, of training and of validation where there was one, of every record of a run.
fn losses(out: &Path) -> Vec<(u64, [Option<f64>; 2])> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap_or_default();
    let record = |line: &str| {
        let record: serde_json::Value = serde_json::from_str(line).unwrap();
        (record["step"].as_u64().unwrap(), ["train/loss", "valid/loss"].map(|tag| record[tag].as_f64()))
    };
    text.lines().map(record).collect()
}

/// What one rank does of a run.
#[derive(Debug)]
struct Course<'a> {
    layout: Layout,
    out: &'a Path,
    /// The checkpoint it goes on from, if there is one.
    from: Option<PathBuf>,
    stop_after: u64,
}

impl Course<'_> {
    /// Trains; `saved` becomes the last step of which this rank is told that it is saved.
    fn run(&self, comm: &Arc<dyn Communicator>, saved: &mut u64) -> Result<()> {
        let (config, (corpus, tokenizer)) = (config(), corpus(&config()));
        let mesh = self.layout.mesh(comm)?;
        let model = match &self.from {
            None => Gpt::new_over(shape(), config.seed, Arc::clone(&mesh))?,
            Some(folder) => Gpt::load_checkpoint(folder, Some(Arc::clone(&mesh)))?,
        };
        let model = model.with_precision(config.precision)?;
        let folder = RunFolder::shared(self.out, self.layout.ranks(&mesh, model.table())?)?;
        let mut trainer = match &self.from {
            None => Trainer::new_in(model, config, corpus, tokenizer, folder)?,
            Some(from) => Trainer::resume_in(model, config, corpus, tokenizer, folder, from)?,
        };
        let stop = AtomicBool::new(false);
        let mut observer = |event: &Event| match event {
            Event::Step { step, .. } => stop.store(*step == self.stop_after, Ordering::Relaxed),
            Event::Saved { step, .. } => *saved = *step,
            _ => {}
        };
        trainer.run(&stop, &mut observer).map(drop)
    }
}

/// How a run ended on one rank.
#[derive(Debug, PartialEq)]
struct End {
    fault: Option<Fault>,
    /// The last step of which the rank was told that it is saved.
    saved: u64,
    /// By the world's clock.
    at: Duration,
}

/// Trains in `out` over the ranks of `layout`, from the newest checkpoint that is there.
///
/// # Panics
/// If a rank panics or ends with an error that is no fault.
fn train(world: &ThreadWorld, layout: Layout, out: &Path, stop_after: u64) -> Vec<End> {
    let store = CheckpointStore::read_only(out, KEEP_LAST);
    let course = Course { layout, out, from: store.latest().unwrap(), stop_after };
    let run = |comm: Arc<dyn Communicator>| {
        let mut saved = 0;
        let error = course.run(&comm, &mut saved).err();
        let fault = error.map(|e| e.fault().cloned().unwrap_or_else(|| panic!("rank {}: no fault: {e}", comm.rank())));
        (fault, saved)
    };
    world.run_timed(run).into_iter().map(|((fault, saved), at)| End { fault, saved, at }).collect()
}

pub(crate) fn world(layout: Layout) -> ThreadWorld {
    ThreadWorld::new(layout.dims.world_size()).with_clock(Clock::Virtual).with_timeout(TIMEOUT)
}

/// A communicator that writes down where its rank calls its operations.
#[derive(Debug)]
struct Recorded {
    inner: Arc<dyn Communicator>,
    sites: Arc<Mutex<Vec<Site>>>,
}

impl Communicator for Recorded {
    fn group(&self) -> &Group {
        self.inner.group()
    }

    fn start(
        &self,
        stamp: Stamp,
        sends: Vec<(usize, Parcel)>,
        receives: &[Expected],
    ) -> moe_parallel::Result<Box<dyn Pending>> {
        self.sites.lock().unwrap().push(stamp.site);
        self.inner.start(stamp, sends, receives)
    }

    fn over(&self, group: Group) -> Arc<dyn Communicator> {
        Arc::new(Self { inner: self.inner.over(group), sites: Arc::clone(&self.sites) })
    }

    fn fault(&self) -> Option<Fault> {
        self.inner.fault()
    }

    fn fail(&self, stamp: Stamp, cause: Cause) -> Fault {
        self.inner.fail(stamp, cause)
    }
}

/// A run that is disturbed.
#[derive(Debug, Clone, Copy)]
struct Case {
    layout: Layout,
    /// With one rank less.
    left: Layout,
    /// Steps that are done and saved before.
    begun: u64,
    clock: Clock,
}

impl Case {
    fn new(layout: Layout, left: Layout) -> Self {
        Self { layout, left, begun: 0, clock: Clock::Virtual }
    }

    fn world(&self, plan: FaultPlan) -> ThreadWorld {
        world(self.layout).with_clock(self.clock).with_faults(plan)
    }
}

/// A rank that is seen to be gone is found at once, what is only silent at the deadline.
fn late(injection: Injection) -> Duration {
    match injection {
        Injection::Kill(_) => Duration::ZERO,
        Injection::Delay(by) => by.min(TIMEOUT),
        Injection::Stop | Injection::Drop => TIMEOUT,
    }
}

fn alone() -> Layout {
    layout(1, 1, 1, 1, Zero::Off)
}

/// A case, and what comes of it undisturbed.
struct Bench {
    case: Case,
    /// What the run begins with.
    begun: TempDir,
    /// Of one rank.
    losses: Vec<(u64, [Option<f64>; 2])>,
    /// Of each operation of each rank.
    sites: Vec<Vec<Site>>,
    /// At most, by the world's clock.
    takes: Duration,
}

/// A run of one rank that ends after `steps` steps.
fn train_alone(steps: u64) -> TempDir {
    let dir = scratch();
    let ends = train(&world(alone()), alone(), dir.path(), steps);
    assert!(ends[0].fault.is_none() && ends[0].saved == steps, "{ends:?}");
    dir
}

impl Bench {
    fn new(case: Case) -> Self {
        let begun = if case.begun > 0 { train_alone(case.begun) } else { scratch() };
        let losses = losses(train_alone(STEPS).path());
        let (sites, takes) = (Vec::new(), Duration::ZERO);
        let bench = Self { case, begun, losses, sites, takes };
        Self { sites: bench.record(), takes: bench.measure(), ..bench }
    }

    /// A folder with what the run begins with.
    fn begin(&self) -> TempDir {
        let dir = scratch();
        copy_folder(self.begun.path(), dir.path());
        dir
    }

    fn record(&self) -> Vec<Vec<Site>> {
        let (dir, layout) = (self.begin(), self.case.layout);
        let from = CheckpointStore::read_only(dir.path(), KEEP_LAST).latest().unwrap();
        let course = Course { layout, out: dir.path(), from, stop_after: STEPS };
        world(layout).run(|inner| {
            let sites = Arc::default();
            let comm: Arc<dyn Communicator> = Arc::new(Recorded { inner, sites: Arc::clone(&sites) });
            course.run(&comm, &mut 0).unwrap();
            std::mem::take(&mut *sites.lock().unwrap())
        })
    }

    /// On the virtual clock messages alone take time, with jitter.
    fn measure(&self) -> Duration {
        if self.case.clock == Clock::System {
            return TIMEOUT / 2;
        }
        let world = self.case.world(FaultPlan::none().with_jitter(1, TIMEOUT / 100));
        let ends = train(&world, self.case.layout, self.begin().path(), STEPS);
        assert!(ends.iter().all(|end| end.fault.is_none()), "{ends:?}");
        ends.iter().map(|end| end.at).max().unwrap().mul_f64(1.25)
    }

    /// One injection in any operation; with every third seed, in one of a save.
    fn plan(&self, seed: u64) -> FaultPlan {
        let most = self.sites.iter().map(Vec::len).max().unwrap() as u64;
        let plan = FaultPlan::seeded(seed, self.sites.len(), most, TIMEOUT);
        let (rank, operation, injection) = plan.injections()[0];
        let aimed = seed.is_multiple_of(3);
        if self.case.clock == Clock::Virtual && !aimed {
            return plan;
        }
        let injection = match (self.case.clock, injection) {
            (Clock::Virtual, any) | (Clock::System, any @ Injection::Kill(_)) => any,
            // Where time passes nobody waits for a deadline.
            (Clock::System, _) => Injection::Kill(Moment::Inside),
        };
        let sites = self.sites[rank].iter().zip(0..);
        let saves: Vec<u64> = sites.filter(|(site, _)| site.phase == Phase::Save).map(|(_, i)| i).collect();
        let operation = if aimed { saves[(seed / 3) as usize % saves.len()] } else { operation };
        FaultPlan::none().with(rank, operation, injection)
    }

    /// The fault that all return who are not its cause; `None` if the run ended well.
    fn fault(&self, plan: &FaultPlan, ends: &[End]) -> Option<Fault> {
        let (victim, operation, injection) = plan.injections()[0];
        let operations = self.sites[victim].len() as u64;
        let (never, last) = (operation >= operations, operation + 1 == operations);
        let harmless = never || matches!(injection, Injection::Delay(by) if by < TIMEOUT);
        let silent = matches!(injection, Injection::Delay(_) | Injection::Drop);
        let survivors: Vec<&End> = (0..ends.len()).filter(|rank| *rank != victim).map(|rank| &ends[rank]).collect();
        let fault = survivors.iter().find_map(|end| end.fault.as_ref());
        // In the last operation some may have ended before others find the fault.
        let alike = |end: &End| end.fault.as_ref() == fault || last && end.fault.is_none();
        assert!(survivors.iter().all(|end| alike(end)), "one fault");
        match fault {
            // What was lost may have been no message at all.
            None => assert!(harmless || last || silent, "it must be found"),
            Some(_) => assert!(!harmless, "nothing went wrong"),
        }
        let own = ends[victim].fault.as_ref();
        let killed = own.is_some_and(|own| own.cause == Cause::Killed);
        assert!(if never || silent { alike(&ends[victim]) } else { killed }, "the victim's own");
        let most = self.takes + late(injection);
        assert!(survivors.iter().all(|end| end.at <= most), "later than {most:?}");
        fault.cloned()
    }

    /// Step of the newest checkpoint in `out`, 0 without one: whole, and not older than what a rank was told of.
    fn newest(store: &CheckpointStore, told: u64) -> u64 {
        let Some(folder) = store.latest().unwrap() else {
            assert_eq!(told, 0, "the checkpoint is lost");
            return 0;
        };
        let state = read_state(&folder).unwrap();
        verify(&folder, &state).unwrap();
        Reader::open(&folder).unwrap();
        assert!((told..=told + config().save_interval).contains(&state.step), "{} where {told} was told", state.step);
        state.step
    }

    /// Goes on in `out` with the ranks that are left, or with one of them: the losses are those of one rank all along.
    fn go_on(&self, out: &Path, layout: Layout) {
        let ends = train(&world(layout), layout, out, u64::MAX);
        assert!(ends.iter().all(|end| end.fault.is_none()), "{layout:?}: {ends:?}");
        let store = CheckpointStore::read_only(out, KEEP_LAST);
        assert_eq!(Self::newest(&store, STEPS), STEPS);
        assert_eq!(unfinished(out), Vec::<String>::new());
        let got = losses(out);
        assert_eq!(got.len(), self.losses.len(), "no record twice, none missing: {got:?}");
        let close = |(got, want): (&Option<f64>, &Option<f64>)| match (got, want) {
            (Some(got), Some(want)) => (got - want).abs() < 1e-5 * want,
            _ => got == want,
        };
        for (got, want) in got.iter().zip(&self.losses) {
            assert!(got.0 == want.0 && got.1.iter().zip(&want.1).all(close), "{got:?} {want:?}");
        }
    }

    fn trial(&self, seed: u64, tally: &mut Tally) {
        let (plan, dir) = (self.plan(seed), self.begin());
        let (world, layout, out) = (self.case.world(plan.clone()), self.case.layout, dir.path());
        let ends = train(&world, layout, out, STEPS);
        let fault = self.fault(&plan, &ends);
        if seed.is_multiple_of(20) && self.case.clock == Clock::Virtual {
            assert_eq!(train(&world, layout, self.begin().path(), STEPS), ends, "it replays");
        }
        let unfinished = unfinished(out).len();
        let store = match seed % 2 {
            0 => CheckpointStore::open(out, KEEP_LAST).unwrap(),
            // What the fault left is removed by the run that goes on.
            _ => CheckpointStore::read_only(out, KEEP_LAST),
        };
        let told = ends.iter().map(|end| end.saved).max().unwrap().max(self.case.begun);
        let newest = Self::newest(&store, told);
        assert!(fault.is_some() || newest == STEPS, "it ended well before its end");
        tally.count(fault.as_ref(), newest, unfinished, losses(out).last().map_or(0, |last| last.0));
        self.go_on(out, if seed.is_multiple_of(4) { alone() } else { self.case.left });
    }
}

/// What came of some seeds.
#[derive(Debug, Default)]
struct Tally {
    well: usize,
    in_save: usize,
    elsewhere: usize,
    /// Faults that left a checkpoint that is not whole.
    unfinished: usize,
    /// Faults after which there was no checkpoint.
    without: usize,
    /// Faults after which there were records of steps that no checkpoint has.
    ahead: usize,
}

impl Tally {
    fn count(&mut self, fault: Option<&Fault>, newest: u64, unfinished: usize, recorded: u64) {
        match fault {
            None => self.well += 1,
            Some(fault) if fault.stamp.site.phase == Phase::Save => self.in_save += 1,
            Some(_) => self.elsewhere += 1,
        }
        self.unfinished += usize::from(unfinished > 0);
        self.without += usize::from(newest == 0);
        self.ahead += usize::from(recorded > newest);
    }
}

fn check(case: Case, seeds: Range<u64>) {
    let bench = Bench::new(case);
    let mut tally = Tally::default();
    for seed in seeds.clone() {
        let trial = catch_unwind(AssertUnwindSafe(|| bench.trial(seed, &mut tally)));
        trial.unwrap_or_else(|panic| {
            eprintln!("seed {seed}: {:?} in {case:?}", bench.plan(seed));
            resume_unwind(panic)
        });
    }
    let some = (seeds.end - seeds.start) as usize / 20;
    eprintln!("{tally:?} of {:?} operations", bench.sites.iter().map(Vec::len).collect::<Vec<_>>());
    assert!(tally.in_save >= 4 * some && tally.elsewhere >= 6 * some && tally.well <= 7 * some, "{tally:?}");
    assert!(tally.unfinished >= some && tally.ahead >= some, "{tally:?}");
    assert!(tally.without >= some || case.begun > 0, "{tally:?}");
}

pub(crate) fn layout(dp: usize, tp: usize, ep: usize, slices: usize, zero: Zero) -> Layout {
    Layout::new(ParallelDims::new(dp, tp, ep, slices), zero)
}

/// Three ranks have 2, 1 and 1 micro-batches of a step.
#[test]
fn replicas() {
    check(Case::new(layout(3, 1, 1, 1, Zero::Off), layout(2, 1, 2, 1, Zero::Gradients)), 0..63);
}

#[test]
fn replicas_with_divided_moments() {
    check(Case::new(layout(3, 1, 1, 1, Zero::Moments), layout(1, 2, 2, 1, Zero::Off)), 100..163);
}

#[test]
fn replicas_with_divided_gradients() {
    check(Case::new(layout(3, 1, 1, 1, Zero::Gradients), layout(2, 1, 1, 2, Zero::Moments)), 200..263);
}

/// Two experts and four on three ranks.
#[test]
fn uneven_experts() {
    check(Case::new(layout(3, 1, 3, 1, Zero::Off), layout(1, 2, 1, 1, Zero::Gradients)), 300..363);
}

#[test]
fn experts_with_divided_moments() {
    check(Case::new(layout(4, 1, 4, 1, Zero::Moments), layout(3, 1, 1, 1, Zero::Gradients)), 400..463);
}

#[test]
fn experts_and_split_matrices() {
    check(Case::new(layout(2, 2, 2, 1, Zero::Off), layout(3, 1, 3, 1, Zero::Moments)), 500..563);
}

#[test]
fn experts_with_divided_gradients_from_a_checkpoint() {
    let case = Case::new(layout(4, 1, 2, 1, Zero::Gradients), layout(3, 1, 3, 1, Zero::Off));
    check(Case { begun: 2, ..case }, 600..663);
}

#[test]
fn split_matrices_and_moments_from_a_checkpoint() {
    let case = Case::new(layout(2, 2, 4, 1, Zero::Moments), layout(3, 1, 1, 1, Zero::Off));
    check(Case { begun: 2, ..case }, 700..763);
}

/// On the system's clock all ranks compute and write at the same time.
#[test]
fn ranks_that_run_at_once() {
    let case = Case::new(layout(4, 1, 4, 1, Zero::Moments), layout(3, 1, 3, 1, Zero::Off));
    check(Case { clock: Clock::System, ..case }, 800..830);
}
