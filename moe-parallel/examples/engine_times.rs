//! How long barriers take over processes, of all and of pairs, and an all-to-all of large parts: `engine_times tcp RANKS` starts the processes
//! itself; `mpirun -n RANKS engine_times mpi` (feature `mpi`) is for comparison. Rank 0 prints a line.

use anyhow::{Context, Result, bail, ensure};
use moe_parallel::comm::tcp::{TcpConfig, TcpWorld};
use moe_parallel::{Collectives, Communicator, Phase, Site};
use std::net::{Ipv4Addr, TcpListener};
use std::process::Command;
use std::time::{Duration, Instant};

const SITE: Site = Site::new(Phase::Start);
const TIMEOUT: Duration = Duration::from_secs(120);
/// What each rank sends in the all-to-all.
const BYTES: usize = 64 << 20;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words[..] {
        ["tcp", ranks] => start(ranks.parse().context("RANKS is a number")?),
        ["tcp", ranks, rank, master] => {
            let (rank, size, master, job) = (rank.parse()?, ranks.parse()?, master.into(), "engine_times".into());
            let config =
                TcpConfig { rank, size, master, job, timeout: TIMEOUT, listen: Some(Ipv4Addr::LOCALHOST.into()) };
            let (world, comm) = TcpWorld::start(&config)?;
            measure("TCP", &*comm)?;
            Ok(world.finish()?)
        }
        #[cfg(feature = "mpi")]
        ["mpi"] => {
            let (world, comm) = moe_parallel::comm::mpi::MpiWorld::start(TIMEOUT)?;
            measure("MPI", &*comm)?;
            Ok(world.finish()?)
        }
        _ => bail!("usage: engine_times tcp RANKS, or mpirun -n RANKS engine_times mpi with the feature `mpi`"),
    }
}

/// Starts a process for each rank.
fn start(ranks: usize) -> Result<()> {
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let start = |rank: usize| {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["tcp", &ranks.to_string(), &rank.to_string(), &format!("127.0.0.1:{port}")]);
        command.spawn().context("a rank cannot be started")
    };
    let children: Vec<_> = (0..ranks).map(start).collect::<Result<_>>()?;
    for mut child in children {
        ensure!(child.wait()?.success(), "a rank has failed");
    }
    Ok(())
}

fn measure(engine: &str, comm: &dyn Communicator) -> Result<()> {
    let barriers = times(2000, || Ok(comm.barrier(SITE)?))?;
    let pair = comm.split(SITE, comm.rank() as u64 / 2, 0)?;
    let pairs = times(2000, || Ok(pair.barrier(SITE)?))?;
    let part = BYTES / size_of::<u64>() / (comm.size() - 1).max(1);
    let counts: Vec<usize> = (0..comm.size()).map(|rank| if rank == comm.rank() { 0 } else { part }).collect();
    let values = vec![comm.rank() as u64; part * (comm.size() - 1)];
    let exchanges = times(12, || Ok(comm.all_to_all_v(SITE, &values, &counts, &counts).map(drop)?))?;
    if comm.rank() == 0 {
        let (size, [middle, late]) =
            (comm.size(), [2, 20].map(|part| barriers[barriers.len() - barriers.len() / part]));
        println!(
            "{engine}, {size} ranks: barrier {:.1} us (one in 20 over {:.1} us), of pairs {:.1} us; all-to-all of {} MB a rank {:.1} ms, {:.2} GB/s each way",
            middle * 1e6,
            late * 1e6,
            pairs[pairs.len() / 2] * 1e6,
            BYTES >> 20,
            exchanges[exchanges.len() / 2] * 1e3,
            BYTES as f64 / exchanges[exchanges.len() / 2] / 1e9,
        );
    }
    Ok(())
}

/// Seconds, in order; the first few do not count.
fn times(count: usize, mut what: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    for turn in 0..count + count / 4 {
        let start = Instant::now();
        what()?;
        seconds.extend((turn >= count / 4).then(|| start.elapsed().as_secs_f64()));
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds)
}
