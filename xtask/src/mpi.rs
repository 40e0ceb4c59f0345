//! `cargo xtask mpi`: the MPI engine under a real `mpirun`: its conformance, and what ranks return when one of them fails.
//!
//! Ranks are more than cores here. A run that does not end by itself is ended by this driver and counts as a hang.

use crate::shell::{self, cargo};
use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Options of `cargo xtask mpi`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run every scenario 20 times instead of twice.
    #[arg(long)]
    long: bool,
}

/// Of every operation in a scenario.
const DEADLINE: Duration = Duration::from_secs(2);
/// How much later every rank has told its fault, or the launcher has ended the job.
const MARGIN: Duration = Duration::from_secs(1);
/// After this a run is a hang.
const HARD_LIMIT: Duration = Duration::from_secs(60);
/// Ranks of a scenario; rank 1 fails.
const RANKS: usize = 4;
const VICTIM: usize = 1;

/// What a scenario of the example `mpi_faults` must come to.
struct Scenario {
    name: &'static str,
    expected: Expected,
}

enum Expected {
    /// All ranks end well.
    Done,
    /// All ranks return one fault, which contains this.
    OnAll(&'static str),
    /// So do all but the one that fails.
    OnSurvivors(&'static str),
    /// The launcher ends the job: a process has died, and this MPI has no fault tolerance.
    JobEnds,
}

const SCENARIOS: [Scenario; 10] = [
    Scenario { name: "none", expected: Expected::Done },
    Scenario { name: "busy", expected: Expected::Done },
    Scenario { name: "diverge", expected: Expected::OnAll("must call the same operations") },
    Scenario { name: "size", expected: Expected::OnAll("bytes where") },
    Scenario { name: "late", expected: Expected::OnAll("no message within 2.0 s from rank 1, last seen in barrier") },
    Scenario {
        name: "stop",
        expected: Expected::OnSurvivors("no message within 2.0 s from rank 1, last seen in barrier"),
    },
    Scenario { name: "leave", expected: Expected::OnSurvivors("rank 1 has left") },
    Scenario { name: "kill-before", expected: Expected::JobEnds },
    Scenario { name: "kill-inside", expected: Expected::JobEnds },
    Scenario { name: "kill-after", expected: Expected::JobEnds },
];

/// Builds the examples, then runs them.
pub(crate) fn run(args: &Args) -> Result<()> {
    let version = version()?;
    // The whole workspace is named so that the dependencies are the ones its tests have compiled.
    let examples = ["--example", "mpi_conformance", "--example", "mpi_faults", "--example", "mpi_equality"];
    let features = ["--features", "moe-models/mpi,moe-parallel/testing"];
    shell::run(cargo(&["build", "--workspace"]).args(examples).args(features))?;

    println!("{version}");
    for ranks in [2, 4, 8] {
        let run = Run::of(ranks, &["mpi_conformance"])?;
        ensure!(run.succeeded && run.lines.len() == 1, "conformance on {ranks} ranks failed:\n{}", run.text());
        println!("{}", run.lines[0].1);
    }

    for ranks in [4, 8] {
        let run = Run::of(ranks, &["mpi_equality"])?;
        ensure!(run.succeeded && run.lines.len() == 2, "equality on {ranks} ranks failed:\n{}", run.text());
        run.lines.iter().for_each(|(_, line)| println!("{line}"));
    }

    let times = if args.long { 20 } else { 2 };
    let mut failures = 0;
    for scenario in SCENARIOS {
        let mut slowest = 0.0f64;
        let mut right = 0;
        for _ in 0..times {
            let run = Run::of(RANKS, &["mpi_faults", scenario.name, &DEADLINE.as_secs_f64().to_string()])?;
            match scenario.judge(&run) {
                Ok(seconds) => {
                    right += 1;
                    slowest = slowest.max(seconds);
                }
                Err(error) => eprintln!("{}: {error:#}\n{}", scenario.name, run.text()),
            }
        }
        failures += times - right;
        println!("{:12} {right} of {times} as expected: {}, at most {slowest:.2} s", scenario.name, scenario.meaning());
    }
    ensure!(failures == 0, "{failures} runs did not end as they must");
    Ok(())
}

/// The MPI at hand.
fn version() -> Result<String> {
    let install = "on Debian: apt-get install --no-install-recommends openmpi-bin libopenmpi-dev libclang-dev";
    for program in ["mpicc", "mpirun"] {
        let found = Command::new(program).arg("--version").output();
        ensure!(found.is_ok(), "`{program}` is not on the PATH, so nothing was run over MPI; {install}");
    }
    let text = shell::output(&mut shell::command("mpirun", &["--version"]))?;
    let first = text.lines().next().unwrap_or_default();
    ensure!(first.contains("Open MPI"), "`mpirun` is {first:?}, but only Open MPI's options are known here; {install}");
    Ok(first.to_owned())
}

impl Scenario {
    fn meaning(&self) -> String {
        match self.expected {
            Expected::Done => "no rank fails".into(),
            Expected::OnAll(text) => format!("\"{text}\" on all {RANKS} ranks"),
            Expected::OnSurvivors(text) => format!("\"{text}\" on the other {} ranks", RANKS - 1),
            Expected::JobEnds => "the launcher ends the job".into(),
        }
    }

    /// The seconds it took; an error if the run is not what it must be.
    fn judge(&self, run: &Run) -> Result<f64> {
        ensure!(!run.hung, "hung");
        ensure!(run.succeeded == matches!(self.expected, Expected::Done), "the exit status of mpirun is wrong");
        let told: Vec<Told> = run.lines.iter().filter_map(|(_, line)| Told::of(line)).collect();
        let wanted: Vec<usize> = match self.expected {
            Expected::Done | Expected::OnAll(_) => (0..RANKS).collect(),
            Expected::OnSurvivors(_) => (0..RANKS).filter(|&rank| rank != VICTIM).collect(),
            Expected::JobEnds => {
                let dies = run.lines.iter().find(|(_, line)| line.contains("ends itself"));
                let seconds = (run.wall - dies.context("no rank has ended itself")?.0).as_secs_f64();
                ensure!(seconds <= (DEADLINE + MARGIN).as_secs_f64(), "the job took {seconds:.2} s to end");
                return Ok(seconds);
            }
        };
        let mut ranks: Vec<usize> = told.iter().map(|told| told.rank).collect();
        ranks.sort_unstable();
        let missing: Vec<_> = wanted.iter().filter(|rank| !ranks.contains(rank)).collect();
        ensure!(missing.is_empty(), "ranks {missing:?} have told nothing");
        let told: Vec<_> = told.into_iter().filter(|told| wanted.contains(&told.rank)).collect();
        let what = match self.expected {
            Expected::OnAll(text) | Expected::OnSurvivors(text) => text,
            Expected::Done | Expected::JobEnds => "done",
        };
        for Told { rank, seconds, what: got } in &told {
            ensure!(*got == told[0].what, "rank {rank} tells something else than rank {}", told[0].rank);
            ensure!(got.contains(what), "rank {rank} does not tell of {what:?}");
            ensure!(*seconds <= (DEADLINE + MARGIN).as_secs_f64() || *rank == VICTIM, "rank {rank} took {seconds} s");
        }
        Ok(told.iter().filter(|told| told.rank != VICTIM).map(|told| told.seconds).fold(0.0, f64::max))
    }
}

/// A line `rank R after S s: WHAT`.
struct Told<'a> {
    rank: usize,
    seconds: f64,
    what: &'a str,
}

impl<'a> Told<'a> {
    fn of(line: &'a str) -> Option<Self> {
        let (rank, rest) = line.strip_prefix("rank ")?.split_once(" after ")?;
        let (seconds, what) = rest.split_once(" s: ")?;
        Some(Self { rank: rank.parse().ok()?, seconds: seconds.parse().ok()?, what })
    }
}

/// A job that has ended, and what it has printed, each line with the time it came at.
struct Run {
    succeeded: bool,
    hung: bool,
    wall: Duration,
    lines: Vec<(Duration, String)>,
    errors: Vec<String>,
}

impl Run {
    /// Runs an example, the first of `words`, on some ranks.
    fn of(ranks: usize, words: &[&str]) -> Result<Self> {
        let Some((example, args)) = words.split_first() else { bail!("no example is named") };
        let program = shell::root().join("target/debug/examples").join(example);
        let start = Instant::now();
        let mut child = Command::new("mpirun")
            // More ranks than cores, and a container's user.
            .args(["--allow-run-as-root", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1"])
            .args(["-n", &ranks.to_string()])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start mpirun")?;
        let (sender, lines_and_errors) = mpsc::channel();
        read(start, child.stdout.take(), sender.clone(), Ok);
        read(start, child.stderr.take(), sender, Err);
        let hung = !ends(&mut child, start)?;
        let status = child.wait()?;
        let wall = start.elapsed();
        // A rank that was stopped may outlive a launcher that was killed, and keep its output open.
        let (mut lines, mut errors) = (Vec::new(), Vec::new());
        while let Ok((at, line)) = lines_and_errors.recv_timeout(Duration::from_secs(2)) {
            match line {
                Ok(line) => lines.push((at, line)),
                Err(line) => errors.push(line),
            }
        }
        Ok(Self { succeeded: status.success(), hung, wall, lines, errors })
    }

    fn text(&self) -> String {
        let lines: Vec<&str> = self.lines.iter().map(|(_, line)| line.as_str()).collect();
        format!("{}\n{}", lines.join("\n"), self.errors.join("\n"))
    }
}

/// A line of the standard output, or of the errors.
type Line = std::result::Result<String, String>;

/// Reads lines on a thread of its own, each with the time it came at.
fn read(
    start: Instant,
    from: Option<impl Read + Send + 'static>,
    to: mpsc::Sender<(Duration, Line)>,
    kind: fn(String) -> Line,
) {
    thread::spawn(move || {
        let lines = from.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok);
        lines.map(|line| to.send((start.elapsed(), kind(line)))).take_while(Result::is_ok).for_each(drop);
    });
}

/// Waits for a job; whether it has ended by itself. One that has not is ended.
fn ends(child: &mut Child, start: Instant) -> Result<bool> {
    while start.elapsed() < HARD_LIMIT {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(5));
    }
    // The launcher ends its processes when it is asked to, but not when it is killed.
    let _asked = Command::new("kill").arg(child.id().to_string()).status();
    thread::sleep(Duration::from_secs(5));
    child.kill()?;
    Ok(false)
}
