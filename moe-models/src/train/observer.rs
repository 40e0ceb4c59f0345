//! What a run tells whoever watches it. The library prints nothing; a program shows these as it likes.

use super::model::LossParts;
use super::non_finite::NonFinite;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Time between two [`Event::Prepared`].
pub(crate) const REPORT_INTERVAL: Duration = Duration::from_millis(200);

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Event {
    /// A slow preparation began, such as tokenising a source.
    Preparing {
        /// What is being done, for a person.
        what: String,
    },
    /// The last preparation goes on; comes a few times a second, or more rarely.
    Prepared {
        /// Bytes of the files done; of compressed ones, compressed bytes.
        done: u64,
        /// Bytes of the files in all. Training a tokenizer goes on for a while after the last of them.
        total: u64,
    },
    /// Training begins or continues.
    Started {
        /// Steps already done.
        step: u64,
        /// Steps of the whole run.
        total_steps: u64,
        /// Tokens of one step.
        tokens_per_step: u64,
    },
    /// An optimizer step ended.
    Step {
        /// Steps done.
        step: u64,
        /// Total loss, nats per token.
        loss: f64,
        /// What it is made of.
        parts: LossParts,
        /// Global gradient norm before clipping.
        grad_norm: f64,
        /// Learning rate of the step.
        lr: f64,
        /// Whether the parameters were updated; false after [`Event::Skipped`].
        applied: bool,
    },
    /// The update of a step was left out, because its loss or gradient is not finite. Comes before the step's
    /// [`Event::Step`].
    Skipped {
        /// The step, as its [`Event::Step`] will count it.
        step: u64,
        /// What was not finite.
        what: NonFinite,
        /// Steps skipped in a row, this one included.
        in_a_row: u64,
    },
    /// A validation ended.
    Validated {
        /// Steps done.
        step: u64,
        /// Nats per token over all sources.
        loss: f64,
        /// Bits per byte over all sources.
        bits_per_byte: f64,
        /// Bits per byte of each source.
        by_source: Vec<(String, f64)>,
    },
    /// A checkpoint was written.
    Saved {
        /// Steps done.
        step: u64,
        /// Its folder.
        dir: PathBuf,
    },
}

/// Receives [`Event`]s in order, on the training thread.
pub trait Observer {
    /// Called for each event.
    fn event(&mut self, event: &Event);
}

/// Ignores everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&mut self, _: &Event) {}
}

impl<F: FnMut(&Event)> Observer for F {
    fn event(&mut self, event: &Event) {
        self(event);
    }
}

/// Tells an observer of a preparation that goes on, a few times a second.
pub(crate) struct Progress<'a> {
    observer: &'a mut dyn Observer,
    reported: Instant,
}

impl<'a> Progress<'a> {
    /// Of the preparation that begins now.
    pub(crate) fn new(observer: &'a mut dyn Observer) -> Self {
        Self { observer, reported: Instant::now() }
    }

    /// Sends an [`Event::Prepared`] if the last one is long enough ago.
    pub(crate) fn report(&mut self, done: u64, total: u64) {
        if self.reported.elapsed() >= REPORT_INTERVAL {
            self.observer.event(&Event::Prepared { done, total });
            self.reported = Instant::now();
        }
    }
}
