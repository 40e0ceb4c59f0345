//! [`Launcher`] and [`Job`]: starting an example under `mpirun`, and what it has printed.

use crate::shell;
use anyhow::{Context, Result, bail, ensure};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// After this a job is a hang.
const HARD_LIMIT: Duration = Duration::from_secs(60);

/// The MPI at hand.
pub(super) struct Launcher {
    /// Where it is installed, if not where everything is.
    prefix: Option<PathBuf>,
    /// What it calls itself.
    pub(super) version: String,
    /// Ranks outlive the death of another.
    pub(super) is_tolerant: bool,
}

impl Launcher {
    /// Looks for `mpirun`, and for the `mpicc` that the binding is built with.
    pub(super) fn find(prefix: Option<&Path>) -> Result<Self> {
        let install = "on Debian: apt-get install --no-install-recommends openmpi-bin libopenmpi-dev libclang-dev";
        let found = Command::new("mpicc").arg("--version").output();
        ensure!(found.is_ok(), "`mpicc` is not on the PATH, so nothing was run over MPI; {install}");
        let mut this = Self { prefix: prefix.map(Path::to_owned), version: String::new(), is_tolerant: false };
        let output = this.command().arg("--version").output();
        let output = output.with_context(|| format!("no `mpirun` is found, so nothing was run over MPI; {install}"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        this.version = text.lines().next().unwrap_or_default().to_owned();
        let major: Option<u32> =
            this.version.strip_prefix("mpirun (Open MPI) ").and_then(|v| v.split('.').next()?.parse().ok());
        let Some(major) = major else {
            bail!("`mpirun` is {:?}, but only Open MPI's options are known here; {install}", this.version);
        };
        this.is_tolerant = major >= 5;
        Ok(this)
    }

    fn command(&self) -> Command {
        let Some(prefix) = &self.prefix else { return Command::new("mpirun") };
        let mut command = Command::new(prefix.join("bin/mpirun"));
        command.env("LD_LIBRARY_PATH", prefix.join("lib"));
        command
    }

    /// Runs an example, the first of `words`, on some ranks.
    pub(super) fn run(&self, ranks: usize, words: &[&str]) -> Result<Job> {
        let Some((example, args)) = words.split_first() else { bail!("no example is named") };
        // More ranks than cores, and a container's user.
        let mut command = self.command();
        command.args(["--allow-run-as-root", "--mca", "mpi_yield_when_idle", "1"]);
        if self.is_tolerant {
            command.args(["--with-ft", "ulfm", "--map-by", ":OVERSUBSCRIBE"]);
        } else {
            // It ends a job in one or more steps, between which it else waits for a second.
            command.args(["--oversubscribe", "--mca", "odls_base_sigkill_timeout", "0"]);
        }
        let program = shell::root().join("target/debug/examples").join(example);
        command.args(["-n", &ranks.to_string()]).arg(program).args(args);
        Job::of(&mut command)
    }
}

/// A job that has ended, and what it has printed, each line with the time it came at.
pub(super) struct Job {
    pub(super) succeeded: bool,
    pub(super) hung: bool,
    pub(super) wall: Duration,
    pub(super) lines: Vec<(Duration, String)>,
    errors: Vec<String>,
}

impl Job {
    fn of(command: &mut Command) -> Result<Self> {
        let start = Instant::now();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot start mpirun")?;
        let (sender, lines_and_errors) = mpsc::channel();
        read(start, child.stdout.take(), sender.clone(), Ok);
        read(start, child.stderr.take(), sender, Err);
        let hung = !ends(&mut child, start)?;
        let status = child.wait()?;
        let wall = start.elapsed();
        // A rank that was stopped may outlive a launcher that was killed, and keep its output open.
        let (mut lines, mut errors) = (Vec::new(), Vec::new());
        while let Ok((at, line)) = lines_and_errors.recv_timeout(Duration::from_secs(2)) {
            match line {
                Ok(line) => lines.push((at, line)),
                Err(line) => errors.push(line),
            }
        }
        Ok(Self { succeeded: status.success(), hung, wall, lines, errors })
    }

    /// All that was printed.
    pub(super) fn text(&self) -> String {
        let lines: Vec<&str> = self.lines.iter().map(|(_, line)| line.as_str()).collect();
        format!("{}\n{}", lines.join("\n"), self.errors.join("\n"))
    }
}

/// A line of the standard output, or of the errors.
type Line = std::result::Result<String, String>;

/// Reads lines on a thread of its own, each with the time it came at.
fn read(
    start: Instant,
    from: Option<impl Read + Send + 'static>,
    to: mpsc::Sender<(Duration, Line)>,
    kind: fn(String) -> Line,
) {
    thread::spawn(move || {
        let lines = from.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(Result::ok);
        lines.map(|line| to.send((start.elapsed(), kind(line)))).take_while(Result::is_ok).for_each(drop);
    });
}

/// Waits for a job; whether it has ended by itself. One that has not is ended.
fn ends(child: &mut Child, start: Instant) -> Result<bool> {
    while start.elapsed() < HARD_LIMIT {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(5));
    }
    // The launcher ends its processes when it is asked to, but not when it is killed.
    let _asked = Command::new("kill").arg(child.id().to_string()).status();
    thread::sleep(Duration::from_secs(5));
    child.kill()?;
    Ok(false)
}
