//! `exchange` as the library that SimGrid's `smpirun` loads, once for each simulated rank, and calls `main` of.
//!
//! Built against SimGrid's MPI by `cargo xtask bench parallel simulated`; see `xtask/simgrid/`. Arguments are taken from the
//! call: those of the process are the simulator's.

mod bench;
mod form;
mod processes;

use anyhow::{Context, Result, ensure};
use bench::{Args, Engine};
use clap::Parser;
use moe_parallel::Communicator;
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::CommunicatorCollectives;
use std::ffi::{CStr, c_char, c_int};

fn largest(_: &dyn Communicator, values: &[f64]) -> Result<Vec<f64>> {
    let mut largest = values.to_vec();
    SimpleCommunicator::world().all_reduce_into(values, &mut largest[..], SystemOperation::max());
    Ok(largest)
}

/// All ranks begin at one moment: the simulated clock is one for all, and reading it takes time.
fn meet(comm: &dyn Communicator) -> Result<()> {
    /// More than the reduction takes from its last beginning on.
    const AHEAD: f64 = 200e-6;
    let moment = largest(comm, &[mpi::time()])?.into_iter().fold(0.0, f64::max) + AHEAD;
    ensure!(mpi::time() < moment, "the ranks come too late to where they meet");
    while mpi::time() < moment {}
    Ok(())
}

fn run(arguments: &[String]) -> Result<()> {
    // The engine's own barrier is a message from each to each, which takes long to simulate.
    let text = processes::run(&Args::try_parse_from(arguments)?, |engine| Engine { meet, largest, ..engine })?;
    print!("{}", text.unwrap_or_default());
    Ok(())
}

/// The words of a C program's `main`.
///
/// # Safety
/// As C says: `words` points to `count` pointers to texts that end with 0.
#[allow(unsafe_code)]
unsafe fn texts(count: c_int, words: *const *const c_char) -> Result<Vec<String>> {
    let word = |index: usize| {
        // SAFETY: the caller gives `count` of them.
        let text = unsafe { CStr::from_ptr(*words.add(index)) };
        text.to_str().map(str::to_owned).context("an argument is not UTF-8")
    };
    (0..usize::try_from(count)?).map(word).collect()
}

/// What the simulator calls for each rank.
///
/// # Safety
/// As [`texts`].
#[allow(unsafe_code)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(count: c_int, words: *const *const c_char) -> c_int {
    // A panic must not leave a function of C's.
    let result = std::panic::catch_unwind(|| {
        // SAFETY: as this function's.
        run(&unsafe { texts(count, words) }?)
    });
    match result {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            eprintln!("error: {error:#}");
            1
        }
        Err(_) => 101,
    }
}
