//! Checkpoints: folders `step-00001234` that are whole or absent, with the newest k and the best kept.
//!
//! A folder holds the model the Hugging Face way (f32), `optimizer.safetensors` and `trainer_state.json`, which is
//! written last and lists size and checksum of every other file. `latest` and `best` beside the folders name one each.
//! Knows nothing of the loop.

use super::config::TrainConfig;
use super::data::DataPosition;
use super::data::packed::Fingerprint;
use super::files::{
    REPLACED_PREFIX, TEMPORARY_PREFIX, abort_dir, begin_dir, checksum, commit_dir, create_dir, recover_swapped, remove,
    remove_dir_at_once, sibling, write_synced,
};
use crate::hf::write_atomically;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "trainer_state.json";
const LATEST: &str = "latest";
const BEST: &str = "best";
const FOLDER_PREFIX: &str = "step-";

/// A checkpoint's step with its validation loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BestCheckpoint {
    /// Optimizer steps done.
    pub step: u64,
    /// Validation loss, nats per token.
    pub valid_loss: f64,
}

/// Size and checksum of one file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileCheck {
    /// Name inside the folder.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// CRC32C of the content.
    pub crc32c: u32,
}

impl FileCheck {
    /// Of the file at `path`, which is read.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be.
    pub(super) fn of(path: &Path) -> Result<Self> {
        let (bytes, crc32c) = checksum(path)?;
        Ok(Self { name: name_of(path), bytes, crc32c })
    }

    /// Reads the file in the folder `dir` and refuses it if it is another.
    ///
    /// # Errors
    /// [`Error::Io`] for a missing file, [`Error::Format`] for one that was cut or altered.
    pub(super) fn verify(&self, dir: &Path) -> Result<()> {
        let path = dir.join(&self.name);
        let got = Self::of(&path)?;
        self.same_size(&path, got.bytes)?;
        match got.crc32c == self.crc32c {
            true => Ok(()),
            false => Err(Error::format(&path, format!("damaged: its checksum differs; {}", without(dir)))),
        }
    }

    /// Refuses the file at `path` if it has another size.
    pub(super) fn same_size(&self, path: &Path, got: u64) -> Result<()> {
        let want = self.bytes;
        if want != got {
            let folder = path.parent().unwrap_or(path);
            let reason = format!("damaged: expected {want} bytes, found {got}; {}", without(folder));
            return Err(Error::format(path, reason));
        }
        Ok(())
    }
}

/// How a run goes on without the checkpoint in a folder.
fn without(folder: &Path) -> String {
    format!("remove the folder {}, and --resume goes on from the checkpoint before it", folder.display())
}

/// Everything a run needs to continue besides weights and moments.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done.
    pub step: u64,
    /// Training tokens seen.
    pub tokens: u64,
    /// Where the data stream stands.
    pub data_position: DataPosition,
    /// The tokenised sources, to notice changed data.
    pub data: Vec<Fingerprint>,
    /// Each source's share of the blend.
    pub shares: Vec<f64>,
    /// Updates the optimizer applied.
    pub optimizer_updates: u64,
    /// Steps skipped in a row for non-finite gradients.
    pub skipped_in_a_row: u64,
    /// Validation loss at this step, if it was measured.
    pub valid_loss: Option<f64>,
    /// The best checkpoint so far, this one included.
    pub best: Option<BestCheckpoint>,
    /// The run's settings, derived ones filled in. All random draws follow from its seed, the step and the positions.
    pub config: TrainConfig,
    /// The other files of the folder.
    #[serde(default)]
    pub files: Vec<FileCheck>,
}

/// The checkpoints of one run.
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    dir: PathBuf,
    keep_last: usize,
}

impl CheckpointStore {
    /// The checkpoints in `dir`, which is created if absent. Remains of interrupted saves are removed; a checkpoint that
    /// a crash left under the name it had while it was replaced gets its own name back. What another process is saving looks
    /// the same, so hold a [`super::RunLock`] where there may be one.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written to: better now than after hours of training.
    pub fn open(dir: &Path, keep_last: usize) -> Result<Self> {
        create_dir(dir)?;
        clear_remains(dir)?;
        let probe = dir.join(format!("{TEMPORARY_PREFIX}{PROBE}"));
        write_synced(&probe, b"writable")?;
        remove(&probe)?;
        Ok(Self { dir: dir.to_owned(), keep_last })
    }

    /// The same for a rank that does not write: nothing is touched.
    pub fn read_only(dir: &Path, keep_last: usize) -> Self {
        Self { dir: dir.to_owned(), keep_last }
    }

    /// The folder of `step`.
    pub fn folder(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{FOLDER_PREFIX}{step:08}"))
    }

    /// Steps of the present checkpoint folders, ascending.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be read.
    pub fn steps(&self) -> Result<Vec<u64>> {
        let mut steps = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(|e| Error::io(&self.dir, e))? {
            let path = entry.map_err(|e| Error::io(&self.dir, e))?.path();
            steps.extend(name_of(&path).strip_prefix(FOLDER_PREFIX).and_then(|s| s.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    /// Begins a checkpoint that is written file by file, by one rank or by several: makes its folder, under a temporary name. Then
    /// follow [`CheckpointStore::commit`], or [`CheckpointStore::abort`] where a file could not be written.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be made.
    pub fn begin(&self, step: u64) -> Result<PathBuf> {
        begin_dir(&self.folder(step))
    }

    /// The folder that [`CheckpointStore::begin`] makes, for ranks that do not.
    pub fn unfinished(&self, step: u64) -> PathBuf {
        sibling(TEMPORARY_PREFIX, &self.folder(step))
    }

    /// Ends a checkpoint whose files are written: adds the state, which lists them, gives the folder its name, points `latest` (and
    /// `best`, if it is) at it, then removes what is no longer kept. `checks` are those of files that need not be read for
    /// them again; a folder of the same step stays until the new one is on the disk.
    ///
    /// # Errors
    /// [`Error::Io`] if something cannot be written; earlier checkpoints are then untouched.
    pub fn commit(&self, state: &TrainerState, checks: Vec<FileCheck>) -> Result<PathBuf> {
        let folder = self.folder(state.step);
        write_state(state, checks, &self.unfinished(state.step))?;
        commit_dir(&folder)?;
        self.mark(LATEST, &folder)?;
        if let Some(best) = state.best {
            self.mark(BEST, &self.folder(best.step))?;
        }
        self.prune(state)?;
        Ok(folder)
    }

    /// Removes what was written of a checkpoint that cannot be ended.
    pub fn abort(&self, step: u64) {
        abort_dir(&self.folder(step));
    }

    /// Lets the file `marker` name `folder`.
    fn mark(&self, marker: &str, folder: &Path) -> Result<()> {
        write_atomically(&self.dir.join(marker), |file| file.write_all(name_of(folder).as_bytes()))
    }

    fn prune(&self, state: &TrainerState) -> Result<()> {
        let best = state.best.map(|b| b.step);
        let older: Vec<u64> = self.steps()?.into_iter().filter(|&s| s <= state.step).collect();
        let surplus = older.len().saturating_sub(self.keep_last);
        for &step in older[..surplus].iter().filter(|&&step| Some(step) != best) {
            remove_dir_at_once(&self.folder(step))?;
        }
        Ok(())
    }

    /// The folder to resume from: the one `latest` names, or else the newest complete one. `None` without any.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be read.
    pub fn latest(&self) -> Result<Option<PathBuf>> {
        if let Some(folder) = self.named_by(LATEST) {
            return Ok(Some(folder));
        }
        let newest_first = self.steps()?.into_iter().rev().map(|step| self.folder(step));
        Ok(newest_first.into_iter().find(|folder| is_complete(folder)))
    }

    /// Refuses a new run where another has saved.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is a checkpoint; [`Error::Io`] if the folder cannot be read.
    pub fn check_empty(&self) -> Result<()> {
        if self.steps()?.is_empty() {
            return Ok(());
        }
        let dir = self.dir.display();
        Err(Error::Argument(format!("{dir} already holds checkpoints; resume that run or choose another folder")))
    }

    /// The folder of the best checkpoint, if one was measured.
    pub fn best(&self) -> Option<PathBuf> {
        self.named_by(BEST)
    }

    fn named_by(&self, marker: &str) -> Option<PathBuf> {
        let name = std::fs::read_to_string(self.dir.join(marker)).ok()?;
        let folder = self.dir.join(name.trim());
        (name.trim().starts_with(FOLDER_PREFIX) && is_complete(&folder)).then_some(folder)
    }
}

/// Removes what interrupted saves left in `dir`, and gives a checkpoint that was being replaced its name back.
fn clear_remains(dir: &Path) -> Result<()> {
    let entries = std::fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
    for entry in entries.map_err(|e| Error::io(dir, e))? {
        let path = entry.path();
        let name = name_of(&path);
        match name.strip_prefix(REPLACED_PREFIX).filter(|place| place.starts_with(FOLDER_PREFIX)) {
            Some(place) => recover_swapped(&path, &dir.join(place), is_complete)?,
            None if is_remains(&name) => remove(&path)?,
            None => {}
        }
    }
    Ok(())
}

/// Written to see whether a folder can be written to.
const PROBE: &str = "probe";

/// Whether an interrupted save here left what bears this name. A user's folder may hold others that begin alike, and tokens that
/// another run is writing.
fn is_remains(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(TEMPORARY_PREFIX) else { return false };
    let is_written_file = rest.starts_with(|first: char| first.is_ascii_digit()) && !rest.ends_with(".tokens");
    is_written_file || rest == PROBE || ["removed-", FOLDER_PREFIX].iter().any(|of| rest.starts_with(of))
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Whether every file that makes a checkpoint is there. Their content is checked when they are read.
fn is_complete(folder: &Path) -> bool {
    let Ok(state) = read_state(folder) else { return folder.join(STATE_FILE).exists() };
    state.files.iter().all(|file| folder.join(&file.name).exists())
}

/// Writes the state into the folder `dir` of which it lists every file.
fn write_state(state: &TrainerState, checks: Vec<FileCheck>, dir: &Path) -> Result<()> {
    let path = dir.join(STATE_FILE);
    let state = TrainerState { files: file_checks(dir, checks)?, ..state.clone() };
    let json =
        serde_json::to_string_pretty(&state).map_err(|e| Error::format(&path, format!("cannot be written: {e}")))?;
    write_synced(&path, json.as_bytes())
}

/// `known`, and the checks of the other files of the folder `dir`.
fn file_checks(dir: &Path, known: Vec<FileCheck>) -> Result<Vec<FileCheck>> {
    let mut checks = known;
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        if checks.iter().all(|check| check.name != name_of(&path)) {
            checks.push(FileCheck::of(&path)?);
        }
    }
    checks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(checks)
}

/// Reads `trainer_state.json` of a checkpoint folder.
///
/// # Errors
/// [`Error::Io`] if it cannot be read, [`Error::Format`] if it is not a trainer state.
pub fn read_state(folder: &Path) -> Result<TrainerState> {
    let path = folder.join(STATE_FILE);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let state = serde_json::from_str(&text).and_then(|mut state: serde_json::Value| {
        if let Some(config) = state.get_mut("config").and_then(serde_json::Value::as_object_mut) {
            TrainConfig::update_saved(config);
        }
        serde_json::from_value(state)
    });
    state.map_err(|e| Error::format(path, format!("not a whole trainer state: {e}")))
}

/// Compares every file of a checkpoint with the sizes and checksums in its state.
///
/// # Errors
/// [`Error::Io`] for a missing file, [`Error::Format`] for one that was cut or altered.
pub fn verify(folder: &Path, state: &TrainerState) -> Result<()> {
    state.files.iter().try_for_each(|file| file.verify(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Settings and shares are compared with those of the run that goes on: a bit that changed would end it.
    #[test]
    fn numbers_come_back_as_they_were() {
        let shares: Vec<f64> = (2..200).map(|count| 1.0 / f64::from(count)).collect();
        let config = TrainConfig { lr: 0.0015, min_lr: Some(0.0015 * 0.1), ..TrainConfig::default() };
        let json = serde_json::to_string(&(&shares, &config)).unwrap();
        let back: (Vec<f64>, TrainConfig) = serde_json::from_str(&json).unwrap();
        assert_eq!(back, (shares, config));
    }

    #[test]
    fn what_others_left_is_not_removed() {
        for name in [".tmp-step-00000002", ".tmp-removed-step-00000002", ".tmp-probe", ".tmp-17-latest"] {
            assert!(is_remains(name), "{name}");
        }
        for name in [".tmp-notes", ".tmp-17-0-aa.tokens", "tmp-step-00000002", ".tmp-"] {
            assert!(!is_remains(name), "{name}");
        }
    }
}
