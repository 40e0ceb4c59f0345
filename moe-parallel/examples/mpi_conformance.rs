//! Holds the MPI engine to the contract of the collectives: `mpirun -n 4 mpi_conformance`.

use moe_parallel::Collectives;
use moe_parallel::comm::mpi::MpiWorld;
use moe_parallel::testing::conformance;
use std::time::{Duration, Instant};

fn main() -> moe_parallel::Result<()> {
    let start = Instant::now();
    let (world, comm) = MpiWorld::start(Duration::from_secs(60))?;
    conformance(&*comm);
    let (rank, size) = (comm.rank(), comm.size());
    world.finish()?;
    if rank == 0 {
        println!("{size} ranks over MPI conform, {:.1} s", start.elapsed().as_secs_f64());
    }
    Ok(())
}
