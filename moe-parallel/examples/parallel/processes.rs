//! The bench over the processes of an MPI job, beside MPI's own all-to-all.

use crate::bench::{self, Args, Engine};
use anyhow::{Context, Result};
use moe_parallel::Collectives;
use moe_parallel::comm::mpi::MpiWorld;
use mpi::datatype::{Partition, PartitionMut};
use mpi::topology::SimpleCommunicator;
use mpi::traits::CommunicatorCollectives;
use std::time::Duration;

/// Of every operation. Simulated ranks are not as fast as real ones.
const TIMEOUT: Duration = Duration::from_secs(3600);

/// Counts and offsets as MPI wants them.
fn parts(counts: &[usize]) -> Result<(Vec<i32>, Vec<i32>)> {
    let counts = counts.iter().map(|&count| i32::try_from(count)).collect::<Result<Vec<_>, _>>();
    let counts = counts.context("MPI counts to 2^31 - 1")?;
    let offsets = counts.iter().scan(0i32, |next, &count| Some(std::mem::replace(next, next.checked_add(count)?)));
    Ok((counts.clone(), offsets.collect()))
}

fn all_to_all_v(values: &[f32], sends: &[usize], receives: &[usize]) -> Result<Vec<f32>> {
    let ((sends, from), (counts, into)) = (parts(sends)?, parts(receives)?);
    let mut got = vec![0f32; receives.iter().sum()];
    let mut to = PartitionMut::new(&mut got[..], counts, into);
    SimpleCommunicator::world().all_to_all_varcount_into(&Partition::new(values, sends, from), &mut to);
    drop(to);
    Ok(got)
}

/// What this process has to print; `adapt` may change what the bench runs on.
pub(crate) fn run(args: &Args, adapt: impl FnOnce(Engine) -> Engine) -> Result<Option<String>> {
    // Without a thread of its own, so that nothing calls MPI while the library's all-to-all runs.
    let (world, comm) = MpiWorld::start_single_threaded(TIMEOUT)?;
    let first = comm.rank() == 0;
    let engine = Engine { library: Some(all_to_all_v), ..Engine::new(comm, mpi::time) };
    let text = bench::run(args, &adapt(engine))?;
    world.finish()?;
    Ok(first.then_some(text))
}
