//! Finds the ranks of a run: one, threads of this process, or processes that a launcher has started.

use super::args::{EngineArg, RankArgs};
use crate::train::launch::{Launched, Launcher, find};
use anyhow::{Context, Result, bail, ensure};
use moe_parallel::comm::Communicator;
use moe_parallel::comm::tcp::{TcpConfig, TcpWorld};
use std::sync::Arc;
use std::time::Duration;

/// A rank's seat among the others.
#[derive(Debug, Clone)]
pub struct Seat {
    /// None of a run of one rank.
    pub comm: Option<Arc<dyn Communicator>>,
    /// Consecutive ranks on a machine.
    pub ranks_per_node: usize,
    /// Ranks that share this process's memory.
    pub ranks_of_process: usize,
}

impl Seat {
    /// Of the only rank.
    pub const ALONE: Self = Self { comm: None, ranks_per_node: 1, ranks_of_process: 1 };
}

/// What a run's ranks are.
#[derive(Debug)]
pub enum World {
    /// This process alone.
    One,
    /// So many threads of this process.
    Threads(usize),
    /// One of several processes.
    Process(Process),
}

/// One of several processes.
#[derive(Debug)]
pub struct Process {
    engine: Engine,
    /// All processes.
    pub comm: Arc<dyn Communicator>,
    ranks_per_node: usize,
    /// How it was found, for people.
    pub found: String,
}

#[derive(Debug)]
enum Engine {
    Tcp(TcpWorld),
    #[cfg(feature = "mpi")]
    Mpi(moe_parallel::comm::mpi::MpiWorld),
}

impl World {
    /// As the arguments and the environment say, with a deadline of `timeout_s` for exchanges unless the arguments have one.
    ///
    /// # Errors
    /// If the ranks do not come together.
    pub fn start(args: &RankArgs, timeout_s: f64) -> Result<Self> {
        if let Some(ranks) = args.ranks {
            ensure!(ranks > 0, "--ranks must be at least 1");
            ensure!(args.engine.is_none(), "--engine is for processes; --ranks makes threads of this one");
            return Ok(if ranks == 1 { Self::One } else { Self::Threads(ranks) });
        }
        match find(|name| std::env::var(name).ok())? {
            Some(launched) if launched.size > 1 => {
                Ok(Self::Process(Process::start(args, &launched, args.timeout(timeout_s)?)?))
            }
            _ => Ok(Self::One),
        }
    }
}

impl Process {
    fn start(args: &RankArgs, launched: &Launched, timeout: Duration) -> Result<Self> {
        let engine = match args.engine {
            Some(engine) => engine,
            None if launched.launcher == Launcher::OpenMpi && cfg!(feature = "mpi") => EngineArg::Mpi,
            None => EngineArg::Tcp,
        };
        let (engine, comm) = match engine {
            EngineArg::Tcp => {
                let Some(master) = launched.master.clone() else {
                    bail!(
                        "{} has started {} processes on several machines, and nobody says where rank 0 is: set MASTER_ADDR and \
                         MASTER_PORT",
                        launched.launcher,
                        launched.size
                    );
                };
                let (rank, size, job) = (launched.rank, launched.size, launched.job.clone());
                let config = TcpConfig { rank, size, master, timeout, job, listen: None };
                let (world, comm) = TcpWorld::start(&config).context("the ranks did not come together")?;
                (Engine::Tcp(world), comm)
            }
            EngineArg::Mpi => start_mpi(timeout, launched.size)?,
        };
        let ranks_per_node = args.ranks_per_node.or(launched.local_size).unwrap_or(launched.size).max(1);
        let name = match &engine {
            Engine::Tcp(_) => "TCP",
            #[cfg(feature = "mpi")]
            Engine::Mpi(_) => "MPI",
        };
        let found = format!("{} ({}) over {name}", launched.launcher, launched.read.join(", "));
        Ok(Self { engine, comm, ranks_per_node, found })
    }

    /// This process's seat.
    pub fn seat(&self) -> Seat {
        Seat { comm: Some(Arc::clone(&self.comm)), ranks_per_node: self.ranks_per_node, ranks_of_process: 1 }
    }

    /// Leaves when all do.
    ///
    /// # Errors
    /// If another process has failed.
    pub fn finish(self) -> Result<()> {
        drop(self.comm);
        match self.engine {
            Engine::Tcp(world) => world.finish()?,
            #[cfg(feature = "mpi")]
            Engine::Mpi(world) => world.finish()?,
        }
        Ok(())
    }

    /// After a fault: the ranks that are left.
    ///
    /// # Errors
    /// If they do not come together.
    pub fn shrink(self) -> Result<Self> {
        drop(self.comm);
        let (engine, comm) = match self.engine {
            Engine::Tcp(world) => {
                let (world, comm) = world.shrink()?;
                (Engine::Tcp(world), comm)
            }
            #[cfg(feature = "mpi")]
            Engine::Mpi(world) => {
                let (world, comm) = world.shrink()?;
                (Engine::Mpi(world), comm)
            }
        };
        Ok(Self { engine, comm, ..self })
    }
}

/// How long MPI may take to start at least.
#[cfg(feature = "mpi")]
const MPI_START: Duration = Duration::from_secs(60);

/// Ends this process, and with it the launcher's job, unless what it returns is dropped within `limit`: the call that starts MPI waits
/// for all processes of the job, knows no deadline and cannot be left.
#[cfg(feature = "mpi")]
fn watch_start(limit: Duration) -> std::sync::mpsc::Sender<()> {
    use std::sync::mpsc::{RecvTimeoutError, channel};
    let (starts, ended) = channel();
    std::thread::spawn(move || {
        if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            eprintln!(
                "error: MPI has not started within {} s: not all processes of the job have come to it; if they need longer, raise \
                 --comm-timeout",
                limit.as_secs()
            );
            std::process::abort();
        }
    });
    starts
}

#[cfg(feature = "mpi")]
fn start_mpi(timeout: Duration, size: usize) -> Result<(Engine, Arc<dyn Communicator>)> {
    use moe_parallel::Collectives;
    let starts = watch_start(timeout.max(MPI_START));
    let (world, comm) = moe_parallel::comm::mpi::MpiWorld::start(timeout)?;
    drop(starts);
    ensure!(
        comm.size() == size,
        "MPI knows {} processes where the launcher says {size}: start them with mpirun, or with --engine tcp",
        comm.size()
    );
    Ok((Engine::Mpi(world), comm))
}

#[cfg(not(feature = "mpi"))]
fn start_mpi(_: Duration, _: usize) -> Result<(Engine, Arc<dyn Communicator>)> {
    bail!("this program was built without MPI: build it with --features mpi, or use --engine tcp")
}
