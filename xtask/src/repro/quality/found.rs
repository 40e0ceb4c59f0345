//! [`Found`]: the records that there are of an experiment.

use super::experiment::{Experiment, Run};
use super::mean::Mean;
use super::record::Record;
use crate::plot::Curve;
use anyhow::{Result, bail};
use std::collections::BTreeMap;
use std::path::Path;

/// The records of a run by seed.
pub(super) type Records = BTreeMap<u64, Record>;

/// The records of an experiment, by run in its order.
pub(super) struct Found<'a> {
    pub(super) experiment: &'a Experiment,
    pub(super) by_run: Vec<(&'a str, Records)>,
    folder: &'a Path,
}

impl<'a> Found<'a> {
    pub(super) fn read(experiment: &'a Experiment, folder: &'a Path) -> Result<Self> {
        let read = |run: &'a Run| Ok((run.name.as_str(), read_run(folder, &experiment.id, &run.name)?));
        Ok(Self { experiment, by_run: experiment.run.iter().map(read).collect::<Result<_>>()?, folder })
    }

    /// Whether no run has ended.
    pub(super) fn is_empty(&self) -> bool {
        self.by_run.iter().all(|(_, own)| own.is_empty())
    }

    /// The records of a run of this experiment or of another.
    pub(super) fn of(&self, name: &str) -> Result<Records> {
        let place = self.experiment.place_of(name);
        place.map_or_else(|| Ok(Records::new()), |(experiment, run)| read_run(self.folder, &experiment, &run))
    }

    /// What the runs were trained on.
    ///
    /// # Errors
    /// If it is not the same for all.
    pub(super) fn text(&self) -> Result<String> {
        let mut texts = self.by_run.iter().flat_map(|(_, own)| own.values()).map(|record| &record.data);
        let Some(first) = texts.next() else { return Ok("nothing".into()) };
        match texts.find(|other| *other != first) {
            None => Ok(shown(first)),
            Some(other) => bail!("{} has runs on {} and on {}", self.experiment.id, shown(first), shown(other)),
        }
    }

    /// The first run minus the second, by seeds that both have.
    ///
    /// # Errors
    /// If they were trained on different texts.
    pub(super) fn difference(&self, first: &str, second: &str) -> Result<Option<Mean>> {
        let (own, other) = (self.of(first)?, self.of(second)?);
        let both: Vec<(&Record, &Record)> = own.iter().filter_map(|(seed, a)| Some((a, other.get(seed)?))).collect();
        if let Some((a, b)) = both.iter().find(|(a, b)| a.data != b.data) {
            bail!(
                "{first} was trained on {}, {second} on {}: their difference says nothing",
                shown(&a.data),
                shown(&b.data)
            );
        }
        Ok(Mean::of_differences(&both.iter().map(|(a, b)| (a.last(), b.last())).collect::<Vec<_>>()))
    }

    /// Means over the seeds that have got so far.
    pub(super) fn curves(&self) -> Vec<Curve> {
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

/// What records say of their text, in words.
pub(super) fn shown(text: &[String]) -> String {
    if text.is_empty() { "the excerpt in the repository".into() } else { text.join("; ") }
}

/// The records of an experiment that there are.
pub(super) fn read_all(folder: &Path, experiment: &str) -> Result<Vec<Record>> {
    let Ok(files) = std::fs::read_dir(folder.join(experiment)) else { return Ok(Vec::new()) };
    let paths = files.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
    paths.map(|path| Record::read(&path)).collect()
}

/// The records of a run that there are, of any seed.
fn read_run(folder: &Path, experiment: &str, run: &str) -> Result<Records> {
    let records = read_all(folder, experiment)?.into_iter().filter(|record| record.run == run);
    Ok(records.map(|record| (record.seed, record)).collect())
}
