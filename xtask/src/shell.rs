//! Running commands from the root of the workspace, and saying which.

use anyhow::{Context, Result, ensure};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The root of the workspace.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().map(PathBuf::from).unwrap_or_default()
}

/// A command that starts in the root.
pub(crate) fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args).current_dir(root());
    command
}

/// The cargo that runs this task.
pub(crate) fn cargo(args: &[&str]) -> Command {
    command(&std::env::var("CARGO").unwrap_or_else(|_| "cargo".into()), args)
}

/// A command as it would be typed.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a command with its output on this terminal.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", shown(command));
    let status = command.status().with_context(|| format!("cannot start {}", shown(command)))?;
    ensure!(status.success(), "{} failed: {status}", shown(command));
    Ok(())
}

/// Runs a command and returns what it prints.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    eprintln!("$ {}", shown(command));
    let output =
        command.stderr(Stdio::inherit()).output().with_context(|| format!("cannot start {}", shown(command)))?;
    ensure!(output.status.success(), "{} failed: {}", shown(command), output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// What a command printed, or why there is nothing.
pub(crate) type Outcome = std::result::Result<String, String>;

/// Runs a command that may fail: its output must fit a pipe. After `limit` it is ended.
pub(crate) fn output_within(command: &mut Command, limit: Duration) -> Result<Outcome> {
    eprintln!("$ {}", shown(command));
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {}", shown(command)))?;
    if ended_within(&mut child, limit)?.is_none() {
        child.kill()?;
        child.wait()?;
        return Ok(Err(format!("not done after {} s", limit.as_secs())));
    }
    let output = child.wait_with_output()?;
    if output.status.success() { Ok(Ok(String::from_utf8(output.stdout)?)) } else { Ok(Err(output.status.to_string())) }
}

/// Runs a command for `limit` at most, then asks it to end and sees to it: the lines that it printed, and how it ended if not well.
pub(crate) fn printed_within(command: &mut Command, limit: Duration) -> Result<(String, Result<(), String>)> {
    eprintln!("$ {}", shown(command));
    let spawned = command.stdout(Stdio::piped()).spawn();
    let mut child = spawned.with_context(|| format!("cannot start {}", shown(command)))?;
    let (told, lines) = std::sync::mpsc::channel();
    let stdout = child.stdout.take().context("it has no output")?;
    std::thread::spawn(move || {
        BufReader::new(stdout).lines().map_while(|line| told.send(line.ok()?).ok()).for_each(drop);
    });
    let status = ended_within(&mut child, limit)?;
    if status.is_none() {
        end(&mut child)?;
    }
    // What it has started may hold the output open.
    let printed: String =
        std::iter::from_fn(|| lines.recv_timeout(Duration::from_secs(1)).ok()).map(|l| l + "\n").collect();
    let ended = match status {
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(status.to_string()),
        None => Err(format!("not done after {} s", limit.as_secs())),
    };
    Ok((printed, ended))
}

/// Asks a program to end, so that it can end what it has started, and sees to it.
pub(crate) fn end(child: &mut Child) -> Result<()> {
    const GRACE: Duration = Duration::from_secs(10);
    if child.try_wait()?.is_some() {
        return Ok(());
    }
    Command::new("kill").arg(child.id().to_string()).status().context("cannot start kill")?;
    if ended_within(child, GRACE)?.is_none() {
        child.kill()?;
        child.wait()?;
    }
    Ok(())
}

fn ended_within(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() > limit {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[test]
    fn a_command_prints_fails_or_takes_too_long() {
        let run = |script: &str| output_within(command("sh", &["-c", script]).env_clear(), Duration::from_secs(2));
        assert_eq!(run("echo done").unwrap(), Ok("done\n".into()));
        assert_eq!(run("exit 3").unwrap(), Err("exit status: 3".into()));
        assert_eq!(run("exec sleep 60").unwrap(), Err("not done after 2 s".into()));
        assert!(output_within(&mut command("no such program", &[]), Duration::ZERO).is_err());
    }

    #[test]
    fn what_was_printed_before_the_end_is_kept() {
        let run = |script: &str| printed_within(&mut command("sh", &["-c", script]), Duration::from_secs(2)).unwrap();
        assert_eq!(run("echo done"), ("done\n".into(), Ok(())));
        assert_eq!(run("echo half; exit 3"), ("half\n".into(), Err("exit status: 3".into())));
        // Its child holds the output open.
        assert_eq!(run("echo half; sleep 60 & wait"), ("half\n".into(), Err("not done after 2 s".into())));
    }
}

/// The processor and its cores.
pub(crate) fn machine() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, m)| m.trim().to_owned()));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{}, {cores} cores", model.unwrap_or_else(|| "unknown processor".into()))
}

/// The commit that is checked out, and whether something differs from it.
pub(crate) fn commit() -> Result<String> {
    Ok(output(&mut command("git", &["describe", "--always", "--dirty"]))?.trim().to_owned())
}
