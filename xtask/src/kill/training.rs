//! Whole training runs of `moe-train` whose ranks are killed or stopped for good at random moments of training and of saving. No
//! run may hang, no checkpoint be lost, and each goes on: in the same job where the engine can, else when it is started again on
//! fewer ranks.

use super::job::{HARD_LIMIT, Job, Launch, draw, send};
use super::{Args, Engine, Signal};
use crate::shell::{self, cargo, root};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

const RANKS: usize = 4;
/// Steps of a run, each followed by a checkpoint, so that about half of all moments are in saving.
const STEPS: u64 = 16;
/// After which a rank that does not answer ends the run.
const DEADLINE: &str = "4";
/// Largest difference of a loss from that of one rank, as a part of it.
const TOLERANCE: f64 = 1e-4;

/// A model small enough that saving it takes as long as a step.
const MODEL: [&str; 24] = [
    "--preset",
    "tiny-pr-moe",
    "--hidden-size",
    "32",
    "--num-layers",
    "4",
    "--num-heads",
    "2",
    "--num-experts",
    "4,8",
    "--vocab-size",
    "512",
    "--seq-length",
    "64",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "8",
    "--precision",
    "f32",
    "--save-interval",
    "1",
    "--eval-iters",
    "1",
];

/// How a run with a signal in it ended.
#[derive(Default)]
struct Tally {
    in_saving: u64,
    same_job: u64,
    started_again: u64,
    slowest: f64,
}

/// Runs everything and prints a table.
pub(super) fn run(args: &Args) -> Result<()> {
    let build = ["build", "--release", "--package", "moe-models", "--bin", "moe-train"];
    let features: &[&str] = if args.engine == Engine::Mpi { &["--features", "moe-models/mpi"] } else { &[] };
    shell::run(cargo(&build).args(features))?;
    let bench = Bench::new(args)?;
    let times = args.times.unwrap_or(50);
    println!("signal  runs  in saving  went on in the job  started again  slowest, s");
    for &signal in &args.signals {
        let mut tally = Tally::default();
        for number in 0..times {
            let seed = args.seed + number;
            bench.one(signal, seed, &mut tally).with_context(|| format!("{}, seed {seed}", signal.name()))?;
        }
        let Tally { in_saving, same_job, started_again, slowest } = tally;
        let name = signal.name();
        println!("{name:<6} {:>5} {in_saving:>10} {same_job:>19} {started_again:>14} {slowest:>11.1}", times);
    }
    println!("no run hung, no checkpoint was lost, every curve is that of one rank within {TOLERANCE}");
    Ok(())
}

/// Losses of a run by step.
fn losses(run: &Path) -> BTreeMap<u64, f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    // The last line may be under way.
    let records = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    records.filter_map(|r| Some((r["step"].as_u64()?, r["train/loss"].as_f64()?))).collect()
}

/// What all runs share.
struct Bench<'a> {
    args: &'a Args,
    folder: PathBuf,
    want: BTreeMap<u64, f64>,
    /// From the first step of a run to its end.
    length: Duration,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        let folder = root().join("target/kill");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        let mut bench = Self { args, folder, want: BTreeMap::new(), length: Duration::ZERO };
        fs::copy(root().join("target/release/moe-train"), bench.moe_train())?;
        let one = bench.folder.join("one");
        ensure!(bench.alone(&one)?.status()?.success(), "the run of one rank has failed");
        bench.want = losses(&one);
        ensure!(bench.want.len() as u64 == STEPS, "one rank did {} of {STEPS} steps", bench.want.len());
        // How long a job takes without a signal.
        let mut job = bench.start(&bench.folder.join("calm"))?;
        bench.first_step(&job)?;
        let begun = Instant::now();
        let ended = job.wait(None)?;
        ensure!(ended.iter().all(|ended| *ended == Some(true)), "a run without a signal has failed");
        bench.check(&job.out)?;
        bench.length = begun.elapsed();
        Ok(bench)
    }

    fn program(&self, out: &Path) -> Vec<String> {
        let tokens = (STEPS * 8 * 64).to_string();
        let cache = self.folder.join("data-cache").to_string_lossy().into_owned();
        let out = out.to_string_lossy().into_owned();
        let rest =
            ["--train-tokens", &tokens, "--log-interval", "1", "--data-cache", &cache, "--resume", "--out", &out];
        MODEL.iter().chain(&rest).map(|word| (*word).to_owned()).collect()
    }

    /// A copy, so that nothing that is built meanwhile is run instead.
    fn moe_train(&self) -> PathBuf {
        self.folder.join("moe-train")
    }

    fn alone(&self, out: &Path) -> Result<Command> {
        let mut command = Command::new(self.moe_train());
        let log = File::create(out.with_extension("log"))?;
        command.args(self.program(out)).stdin(Stdio::null()).stderr(log);
        Ok(command)
    }

    fn start(&self, out: &Path) -> Result<Job> {
        let more = ["--ep", "4", "--comm-timeout", DEADLINE, "--max-restarts", "1"].map(String::from);
        let launch = Launch { engine: self.args.engine, prefix: self.args.prefix.as_deref(), ranks: RANKS };
        let arguments = [self.program(out), more.to_vec()].concat();
        launch.start(&self.moe_train(), &arguments, out, &out.to_string_lossy())
    }

    /// Waits for the first step of a job.
    fn first_step(&self, job: &Job) -> Result<()> {
        let begun = Instant::now();
        while losses(&job.out).is_empty() {
            ensure!(begun.elapsed() < HARD_LIMIT, "it has not begun; see {}", job.out.display());
            sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// All steps are done, with the losses of one rank.
    fn check(&self, out: &Path) -> Result<()> {
        let got = losses(out);
        ensure!(got.keys().eq(self.want.keys()), "steps {:?}", got.keys().collect::<Vec<_>>());
        for (step, loss) in got {
            let want = self.want[&step];
            ensure!((loss - want).abs() < TOLERANCE * want, "step {step} has loss {loss}, that of one rank is {want}");
        }
        Ok(())
    }

    /// One run with a signal in it.
    fn one(&self, signal: Signal, seed: u64, tally: &mut Tally) -> Result<()> {
        let engine = self.args.engine;
        let out = self.folder.join(format!("{}-{seed}", signal.name()));
        let victim = (draw(seed, 1) % RANKS as u64) as usize;
        let mut moment = self.length.mul_f64(draw(seed, 2) as f64 / u64::MAX as f64 * 0.9);
        let (mut job, id) = loop {
            let mut job = self.start(&out)?;
            self.first_step(&job)?;
            sleep(moment);
            if let Some(id) = job.rank_id(victim)? {
                break (job, id);
            }
            // It was over already, on a machine that has become faster: earlier in one that begins anew.
            drop(job);
            fs::remove_dir_all(&out)?;
            moment = moment.mul_f64(0.7);
        };
        let newest = newest(&out);
        tally.in_saving += u64::from(saves(&out));
        let sent = send(signal, id)?;
        let begun = Instant::now();
        let stopped = (signal == Signal::Stop && engine == Engine::Tcp).then_some(victim);
        let ended = job.wait(stopped)?;
        tally.slowest = tally.slowest.max(begun.elapsed().as_secs_f64());
        // A process that was stopped under a launcher outlives it, and the launcher need not wait for those that it ends.
        send(Signal::Kill, id)?;
        (0..RANKS).filter(|_| engine == Engine::Mpi).try_for_each(|rank| job.wait_for(rank))?;
        drop(job);

        let done = losses(&out).len() as u64 == STEPS;
        let survivors = ended.iter().enumerate().filter(|(rank, _)| *rank != victim || engine == Engine::Mpi);
        if done && sent && survivors.clone().any(|(_, ended)| *ended == Some(true)) {
            tally.same_job += 1;
        } else {
            tally.started_again += 1;
        }
        // What was whole when the signal came is not lost, and the run is ended from the newest.
        let after = self::newest(&out);
        ensure!(after >= newest, "the newest checkpoint was {newest:?}, then {after:?}");
        ensure!(
            self.alone(&out)?.status()?.success(),
            "it does not go on; see {}",
            out.with_extension("log").display()
        );
        self.check(&out)?;
        Ok(fs::remove_dir_all(&out)?)
    }
}

/// The checkpoint that `latest` names.
fn newest(run: &Path) -> Option<String> {
    fs::read_to_string(run.join("latest")).ok()
}

/// Whether a checkpoint is under way.
fn saves(run: &Path) -> bool {
    let entries = fs::read_dir(run).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with(".tmp-step-"))
}
