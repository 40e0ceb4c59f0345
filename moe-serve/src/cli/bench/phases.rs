//! [`Phases`]: where the time of the engine's steps goes, from the spans that engine and libraries open.

use anyhow::Context as _;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tracing::Subscriber;
use tracing::level_filters::LevelFilter;
use tracing::span::Id;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The span of a step of the engine.
const STEP: &str = "step";

/// Seconds in spans of a name, without those in spans within them; over all threads that open spans.
pub(super) type OwnSeconds = BTreeMap<&'static str, f64>;

/// What each step came to.
#[derive(Debug, Clone, Default)]
pub(super) struct Phases(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    current: OwnSeconds,
    steps: Vec<OwnSeconds>,
}

/// A span that a thread is in.
struct Inside {
    since: Instant,
    /// Seconds in spans within it.
    within: f64,
}

thread_local! {
    static STACK: RefCell<Vec<Inside>> = const { RefCell::new(Vec::new()) };
}

impl Phases {
    /// Listens to everything that this process does from now on, and logs what `init_logging` logs. Once a process.
    ///
    /// # Errors
    /// If something listens already.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let phases = Self::default();
        let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(crate::cli::log_filter());
        let all = tracing_subscriber::registry().with(phases.clone().with_filter(LevelFilter::DEBUG)).with(log);
        tracing::subscriber::set_global_default(all).context("--phases needs the process's spans for itself")?;
        Ok(phases)
    }

    /// The steps since the last call.
    pub(super) fn take(&self) -> Vec<OwnSeconds> {
        std::mem::take(&mut self.seen().steps)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Phases {
    fn on_enter(&self, _: &Id, _: Context<'_, S>) {
        STACK.with_borrow_mut(|stack| stack.push(Inside { since: Instant::now(), within: 0.0 }));
    }

    fn on_exit(&self, id: &Id, context: Context<'_, S>) {
        let own = STACK.with_borrow_mut(|stack| {
            let Inside { since, within } = stack.pop()?;
            let seconds = since.elapsed().as_secs_f64();
            if let Some(outer) = stack.last_mut() {
                outer.within += seconds;
            }
            Some(seconds - within)
        });
        let (Some(own), Some(name)) = (own, context.metadata(id).map(|metadata| metadata.name())) else { return };
        let mut seen = self.seen();
        *seen.current.entry(name).or_default() += own;
        if name == STEP {
            let step = std::mem::take(&mut seen.current);
            seen.steps.push(step);
        }
    }
}

/// The shares of the phases of some steps, the largest first.
pub(super) fn shares<'a>(steps: impl Iterator<Item = &'a OwnSeconds>) -> Vec<(&'static str, f64)> {
    let mut sums = OwnSeconds::new();
    steps.flatten().for_each(|(&name, seconds)| *sums.entry(name).or_default() += seconds);
    let total: f64 = sums.values().sum();
    let mut shares: Vec<_> = sums.into_iter().map(|(name, seconds)| (name, seconds / total)).collect();
    shares.sort_by(|a, b| b.1.total_cmp(&a.1));
    shares
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::sleep;
    use std::time::Duration;
    use tracing::debug_span;

    #[test]
    fn a_span_has_what_those_within_it_have_not() {
        const MS: Duration = Duration::from_millis(4);
        let phases = Phases::default();
        let all = tracing_subscriber::registry().with(phases.clone());
        tracing::subscriber::with_default(all, || {
            debug_span!("step").in_scope(|| {
                debug_span!("outer").in_scope(|| {
                    sleep(MS);
                    (0..2).for_each(|_| debug_span!("inner").in_scope(|| sleep(3 * MS)));
                });
            });
            debug_span!("step").in_scope(|| ());
        });
        let steps = phases.take();
        assert_eq!((steps.len(), phases.take().len()), (2, 0));
        assert_eq!(steps[1].keys().copied().collect::<Vec<_>>(), ["step"]);
        let (outer, inner) = (steps[0]["outer"], steps[0]["inner"]);
        assert!(outer >= MS.as_secs_f64() && inner >= 6.0 * MS.as_secs_f64(), "{steps:?}");
        assert!(steps[0]["step"] < MS.as_secs_f64() && outer < inner, "{steps:?}");

        let shares = shares(steps.iter());
        assert_eq!(shares.iter().map(|share| share.0).collect::<Vec<_>>(), ["inner", "outer", "step"]);
        assert!((shares.iter().map(|share| share.1).sum::<f64>() - 1.0).abs() < 1e-9);
    }
}
