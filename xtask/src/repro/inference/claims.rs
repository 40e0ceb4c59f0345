//! [`Claim`]: what the paper says beside what was measured. Whether it shows is computed of the figures, and written as that.

use std::fmt::Write as _;

/// What something came to in each case, such as a number of ranks.
pub(super) type Cases = Vec<(String, f64)>;

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
    pub(super) shows: Vec<(String, bool)>,
}

impl Claim {
    pub(super) fn verdict(&self) -> String {
        let labels = |shows: bool| {
            let of = self.shows.iter().filter(|case| case.1 == shows).map(|case| case.0.as_str());
            of.collect::<Vec<_>>().join(", ")
        };
        match (labels(true), labels(false)) {
            (yes, no) if yes.is_empty() && no.is_empty() => "not measured".into(),
            (_, no) if no.is_empty() => "shows here".into(),
            (yes, _) if yes.is_empty() => "does not show here".into(),
            (yes, no) => format!("shows: {yes}; does not show: {no}"),
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
    shown.join(", ")
}

/// The same with their cases.
pub(super) fn by_case(cases: &Cases, unit: &str) -> String {
    let shown: Vec<String> = cases.iter().map(|(case, value)| format!("{case}: {}{unit}", digits(*value))).collect();
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

/// In which cases something holds.
pub(super) fn where_holds(cases: &Cases, holds: impl Fn(f64) -> bool) -> Vec<(String, bool)> {
    cases.iter().map(|(case, value)| (case.clone(), holds(*value))).collect()
}

/// Whether values never fall from one case to the next, and grow in all: one case, or none of fewer than two values.
pub(super) fn rises(cases: &Cases) -> Vec<(String, bool)> {
    let values: Vec<f64> = cases.iter().map(|case| case.1).collect();
    match values.as_slice() {
        [first, .., last] => {
            let rises = last > first && values.windows(2).all(|pair| pair[1] >= pair[0]);
            vec![("from the first to the last".into(), rises)]
        }
        _ => Vec::new(),
    }
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
            _ => '~',
        };
        claims.iter().map(sign).collect()
    }

    #[test]
    fn verdicts_follow_from_figures() {
        let cases = |values: &[f64]| -> Cases {
            values.iter().enumerate().map(|(index, value)| (ranks_named(index + 1), *value)).collect()
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
        let text = table(&[claim(rises(&cases(&[1.0, 2.0])))]);
        assert!(text.contains("| s | p | h | shows here |"), "{text}");
    }

    #[test]
    fn three_digits_are_shown() {
        assert_eq!(listed(&[0.1234, 1.234, 12.34, 123.4], "x"), "0.123x, 1.23x, 12.3x, 123x");
        assert_eq!(
            by_case(&vec![("1 rank".into(), 2.0), ("2 ranks".into(), 3.0)], "x"),
            "1 rank: 2.00x, 2 ranks: 3.00x"
        );
        assert_eq!(by_case(&Vec::new(), "x"), "-");
    }
}
