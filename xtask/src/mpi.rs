//! `cargo xtask mpi`: the MPI engine under a real `mpirun`: its conformance, and what ranks return when one of them fails.
//!
//! Ranks are more than cores here. A run that does not end by itself is ended by this driver and counts as a hang.

mod job;

use crate::shell::{self, cargo};
use anyhow::{Context, Result, ensure};
use job::{Job, Launcher};
use std::path::PathBuf;
use std::time::Duration;

/// Options of `cargo xtask mpi`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run every scenario 20 times instead of twice.
    #[arg(long)]
    long: bool,
    /// Run with the Open MPI installed here, which has to be one the `mpicc` on the PATH is compatible with. From version 5
    /// on it is run with its fault tolerance.
    #[arg(long)]
    prefix: Option<PathBuf>,
}

/// Of every operation in a scenario.
const DEADLINE: Duration = Duration::from_secs(2);
/// How much later every rank has told its fault, or the launcher has ended the job.
const MARGIN: Duration = Duration::from_secs(1);
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
    /// A process has died. The others return that it has left; without fault tolerance the launcher ends the job.
    Death,
    /// The others go on without it; not possible without fault tolerance.
    Survival,
}

const SCENARIOS: [Scenario; 11] = [
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
    Scenario { name: "kill-before", expected: Expected::Death },
    Scenario { name: "kill-inside", expected: Expected::Death },
    Scenario { name: "kill-after", expected: Expected::Death },
    Scenario { name: "shrink", expected: Expected::Survival },
];

/// Builds the examples, then runs them.
pub(crate) fn run(args: &Args) -> Result<()> {
    let launcher = Launcher::find(args.prefix.as_deref())?;
    // The whole workspace is named so that the dependencies are the ones its tests have compiled.
    let examples = ["--example", "mpi_conformance", "--example", "mpi_faults", "--example", "mpi_equality"];
    let features = ["--features", "moe-models/mpi,moe-parallel/testing"];
    shell::run(cargo(&["build", "--workspace"]).args(examples).args(features))?;

    println!("{}", launcher.version);
    for ranks in [2, 4, 8] {
        let run = launcher.run(ranks, &["mpi_conformance"])?;
        ensure!(run.succeeded && run.lines.len() == 1, "conformance on {ranks} ranks failed:\n{}", run.text());
        println!("{}", run.lines[0].1);
    }

    for ranks in [4, 8] {
        let run = launcher.run(ranks, &["mpi_equality"])?;
        ensure!(run.succeeded && run.lines.len() == 2, "equality on {ranks} ranks failed:\n{}", run.text());
        run.lines.iter().for_each(|(_, line)| println!("{line}"));
    }

    let times = if args.long { 20 } else { 2 };
    let mut failures = 0;
    for scenario in SCENARIOS {
        let Some(outcome) = scenario.outcome(launcher.is_tolerant) else {
            println!("{:12} skipped: this MPI has no fault tolerance", scenario.name);
            continue;
        };
        let mut slowest = 0.0f64;
        let mut right = 0;
        for _ in 0..times {
            let run = launcher.run(RANKS, &["mpi_faults", scenario.name, &DEADLINE.as_secs_f64().to_string()])?;
            match outcome.judge(&run) {
                Ok(seconds) => {
                    right += 1;
                    slowest = slowest.max(seconds);
                }
                Err(error) => eprintln!("{}: {error:#}\n{}", scenario.name, run.text()),
            }
        }
        failures += times - right;
        println!("{:12} {right} of {times} as expected: {}, at most {slowest:.2} s", scenario.name, outcome.meaning());
    }
    ensure!(failures == 0, "{failures} runs did not end as they must");
    Ok(())
}

/// What a run must come to.
enum Outcome {
    /// The job has ended, soon after a rank has.
    JobEnds,
    /// These ranks have told the same, in time.
    Told { ranks: Vec<usize>, what: &'static str, succeeded: bool },
}

impl Scenario {
    /// None where the MPI cannot do it.
    fn outcome(&self, is_tolerant: bool) -> Option<Outcome> {
        let all = || (0..RANKS).collect();
        let survivors = || (0..RANKS).filter(|&rank| rank != VICTIM).collect();
        let fault = |ranks, what| Some(Outcome::Told { ranks, what, succeeded: false });
        let done = |ranks| Some(Outcome::Told { ranks, what: "done", succeeded: true });
        match self.expected {
            Expected::Done => done(all()),
            Expected::OnAll(what) => fault(all(), what),
            Expected::OnSurvivors(what) => fault(survivors(), what),
            Expected::Death if is_tolerant => fault(survivors(), "rank 1 has left"),
            Expected::Death => Some(Outcome::JobEnds),
            Expected::Survival => is_tolerant.then(|| done(survivors())).flatten(),
        }
    }
}

impl Outcome {
    fn meaning(&self) -> String {
        match self {
            Self::JobEnds => "the launcher ends the job".into(),
            Self::Told { ranks, what, .. } => format!("\"{what}\" on {} ranks", ranks.len()),
        }
    }

    /// The seconds it took; an error if the run is not what it must be.
    fn judge(&self, run: &Job) -> Result<f64> {
        const MOST: f64 = (DEADLINE.as_secs() + MARGIN.as_secs()) as f64;
        ensure!(!run.hung, "hung");
        let Self::Told { ranks, what, succeeded } = self else {
            let dies = run.lines.iter().find(|(_, line)| line.contains("ends itself"));
            let seconds = (run.wall - dies.context("no rank has ended itself")?.0).as_secs_f64();
            ensure!(!run.succeeded, "mpirun says that all is well");
            ensure!(seconds <= MOST, "the job took {seconds:.2} s to end");
            return Ok(seconds);
        };
        ensure!(run.succeeded == *succeeded, "the exit status of mpirun is wrong");
        let told: Vec<Told> = run.lines.iter().filter_map(|(_, line)| Told::of(line)).collect();
        let missing: Vec<_> = ranks.iter().filter(|&&rank| told.iter().all(|told| told.rank != rank)).collect();
        ensure!(missing.is_empty(), "ranks {missing:?} have told nothing");
        let told: Vec<_> = told.into_iter().filter(|told| ranks.contains(&told.rank)).collect();
        for Told { rank, seconds, what: got } in &told {
            ensure!(*got == told[0].what, "rank {rank} tells something else than rank {}", told[0].rank);
            ensure!(got.contains(what), "rank {rank} does not tell of {what:?}");
            ensure!(*seconds <= MOST || *rank == VICTIM, "rank {rank} took {seconds} s");
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
