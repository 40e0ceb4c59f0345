//! [`Timeline`]: what a rank did when, for people who want to see what hides what. Written as a Chrome trace (`chrome://tracing`,
//! Perfetto).

use crate::Result;
use crate::hf::write_atomically;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A line of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Track {
    /// What the rank itself does, one thing at a time.
    Work,
    /// Messages under way: sums of gradients to their owners.
    Sums,
    /// Messages under way: sums or parameters to all.
    Values,
}

/// Something that took time.
#[derive(Debug, Clone, PartialEq)]
pub struct Span {
    /// What it was.
    pub name: String,
    /// Where it belongs.
    pub track: Track,
    /// Since the beginning of the timeline.
    pub begin: Duration,
    /// As well.
    pub end: Duration,
}

/// What a rank did when.
#[derive(Debug)]
pub struct Timeline {
    start: Instant,
    spans: Mutex<Vec<Span>>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self { start: Instant::now(), spans: Mutex::default() }
    }
}

impl Timeline {
    /// Most spans that are kept: a trace is of the beginning of a run.
    const MOST: usize = 200_000;

    /// Adds a span.
    pub fn add(&self, track: Track, name: impl Into<String>, begin: Instant, end: Instant) {
        let mut spans = self.spans.lock().unwrap_or_else(PoisonError::into_inner);
        if spans.len() < Self::MOST {
            let since = |at: Instant| at.saturating_duration_since(self.start);
            spans.push(Span { name: name.into(), track, begin: since(begin), end: since(end) });
        }
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Span> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes all spans so far of rank `rank` to `path`.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn write(&self, path: &Path, rank: usize) -> Result<()> {
        let microseconds = |time: Duration| time.as_secs_f64() * 1e6;
        let event = |span: Span| {
            let (track, length) = (span.track as usize, span.end.saturating_sub(span.begin));
            serde_json::json!({
                "name": span.name, "ph": "X", "pid": rank, "tid": track,
                "ts": microseconds(span.begin), "dur": microseconds(length),
            })
        };
        let mut events: Vec<_> = self.spans().into_iter().map(event).collect();
        for (track, name) in ["work", "sums of gradients", "sums or parameters to all"].into_iter().enumerate() {
            let args = serde_json::json!({ "name": name });
            events
                .push(serde_json::json!({ "name": "thread_name", "ph": "M", "pid": rank, "tid": track, "args": args }));
        }
        let json = serde_json::Value::Array(events).to_string();
        write_atomically(path, |out| out.write_all(json.as_bytes()))
    }
}

/// The time covered by intervals, of which some may overlap.
pub(crate) fn covered(mut intervals: Vec<(Instant, Instant)>) -> Duration {
    intervals.sort();
    let (mut total, mut until) = (Duration::ZERO, None);
    for (begin, end) in intervals {
        let begin = until.map_or(begin, |until: Instant| until.max(begin));
        total += end.saturating_duration_since(begin);
        until = Some(until.map_or(end, |until| until.max(end)));
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlapping_times_count_once() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let of = |list: &[(u64, u64)]| covered(list.iter().map(|&(a, b)| (at(a), at(b))).collect()).as_millis();
        assert_eq!(of(&[]), 0);
        assert_eq!(of(&[(10, 20), (0, 5)]), 15);
        assert_eq!(of(&[(0, 10), (5, 20), (6, 7), (30, 31)]), 21);
        assert_eq!(of(&[(5, 5), (0, 10), (10, 12)]), 12);
    }

    #[test]
    fn a_trace_is_a_list_of_events() {
        let timeline = Timeline::default();
        let begin = Instant::now();
        timeline.add(Track::Work, "forward \"1\"", begin, begin + Duration::from_millis(2));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("trace.json");
        timeline.write(&path, 3).unwrap();
        let events: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let event = &events[0];
        assert_eq!((event["name"].as_str(), event["pid"].as_u64()), (Some("forward \"1\""), Some(3)));
        assert!((event["dur"].as_f64().unwrap() - 2000.0).abs() < 1.0);
        assert_eq!(events.as_array().unwrap().len(), 4);
    }
}
