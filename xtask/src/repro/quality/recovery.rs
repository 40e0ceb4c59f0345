//! Recovery: how much of the quality that a cut has cost a model is won back by training, against tokens.

use super::found::{Found, Records};
use super::mean::Mean;
use super::record::Record;
use crate::plot::Curve;
use anyhow::Result;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Shares that people quote.
const QUOTED: [f64; 2] = [0.80, 0.96];

/// A cut that has cost less, in bits per byte, has lost nothing that a share could be taken of: validations of one model
/// agree in five digits.
const LEAST_COST: f64 = 1e-3;

/// A run whose model was cut before its first step.
struct Recovery {
    run: String,
    /// Bits per byte at 0 tokens above those of the whole model.
    cost: Mean,
    /// The same after the last step.
    left: Mean,
    /// Shares of the cost won back, by tokens; none for a model that lost nothing.
    won_back: BTreeMap<u64, Mean>,
}

impl Recovery {
    /// Of the records of a run and those of the whole model that was trained in the same way; `None` without a seed that both
    /// have.
    fn of(run: &str, own: &Records, whole: &Records) -> Option<Self> {
        let (mut costs, mut left) = (Vec::new(), Vec::new());
        let mut shares: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
        for (seed, record) in own {
            let Some(whole) = whole.get(seed) else { continue };
            let behind = behind(record, whole);
            let (Some((0, cost)), Some((_, last))) = (behind.first().copied(), behind.last()) else { continue };
            costs.push(cost);
            left.push(*last);
            for (tokens, behind) in behind.into_iter().filter(|_| cost >= LEAST_COST) {
                shares.entry(tokens).or_default().push(1.0 - behind / cost);
            }
        }
        let won_back = shares.into_iter().filter_map(|(tokens, shares)| Some((tokens, Mean::of(&shares)?))).collect();
        Some(Self { run: run.to_owned(), cost: Mean::of(&costs)?, left: Mean::of(&left)?, won_back })
    }

    /// The first tokens at which a share is won back, in words.
    fn reaches(&self, share: f64) -> String {
        let first = self.won_back.iter().find(|(_, won)| won.mean >= share);
        match first {
            _ if self.won_back.is_empty() => "-".into(),
            Some((tokens, _)) => format!("{:.2}", *tokens as f64 / 1e6),
            None => "not reached".into(),
        }
    }

    fn curve(&self) -> Curve {
        let points = self.won_back.iter().map(|(tokens, won)| (*tokens as f64 / 1e6, 100.0 * won.mean)).collect();
        Curve { name: self.run.clone(), points }
    }
}

/// How far a run is behind another, by tokens, where both were validated.
fn behind(own: &Record, whole: &Record) -> Vec<(u64, f64)> {
    let whole: BTreeMap<u64, f64> = whole.curve.iter().copied().collect();
    own.curve.iter().filter_map(|(tokens, bits)| Some((*tokens, bits - whole.get(tokens)?))).collect()
}

/// The share of what its cut has cost that a run has won back after its last step.
pub(super) fn won_back_at_the_end(found: &Found<'_>, run: &str) -> Result<Option<Mean>> {
    let Some(of) = &found.experiment.recovery_of else { return Ok(None) };
    let recovery = Recovery::of(run, &found.of(run)?, &found.of(of)?);
    Ok(recovery.and_then(|recovery| recovery.won_back.last_key_value().map(|(_, won)| *won)))
}

/// Adds the tables to `text`; returns the curves, in percent.
pub(super) fn section(text: &mut String, found: &Found<'_>, of: &str) -> Result<Vec<Curve>> {
    let whole = found.of(of)?;
    let recoveries: Vec<Recovery> =
        found.by_run.iter().filter_map(|(run, own)| Recovery::of(run, own, &whole)).collect();
    let _ = write!(
        text,
        "\nWon back at t tokens: the share 1 - D(t) / D(0) of what the cut has cost, D being how many bits per byte a run is behind {of} \
         at the same tokens of the same training; tokens are those of the first validation at which the mean over seeds reaches a share.\n"
    );
    if recoveries.is_empty() {
        *text += "\nNo seed has ended yet of a cut model and of the whole one.\n";
        return Ok(Vec::new());
    }
    *text += "\n| run | cost of the cut, bits per byte | left at the end | seeds |";
    QUOTED.iter().for_each(|share| *text += &format!(" {:.0}% won back at, M tokens |", 100.0 * share));
    *text += "\n|---|---|---|---|---|---|\n";
    for recovery in &recoveries {
        let Recovery { run, cost, left, .. } = recovery;
        let _ = write!(text, "| {run} | {} | {} | {} |", signed(cost), signed(left), cost.count);
        QUOTED.iter().for_each(|&share| *text += &format!(" {} |", recovery.reaches(share)));
        *text += "\n";
    }
    let with_shares: Vec<&Recovery> = recoveries.iter().filter(|recovery| !recovery.won_back.is_empty()).collect();
    let all_tokens: std::collections::BTreeSet<u64> =
        with_shares.iter().flat_map(|recovery| recovery.won_back.keys().copied()).collect();
    if !with_shares.is_empty() {
        *text += "\n| won back, %: tokens, M |";
        with_shares.iter().for_each(|recovery| *text += &format!(" {} |", recovery.run));
        let _ = write!(text, "\n|---|{}\n", "---|".repeat(with_shares.len()));
    }
    for tokens in all_tokens {
        let _ = write!(text, "| {:.2} |", tokens as f64 / 1e6);
        with_shares.iter().for_each(|recovery| *text += &percent(recovery.won_back.get(&tokens)));
        *text += "\n";
    }
    Ok(with_shares.into_iter().map(Recovery::curve).collect())
}

fn signed(of: &Mean) -> String {
    format!("{:+.4}{}", of.mean, of.margin.map_or(String::new(), |margin| format!(" ± {margin:.4}")))
}

fn percent(of: Option<&Mean>) -> String {
    let margin = |of: &Mean| of.margin.map_or(String::new(), |margin| format!(" ± {:.1}", 100.0 * margin));
    of.map_or(" |".into(), |of| format!(" {:.1}{} |", 100.0 * of.mean, margin(of)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repro::quality::record::tests::record;

    fn records(curves: &[&[(u64, f64)]]) -> Records {
        (1..).zip(curves.iter().map(|curve| record(curve))).collect()
    }

    #[test]
    fn shares_are_of_what_each_seed_has_lost() {
        const M: u64 = 1_000_000;
        let whole = records(&[&[(0, 2.0), (M, 1.9), (2 * M, 1.8)], &[(0, 3.0), (M, 3.0), (2 * M, 3.0)]]);
        let own = records(&[&[(0, 2.4), (M, 2.0), (2 * M, 1.8)], &[(0, 3.2), (M, 3.1), (2 * M, 3.02)]]);
        let of = Recovery::of("r", &own, &whole).unwrap();
        assert!((of.cost.mean - 0.3).abs() < 1e-12 && (of.left.mean - 0.01).abs() < 1e-12);
        let means: Vec<(u64, f64)> = of.won_back.iter().map(|(tokens, won)| (*tokens, won.mean)).collect();
        let want = [(0, 0.0), (M, (0.75 + 0.5) / 2.0), (2 * M, (1.0 + 0.9) / 2.0)];
        for ((tokens, got), (want_tokens, want)) in means.iter().zip(want) {
            assert!(*tokens == want_tokens && (got - want).abs() < 1e-9, "{tokens}: {got} {want}");
        }
        assert_eq!([of.reaches(0.6), of.reaches(0.8), of.reaches(0.96)], ["1.00", "2.00", "not reached"]);
    }

    #[test]
    fn what_lost_nothing_wins_nothing_back() {
        let whole = records(&[&[(0, 2.0), (10, 1.9)]]);
        let of = Recovery::of("whole", &whole, &whole).unwrap();
        assert_eq!((of.cost.mean, of.left.mean, of.reaches(0.8).as_str()), (0.0, 0.0, "-"));
        assert!(of.won_back.is_empty());
    }

    #[test]
    fn a_run_without_a_loss_at_0_tokens_or_its_whole_model_has_none() {
        let whole = records(&[&[(0, 2.0), (10, 2.0)]]);
        assert!(Recovery::of("r", &records(&[&[(10, 2.1)]]), &whole).is_none());
        assert!(Recovery::of("r", &records(&[&[(0, 2.1)]]), &Records::new()).is_none());
    }
}
