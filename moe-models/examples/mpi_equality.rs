//! The same model over the processes of an MPI job as on one rank: `mpirun -n 8 mpi_equality`. Runs every layout that has as
//! many ranks as the job; a rank that finds a difference panics and says where. `cargo xtask mpi` runs it.

#[path = "../tests/it/equality.rs"]
mod equality;

use equality::{Kind, Reference, check, layouts};
use moe_models::{DropoutConfig, Precision};
use moe_parallel::comm::mpi::MpiWorld;
use moe_parallel::{Collectives, Phase, Site};
use std::time::Duration;

fn main() -> anyhow::Result<()> {
    let (world, comm) = MpiWorld::start(Duration::from_secs(60))?;
    // As threads that are ranks have it: the cores are shared out.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    rayon::ThreadPoolBuilder::new().num_threads((cores / comm.size()).max(1)).build_global()?;
    let (precision, dropout) = (Precision::F32, DropoutConfig::default());
    let kinds = [
        Kind { experts: vec![4, 8], top_k: 1, capacity: Some(1.0), precision, dropout },
        Kind { experts: vec![3, 5], top_k: 2, capacity: None, precision, dropout },
    ];
    let layouts = layouts(comm.size());
    for kind in &kinds {
        let reference = Reference::new(kind);
        comm.barrier(Site::new(Phase::Start))?;
        layouts.iter().for_each(|layout| check(&comm, layout, &reference));
        if comm.rank() == 0 {
            println!("{} layouts of {} ranks equal one rank: {kind:?}", layouts.len(), comm.size());
        }
    }
    Ok(world.finish()?)
}
