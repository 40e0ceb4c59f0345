//! What ranks over MPI return when one of them fails: `mpirun -n 4 mpi_faults SCENARIO SECONDS`, where the seconds are the
//! deadline of every operation. Rank 1 fails; each rank that returns from its operations prints how and after how long.
//! `cargo xtask mpi` runs all scenarios and judges what is printed.
#![allow(unsafe_code)] // to send itself a signal

use moe_parallel::comm::mpi::MpiWorld;
use moe_parallel::comm::{Communicator, Reduction};
use moe_parallel::{Collectives, Error, Phase, Result, Site};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The rank that fails.
const VICTIM: usize = 1;
const SITE: Site = Site::layer(Phase::Forward, 2);

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(scenario), Some(seconds)) = (args.next(), args.next().and_then(|s| s.parse().ok())) else {
        eprintln!("usage: mpi_faults SCENARIO SECONDS");
        return ExitCode::FAILURE;
    };
    match run(&scenario, Duration::from_secs_f64(seconds)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(scenario: &str, timeout: Duration) -> Result<()> {
    let (mut world, mut comm) = MpiWorld::start(timeout)?;
    // So that all begin at the same time. One that is slow may hear of the fault here already.
    let begun = comm.barrier(Site::new(Phase::Start));
    let start = Instant::now();
    let mut result = begun.and_then(|()| act(scenario, &*comm, timeout));
    if scenario == "shrink" && result.as_ref().is_err_and(|error| error.fault().is_some()) {
        println!(
            "rank {} shrinks the world: {}",
            comm.rank(),
            result.map_or_else(|e| e.to_string(), |()| String::new())
        );
        (world, comm) = world.shrink()?;
        result = go_on(&world, &*comm);
    }
    let seconds = start.elapsed().as_secs_f64();
    let told = match &result {
        Ok(()) => "done".to_owned(),
        Err(error) => error.to_string(),
    };
    println!("rank {} after {seconds:.3} s: {told}", world.origins()[comm.rank()]);
    if ["late", "busy"].contains(&scenario) && comm.rank() != VICTIM {
        // The others wait for the late one, which then returns the same.
        std::thread::sleep(timeout + Duration::from_secs(1));
    }
    result.and(world.finish())
}

/// What a training step might do, in which rank 1 fails.
fn act(scenario: &str, comm: &dyn Communicator, timeout: Duration) -> Result<()> {
    let victim = comm.rank() == VICTIM;
    let part = 50_000;
    let counts = vec![part; comm.size()];
    let values = vec![1.0f32; part * comm.size()];
    match scenario {
        // Nothing fails.
        "none" => {}
        // Another collective than the others'.
        "diverge" if victim => comm.all_gather(SITE, &[1.0f32]).map(drop)?,
        // Another size than the others'.
        "size" if victim => comm.all_gather(SITE, &[1.0f32; 2]).map(drop)?,
        "size" => comm.all_gather(SITE, &[1.0f32]).map(drop)?,
        // Stopped from outside, for ever.
        "stop" if victim => end_by(libc::SIGSTOP),
        // Busy elsewhere for longer than the deadline.
        "late" if victim => std::thread::sleep(timeout + timeout / 2),
        // Sends a large message and then computes for longer than the deadline: no fault, for the others get it meanwhile.
        "busy" => {
            let mut values = vec![comm.rank() as u64; 1_000_000];
            comm.broadcast(SITE, &mut values, VICTIM)?;
            if victim {
                std::thread::sleep(timeout + timeout / 2);
            }
            return Ok(());
        }
        // Leaves before the others do.
        "leave" if victim => return Ok(()),
        "kill-before" if victim => end_by(libc::SIGKILL),
        "kill-inside" | "shrink" if victim => {
            let _started = comm.start_all_to_all_v(SITE, &values, &counts, &counts)?;
            end_by(libc::SIGKILL);
        }
        "kill-after" => {
            comm.all_to_all_v(SITE, &values, &counts, &counts)?;
            if victim {
                end_by(libc::SIGKILL);
            }
        }
        "diverge" | "stop" | "late" | "leave" | "kill-before" | "kill-inside" | "shrink" => {}
        other => return Err(Error::Argument(format!("there is no scenario {other}"))),
    }
    comm.all_to_all_v(SITE, &values, &counts, &counts)?;
    comm.all_reduce(SITE.backward(), &[comm.rank() as f32], Reduction::Sum)?;
    comm.barrier(SITE.backward())
}

/// The ranks that live do what all did before.
fn go_on(world: &MpiWorld, comm: &dyn Communicator) -> Result<()> {
    let origins: Vec<u64> = world.origins().iter().map(|&rank| rank as u64).collect();
    let got = comm.all_gather(SITE, &[origins[comm.rank()]])?;
    if got != origins || got.contains(&(VICTIM as u64)) {
        return Err(Error::Engine(format!("ranks {got:?} go on, not {origins:?}")));
    }
    act("none", comm, Duration::ZERO)
}

fn end_by(signal: libc::c_int) {
    // Told at once, and before: what times are counted from.
    println!("rank {VICTIM} ends itself");
    // SAFETY: the signal is this process's own, and no handler of ours runs.
    unsafe { libc::raise(signal) };
}
