//! Runs on the ranks that there are, and goes on with those that are left when one has died or got stuck.

use super::args::TrainArgs;
use super::recipe::Recipe;
use super::run::{Begin, run as run_rank};
use super::signals::Signals;
use crate::Error;
use crate::cli::ranks::{Process, Seat, World};
use anyhow::{Result, bail};
use moe_parallel::Collectives;
use moe_parallel::comm::thread::ThreadWorld;

pub(crate) fn run<R: Recipe>(args: &TrainArgs, recipe: &R, signals: &Signals) -> Result<()> {
    match World::start(&args.ranks.common, args.ranks.timeout()?.as_secs_f64())? {
        World::One => {
            args.ranks.check_one_rank()?;
            run_rank(args, recipe, &Seat::ALONE, begin(args), signals)
        }
        World::Threads(ranks) => on_threads(args, recipe, ranks, signals),
        World::Process(process) => as_process(args, recipe, process, signals),
    }
}

fn begin(args: &TrainArgs) -> Begin {
    if args.resume { Begin::Resume } else { Begin::New }
}

/// Threads of this process: they end together.
fn on_threads<R: Recipe>(args: &TrainArgs, recipe: &R, ranks: usize, signals: &Signals) -> Result<()> {
    if args.ranks.common.max_restarts > 0 {
        bail!("--max-restarts is for ranks that are processes: threads of one process end together");
    }
    eprintln!("ranks: {ranks} threads of this process");
    let ranks_per_node = args.ranks.common.ranks_per_node.unwrap_or(ranks).max(1);
    let results = ThreadWorld::new(ranks).with_timeout(args.ranks.timeout()?).run(|comm| {
        let seat = Seat { comm: Some(comm), ranks_per_node, ranks_of_process: ranks };
        run_rank(args, recipe, &seat, begin(args), signals)
    });
    // What another rank was told comes from the one that knows more; that one is gone is what its own error explains.
    let errors = results.into_iter().filter_map(Result::err);
    let hearsay = |error: &anyhow::Error| match error.downcast_ref::<Error>() {
        Some(Error::OtherRank { .. }) => 1,
        _ if fault_of(error) => 2,
        _ => 0,
    };
    match errors.min_by_key(hearsay) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Whether an error is that a rank is gone or stuck.
fn fault_of(error: &anyhow::Error) -> bool {
    let own = error.downcast_ref::<Error>().and_then(Error::fault);
    own.or_else(|| error.downcast_ref::<moe_parallel::Error>().and_then(moe_parallel::Error::fault)).is_some()
}

/// One of several processes.
fn as_process<R: Recipe>(args: &TrainArgs, recipe: &R, mut process: Process, signals: &Signals) -> Result<()> {
    let (mut begin, mut restarts) = (begin(args), 0);
    loop {
        let first = process.comm.rank() == 0;
        if first {
            eprintln!("ranks: {}", process.found);
        }
        let error = match run_rank(args, recipe, &process.seat(), begin, signals) {
            Ok(()) => return process.finish(),
            Err(error) => error,
        };
        if !fault_of(&error) || restarts == args.ranks.common.max_restarts {
            return Err(error);
        }
        restarts += 1;
        let ranks = process.comm.size();
        if first {
            eprintln!(
                "{error:#}\nrestart {restarts} of {} without the ranks that are gone",
                args.ranks.common.max_restarts
            );
        }
        process = match process.shrink() {
            Ok(smaller) => smaller,
            // Why it had to be comes first.
            Err(why) => return Err(error.context(format!("the ranks that are left of {ranks} cannot go on: {why}"))),
        };
        begin = Begin::Restart;
    }
}
