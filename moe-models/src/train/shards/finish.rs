//! [`finish`]: from the files of all ranks to a checkpoint.

use super::super::checkpoint::FileCheck;
use super::index::{Index, Kind, Save, Tensors};
use super::report::PartReport;
use crate::hf::{RANKS_INDEX, WEIGHTS_FILE, WEIGHTS_INDEX, WeightForm, write_weight_index};
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Ends what [`super::write_part`] has written on every rank: makes sure that it is the model `tensors`, each element once, and in
/// the folder `dir`; then writes the index, and that of Hugging Face where weights are whole and in several files. The checks of
/// all files, for [`super::super::checkpoint::CheckpointStore::commit`].
///
/// # Errors
/// [`Error::Argument`] unless there is one report of each rank; [`Error::OtherRank`] for one of another save; [`Error::Format`] if
/// the parts do not make up the model, naming what is missing or doubled, or a file is not what its rank wrote; [`Error::Io`].
pub fn finish(dir: &Path, save: Save, reports: &[PartReport], tensors: Tensors) -> Result<Vec<FileCheck>> {
    check_reports(save, reports)?;
    let parts = reports.iter().any(|report| report.weights == WeightForm::Parts);
    let form = if parts { WeightForm::Parts } else { WeightForm::Whole };
    let mut index = Index::new(save, form, tensors);
    for report in reports {
        index.files.extend_from_slice(&report.files);
        index.entries.extend_from_slice(&report.entries);
    }
    index.check(&dir.join(RANKS_INDEX))?;
    reports.iter().try_for_each(|report| check_files(dir, report))?;
    let mut checks = index.files.clone();
    if form == WeightForm::Whole && write_published_index(dir, &index)? {
        checks.push(FileCheck::of(&dir.join(WEIGHTS_INDEX))?);
    }
    index.write(dir)?;
    checks.push(FileCheck::of(&dir.join(RANKS_INDEX))?);
    Ok(checks)
}

fn check_reports(save: Save, reports: &[PartReport]) -> Result<()> {
    let ranks: BTreeSet<usize> = reports.iter().map(|report| report.rank).collect();
    let alike = reports.iter().all(|report| report.ranks == reports.len());
    if !alike || ranks.len() != reports.len() || ranks.iter().any(|&rank| rank >= reports.len()) {
        let told: Vec<String> = reports.iter().map(|r| format!("{} of {}", r.rank, r.ranks)).collect();
        return Err(Error::Argument(format!(
            "a checkpoint is made of one report of each rank, got {}",
            told.join(", ")
        )));
    }
    match reports.iter().find(|report| report.save != save) {
        None => Ok(()),
        Some(PartReport { rank, save: other, .. }) => {
            let text = format!("wrote files of {other:?}, but this is {save:?}; all ranks write those of one save");
            Err(Error::OtherRank { rank: *rank, text })
        }
    }
}

/// Makes sure that what a rank wrote is in the folder that this rank sees.
fn check_files(dir: &Path, report: &PartReport) -> Result<()> {
    for FileCheck { name, bytes: want, .. } in &report.files {
        let path = dir.join(name);
        let got = std::fs::metadata(&path).map(|metadata| metadata.len());
        if !got.as_ref().is_ok_and(|got| got == want) {
            let found = got.map_or_else(|e| e.to_string(), |got| format!("{got} bytes"));
            let rank = report.rank;
            return Err(Error::format(
                path,
                format!(
                    "rank {rank} wrote {want} bytes here, but this rank finds: {found}; do all ranks reach the same folder \
                     under this name?"
                ),
            ));
        }
    }
    Ok(())
}

/// Writes the index of whole weights as anyone reads it, unless they are in the one file that needs none.
fn write_published_index(dir: &Path, index: &Index) -> Result<bool> {
    let weights = || index.entries.iter().filter(|entry| entry.kind == Kind::Weight);
    if weights().all(|entry| entry.file == WEIGHTS_FILE) {
        return Ok(false);
    }
    let map: BTreeMap<String, String> = weights().map(|entry| (entry.tensor.clone(), entry.file.clone())).collect();
    let bytes = weights().map(|entry| entry.tensor_box().volume() * size_of::<f32>()).sum();
    write_weight_index(dir, &map, bytes)?;
    Ok(true)
}
