//! Other programs' training steps: each row by a Python of its own, with a limit on its time.

use crate::shell::{output, output_within, root};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const SCRIPT: &str = "moe-models/benches/training/peers.py";

/// A Python environment with peers.
pub(super) struct Environment {
    python: PathBuf,
    /// Versions and threads.
    pub(super) setup: Value,
    /// Peer, type and router of each row that it has.
    rows: Vec<Value>,
}

impl Environment {
    /// Asks the environment for what it has.
    pub(super) fn new(venv: &Path) -> Result<Self> {
        let python = venv.join("bin/python");
        ensure!(python.exists(), "--peers needs a Python environment, but {} is not there", python.display());
        let printed = output(Command::new(&python).arg(root().join(SCRIPT)))?;
        let mut setup: Value = serde_json::from_str(&printed).context("what peers.py says is not JSON")?;
        let rows = setup.as_object_mut().and_then(|setup| setup.remove("rows"));
        let rows = rows.as_ref().and_then(Value::as_array).context("peers.py names no rows")?.clone();
        Ok(Self { python, setup, rows })
    }

    /// Every row on `model`. One that fails or takes longer than `limit` says so under `failed`.
    pub(super) fn measure(&self, model: &Value, steps: &[String], limit: Duration) -> Result<Vec<Value>> {
        let measure = |row: &Value| {
            let mut command = Command::new(&self.python);
            command.arg(root().join(SCRIPT)).arg("--model").arg(model.to_string()).args(steps);
            for key in ["peer", "type"] {
                command.arg(format!("--{key}")).arg(row[key].as_str().context("a row of peers.py has no name")?);
            }
            let mut measured = serde_json::json!({ "size": model["name"] });
            let result = match output_within(&mut command, limit)? {
                Ok(printed) => serde_json::from_str(&printed).context("what peers.py says is not JSON")?,
                Err(failed) => serde_json::json!({ "failed": failed }),
            };
            for part in [row, &result] {
                for (key, value) in part.as_object().context("a row of peers.py is no object")? {
                    measured[key] = value.clone();
                }
            }
            Ok(measured)
        };
        self.rows.iter().map(measure).collect()
    }
}
