//! [`Phases`]: how long a rank has been in which part of its passes, summed from the spans that the libraries open.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing::span::Id;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The spans that are summed.
const NAMES: [&str; 6] = ["attention", "route", "dispatch", "all_to_all", "experts", "combine"];

/// Seconds in each part of a pass; no two count the same moment.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PhaseSeconds {
    pub(crate) attention: f64,
    /// Which experts, with which weights.
    pub(crate) gate: f64,
    /// Rows into the experts' order and back, without their way between ranks.
    pub(crate) layout: f64,
    /// Exchanges of rows, and of their counts where these travel.
    pub(crate) all_to_all: f64,
    pub(crate) experts: f64,
}

impl PhaseSeconds {
    /// One after the other, for messages.
    pub(crate) fn values(self) -> [f64; 5] {
        [self.attention, self.gate, self.layout, self.all_to_all, self.experts]
    }
}

/// Nanoseconds in each span so far, over all threads of this process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Phases(Arc<[AtomicU64; NAMES.len()]>);

impl Phases {
    /// Listens to everything that this process does from now on. Once a process.
    ///
    /// # Errors
    /// If something listens already.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let phases = Self::default();
        let all = tracing_subscriber::registry().with(LevelFilter::DEBUG).with(phases.clone());
        tracing::subscriber::set_global_default(all)?;
        Ok(phases)
    }

    /// Since the start.
    pub(crate) fn total(&self) -> PhaseSeconds {
        let [attention, gate, dispatch, all_to_all, experts, combine] =
            self.0.each_ref().map(|nanoseconds| nanoseconds.load(Ordering::Relaxed) as f64 / 1e9);
        // Exchanges lie inside of dispatch and combine.
        PhaseSeconds { attention, gate, layout: dispatch + combine - all_to_all, all_to_all, experts }
    }
}

/// When a span was entered.
struct Entered(Instant);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Phases {
    fn on_enter(&self, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id).filter(|span| NAMES.contains(&span.name())) {
            span.extensions_mut().replace(Entered(Instant::now()));
        }
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let Some(index) = NAMES.iter().position(|name| *name == span.name()) else { return };
        if let Some(Entered(at)) = span.extensions_mut().remove() {
            let nanoseconds = u64::try_from(at.elapsed().as_nanos()).unwrap_or(u64::MAX);
            self.0[index].fetch_add(nanoseconds, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::sleep;
    use std::time::Duration;

    #[test]
    fn no_moment_counts_twice() {
        const MS: Duration = Duration::from_millis(4);
        let phases = Phases::default();
        let all = tracing_subscriber::registry().with(LevelFilter::DEBUG).with(phases.clone());
        tracing::subscriber::with_default(all, || {
            tracing::debug_span!("dispatch").in_scope(|| {
                sleep(MS);
                tracing::debug_span!("all_to_all").in_scope(|| sleep(MS));
            });
            tracing::debug_span!("other").in_scope(|| sleep(MS));
        });
        let total = phases.total();
        let least = MS.as_secs_f64();
        assert!(total.layout >= least && total.all_to_all >= least, "{total:?}");
        assert_eq!((total.attention, total.gate, total.experts), (0.0, 0.0, 0.0));
    }
}
