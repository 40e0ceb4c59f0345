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
const NAMES: [&str; 5] = ["attention", "route", "dispatch", "experts", "combine"];

/// Seconds in parts of passes, none of which lies in another.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct PhaseSeconds {
    pub(crate) attention: f64,
    /// Which experts, with which weights.
    pub(crate) gate: f64,
    /// Tokens to experts and back: rows made, sent and put together.
    pub(crate) dispatch_and_combine: f64,
    pub(crate) experts: f64,
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
        let [attention, gate, dispatch, experts, combine] =
            self.0.each_ref().map(|nanoseconds| nanoseconds.load(Ordering::Relaxed) as f64 / 1e9);
        PhaseSeconds { attention, gate, dispatch_and_combine: dispatch + combine, experts }
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
    fn spans_are_summed_by_name() {
        const MS: Duration = Duration::from_millis(4);
        let phases = Phases::default();
        let all = tracing_subscriber::registry().with(LevelFilter::DEBUG).with(phases.clone());
        tracing::subscriber::with_default(all, || {
            for name in [tracing::debug_span!("dispatch"), tracing::debug_span!("combine")] {
                name.in_scope(|| tracing::debug_span!("other").in_scope(|| sleep(MS)));
            }
        });
        let total = phases.total();
        assert!(total.dispatch_and_combine >= 2.0 * MS.as_secs_f64(), "{total:?}");
        assert_eq!((total.attention, total.gate, total.experts), (0.0, 0.0, 0.0));
    }
}
