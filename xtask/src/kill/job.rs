//! [`Job`]: the processes of ranks that a signal is sent to.

use super::{Engine, Signal};
use anyhow::{Context, Result, ensure};
use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// After this a job is a hang.
pub(super) const HARD_LIMIT: Duration = Duration::from_secs(90);

/// Random numbers of a seed, one for each use.
pub(super) fn draw(seed: u64, salt: u64) -> u64 {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// How jobs are started.
#[derive(Clone, Copy)]
pub(super) struct Launch<'a> {
    pub(super) engine: Engine,
    /// Of another Open MPI.
    pub(super) prefix: Option<&'a Path>,
    pub(super) ranks: usize,
}

/// The processes of a job: the ranks, or their launcher.
pub(super) struct Job {
    pub(super) processes: Vec<Child>,
    engine: Engine,
    /// A word of the ranks' command lines that no other process has.
    mark: String,
    /// Their logs begin with it.
    pub(super) out: PathBuf,
}

impl Launch<'_> {
    /// Starts the ranks of a program, whose logs lie beside `out`; `mark` is a word of `arguments` that no other process has.
    pub(super) fn start(&self, program: &Path, arguments: &[String], out: &Path, mark: &str) -> Result<Job> {
        let log = |name: &str| File::create(out.with_extension(name));
        let processes = match self.engine {
            Engine::Tcp => {
                let port = free_port()?.to_string();
                let rank = |rank: usize| {
                    let mut command = Command::new(program);
                    for (name, number) in [("RANK", rank), ("WORLD_SIZE", self.ranks), ("LOCAL_WORLD_SIZE", self.ranks)]
                    {
                        command.env(name, number.to_string());
                    }
                    command.args(arguments).env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port);
                    let streams = command.stdin(Stdio::null()).stdout(Stdio::null());
                    Ok(streams.stderr(log(&format!("{rank}.log"))?).spawn()?)
                };
                (0..self.ranks).map(rank).collect::<Result<_>>()?
            }
            Engine::Mpi => {
                let mut command = self.mpirun();
                command.args(["-n", &self.ranks.to_string()]).arg(program).args(arguments);
                command.stdin(Stdio::null()).stdout(log("out.log")?).stderr(log("log")?);
                vec![command.spawn().context("cannot start mpirun")?]
            }
        };
        Ok(Job { processes, engine: self.engine, mark: mark.to_owned(), out: out.to_owned() })
    }

    fn mpirun(&self) -> Command {
        let mut command = match self.prefix {
            None => Command::new("mpirun"),
            Some(prefix) => {
                let mut command = Command::new(prefix.join("bin/mpirun"));
                command.env("LD_LIBRARY_PATH", prefix.join("lib"));
                command
            }
        };
        command.args(["--allow-run-as-root", "--mca", "mpi_yield_when_idle", "1"]);
        if self.prefix.is_some() {
            command.args(["--with-ft", "ulfm", "--map-by", ":OVERSUBSCRIBE"]);
        } else {
            command.args(["--oversubscribe", "--mca", "odls_base_sigkill_timeout", "0"]);
        }
        command
    }
}

impl Job {
    /// Waits until all have ended by themselves, but for `stopped`; whether each did so well.
    pub(super) fn wait(&mut self, stopped: Option<usize>) -> Result<Vec<Option<bool>>> {
        let begun = Instant::now();
        loop {
            let ended = self.ended()?;
            if are_all(&ended, stopped) {
                return Ok(ended);
            }
            ensure!(begun.elapsed() < HARD_LIMIT, "it hangs: {ended:?}; see {}", self.out.display());
            sleep(Duration::from_millis(10));
        }
    }

    /// Whether each has ended well; none that still runs.
    pub(super) fn ended(&mut self) -> Result<Vec<Option<bool>>> {
        let ended = |process: &mut Child| Ok(process.try_wait()?.map(|status| status.success()));
        self.processes.iter_mut().map(ended).collect()
    }

    /// The id of the process that is a rank, unless it has ended.
    pub(super) fn rank_id(&mut self, rank: usize) -> Result<Option<u32>> {
        if self.engine == Engine::Tcp {
            let process = &mut self.processes[rank];
            return Ok(process.try_wait()?.is_none().then(|| process.id()));
        }
        let wanted = format!("OMPI_COMM_WORLD_RANK={rank}");
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let has = |file: &str, text: &str| {
                let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
                bytes.split(|&byte| byte == 0).any(|part| part == text.as_bytes())
            };
            if has("environ", &wanted) && has("cmdline", &self.mark) && !has("cmdline", "mpirun") {
                return Ok(Some(id));
            }
        }
        Ok(None)
    }

    /// Waits until there is a process that is the rank, which a launcher takes its time for.
    pub(super) fn wait_until_started(&mut self, rank: usize) -> Result<()> {
        self.wait_until(rank, "has not started", |id| id.is_some())
    }

    /// Waits until a rank has ended, however it is told of by its launcher.
    pub(super) fn wait_for(&mut self, rank: usize) -> Result<()> {
        self.wait_until(rank, "has not ended", |id| id.is_none())
    }

    fn wait_until(&mut self, rank: usize, otherwise: &str, is_so: impl Fn(Option<u32>) -> bool) -> Result<()> {
        let begun = Instant::now();
        while !is_so(self.rank_id(rank)?) {
            ensure!(begun.elapsed() < HARD_LIMIT, "rank {rank} {otherwise}; see {}", self.out.display());
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Whether all have ended but for `stopped`.
pub(super) fn are_all(ended: &[Option<bool>], stopped: Option<usize>) -> bool {
    ended.iter().enumerate().all(|(rank, ended)| ended.is_some() || Some(rank) == stopped)
}

impl Drop for Job {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ended = process.kill();
            let _known = process.wait();
        }
    }
}

/// Sends a signal; whether there was a process to get it.
pub(super) fn send(signal: Signal, id: u32) -> Result<bool> {
    let mut command = Command::new("kill");
    command.args([format!("-{}", signal.name()), id.to_string()]).stderr(Stdio::null());
    Ok(command.status()?.success())
}

/// A port that nobody listens on.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
