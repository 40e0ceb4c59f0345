//! [`Claim`]: a sentence of the paper, and whether the records show it.

use super::experiment::Experiment;
use super::found::Found;
use super::mean::Mean;
use super::reach::{self, ComputeSaved};
use super::recovery;
use anyhow::{Result, ensure};
use serde::Deserialize;
use std::fmt::Write as _;

/// Something that is said, and what would show it.
#[derive(Debug, Deserialize)]
pub(super) struct Claim {
    says: String,
    /// The figures that it was said with.
    published: String,
    #[serde(flatten)]
    shown_by: ShownBy,
}

/// What would show a claim.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ShownBy {
    /// The first run has fewer bits per byte than the second.
    Lower([String; 2]),
    /// The first has no more than `within` bits per byte more.
    NoHigher { runs: [String; 2], within: f64 },
    /// The two are not further apart.
    Equal { runs: [String; 2], within: f64 },
    /// The comparison of this title saves so many times the compute.
    Saves { reach: String, times: f64 },
    /// The run wins back this share of what its cut has cost.
    WinsBack { run: String, share: f64 },
}

/// Whether a claim shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Shows,
    DoesNot,
    NotToldApart,
    NotMeasured,
    /// Seeds that show it, of all; too few for an interval.
    OfSeeds(usize, usize),
}

impl Verdict {
    /// Of a value that is known to lie between `low` and `high`, and would have to be at least `least`.
    fn at_least(least: f64, low: f64, high: f64) -> Self {
        match (low >= least, high < least) {
            (true, _) => Self::Shows,
            (_, true) => Self::DoesNot,
            _ => Self::NotToldApart,
        }
    }

    fn words(self) -> String {
        match self {
            Self::Shows => "shows here".into(),
            Self::DoesNot => "does not show here".into(),
            Self::NotToldApart => "not told apart here".into(),
            Self::NotMeasured => "not measured yet".into(),
            Self::OfSeeds(shows, all) => format!("in {shows} of {all} seeds"),
        }
    }
}

impl ShownBy {
    fn runs(&self) -> &[String] {
        match self {
            Self::Lower(runs) | Self::NoHigher { runs, .. } | Self::Equal { runs, .. } => runs,
            Self::WinsBack { run, .. } => std::slice::from_ref(run),
            Self::Saves { .. } => &[],
        }
    }

    /// Whether a difference of two runs shows it. One seed shows nothing.
    fn judge(&self, of: &Mean) -> Verdict {
        let Some(margin) = of.margin else { return Verdict::NotToldApart };
        let (low, high) = (of.mean - margin, of.mean + margin);
        match *self {
            // An interval that touches 0 is on neither side of it.
            Self::Lower(_) if high < 0.0 => Verdict::Shows,
            Self::Lower(_) if low > 0.0 => Verdict::DoesNot,
            Self::Lower(_) => Verdict::NotToldApart,
            Self::NoHigher { within, .. } => Verdict::at_least(-within, -high, -low),
            Self::Equal { within, .. } if low >= -within && high <= within => Verdict::Shows,
            Self::Equal { within, .. } if low > within || high < -within => Verdict::DoesNot,
            _ => Verdict::NotToldApart,
        }
    }

    /// What was measured, in words, and whether it shows the claim.
    fn of(&self, found: &Found<'_>) -> Result<(String, Verdict)> {
        let nothing = || ("-".to_owned(), Verdict::NotMeasured);
        Ok(match self {
            Self::Lower([first, second])
            | Self::NoHigher { runs: [first, second], .. }
            | Self::Equal { runs: [first, second], .. } => {
                let of = found.difference(first, second)?;
                of.map_or_else(nothing, |of| {
                    (format!("{first} minus {second}: {}", interval(&of, 1.0, 4)), self.judge(&of))
                })
            }
            Self::Saves { reach, times } => {
                let saved = reach::compute_saved(found, reach)?;
                let words: Vec<&str> = saved.iter().map(|saved| saved.words.as_str()).collect();
                let shows = |saved: &&ComputeSaved| Verdict::at_least(*times, saved.low, saved.high) == Verdict::Shows;
                match saved.iter().filter(shows).count() {
                    _ if saved.is_empty() => nothing(),
                    count => (format!("compute, by seed: {}", words.join(", ")), Verdict::OfSeeds(count, saved.len())),
                }
            }
            Self::WinsBack { run, share } => match recovery::won_back_at_the_end(found, run)? {
                Some(of) => {
                    let margin = of.margin.unwrap_or(f64::INFINITY);
                    let verdict = Verdict::at_least(*share, of.mean - margin, of.mean + margin);
                    (format!("{run}: {} %", interval(&of, 100.0, 1)), verdict)
                }
                None => nothing(),
            },
        })
    }
}

fn interval(of: &Mean, unit: f64, digits: usize) -> String {
    let number = |value: f64| format!("{:+.digits$}", unit * value);
    let around = |margin: f64| format!(" ({} to {})", number(of.mean - margin), number(of.mean + margin));
    format!("{}{}", number(of.mean), of.margin.map_or(" (one seed)".into(), around))
}

impl Claim {
    /// The runs that it names.
    pub(super) fn runs(&self) -> &[String] {
        self.shown_by.runs()
    }

    /// Refuses one that nothing of the experiment could show.
    pub(super) fn check(&self, experiment: &Experiment) -> Result<()> {
        let fits = match &self.shown_by {
            ShownBy::Saves { reach, .. } => experiment.reach.iter().any(|own| own.title == *reach),
            ShownBy::WinsBack { .. } => experiment.recovery_of.is_some(),
            _ => true,
        };
        ensure!(fits, "nothing here could show the claim {:?}", self.says);
        Ok(())
    }
}

/// Adds the claims of all experiments, and whether they show, to `text`.
pub(super) fn section(text: &mut String, experiments: &[Found<'_>]) -> Result<()> {
    let count: usize = experiments.iter().map(|found| found.experiment.claim.len()).sum();
    let _ = write!(
        text,
        "\n## What is claimed, and what shows here\n\nA claim shows, or does not, where the whole 95% interval says so; with one seed \
         nothing does. Of compute the seeds are counted. Each interval is of its own claim: of {count} at 95%, one or another may be beside \
         the truth. How many seeds were run was decided in part when differences had been seen: three first, five where they came out \
         below 0.01.\n\n| claim | the paper | here | |\n|---|---|---|---|\n"
    );
    for found in experiments {
        for claim in &found.experiment.claim {
            let (here, verdict) = claim.shown_by.of(found)?;
            let _ = writeln!(text, "| {} | {} | {here} | {} |", claim.says, claim.published, verdict.words());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(by: &str, mean: f64, margin: f64) -> Verdict {
        let by: ShownBy = toml::from_str(by).unwrap();
        by.judge(&Mean { mean, margin: Some(margin), count: 3 })
    }

    #[test]
    fn the_whole_interval_decides() {
        let lower = r#"lower = ["a", "b"]"#;
        assert_eq!(judged(lower, -0.02, 0.01), Verdict::Shows);
        assert_eq!(judged(lower, 0.02, 0.01), Verdict::DoesNot);
        assert_eq!(judged(lower, -0.02, 0.02), Verdict::NotToldApart);
        let no_higher = r#"no-higher = { runs = ["a", "b"], within = 0.01 }"#;
        assert_eq!(judged(no_higher, -0.5, 0.1), Verdict::Shows);
        assert_eq!(judged(no_higher, 0.005, 0.005), Verdict::Shows);
        assert_eq!(judged(no_higher, 0.005, 0.006), Verdict::NotToldApart);
        assert_eq!(judged(no_higher, 0.05, 0.01), Verdict::DoesNot);
        let equal = r#"equal = { runs = ["a", "b"], within = 0.01 }"#;
        assert_eq!(judged(equal, -0.005, 0.004), Verdict::Shows);
        assert_eq!(judged(equal, -0.005, 0.006), Verdict::NotToldApart);
        assert_eq!(judged(equal, -0.05, 0.006), Verdict::DoesNot);
        let one: ShownBy = toml::from_str(lower).unwrap();
        assert_eq!(one.judge(&Mean { mean: -1.0, margin: None, count: 1 }), Verdict::NotToldApart);
    }

    #[test]
    fn shares_and_ratios_are_judged_by_their_ends() {
        assert_eq!(Verdict::at_least(5.0, 5.0, 6.0), Verdict::Shows);
        assert_eq!(Verdict::at_least(5.0, 0.0, 4.9), Verdict::DoesNot);
        assert_eq!(Verdict::at_least(5.0, 4.0, f64::INFINITY), Verdict::NotToldApart);
    }
}
