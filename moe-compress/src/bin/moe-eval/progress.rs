//! Lines to standard error about what takes long.

use moe_models::train::{Event, Observer};
use std::time::{Duration, Instant};

/// Time between two lines.
const INTERVAL: Duration = Duration::from_secs(5);

pub(crate) struct Progress {
    what: String,
    shown: Instant,
}

impl Default for Progress {
    fn default() -> Self {
        Self { what: String::new(), shown: Instant::now() }
    }
}

impl Progress {
    /// Requests of a task.
    pub(crate) fn requests(&mut self, task: &str, done: usize, total: usize) {
        self.say(&format!("{task}: {done} of {total} requests"));
    }

    fn say(&mut self, line: &str) {
        if self.shown.elapsed() >= INTERVAL {
            eprintln!("{line}");
            self.shown = Instant::now();
        }
    }
}

impl Observer for Progress {
    fn event(&mut self, event: &Event) {
        match event {
            Event::Preparing { what } => self.what.clone_from(what),
            Event::Prepared { done, total } => {
                let line = format!("{}: {done} of {total} bytes", self.what);
                self.say(&line);
            }
            _ => {}
        }
    }
}
