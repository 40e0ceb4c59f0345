//! [`Claim`]: what the paper says beside what was measured. Whether it shows is computed of the figures, and written as that.

use std::fmt::Write as _;

/// A value, and between what values measurements of the same thing lie.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Span {
    pub(super) value: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl From<f64> for Span {
    fn from(value: f64) -> Self {
        Self { value, low: value, high: value }
    }
}

impl std::ops::Neg for Span {
    type Output = Self;
    fn neg(self) -> Self {
        Self { value: -self.value, low: -self.high, high: -self.low }
    }
}

/// What something came to in each case, such as a number of ranks.
pub(super) type Cases = Vec<(String, Span)>;

/// Whether something holds in each case; None where it does by one measurement and does not by another.
pub(super) type Verdicts = Vec<(String, Option<bool>)>;

/// One of them.
#[derive(Debug)]
pub(super) struct Claim {
    /// In words.
    pub(super) says: String,
    /// The paper's figures.
    pub(super) published: String,
    /// Those from here.
    pub(super) here: String,
    /// In which cases it does; none where nothing was measured that could tell.
    pub(super) shows: Verdicts,
}

impl Claim {
    pub(super) fn verdict(&self) -> String {
        const WORDS: [(Option<bool>, &str, &str); 3] = [
            (Some(true), "shows", "shows here"),
            (Some(false), "does not show", "does not show here"),
            (None, "not told apart", "not told apart here"),
        ];
        let parts = WORDS.iter().filter_map(|(shows, part, whole)| {
            let of = self.shows.iter().filter(|case| case.1 == *shows).map(|case| case.0.as_str());
            let cases: Vec<&str> = of.collect();
            match cases.len() {
                0 => None,
                all if all == self.shows.len() => Some((*whole).to_owned()),
                _ => Some(format!("{part}: {}", cases.join(", "))),
            }
        });
        let parts: Vec<String> = parts.collect();
        if parts.is_empty() { "not measured".into() } else { parts.join("; ") }
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
    shown.join(", ")
}

/// The same with their cases, and with the spans of those that were measured more than once.
pub(super) fn by_case(cases: &Cases, unit: &str) -> String {
    let shown = cases.iter().map(|(case, Span { value, low, high })| {
        let span = if low < high { format!(" ({} to {})", digits(*low), digits(*high)) } else { String::new() };
        format!("{case}: {}{unit}{span}", digits(*value))
    });
    let shown: Vec<String> = shown.collect();
    if shown.is_empty() { "-".into() } else { shown.join(", ") }
}

/// As a case is called.
pub(super) fn ranks_named(ranks: usize) -> String {
    if ranks == 1 { "1 rank".into() } else { format!("{ranks} ranks") }
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

/// What two measurements say together.
pub(super) fn agreed(one: bool, other: bool) -> Option<bool> {
    (one == other).then_some(one)
}

/// In which cases something holds that holds for all values above one, or below.
pub(super) fn where_holds(cases: &Cases, holds: impl Fn(f64) -> bool) -> Verdicts {
    cases.iter().map(|(case, span)| (case.clone(), agreed(holds(span.low), holds(span.high)))).collect()
}

/// Whether values never fall from one case to the next, and grow in all; nothing of fewer than two values.
pub(super) fn rises(cases: &Cases) -> Verdicts {
    let spans: Vec<Span> = cases.iter().map(|case| case.1).collect();
    let [first, .., last] = spans.as_slice() else { return Vec::new() };
    let pairs = || spans.windows(2).map(|pair| (pair[0], pair[1]));
    let surely = last.low > first.high && pairs().all(|(before, after)| after.low >= before.high);
    let perhaps = last.high > first.low && pairs().all(|(before, after)| after.high >= before.low);
    vec![("from the first to the last".into(), agreed(surely, perhaps))]
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What each claim comes to: all cases, none, some or nothing at all.
    pub(in crate::repro::inference) fn verdicts(claims: &[Claim]) -> String {
        let sign = |claim: &Claim| match claim.verdict().as_str() {
            "shows here" => '+',
            "does not show here" => '-',
            "not measured" => '?',
            "not told apart here" => '=',
            _ => '~',
        };
        claims.iter().map(sign).collect()
    }

    #[test]
    fn verdicts_follow_from_figures() {
        let cases = |values: &[f64]| -> Cases {
            values.iter().enumerate().map(|(index, value)| (ranks_named(index + 1), Span::from(*value))).collect()
        };
        let claim = |shows| Claim { says: "s".into(), published: "p".into(), here: "h".into(), shows };
        let of = |values: &[f64]| claim(where_holds(&cases(values), |value| value >= 1.0)).verdict();
        assert_eq!(of(&[2.0, 1.0]), "shows here");
        assert_eq!(of(&[0.5]), "does not show here");
        assert_eq!(of(&[]), "not measured");
        assert_eq!(of(&[2.0, 0.9, 1.0]), "shows: 1 rank, 3 ranks; does not show: 2 ranks");
        let rising = |values: &[f64]| verdicts(&[claim(rises(&cases(values)))]);
        assert_eq!([rising(&[1.0, 1.0, 2.0]), rising(&[1.0, 3.0, 2.0]), rising(&[1.0])], ["+", "-", "?"]);
        assert_eq!(rising(&[1.0, 1.0]), "-");
        // Two measurements that differ.
        let wide = |low, high| vec![("a".to_owned(), Span { value: low, low, high })];
        let between = |low, high| claim(where_holds(&wide(low, high), |value| value >= 1.0)).verdict();
        assert_eq!(between(0.5, 1.5), "not told apart here");
        assert_eq!((between(1.0, 1.5).as_str(), between(0.5, 0.9).as_str()), ("shows here", "does not show here"));
        let rising = |second| verdicts(&[claim(rises(&[wide(1.0, 2.0), second].concat()))]);
        assert_eq!([rising(wide(1.5, 3.0)), rising(wide(2.5, 3.0)), rising(wide(0.1, 0.5))], ["=", "+", "-"]);
        let text = table(&[claim(rises(&cases(&[1.0, 2.0])))]);
        assert!(text.contains("| s | p | h | shows here |"), "{text}");
    }

    #[test]
    fn three_digits_are_shown() {
        assert_eq!(listed(&[0.1234, 1.234, 12.34, 123.4], "x"), "0.123x, 1.23x, 12.3x, 123x");
        let cases = vec![("1 rank".into(), 2.0.into()), ("2 ranks".into(), Span { value: 3.0, low: 2.5, high: 4.0 })];
        assert_eq!(by_case(&cases, "x"), "1 rank: 2.00x, 2 ranks: 3.00x (2.50 to 4.00)");
        assert_eq!(by_case(&Vec::new(), "x"), "-");
    }
}
