//! What Ctrl-C and termination do: while steps are trained the run is saved first, at any other time there is nothing to
//! save and the program ends at once.

use anyhow::{Context, Result};
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exit status of a run that a signal ended at once. One that was stopped and saved ends with 0.
const ENDED_BY_SIGNAL: i32 = 130;

/// Listens until the program ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct Signals {
    training: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Signals {
    pub(crate) fn listen() -> Result<Self> {
        let signals = Self::default();
        let heard = signals.clone();
        ctrlc::set_handler(move || heard.handle()).context("cannot listen for signals")?;
        Ok(signals)
    }

    /// Runs `train`, during which the first signal raises the flag it is given instead of ending the program.
    pub(crate) fn while_training<T>(&self, train: impl FnOnce(&AtomicBool) -> T) -> T {
        self.training.store(true, Ordering::SeqCst);
        let result = train(&self.stop);
        self.training.store(false, Ordering::SeqCst);
        result
    }

    /// Runs on a thread of its own, so it is prompt whatever the others do.
    fn handle(&self) {
        if !self.training.load(Ordering::SeqCst) {
            eprintln!("\nended by a signal; no step was under way, so there was nothing to save");
            exit(ENDED_BY_SIGNAL);
        }
        if self.stop.swap(true, Ordering::SeqCst) {
            eprintln!("\nended by a second signal; the run can be resumed from its last checkpoint");
            exit(ENDED_BY_SIGNAL);
        }
        eprintln!("\nsaving after this step; press Ctrl-C again to end at once");
    }
}
