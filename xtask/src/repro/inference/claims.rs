//! [`Claim`]: what the paper says beside what was measured. Whether it shows is computed of the figures, and written as that.

use std::fmt::Write as _;

/// One of them.
#[derive(Debug)]
pub(super) struct Claim {
    /// In words.
    pub(super) says: String,
    /// The paper's figures.
    pub(super) published: String,
    /// Those from here.
    pub(super) here: String,
    /// None where nothing was measured that could tell.
    pub(super) shows: Option<bool>,
}

impl Claim {
    pub(super) fn verdict(&self) -> &'static str {
        match self.shows {
            Some(true) => "shows here",
            Some(false) => "does not show here",
            None => "not measured",
        }
    }
}

/// All of them as a table.
pub(super) fn table(claims: &[Claim]) -> String {
    let mut text = String::from("| claim | the paper | here | |\n|---|---|---|---|\n");
    for claim in claims {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {} | {} | {} | {} |", claim.says, claim.published, claim.here, claim.verdict());
    }
    text
}

/// Numbers one after the other, of as many digits as matter.
pub(super) fn listed(values: &[f64], unit: &str) -> String {
    let shown: Vec<String> = values.iter().map(|value| format!("{}{unit}", digits(*value))).collect();
    if shown.is_empty() { "-".into() } else { shown.join(", ") }
}

/// Three digits.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Whether all are at least this; None without any.
pub(super) fn all_at_least(values: &[f64], least: f64) -> Option<bool> {
    (!values.is_empty()).then(|| values.iter().all(|value| *value >= least))
}

/// Whether values never fall, and grow in all; None of fewer than two.
pub(super) fn rises(values: &[f64]) -> Option<bool> {
    let (first, last) = (values.first()?, values.last()?);
    (values.len() > 1).then(|| last > first && values.windows(2).all(|pair| pair[1] >= pair[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_follow_from_figures() {
        assert_eq!((all_at_least(&[2.0, 1.0], 1.0), all_at_least(&[2.0, 0.9], 1.0)), (Some(true), Some(false)));
        assert_eq!(all_at_least(&[], 1.0), None);
        assert_eq!((rises(&[1.0, 1.0, 2.0]), rises(&[1.0, 3.0, 2.0]), rises(&[1.0])), (Some(true), Some(false), None));
        assert_eq!(rises(&[1.0, 1.0]), Some(false));
        let claim = |shows| Claim { says: "s".into(), published: "p".into(), here: "h".into(), shows };
        let text = table(&[claim(Some(true)), claim(Some(false)), claim(None)]);
        for line in ["| s | p | h | shows here |", "| s | p | h | does not show here |", "| s | p | h | not measured |"]
        {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn three_digits_are_shown() {
        assert_eq!(listed(&[0.1234, 1.234, 12.34, 123.4], "x"), "0.123x, 1.23x, 12.3x, 123x");
        assert_eq!(listed(&[], "x"), "-");
    }
}
