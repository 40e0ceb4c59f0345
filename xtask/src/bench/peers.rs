//! Rows of a bench beside those of other programs that do the same work in the same run.

use crate::shell::{printed_within, root};
use anyhow::{Context, Result};
use serde_json::Value;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

/// How long one peer may take with one form: some have no kernel for a model and go on for hours.
const PEER_LIMIT: Duration = Duration::from_secs(900);

/// A bench's rows, from its lines that begin with `json`, and the rest of what it printed.
pub(crate) fn split_output(printed: &str) -> Result<(Vec<Value>, String)> {
    let (json, table): (Vec<&str>, Vec<&str>) = printed.lines().partition(|line| line.starts_with("json "));
    let rows = json.iter().map(|line| serde_json::from_str(&line["json ".len()..])).collect::<Result<_, _>>()?;
    Ok((rows, table.join("\n") + "\n"))
}

/// Runs `script`, a path in the workspace, in each environment: the rows of the peers, and the set-up of each run. Of one that fails or
/// takes too long what it printed before counts, and it is told: the others have taken long.
fn run_peers(script: &str, venvs: &[PathBuf], arguments: &[String]) -> Result<(Vec<Value>, Vec<Value>)> {
    let mut lines: Vec<Value> = Vec::new();
    for venv in venvs {
        let python = venv.join("bin/python");
        anyhow::ensure!(python.exists(), "--peers needs a Python environment, but {} is not there", python.display());
        let mut command = Command::new(python);
        command.arg(root().join(script)).args(arguments);
        let (printed, ended) = printed_within(&mut command, PEER_LIMIT)?;
        if let Err(reason) = ended {
            let told = format!("what a peer has not said when it ended, {reason}: {script} {}", arguments.join(" "));
            eprintln!("left out: {told}");
            lines.push(serde_json::json!({ "left out": told }));
        }
        let parsed = printed.lines().map(serde_json::from_str).collect::<Result<Vec<_>, _>>();
        lines.extend(parsed.context("a line of peers.py is not JSON")?);
    }
    Ok(lines.into_iter().partition(|line| line.get("peer").is_some()))
}

/// What was measured, ours and the peers'.
#[derive(Default)]
pub(super) struct Measured {
    /// What the bench printed, without its JSON lines.
    pub(super) table: String,
    pub(super) ours: Vec<Value>,
    pub(super) peers: Vec<Value>,
    /// Versions and threads of the peers.
    pub(super) setup: Vec<Value>,
}

impl Measured {
    /// Reads our bench's output and runs the peers of each environment with these arguments.
    pub(super) fn new(printed: &str, script: &str, venvs: &[PathBuf], arguments: &[String]) -> Result<Self> {
        let (ours, table) = split_output(printed)?;
        let (peers, setup) = run_peers(script, venvs, arguments)?;
        Ok(Self { table, ours, peers, setup })
    }

    /// The bench's table, and a line for each set-up of the peers.
    pub(super) fn head(&self) -> String {
        let mut text = self.table.clone();
        for setup in &self.setup {
            let _ = writeln!(text, "\npeers: {setup}");
        }
        text
    }

    /// Every row.
    pub(super) fn json(&self) -> Value {
        serde_json::json!({ "ours": self.ours, "peers": self.peers, "setup": self.setup })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn a_peer_that_fails_is_left_out_and_said_so() {
        use std::os::unix::fs::symlink;
        let venv = std::env::temp_dir().join(format!("failing-peer-{}", std::process::id()));
        std::fs::create_dir_all(venv.join("bin")).unwrap();
        symlink("/bin/false", venv.join("bin/python")).unwrap();
        let measured = Measured::new("head\n", "peers.py", std::slice::from_ref(&venv), &["int8".into()]);
        std::fs::remove_dir_all(venv).unwrap();
        let measured = measured.unwrap();
        assert!(measured.peers.is_empty() && measured.head().contains("when it ended, exit status: 1: peers.py int8"));
    }

    #[test]
    fn our_lines_are_taken_from_the_output() {
        let of = |printed: &str| Measured::new(printed, "no peers", &[], &[]);
        let measured = of("head\njson {\"shape\": \"a\"}\ntail\n").unwrap();
        assert_eq!((measured.head().as_str(), measured.ours.len()), ("head\ntail\n", 1));
        assert!(of("json {").is_err());
    }
}
