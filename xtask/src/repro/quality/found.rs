//! [`Found`]: the records that there are of an experiment.

use super::experiment::{Experiment, Run};
use super::mean::Mean;
use super::record::Record;
use crate::plot::Curve;
use anyhow::Result;
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
        let read = |run: &'a Run| Ok((run.name.as_str(), read_all(folder, &experiment.id, &run.name)?));
        Ok(Self { experiment, by_run: experiment.run.iter().map(read).collect::<Result<_>>()?, folder })
    }

    /// Whether no run has ended.
    pub(super) fn is_empty(&self) -> bool {
        self.by_run.iter().all(|(_, own)| own.is_empty())
    }

    /// The records of a run of this experiment or of another.
    pub(super) fn of(&self, name: &str) -> Result<Records> {
        let place = self.experiment.place_of(name);
        place.map_or_else(|| Ok(Records::new()), |(experiment, run)| read_all(self.folder, &experiment, &run))
    }

    /// The first run minus the second, by seeds that both have.
    pub(super) fn difference(&self, first: &str, second: &str) -> Result<Option<Mean>> {
        let other = self.of(second)?;
        let pairs: Vec<(f64, f64)> =
            self.of(first)?.iter().filter_map(|(seed, a)| Some((a.last(), other.get(seed)?.last()))).collect();
        Ok(Mean::of_differences(&pairs))
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

/// The records of a run that there are, of any seed.
fn read_all(folder: &Path, experiment: &str, run: &str) -> Result<Records> {
    let Ok(files) = std::fs::read_dir(folder.join(experiment)) else { return Ok(Records::new()) };
    let paths = files.flatten().map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "json"));
    let records = paths.map(|path| Record::read(&path)).collect::<Result<Vec<_>>>()?;
    Ok(records.into_iter().filter(|record| record.run == run).map(|record| (record.seed, record)).collect())
}
