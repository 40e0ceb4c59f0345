//! Reach: the tokens it takes one kind of model to come to the loss of another, from runs of several budgets, each trained to
//! its own end; and what that saves.

use super::experiment::Reach;
use super::found::{Found, Records};
use super::mean::Mean;
use super::record::Record;
use crate::plot::Curve;
use anyhow::Result;
use std::fmt::Write as _;

/// What a run costs.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    tokens: f64,
    minutes: f64,
    /// Forwards: a training step takes three times as much.
    flops: f64,
}

impl Cost {
    const NAMES: [&str; 3] = ["tokens", "compute", "minutes"];

    fn of(record: &Record) -> Self {
        let tokens = record.tokens() as f64;
        Self { tokens, minutes: record.minutes, flops: tokens * record.flops_per_token as f64 }
    }

    /// This one over another, in the order of the names.
    fn over(&self, other: &Self) -> [f64; 3] {
        [self.tokens / other.tokens, self.flops / other.flops, self.minutes / other.minutes]
    }
}

/// Where a loss is come to.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Reached {
    At(Cost),
    /// By the smallest budget, whose cost this is.
    Before(Cost),
    /// Not by the largest.
    After(Cost),
}

/// Where `goal` is come to by runs of growing budgets: bits per byte are taken as linear in the logarithm of tokens between
/// two of them, minutes and compute as linear in tokens. `None` without runs.
fn reached(goal: f64, budgets: &[(Cost, f64)]) -> Option<Reached> {
    let ((first, _), (last, _)) = (budgets.first()?, budgets.last()?);
    let at = match budgets.iter().position(|&(_, bits)| bits <= goal) {
        None => return Some(Reached::After(*last)),
        Some(0) => return Some(Reached::Before(*first)),
        Some(at) => at,
    };
    let ((low, above), (high, below)) = (budgets[at - 1], budgets[at]);
    let tokens = low.tokens * (high.tokens / low.tokens).powf((above - goal) / (above - below));
    let share = if high.tokens > low.tokens { (tokens - low.tokens) / (high.tokens - low.tokens) } else { 1.0 };
    let between = |low: f64, high: f64| low + share * (high - low);
    let (minutes, flops) = (between(low.minutes, high.minutes), between(low.flops, high.flops));
    Some(Reached::At(Cost { tokens, minutes, flops }))
}

/// What one seed saves: the goal's cost over the cost of coming to it, `[tokens, compute, minutes]`.
struct Saved {
    goal: Cost,
    reached: Reached,
}

impl Saved {
    /// Known to the number only if the goal lies between two budgets.
    fn ratios(&self) -> Option<[f64; 3]> {
        match self.reached {
            Reached::At(cost) => Some(self.goal.over(&cost)),
            Reached::Before(_) | Reached::After(_) => None,
        }
    }

    /// The ratio of a kind in words.
    fn ratio(&self, kind: usize) -> String {
        match self.reached {
            Reached::At(cost) => format!("{:.2}", self.goal.over(&cost)[kind]),
            Reached::Before(cost) => format!("more than {:.2}", self.goal.over(&cost)[kind]),
            Reached::After(cost) => format!("less than {:.2}", self.goal.over(&cost)[kind]),
        }
    }

    fn tokens(&self) -> String {
        match self.reached {
            Reached::At(cost) => format!("{:.2}", cost.tokens / 1e6),
            Reached::Before(cost) => format!("less than {:.2}", cost.tokens / 1e6),
            Reached::After(cost) => format!("more than {:.2}", cost.tokens / 1e6),
        }
    }
}

/// The records of the runs of one comparison.
struct Budgets {
    goal: Records,
    by: Vec<Records>,
}

impl Budgets {
    fn read(found: &Found<'_>, reach: &Reach) -> Result<Self> {
        let by = reach.by.iter().map(|run| found.of(run)).collect::<Result<_>>()?;
        Ok(Self { goal: found.of(&reach.goal)?, by })
    }

    /// Of the seeds that have all runs.
    fn saved(&self) -> Vec<Saved> {
        let of = |(seed, goal): (&u64, &Record)| {
            let records = self.by.iter().map(|run| run.get(seed)).collect::<Option<Vec<_>>>()?;
            let mut budgets: Vec<(Cost, f64)> = records.iter().map(|r| (Cost::of(r), r.last())).collect();
            budgets.sort_by(|a, b| a.0.tokens.total_cmp(&b.0.tokens));
            Some(Saved { goal: Cost::of(goal), reached: reached(goal.last(), &budgets)? })
        };
        self.goal.iter().filter_map(of).collect()
    }

    /// Bits per byte above the goal's by budget, mean over the seeds that both have.
    fn curve(&self, name: &str) -> Curve {
        let point = |run: &Records| {
            let tokens = run.values().next()?.tokens() as f64 / 1e6;
            let pairs: Vec<(f64, f64)> =
                run.iter().filter_map(|(seed, r)| Some((r.last(), self.goal.get(seed)?.last()))).collect();
            Some((tokens, Mean::of_differences(&pairs)?.mean))
        };
        let mut points: Vec<(f64, f64)> = self.by.iter().filter_map(point).collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Curve { name: name.to_owned(), points }
    }
}

/// What a seed saves of compute: a number, or what it is more or less than.
pub(super) struct ComputeSaved {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) words: String,
}

/// What each seed saves in the comparison of this title.
pub(super) fn compute_saved(found: &Found<'_>, title: &str) -> Result<Vec<ComputeSaved>> {
    const COMPUTE: usize = 1;
    let Some(reach) = found.experiment.reach.iter().find(|reach| reach.title == title) else { return Ok(Vec::new()) };
    let of = |saved: Saved| {
        let ratio = |cost: &Cost| saved.goal.over(cost)[COMPUTE];
        let (low, high) = match &saved.reached {
            Reached::At(cost) => (ratio(cost), ratio(cost)),
            Reached::Before(cost) => (ratio(cost), f64::INFINITY),
            Reached::After(cost) => (0.0, ratio(cost)),
        };
        ComputeSaved { low, high, words: saved.ratio(COMPUTE) }
    };
    Ok(Budgets::read(found, reach)?.saved().into_iter().map(of).collect())
}

/// Adds the table to `text`; returns how far each budget is from its goal, as curves.
pub(super) fn section(text: &mut String, found: &Found<'_>) -> Result<Vec<Curve>> {
    let experiment = found.experiment;
    *text += "\nSaved: what the goal has taken over what comes to its loss, which is interpolated between two budgets (bits per byte \
              linear in the logarithm of tokens). Means are of seeds that all come to it between the budgets.\n";
    *text += "\n| | M tokens that come to the goal, by seed |";
    Cost::NAMES.iter().for_each(|name| *text += &format!(" {name} saved, by seed | mean |"));
    *text += " the paper |\n|---|---|---|---|---|---|---|---|---|\n";
    let mut curves = Vec::new();
    for reach in &experiment.reach {
        let budgets = Budgets::read(found, reach)?;
        let saved = budgets.saved();
        let list = |of: &dyn Fn(&Saved) -> String| match saved.is_empty() {
            true => "-".into(),
            false => saved.iter().map(of).collect::<Vec<_>>().join(", "),
        };
        let _ = write!(text, "| {} | {} |", reach.title, list(&Saved::tokens));
        let ratios: Option<Vec<[f64; 3]>> = saved.iter().map(Saved::ratios).collect();
        for kind in 0..Cost::NAMES.len() {
            let values = ratios.iter().flatten().map(|ratios| ratios[kind]).collect::<Vec<_>>();
            let mean = Mean::of(&values).map_or("-".into(), |of| {
                let margin = of.margin.map_or(String::new(), |margin| format!(" ± {margin:.2}"));
                format!("{:.2}{margin}", of.mean)
            });
            let _ = write!(text, " {} | {mean} |", list(&|seed: &Saved| seed.ratio(kind)));
        }
        let _ = writeln!(text, " {} |", reach.published);
        curves.push(budgets.curve(&reach.title));
    }
    Ok(curves.into_iter().filter(|curve| !curve.points.is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repro::quality::record::tests::record;

    fn cost(tokens: f64) -> Cost {
        Cost { tokens, minutes: 10.0 * tokens, flops: 3.0 * tokens }
    }

    #[test]
    fn a_loss_is_come_to_between_two_budgets() {
        let budgets = [(cost(1.0), 3.0), (cost(4.0), 2.0), (cost(8.0), 1.8)];
        // Half way down is half way in the logarithm: 2 of 1 to 4.
        let Some(Reached::At(half)) = reached(2.5, &budgets) else { panic!("not between") };
        assert!((half.tokens - 2.0).abs() < 1e-12, "{half:?}");
        // In tokens that is a third of the way.
        assert!((half.minutes - 20.0).abs() < 1e-9 && (half.flops - 6.0).abs() < 1e-9, "{half:?}");
        assert_eq!(reached(2.0, &budgets), Some(Reached::At(cost(4.0))));
        assert_eq!(reached(3.0, &budgets), Some(Reached::Before(cost(1.0))));
        assert_eq!(reached(1.7, &budgets), Some(Reached::After(cost(8.0))));
        assert_eq!(reached(1.7, &[]), None);
    }

    /// As in a run that only shows that all is well.
    #[test]
    fn budgets_of_one_size_are_no_trouble() {
        let budgets = [(cost(2.0), 3.0), (cost(2.0), 1.0)];
        assert_eq!(reached(2.0, &budgets), Some(Reached::At(cost(2.0))));
    }

    #[test]
    fn seeds_are_compared_with_themselves() {
        let run = |curves: &[(u64, &[(u64, f64)])]| -> Records {
            curves.iter().map(|(seed, curve)| (*seed, record(curve))).collect()
        };
        let goal = run(&[(1, &[(8, 2.5)]), (2, &[(8, 1.0)]), (3, &[(8, 9.0)]), (4, &[(8, 2.5)])]);
        let one = run(&[(1, &[(1, 3.0)]), (2, &[(1, 3.0)]), (3, &[(1, 3.0)])]);
        let four = run(&[(1, &[(2, 4.0), (4, 2.0)]), (2, &[(4, 2.0)]), (3, &[(4, 2.0)]), (4, &[(4, 2.0)])]);
        let budgets = Budgets { goal, by: vec![four, one] };
        let saved = budgets.saved();
        assert_eq!(saved.len(), 3, "seed 4 has no run of the smaller budget");
        let words: Vec<String> = saved.iter().map(|seed| seed.ratio(0)).collect();
        assert_eq!(words, ["4.00", "less than 2.00", "more than 8.00"]);
        assert_eq!(saved[0].ratios().map(|ratios| ratios[0].round()), Some(4.0));
        assert_eq!(saved[1].ratios(), None);
        let points = budgets.curve("c").points;
        assert_eq!(points.iter().map(|point| point.0).collect::<Vec<_>>(), [1e-6, 4e-6]);
        assert!((points[1].1 - (2.0 * 4.0 - 2.5 - 1.0 - 9.0 - 2.5) / 4.0).abs() < 1e-12);
    }
}
