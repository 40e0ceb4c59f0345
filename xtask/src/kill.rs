//! `cargo xtask kill`: whole training runs of `moe-train` whose ranks are killed or stopped for good at random moments of training
//! and of saving. No run may hang, no checkpoint be lost, and each goes on: in the same job where the engine can, else when it is
//! started again on fewer ranks.

use crate::shell::{self, cargo, root};
use anyhow::{Context, Result, ensure};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Options of `cargo xtask kill`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What carries messages between ranks.
    #[arg(value_enum, default_value = "tcp")]
    engine: Engine,
    /// Runs for each signal.
    #[arg(long, default_value_t = 50)]
    times: u64,
    /// What is sent: KILL ends a rank, STOP leaves it there for good.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Signal::Kill, Signal::Stop])]
    signals: Vec<Signal>,
    /// Of the first run; the others follow.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Run with the Open MPI installed here, which has to be one the `mpicc` on the PATH is compatible with. From version 5 on ranks
    /// outlive the death of another.
    #[arg(long)]
    prefix: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Engine {
    /// Processes with torchrun's variables.
    Tcp,
    /// Processes of `mpirun`.
    Mpi,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "UPPER")]
enum Signal {
    Kill,
    Stop,
}

impl Signal {
    /// As `kill` names it.
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "KILL",
            Self::Stop => "STOP",
        }
    }
}

const RANKS: usize = 4;
/// Steps of a run, each followed by a checkpoint, so that about half of all moments are in saving.
const STEPS: u64 = 16;
/// After which a rank that does not answer ends the run.
const DEADLINE: &str = "4";
/// After this a job is a hang.
const HARD_LIMIT: Duration = Duration::from_secs(90);
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
pub(crate) fn run(args: &Args) -> Result<()> {
    let build = ["build", "--release", "--package", "moe-models", "--bin", "moe-train"];
    let features: &[&str] = if args.engine == Engine::Mpi { &["--features", "moe-models/mpi"] } else { &[] };
    shell::run(cargo(&build).args(features))?;
    let bench = Bench::new(args)?;
    println!("signal  runs  in saving  went on in the job  started again  slowest, s");
    for &signal in &args.signals {
        let mut tally = Tally::default();
        for number in 0..args.times {
            let seed = args.seed + number;
            bench.one(signal, seed, &mut tally).with_context(|| format!("{}, seed {seed}", signal.name()))?;
        }
        let Tally { in_saving, same_job, started_again, slowest } = tally;
        let name = signal.name();
        println!("{name:<6} {:>5} {in_saving:>10} {same_job:>19} {started_again:>14} {slowest:>11.1}", args.times);
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

/// Random numbers of a seed, one for each use.
fn draw(seed: u64, salt: u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What all runs share.
struct Bench<'a> {
    args: &'a Args,
    folder: PathBuf,
    want: BTreeMap<u64, f64>,
    /// From the first step of a run to its end.
    length: Duration,
}

/// The processes of a job: the ranks, or their launcher.
struct Job {
    processes: Vec<Child>,
    out: PathBuf,
}

impl Job {
    /// Whether all have ended by themselves in time, but for `stopped`.
    fn wait(&mut self, stopped: Option<usize>) -> Result<Vec<Option<bool>>> {
        let begun = Instant::now();
        loop {
            let ended: Vec<Option<bool>> = self
                .processes
                .iter_mut()
                .map(|process| Ok(process.try_wait()?.map(|status| status.success())))
                .collect::<Result<_>>()?;
            let open = ended.iter().enumerate().any(|(rank, ended)| ended.is_none() && Some(rank) != stopped);
            if !open {
                return Ok(ended);
            }
            ensure!(begun.elapsed() < HARD_LIMIT, "it hangs: {ended:?}; see {}", self.out.display());
            sleep(Duration::from_millis(10));
        }
    }

    /// The id of the process that is a rank, unless it has ended.
    fn rank_id(&mut self, engine: Engine, rank: usize) -> Result<Option<u32>> {
        if engine == Engine::Tcp {
            let process = &mut self.processes[rank];
            return Ok(process.try_wait()?.is_none().then(|| process.id()));
        }
        let (wanted, out) = (format!("OMPI_COMM_WORLD_RANK={rank}"), self.out.to_string_lossy().into_owned());
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let has = |file: &str, text: &str| {
                let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
                bytes.split(|&byte| byte == 0).any(|part| part == text.as_bytes())
            };
            if has("environ", &wanted) && has("cmdline", &out) && !has("cmdline", "mpirun") {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ended = process.kill();
            let _known = process.wait();
        }
    }
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
        let more = ["--ep", "4", "--comm-timeout", DEADLINE, "--max-restarts", "1"];
        let log = |name: &str| File::create(out.with_extension(name));
        let processes = match self.args.engine {
            Engine::Tcp => {
                let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port().to_string();
                let rank = |rank: usize| {
                    let mut command = Command::new(self.moe_train());
                    command.args(self.program(out)).args(more);
                    for (name, number) in [("RANK", rank), ("WORLD_SIZE", RANKS), ("LOCAL_WORLD_SIZE", RANKS)] {
                        command.env(name, number.to_string());
                    }
                    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
                    Ok(command.stdin(Stdio::null()).stderr(log(&format!("{rank}.log"))?).spawn()?)
                };
                (0..RANKS).map(rank).collect::<Result<_>>()?
            }
            Engine::Mpi => {
                let mut command = self.mpirun();
                command.args(["-n", &RANKS.to_string()]).arg(self.moe_train()).args(self.program(out)).args(more);
                command.stdin(Stdio::null()).stdout(log("out.log")?).stderr(log("log")?);
                vec![command.spawn().context("cannot start mpirun")?]
            }
        };
        Ok(Job { processes, out: out.to_owned() })
    }

    fn mpirun(&self) -> Command {
        let mut command = match &self.args.prefix {
            None => Command::new("mpirun"),
            Some(prefix) => {
                let mut command = Command::new(prefix.join("bin/mpirun"));
                command.env("LD_LIBRARY_PATH", prefix.join("lib"));
                command
            }
        };
        command.args(["--allow-run-as-root", "--mca", "mpi_yield_when_idle", "1"]);
        if self.args.prefix.is_some() {
            command.args(["--with-ft", "ulfm", "--map-by", ":OVERSUBSCRIBE"]);
        } else {
            command.args(["--oversubscribe", "--mca", "odls_base_sigkill_timeout", "0"]);
        }
        command
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
            if let Some(id) = job.rank_id(engine, victim)? {
                break (job, id);
            }
            // It was over already, on a machine that has become faster: earlier in one that begins anew.
            drop(job);
            fs::remove_dir_all(&out)?;
            moment = moment.mul_f64(0.7);
        };
        let newest = newest(&out);
        tally.in_saving += u64::from(saves(&out));
        let sent = Command::new("kill")
            .args([format!("-{}", signal.name()), id.to_string()])
            .stderr(Stdio::null())
            .status()?;
        let begun = Instant::now();
        let stopped = (signal == Signal::Stop && engine == Engine::Tcp).then_some(victim);
        let ended = job.wait(stopped)?;
        tally.slowest = tally.slowest.max(begun.elapsed().as_secs_f64());
        // A process that was stopped under a launcher outlives it, and the launcher need not wait for those that it ends.
        let _gone = Command::new("kill").args(["-KILL", &id.to_string()]).stderr(Stdio::null()).status();
        for rank in (0..RANKS).filter(|_| engine == Engine::Mpi) {
            while job.rank_id(engine, rank)?.is_some() {
                ensure!(begun.elapsed() < HARD_LIMIT, "rank {rank} has outlived its launcher; see {}", out.display());
                sleep(Duration::from_millis(10));
            }
        }
        drop(job);

        let done = losses(&out).len() as u64 == STEPS;
        let survivors = ended.iter().enumerate().filter(|(rank, _)| *rank != victim || engine == Engine::Mpi);
        if done && sent.success() && survivors.clone().any(|(_, ended)| *ended == Some(true)) {
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
