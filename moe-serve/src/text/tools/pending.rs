//! [`Pending`]: text that has come and is not read yet; [`TextOut`]: text on its way to the reader.

use super::AnswerPart;

/// Text that has come and is not read yet.
#[derive(Debug, Default)]
pub(super) struct Pending(pub(super) String);

impl Pending {
    pub(super) fn push(&mut self, text: &str) {
        self.0.push_str(text);
    }

    pub(super) fn take(&mut self) -> String {
        std::mem::take(&mut self.0)
    }

    /// Takes the first `bytes`.
    pub(super) fn take_front(&mut self, bytes: usize) -> String {
        let rest = self.0.split_off(bytes);
        std::mem::replace(&mut self.0, rest)
    }

    /// Drops leading characters of `drop`.
    pub(super) fn skip(&mut self, drop: impl Fn(char) -> bool) {
        let bytes = self.0.len() - self.0.trim_start_matches(drop).len();
        self.0.drain(..bytes);
    }

    /// Whether more text could make the beginning one of `markers`, of which it is a part now.
    pub(super) fn may_begin(&self, markers: &[&str]) -> bool {
        markers.iter().any(|marker| marker.len() > self.0.len() && marker.starts_with(&self.0))
    }

    /// Drops one of `markers` at the beginning.
    pub(super) fn skip_marker(&mut self, markers: &[&str]) -> bool {
        let found = markers.iter().find(|marker| self.0.starts_with(**marker));
        if let Some(marker) = found {
            self.0.drain(..marker.len());
        }
        found.is_some()
    }

    /// The text before the first of `markers`, and which; both are taken.
    pub(super) fn take_through<'m>(&mut self, markers: &[&'m str]) -> Option<(String, &'m str)> {
        let found = markers.iter().filter_map(|marker| self.0.find(marker).map(|at| (at, *marker))).min()?;
        let before = self.take_front(found.0);
        self.0.drain(..found.1.len());
        Some((before, found.1))
    }

    /// Takes what cannot be the beginning of any of `markers`.
    pub(super) fn take_certain(&mut self, markers: &[&str]) -> String {
        let possible = |at: usize| markers.iter().any(|marker| marker.starts_with(&self.0[at..]));
        let keep_from = self.0.char_indices().map(|(at, _)| at).find(|&at| possible(at)).unwrap_or(self.0.len());
        self.take_front(keep_from)
    }
}

/// Text on its way to the reader. White space between text and calls, and between calls, belongs to the form and is dropped.
#[derive(Debug, Default)]
pub(super) struct TextOut {
    held: String,
    called: bool,
    /// Whether nothing was said since the last call.
    after_call: bool,
}

impl TextOut {
    pub(super) fn push(&mut self, text: &str, out: &mut Vec<AnswerPart>) {
        let text = if self.after_call { text.trim_start() } else { text };
        self.after_call &= text.is_empty();
        self.held.push_str(text);
        let certain = self.held.trim_end().len();
        if certain > 0 {
            let rest = self.held.split_off(certain);
            out.push(AnswerPart::Text(std::mem::replace(&mut self.held, rest)));
        }
    }

    /// A call begins.
    pub(super) fn call(&mut self) {
        self.held.clear();
        (self.called, self.after_call) = (true, true);
    }

    pub(super) fn finish(&mut self, out: &mut Vec<AnswerPart>) {
        let held = std::mem::take(&mut self.held);
        if !self.called && !held.is_empty() {
            out.push(AnswerPart::Text(held));
        }
    }
}
