//! [`StopMatcher`]: ends a text at the first stop string and never lets a part of one through.

/// Watches a growing text for stop strings.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text that may be the beginning of a stop string.
    held: String,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher for `stops`; empty ones are left out.
    pub fn new(stops: Vec<String>) -> Self {
        let stops = stops.into_iter().filter(|stop| !stop.is_empty()).collect();
        Self { stops, held: String::new(), stopped: false }
    }

    /// Adds text; returns what can no longer become part of a stop string. After a match everything is swallowed.
    pub fn push(&mut self, text: &str) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(text);
        if let Some(start) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.stopped = true;
            self.held.truncate(start);
            return std::mem::take(&mut self.held);
        }
        let keep_from = self.first_possible_start();
        let rest = self.held.split_off(keep_from);
        std::mem::replace(&mut self.held, rest)
    }

    /// Lets `text` through unmatched, after whatever was held. For text that must not be cut, such as the first tokens.
    pub fn push_unmatched(&mut self, text: &str) -> String {
        std::mem::take(&mut self.held) + text
    }

    /// Whether a stop string was found.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// What was held back, once no more text comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// The first byte from which the held text is a proper beginning of a stop string.
    fn first_possible_start(&self) -> usize {
        let starts = self.held.char_indices().map(|(at, _)| at);
        let mut possible = starts.filter(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])));
        possible.next().unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(stops: &[&str], pieces: &[&str], want: &[&str], stopped: bool) {
        let mut matcher = StopMatcher::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut got: Vec<String> = pieces.iter().map(|piece| matcher.push(piece)).collect();
        got.push(matcher.finish());
        assert_eq!(got, want);
        assert_eq!(matcher.stopped(), stopped);
    }

    #[test]
    fn a_stop_string_across_three_pieces() {
        check(&["\nA:"], &["yes\n", "A", ": no"], &["yes", "", "", ""], true);
    }

    #[test]
    fn a_false_alarm_is_released() {
        check(&["\nA:"], &["yes\n", "B", "!"], &["yes", "\nB", "!", ""], false);
    }

    #[test]
    fn an_unfinished_stop_string_is_text_at_the_end() {
        check(&["END"], &["the EN"], &["the ", "EN"], false);
    }

    #[test]
    fn the_earliest_of_several_wins() {
        check(&["c", "ab"], &["xabc"], &["x", ""], true);
    }

    #[test]
    fn overlapping_beginnings() {
        check(&["aab"], &["a", "a", "a", "b"], &["", "", "a", "", ""], true);
    }

    #[test]
    fn multi_byte_stop_strings() {
        check(&["🦀漢"], &["a🦀", "🦀", "漢b"], &["a", "🦀", "", ""], true);
    }

    proptest::proptest! {
        #[test]
        fn any_pieces_end_where_the_whole_text_would(pieces in proptest::collection::vec("[abé]{0,4}", 0..8),
                                                     stops in proptest::collection::vec("[abé]{1,4}", 0..4)) {
            let mut matcher = StopMatcher::new(stops.clone());
            let mut got = String::new();
            let mut seen = String::new();
            for piece in &pieces {
                seen += piece;
                got += &matcher.push(piece);
                assert!(seen.starts_with(&got));
                // What is out is never taken back, and what is held is never more than a beginning of a stop string.
                assert!(matcher.stopped() || stops.iter().all(|stop| !got.contains(stop.as_str())));
            }
            got += &matcher.finish();
            // The first piece that completes a stop string decides; among those it completes, the earliest wins.
            let mut whole = String::new();
            let mut want = None;
            for piece in &pieces {
                whole += piece;
                want = want.or_else(|| stops.iter().filter_map(|stop| whole.find(stop.as_str())).min());
            }
            assert_eq!(got, whole[..want.unwrap_or(whole.len())]);
            assert_eq!(matcher.stopped(), want.is_some());
        }
    }
}
