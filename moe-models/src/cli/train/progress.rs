//! Shows a run: a bar on a terminal, plain lines elsewhere.

use crate::train::model::LossParts;
use crate::train::{Event, Observer};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Time between two lines about one preparation.
const PREPARING_INTERVAL: Duration = Duration::from_secs(5);

/// The preparation under way.
struct Preparing {
    what: String,
    started: Instant,
    shown: Instant,
}

pub(crate) struct Progress {
    /// Of a rank that prints nothing.
    silent: bool,
    bar: Option<ProgressBar>,
    preparing: Option<Preparing>,
    terminal: bool,
    log_interval: u64,
    started: Instant,
    first_step: u64,
    total_steps: u64,
    tokens_per_step: u64,
}

impl Progress {
    pub(crate) fn new(log_interval: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self {
            silent: false,
            bar: None,
            preparing: None,
            terminal,
            log_interval: log_interval.max(1),
            started: Instant::now(),
            first_step: 0,
            total_steps: 0,
            tokens_per_step: 0,
        }
    }

    /// Shows nothing: another rank shows the same.
    pub(crate) fn silent() -> Self {
        Self { silent: true, ..Self::new(1) }
    }

    /// Leaves the bar as it is and ends its line.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    /// A line about the run.
    pub(crate) fn say(&self, text: &str) {
        if !self.silent {
            self.line(text);
        }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    fn prepare(&mut self, what: &str) {
        self.line(&format!("{what} ..."));
        let now = Instant::now();
        self.preparing = Some(Preparing { what: what.to_owned(), started: now, shown: now });
    }

    /// A line now and then: a preparation of minutes must not look like one that hangs.
    fn prepared(&mut self, done: u64, total: u64) {
        let Some(Preparing { what, started, shown }) = &mut self.preparing else { return };
        if shown.elapsed() < PREPARING_INTERVAL {
            return;
        }
        *shown = Instant::now();
        let (percent, seconds) = (100 * done / total.max(1), started.elapsed().as_secs());
        let text = format!("{what}: {percent} % of {:.1} MB read, {seconds} s", total as f64 / 1e6);
        self.line(&text);
    }

    fn start(&mut self, step: u64, total_steps: u64, tokens_per_step: u64) {
        (self.first_step, self.total_steps, self.tokens_per_step) = (step, total_steps, tokens_per_step);
        self.started = Instant::now();
        if self.terminal {
            let bar = ProgressBar::new(total_steps);
            if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} steps  {msg}") {
                bar.set_style(style);
            }
            bar.set_position(step);
            self.bar = Some(bar);
        }
    }

    fn step(&self, step: u64, loss: &str, grad_norm: f64, lr: f64) {
        let done = step - self.first_step;
        let seconds = self.started.elapsed().as_secs_f64().max(1e-9);
        let tokens_per_second = (done * self.tokens_per_step) as f64 / seconds;
        let rest = (self.total_steps - step) as f64 * seconds / done.max(1) as f64;
        let eta = indicatif::HumanDuration(Duration::try_from_secs_f64(rest).unwrap_or_default());
        match &self.bar {
            Some(bar) => {
                bar.set_position(step);
                bar.set_message(format!("loss {loss}  {tokens_per_second:.0} tokens/s  ETA {eta:#}"));
            }
            None if step.is_multiple_of(self.log_interval) || step == self.total_steps => eprintln!(
                "step {step}/{}  loss {loss}  grad {grad_norm:.3}  lr {lr:.2e}  {tokens_per_second:.0} tokens/s  ETA {eta:#}",
                self.total_steps
            ),
            None => {}
        }
    }
}

/// A loss, and what it is made of where a student follows its teacher.
fn loss_in_words(loss: f64, parts: &LossParts) -> String {
    match parts.kd {
        0.0 => format!("{loss:.4}"),
        kd => format!("{loss:.4} (text {:.4}, teacher {kd:.4})", parts.lm),
    }
}

impl Observer for Progress {
    fn event(&mut self, event: &Event) {
        if self.silent {
            return;
        }
        match event {
            Event::Preparing { what } => self.prepare(what),
            Event::Prepared { done, total } => self.prepared(*done, *total),
            Event::Started { step, total_steps, tokens_per_step } => self.start(*step, *total_steps, *tokens_per_step),
            Event::Skipped { step, what, in_a_row } => {
                self.line(&format!("step {step}: update skipped ({in_a_row} in a row): {what}"));
            }
            Event::Step { step, loss, parts, grad_norm, lr, .. } => {
                self.step(*step, &loss_in_words(*loss, parts), *grad_norm, *lr)
            }
            Event::Validated { step, loss, bits_per_byte, by_source } => {
                let parts: Vec<String> = by_source.iter().map(|(name, bits)| format!("{name} {bits:.3}")).collect();
                let parts = if parts.len() > 1 { format!(" ({})", parts.join(", ")) } else { String::new() };
                self.line(&format!("step {step}: valid loss {loss:.4}, {bits_per_byte:.4} bits per byte{parts}"));
            }
            Event::Saved { step, dir } => self.line(&format!("step {step}: saved {}", dir.display())),
        }
    }
}
