//! The report: tables, paired differences and curves from records, nothing else.

use super::experiment::{Experiment, Job, Run};
use super::pairs::{Difference, difference};
use super::record::Record;
use super::runner::Place;
use crate::plot::{Curve, draw};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

/// The runs that are missing, and how long they would take.
pub(super) fn plan(jobs: &[Job], place: &Place) -> String {
    let mut by_experiment: BTreeMap<&str, (usize, usize, f64)> = BTreeMap::new();
    for job in jobs {
        let (all, missing, minutes) = by_experiment.entry(&job.experiment).or_default();
        *all += 1;
        if !place.is_done(job) {
            *missing += 1;
            *minutes += job.minutes;
        }
    }
    let mut text = format!("{:<16}{:>6}{:>10}{:>18}\n", "experiment", "runs", "missing", "thread-minutes");
    let mut total = 0.0;
    for (id, (all, missing, minutes)) in by_experiment {
        let _ = writeln!(text, "{id:<16}{all:>6}{missing:>10}{minutes:>18.0}");
        total += minutes;
    }
    let _ = writeln!(text, "{:.1} hours on two threads", total / 120.0);
    text
}

/// The records of a run by seed.
type Records = BTreeMap<u64, Record>;

/// The records of an experiment, by run in its order.
struct Found<'a> {
    experiment: &'a Experiment,
    by_run: Vec<(&'a str, Records)>,
    folder: &'a Path,
}

impl<'a> Found<'a> {
    fn read(experiment: &'a Experiment, folder: &'a Path) -> Result<Self> {
        let read = |run: &'a Run| Ok((run.name.as_str(), read_all(folder, &experiment.id, &run.name)?));
        Ok(Self { experiment, by_run: experiment.run.iter().map(read).collect::<Result<_>>()?, folder })
    }

    /// The records of a run of this experiment or of another.
    fn of(&self, name: &str) -> Result<Records> {
        let place = self.experiment.place_of(name);
        place.map_or_else(|| Ok(Records::new()), |(experiment, run)| read_all(self.folder, &experiment, &run))
    }

    /// The first run minus the second, by seeds that both have.
    fn difference(&self, first: &str, second: &str) -> Result<Option<Difference>> {
        let other = self.of(second)?;
        let pairs: Vec<(f64, f64)> =
            self.of(first)?.iter().filter_map(|(seed, a)| Some((a.last(), other.get(seed)?.last()))).collect();
        Ok(difference(&pairs))
    }

    /// Means over the seeds that have got so far.
    fn curves(&self) -> Vec<Curve> {
        let curve = |(name, own): &(&str, Records)| {
            let first = own.values().next()?;
            let mean = |at: usize| {
                let values: Vec<f64> = own.values().filter_map(|r| Some(r.curve.get(at)?.1)).collect();
                values.iter().sum::<f64>() / values.len() as f64
            };
            let points =
                first.curve.iter().enumerate().map(|(at, (tokens, _))| (*tokens as f64 / 1e6, mean(at))).collect();
            Some(Curve { name: (*name).to_owned(), points })
        };
        self.by_run.iter().filter_map(curve).collect()
    }
}

/// The records of a run that there are, of any seed.
fn read_all(folder: &Path, experiment: &str, run: &str) -> Result<Records> {
    let Ok(files) = std::fs::read_dir(folder.join(experiment)) else { return Ok(Records::new()) };
    let paths = files.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
    let records = paths.map(|path| Record::read(&path)).collect::<Result<Vec<_>>>()?;
    Ok(records.into_iter().filter(|record| record.run == run).map(|record| (record.seed, record)).collect())
}

/// Writes `report.md` and a picture for each experiment that has records.
pub(super) fn write(experiments: &[Experiment], records: &Path) -> Result<()> {
    std::fs::create_dir_all(records).with_context(|| format!("cannot make {}", records.display()))?;
    let mut text = String::from(
        "# Quality\n\nMade by `cargo xtask repro quality` of the records in this folder. Bits per byte are of validation text after the\n\
         last step; differences are paired by seed, with their 95% interval (Student's t).\n",
    );
    for experiment in experiments {
        let found = Found::read(experiment, records)?;
        if found.by_run.iter().all(|(_, own)| own.is_empty()) {
            let _ = write!(text, "\n## {}\n\nNo run of `{}` has ended yet.\n", experiment.title, experiment.id);
            continue;
        }
        section(&mut text, &found)?;
        let picture = format!("{}.svg", experiment.id);
        draw(&found.curves(), &experiment.title, &records.join(&picture))?;
        let _ = write!(text, "\n![bits per byte against tokens]({picture})\n");
    }
    let path = records.join("report.md");
    let unfinished = records.join("report.unfinished");
    std::fs::write(&unfinished, &text)?;
    std::fs::rename(&unfinished, &path)?;
    println!("{text}\nin {}", path.display());
    Ok(())
}

fn section(text: &mut String, found: &Found<'_>) -> Result<()> {
    let experiment = found.experiment;
    let _ = write!(
        text,
        "\n## {}\n\nThe paper: {}\n\nHere: {}\n",
        experiment.title,
        experiment.published.trim(),
        experiment.differences.trim()
    );
    *text += "\n| run | bits per byte | seeds | tokens, M | parameters, M | per token, M | MFLOP a token | minutes |\n|---|---|---|---|---|---|---|---|\n";
    for (name, own) in &found.by_run {
        let Some(first) = own.values().next() else {
            let _ = writeln!(text, "| {name} | - | 0 | | | | | |");
            continue;
        };
        let count = own.len() as f64;
        let mean = |of: &dyn Fn(&Record) -> f64| own.values().map(of).sum::<f64>() / count;
        let _ = writeln!(
            text,
            "| {name} | {:.4} | {} | {:.2} | {:.3} | {:.3} | {:.3} | {:.1} |",
            mean(&|record| record.last()),
            own.len(),
            first.train_tokens as f64 / 1e6,
            first.total_parameters as f64 / 1e6,
            first.active_parameters as f64 / 1e6,
            first.flops_per_token as f64 / 1e6,
            mean(&|record| record.minutes),
        );
    }
    if experiment.pairs.is_empty() {
        return Ok(());
    }
    *text += "\n| difference | bits per byte | 95% interval | seeds | |\n|---|---|---|---|---|\n";
    for [first, second] in &experiment.pairs {
        let Some(of) = found.difference(first, second)? else {
            let _ = writeln!(text, "| {first} minus {second} | - | | 0 | |");
            continue;
        };
        let interval =
            of.margin.map_or("-".into(), |margin| format!("{:.4} to {:.4}", of.mean - margin, of.mean + margin));
        let verdict = match (of.is_clear(), of.mean < 0.0) {
            (false, _) => "not told apart",
            (true, true) => "lower",
            (true, false) => "higher",
        };
        let _ = writeln!(text, "| {first} minus {second} | {:+.4} | {interval} | {} | {verdict} |", of.mean, of.pairs);
    }
    Ok(())
}
