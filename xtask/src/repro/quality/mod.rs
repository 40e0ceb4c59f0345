//! `cargo xtask repro quality`: the paper's claims about quality, at a size for two cores.
//!
//! Experiments lie in `xtask/repro/quality/`, one file each. A run leaves one small record when it ends, so that the work can be
//! cut at any point and goes on with what is missing; the report is made of the records alone.

mod claims;
mod experiment;
mod found;
mod mean;
mod reach;
mod record;
mod recovery;
mod report;
mod runner;

use anyhow::{Context, Result, ensure};
use experiment::{Experiment, Job};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Experiments; all of them if none is named.
    experiments: Vec<String>,
    /// Train on these sources instead of the excerpt in the repository (as `moe-train --data`). Repeatable.
    #[arg(long)]
    data: Vec<String>,
    /// Validate on these (as `moe-train --valid`). Repeatable.
    #[arg(long)]
    valid: Vec<String>,
    /// Begin no run that would not be over in this time; without it, all that are missing.
    #[arg(long, value_name = "MINUTES")]
    minutes: Option<f64>,
    /// Runs of one thread each, side by side.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Every run with its first seed and a few steps, to see that all is well. Records go to --out.
    #[arg(long)]
    smoke: bool,
    /// Print the runs that are missing and how long they would take, and run none.
    #[arg(long)]
    plan: bool,
    /// Make the report of the records that there are, and run none.
    #[arg(long)]
    report: bool,
    /// Where runs go.
    #[arg(long, default_value = "runs/repro")]
    out: PathBuf,
    /// Where records and the report go [default: xtask/results/quality].
    #[arg(long, value_name = "DIR")]
    records: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(args.jobs > 0, "--jobs must be at least 1");
    let folder = crate::shell::root().join("xtask/repro/quality");
    let experiments = Experiment::read_all(&folder, &args.experiments, args.smoke)?;
    let runs = crate::shell::root().join(&args.out);
    let records = match (&args.records, args.smoke) {
        (Some(dir), _) => dir.clone(),
        (None, true) => runs.join("smoke-records"),
        (None, false) => crate::shell::root().join("xtask/results/quality"),
    };
    let place = runner::Place { runs: if args.smoke { runs.join("smoke") } else { runs }, records };
    let jobs: Vec<Job> = experiments.iter().flat_map(Experiment::jobs).collect();
    if args.plan {
        print!("{}", report::plan(&jobs, &place));
        return Ok(());
    }
    if !args.report {
        let until = args.minutes.map(|minutes| {
            let length = Duration::try_from_secs_f64(minutes * 60.0);
            let until = length.ok().and_then(|length| Instant::now().checked_add(length));
            until.with_context(|| format!("--minutes must be a length of time from 0 on, got {minutes}"))
        });
        let until = until.transpose()?;
        let text = runner::Text { data: args.data.clone(), valid: args.valid.clone() };
        let beside: BTreeSet<String> = experiments.iter().flat_map(Experiment::beside).collect();
        let described = text.described()?;
        place.check_text(beside.iter(), &described)?;
        place.check_runs(&jobs)?;
        place.keep_text(&described)?;
        runner::run_all(&jobs, &place, &text, args.jobs, until)?;
    }
    // All that there is, whatever was run now.
    let reported = if args.smoke { experiments } else { Experiment::read_all(&folder, &[], false)? };
    place.check_runs(&reported.iter().flat_map(Experiment::jobs).collect::<Vec<_>>())?;
    report::write(&reported, &place.records)
}
