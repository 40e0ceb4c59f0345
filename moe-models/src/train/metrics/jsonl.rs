//! `metrics.jsonl`: one JSON object per record, `{"step":..,"tokens":..,"TAG":VALUE,..}`.

use super::Record;
use crate::hf::write_atomically;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Appends records to a JSONL file.
#[derive(Debug)]
pub struct JsonlWriter {
    path: PathBuf,
    file: File,
}

impl JsonlWriter {
    /// Opens `path` and keeps its records up to `resume_step` (0: none). A last line cut short by a killed run is
    /// dropped.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read or written, [`Error::Format`] for a line that is not a record.
    pub fn open(path: &Path, resume_step: u64) -> Result<Self> {
        let kept = if resume_step > 0 && path.exists() { records_up_to(path, resume_step)? } else { String::new() };
        write_atomically(path, |file| file.write_all(kept.as_bytes()))?;
        let file = File::options().append(true).open(path).map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends one line. A value that JSON cannot hold (not finite) becomes null.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), record.step.into());
        line.insert("tokens".into(), record.tokens.into());
        line.extend(record.values.iter().map(|(tag, value)| (tag.clone(), Value::from(*value))));
        let text = format!("{}\n", Value::Object(line));
        self.file.write_all(text.as_bytes()).map_err(|e| Error::io(&self.path, e))
    }
}

fn records_up_to(path: &Path, last_step: u64) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let mut kept = String::with_capacity(text.len());
    for (index, line) in text.split_inclusive('\n').enumerate().filter(|(_, line)| line.ends_with('\n')) {
        let step = serde_json::from_str::<Value>(line).ok().and_then(|v| v.get("step")?.as_u64());
        let step = step.ok_or_else(|| {
            Error::format(path, format!("line {}: expected a JSON object with a number \"step\"", index + 1))
        })?;
        if step <= last_step {
            kept.push_str(line);
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(step: u64) -> Record {
        Record { step, tokens: step * 64, values: vec![("train/loss".into(), 1.5), ("x".into(), f64::NAN)] }
    }

    #[test]
    fn resuming_cuts_what_came_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut writer = JsonlWriter::open(&path, 0).unwrap();
        (1..=5).for_each(|step| writer.write(&record(step)).unwrap());
        writer.file.write_all(b"{\"step\":6,\"tok").unwrap();
        JsonlWriter::open(&path, 3).unwrap().write(&record(4)).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> =
            text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        assert_eq!(text.lines().next().unwrap(), r#"{"step":1,"tokens":64,"train/loss":1.5,"x":null}"#);
        JsonlWriter::open(&path, 0).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"", "a new run starts anew");
    }

    #[test]
    fn foreign_files_are_not_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":1}\nhello\n").unwrap();
        assert!(JsonlWriter::open(&path, 3).unwrap_err().to_string().contains("line 2"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":1}\nhello\n");
    }
}
