//! Measuring one row, in a process of its own: its peak memory is then its own too, and a row that the machine is too
//! small for ends alone.

use crate::models::random_model;
use crate::options::HERE;
use crate::rows::Row;
use crate::run::{Run, Stepped, Times};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

/// A measured row: medians, each taken by itself.
#[derive(Serialize, Deserialize)]
pub(crate) struct Measured {
    pub(crate) step_ms: f64,
    pub(crate) best_ms: f64,
    pub(crate) forward_ms: f64,
    pub(crate) backward_ms: f64,
    pub(crate) optimizer_ms: f64,
    pub(crate) drop_rate: f64,
    /// Most memory that the process has held.
    pub(crate) peak_mb: f64,
    /// Parameters of all experts.
    pub(crate) expert_parameters: usize,
}

/// A measured row, or why there is none.
pub(crate) type Outcome = Result<Measured, String>;

/// Measures the row of these names in this process and prints it as JSON.
pub(crate) fn measure_here(words: &[String], steps: usize) -> Result<()> {
    // When memory runs out, the kernel is to end this row, and neither the bench nor others' work. Not every system has it.
    let _ignored = std::fs::write("/proc/self/oom_score_adj", "1000");
    let (name, row) = words.split_first().with_context(|| format!("{HERE} needs a model and a row"))?;
    println!("{}", serde_json::to_string(&measure(name, &Row::of(row)?, steps)?)?);
    Ok(())
}

fn measure(name: &str, row: &Row, steps: usize) -> Result<Measured> {
    let model = random_model(name, row.router.1)?.with_precision(row.precision.1)?.with_recompute(row.recompute.1);
    let mut run = Run::new(&model, row)?;
    // The first step warms up, and is checked: random weights on random tokens know nothing.
    let (lm_loss, unknowing) = (run.step()?.lm_loss, (model.config().vocab_size as f64).ln());
    ensure!((lm_loss - unknowing).abs() < 0.5, "an untrained model's loss is {lm_loss}, expected about {unknowing}");
    let stepped = (0..steps).map(|_| run.step()).collect::<Result<Vec<_>>>()?;
    let experts = model.params().iter().filter(|(name, _)| name.contains(".experts."));
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    Ok(Measured {
        step_ms: ms(median(&stepped, |t| t.step)),
        best_ms: ms(stepped.iter().map(|s| s.times.step).min().unwrap_or_default()),
        forward_ms: ms(median(&stepped, |t| t.forward)),
        backward_ms: ms(median(&stepped, |t| t.backward)),
        optimizer_ms: ms(median(&stepped, |t| t.optimizer)),
        drop_rate: stepped.iter().map(|s| s.drop_rate).sum::<f64>() / steps as f64,
        peak_mb: peak_mb()?,
        expert_parameters: experts.map(|(_, var)| var.elem_count()).sum(),
    })
}

fn median(stepped: &[Stepped], of: impl Fn(&Times) -> Duration) -> Duration {
    let mut times: Vec<Duration> = stepped.iter().map(|s| of(&s.times)).collect();
    times.sort();
    (times[(times.len() - 1) / 2] + times[times.len() / 2]) / 2
}

/// The most memory that this process has held, in units of 10^6 bytes.
fn peak_mb() -> Result<f64> {
    let status =
        std::fs::read_to_string("/proc/self/status").context("this system does not tell a process's memory")?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix("kB"));
    let kib: f64 = kib.context("/proc/self/status has no VmHWM")?.trim().parse()?;
    Ok(kib * 1024.0 / 1e6)
}

/// Starts this program again for one row.
pub(crate) fn measure_apart(name: &str, row: &[&str], steps: usize) -> Result<Outcome> {
    eprintln!("{name} {}", row.join(" "));
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's file")?);
    command.args([HERE, name]).args(row).args(["--steps", &steps.to_string()]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot start again")?;
    if !output.status.success() {
        return Ok(Err(reason(output.status)));
    }
    let measured: Measured = serde_json::from_slice(&output.stdout)?;
    eprintln!("  {:.1} ms a step, {:.0} MB", measured.step_ms, measured.peak_mb);
    Ok(Ok(measured))
}

fn reason(status: ExitStatus) -> String {
    #[cfg(unix)]
    if std::os::unix::process::ExitStatusExt::signal(&status) == Some(9) {
        return "killed, as the kernel does when memory runs out".into();
    }
    status.to_string()
}
