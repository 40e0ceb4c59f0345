//! [`KeptTargets`]: what a teacher says of the sequences of a training run, kept on disk, so that runs that see the same sequences
//! again need not ask it.
//!
//! Of each token the `k` likeliest entries are kept with their probabilities: 8 `k` bytes a token. What lies between the sum of
//! these and 1 is known to belong to all other entries together ([`moe_core::ops::SoftTargets::TopK`]), no more. A run that keeps
//! its targets learns from these alone, whether they were found or made: its bits do not depend on what was there before.
//!
//! ```text
//! folder   one for each teacher, k and temperature; files of several runs beside each other, each written by one
//! file     records of one size: the hash of a sequence's ids (16 bytes), then its ids [seq_len, k] and probabilities [seq_len, k]
//! ```

use crate::teacher::Teacher;
use crate::{Error, Result};
use candle_core::Tensor;
use moe_models::Precision;
use moe_models::train::model::TokenBatch;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Tokens whose logits exist at a time while targets are made.
const BLOCK: usize = 256;

/// Names a sequence by its ids.
type Key = [u8; 16];

/// What is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetsConfig {
    /// Entries of the vocabulary.
    pub vocab_size: usize,
    /// Tokens of every sequence.
    pub seq_len: usize,
    /// Entries of a token.
    pub k: usize,
    /// What logits are divided by.
    pub temperature: f64,
    /// Of the teacher's products.
    pub precision: Precision,
}

/// Targets of one teacher at one temperature.
#[derive(Debug)]
pub struct KeptTargets {
    config: TargetsConfig,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    dir: PathBuf,
    files: Vec<(PathBuf, File)>,
    /// File and place of each sequence.
    found: HashMap<Key, (usize, u64)>,
    /// The one of `files` that this run adds to, once it has anything to add, and its bytes.
    own: Option<(usize, u64)>,
    asked: u64,
}

/// Targets of a batch: `[batch * seq_len, k]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct TopTargets {
    /// Entries of a token.
    pub k: usize,
    /// The likeliest first.
    pub ids: Vec<u32>,
    /// Their probabilities.
    pub probs: Vec<f32>,
}

impl KeptTargets {
    /// Those in `dir` of the teacher of this `fingerprint`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a `k` of 0 or above the vocabulary; if the folder cannot be read or written to.
    pub fn open(dir: &Path, fingerprint: &str, config: TargetsConfig) -> Result<Self> {
        let TargetsConfig { vocab_size, seq_len, k, temperature, precision } = config;
        if k == 0 || k > vocab_size {
            return Err(Error::Argument(format!("a token's likeliest entries must be 1 to {vocab_size}, got {k}")));
        }
        let short = fingerprint.get(..16).unwrap_or(fingerprint);
        let dir = dir.join(format!("{short}-k{k}-t{temperature}-s{seq_len}-{precision:?}"));
        std::fs::create_dir_all(&dir).map_err(|e| io(&dir, e))?;
        let (files, found) = (Vec::new(), HashMap::new());
        let mut state = State { dir, files, found, own: None, asked: 0 };
        let record = record_bytes(seq_len, k);
        for path in files_in(&state.dir)? {
            let mut file = File::open(&path).map_err(|e| io(&path, e))?;
            let bytes = file.metadata().map_err(|e| io(&path, e))?.len();
            // A record that a run has not ended is none.
            for at in (0..bytes / record).map(|index| index * record) {
                let mut key = Key::default();
                file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut key)).map_err(|e| io(&path, e))?;
                state.found.insert(key, (state.files.len(), at));
            }
            state.files.push((path, file));
        }
        Ok(Self { config, state: Mutex::new(state) })
    }

    /// What the teacher says of a batch: from disk where it has been asked before, and else kept.
    ///
    /// # Errors
    /// [`Error::Argument`] for sequences of another length; what the teacher returns; if the folder cannot be read or written to.
    pub fn of(&self, teacher: &Teacher, batch: &TokenBatch) -> Result<TopTargets> {
        if batch.seq_len != self.config.seq_len {
            let (want, got) = (self.config.seq_len, batch.seq_len);
            return Err(Error::Argument(format!("targets are kept for sequences of {want} tokens, got {got}")));
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let sequences: Vec<&[u32]> = batch.input_ids.chunks(self.config.seq_len).collect();
        let keys: Vec<Key> = sequences.iter().map(|ids| key(ids)).collect();
        let new: Vec<usize> = (0..keys.len()).filter(|&i| !state.found.contains_key(&keys[i])).collect();
        if !new.is_empty() {
            let input_ids: Vec<u32> = new.iter().flat_map(|&i| sequences[i]).copied().collect();
            let made = self.ask(teacher, &input_ids, new.len())?;
            let entries = self.config.seq_len * self.config.k;
            for (at, &i) in new.iter().enumerate() {
                let part = at * entries..(at + 1) * entries;
                state.keep(keys[i], &made.ids[part.clone()], &made.probs[part])?;
            }
            state.asked += new.len() as u64;
        }
        let mut targets = TopTargets { k: self.config.k, ids: Vec::new(), probs: Vec::new() };
        for key in &keys {
            state.read(key, self.config.seq_len * self.config.k, &mut targets)?;
        }
        Ok(targets)
    }

    /// Sequences that the teacher was asked for.
    pub fn asked(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).asked
    }

    /// Bytes on disk of a token.
    pub fn bytes_per_token(&self) -> f64 {
        record_bytes(self.config.seq_len, self.config.k) as f64 / self.config.seq_len as f64
    }

    fn ask(&self, teacher: &Teacher, input_ids: &[u32], batch: usize) -> Result<TopTargets> {
        let all = TokenBatch {
            input_ids: input_ids.to_vec(),
            target_ids: input_ids.to_vec(),
            batch,
            seq_len: self.config.seq_len,
        };
        let hidden = teacher.hidden(&all)?;
        let mut targets = TopTargets { k: self.config.k, ids: Vec::new(), probs: Vec::new() };
        for start in (0..input_ids.len()).step_by(BLOCK) {
            let rows = BLOCK.min(input_ids.len() - start);
            let logits: Tensor = teacher.decoder().head().logits(&hidden.narrow(0, start, rows)?)?;
            for row in logits.to_vec2::<f32>()? {
                targets.push(&row, self.config.temperature);
            }
        }
        Ok(targets)
    }
}

impl TopTargets {
    /// Adds a token's, from its logits.
    fn push(&mut self, logits: &[f32], temperature: f64) {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exp = |z: f32| (f64::from(z - max) / temperature).exp();
        let sum: f64 = logits.iter().map(|&z| exp(z)).sum();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        // The lower id first among equals, so that a choice is one.
        let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if self.k < order.len() {
            order.select_nth_unstable_by(self.k - 1, by);
            order.truncate(self.k);
        }
        order.sort_unstable_by(by);
        self.probs.extend(order.iter().map(|&id| (exp(logits[id as usize]) / sum) as f32));
        self.ids.extend(order);
    }
}

impl State {
    /// Adds a sequence to this run's file.
    fn keep(&mut self, key: Key, ids: &[u32], probs: &[f32]) -> Result<()> {
        let mut bytes = key.to_vec();
        ids.iter().for_each(|id| bytes.extend(id.to_le_bytes()));
        probs.iter().for_each(|p| bytes.extend(p.to_le_bytes()));
        let (own, written) = match self.own {
            Some(own) => own,
            None => {
                let first = self.files.iter().map(|(path, _)| number_of(path) + 1).max().unwrap_or(0);
                self.files.push(new_file(&self.dir, first)?);
                (self.files.len() - 1, 0)
            }
        };
        let (path, file) = &mut self.files[own];
        file.seek(SeekFrom::Start(written)).and_then(|_| file.write_all(&bytes)).map_err(|e| io(&*path, e))?;
        self.found.insert(key, (own, written));
        self.own = Some((own, written + bytes.len() as u64));
        Ok(())
    }

    /// Reads one that has been found.
    fn read(&mut self, key: &Key, entries: usize, targets: &mut TopTargets) -> Result<()> {
        let Some(&(file, at)) = self.found.get(key) else {
            return Err(Error::Argument("a sequence's targets are neither found nor made".into()));
        };
        let mut bytes = vec![0; 8 * entries];
        let (path, file) = &mut self.files[file];
        let start = SeekFrom::Start(at + size_of::<Key>() as u64);
        file.seek(start).and_then(|_| file.read_exact(&mut bytes)).map_err(|e| io(&*path, e))?;
        let (ids, probs) = bytes.as_chunks::<4>().0.split_at(entries);
        targets.ids.extend(ids.iter().map(|word| u32::from_le_bytes(*word)));
        targets.probs.extend(probs.iter().map(|word| f32::from_le_bytes(*word)));
        Ok(())
    }
}

fn io(path: impl Into<PathBuf>, error: std::io::Error) -> Error {
    moe_models::Error::io(path, error).into()
}

fn key(ids: &[u32]) -> Key {
    let mut hasher = blake3::Hasher::new();
    ids.iter().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    let mut key = Key::default();
    hasher.finalize_xof().fill(&mut key);
    key
}

fn record_bytes(seq_len: usize, k: usize) -> u64 {
    (size_of::<Key>() + 8 * seq_len * k) as u64
}

fn number_of(path: &Path) -> u64 {
    path.file_stem().and_then(|stem| stem.to_str()?.parse().ok()).unwrap_or(0)
}

/// In the order of their numbers.
fn files_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).map_err(|e| io(dir, e))?;
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "targets"))
        .collect();
    files.sort_by_key(|path| number_of(path));
    Ok(files)
}

/// A file that no other run has.
fn new_file(dir: &Path, first: u64) -> Result<(PathBuf, File)> {
    let mut number = first;
    loop {
        let path = dir.join(format!("{number}.targets"));
        match OpenOptions::new().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(error) => return Err(io(path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_likeliest_entries_by_hand() {
        let mut targets = TopTargets { k: 2, ids: vec![], probs: vec![] };
        targets.push(&[0.0, 2.0, 1.0, 2.0], 1.0);
        assert_eq!(targets.ids, [1, 3]);
        let sum = 1.0 + 2.0 * 2f64.exp() + 1f64.exp();
        assert!(targets.probs.iter().all(|&p| (f64::from(p) - 2f64.exp() / sum).abs() < 1e-7));
        let mut all = TopTargets { k: 3, ids: vec![], probs: vec![] };
        all.push(&[3.0, 1.0, 2.0], 2.0);
        assert_eq!(all.ids, [0, 2, 1]);
        assert!((all.probs.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    }
}
