//! Times the forms of one exchange of rows over the processes of an MPI job (feature `mpi`, started by `mpirun`), or over
//! threads of this process. `cargo xtask bench parallel hosts` runs it over emulated hosts.
//!
//! ```text
//! cargo run --release -p moe-parallel --example exchange -- --threads 8
//! ```

mod bench;
mod form;
#[cfg(feature = "mpi")]
mod processes;

use anyhow::{Result, ensure};
use bench::{Args, Engine};
use clap::Parser;
use moe_parallel::comm::thread::ThreadWorld;
use std::sync::OnceLock;
use std::time::Instant;

fn now() -> f64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_secs_f64()
}

fn on_threads(args: &Args, threads: usize) -> Result<String> {
    ensure!(threads > 0, "--threads must be at least 1");
    let world = ThreadWorld::new(threads);
    let texts = world.run(|comm| bench::run(args, &Engine::new(comm, now)));
    texts.into_iter().collect::<Result<Vec<_>>>().map(|texts| texts.into_iter().next().unwrap_or_default())
}

#[cfg(not(feature = "mpi"))]
mod processes {
    type Adapt = fn(super::Engine) -> super::Engine;

    pub(super) fn run(_: &super::Args, _: Adapt) -> anyhow::Result<Option<String>> {
        anyhow::bail!("built without feature `mpi`, so the ranks can only be threads: give --threads")
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let text = match args.threads {
        Some(threads) => Some(on_threads(&args, threads)?),
        None => processes::run(&args, std::convert::identity::<Engine>)?,
    };
    print!("{}", text.unwrap_or_default());
    Ok(())
}
