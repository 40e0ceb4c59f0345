//! TensorBoard event files: TFRecord framing around hand-encoded `Event` messages with scalar summaries.
//!
//! # Source
//! tensorflow `core/lib/io/record_writer.h` (framing and masked CRC32C), `core/util/event.proto`,
//! `core/framework/summary.proto`.

use super::Record;
use crate::train::files::{crc32c, create_dir};
use crate::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Creates a new event file in `dir`, which is created if absent. `purge_from` tells TensorBoard to forget what
    /// earlier files of the folder say about that step and later ones.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder or file cannot be written.
    pub fn create(dir: &Path, purge_from: Option<u64>) -> Result<Self> {
        create_dir(dir)?;
        let (path, file) = new_event_file(dir)?;
        let mut writer = Self { path, file };
        writer.append(&event(0, &string_field(FILE_VERSION, "brain.Event:2")))?;
        if let Some(step) = purge_from {
            writer.append(&event(step, &bytes_field(SESSION_LOG, &varint_field(SESSION_STATUS, SESSION_START))))?;
        }
        Ok(writer)
    }

    /// Writes every value of `record` as one event at its step.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<()> {
        let summary: Vec<u8> = record.values.iter().flat_map(|(tag, value)| scalar(tag, *value)).collect();
        self.append(&event(record.step, &bytes_field(SUMMARY, &summary)))
    }

    fn append(&mut self, message: &[u8]) -> Result<()> {
        self.file.write_all(&frame(message)).map_err(|e| Error::io(&self.path, e))
    }
}

/// TensorBoard reads a folder's files in the order of their names, so the time in seconds comes first.
fn new_event_file(dir: &Path) -> Result<(PathBuf, File)> {
    let seconds = now().as_secs();
    let mut number = 0u32;
    loop {
        let path = dir.join(format!("events.out.tfevents.{seconds:010}.{number:03}.moe-train"));
        match File::options().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => number += 1,
            Err(e) => return Err(Error::io(path, e)),
        }
    }
}

fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

// Field numbers of event.proto and summary.proto.
const WALL_TIME: u64 = 1;
const STEP: u64 = 2;
const FILE_VERSION: u64 = 3;
const SUMMARY: u64 = 5;
const SESSION_LOG: u64 = 7;
const SESSION_STATUS: u64 = 1;
const SESSION_START: u64 = 1;
const SUMMARY_VALUE: u64 = 1;
const VALUE_TAG: u64 = 1;
const VALUE_SIMPLE: u64 = 2;

// Wire types of protobuf.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const LENGTH: u64 = 2;
const FIXED32: u64 = 5;

fn varint(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn field(number: u64, wire_type: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = varint(number << 3 | wire_type);
    out.extend_from_slice(payload);
    out
}

fn varint_field(number: u64, value: u64) -> Vec<u8> {
    field(number, VARINT, &varint(value))
}

fn bytes_field(number: u64, bytes: &[u8]) -> Vec<u8> {
    let mut payload = varint(bytes.len() as u64);
    payload.extend_from_slice(bytes);
    field(number, LENGTH, &payload)
}

fn string_field(number: u64, text: &str) -> Vec<u8> {
    bytes_field(number, text.as_bytes())
}

fn scalar(tag: &str, value: f64) -> Vec<u8> {
    let mut message = string_field(VALUE_TAG, tag);
    message.extend(field(VALUE_SIMPLE, FIXED32, &(value as f32).to_le_bytes()));
    bytes_field(SUMMARY_VALUE, &message)
}

fn event(step: u64, what: &[u8]) -> Vec<u8> {
    let mut message = field(WALL_TIME, FIXED64, &now().as_secs_f64().to_le_bytes());
    message.extend(varint_field(STEP, step));
    message.extend_from_slice(what);
    message
}

/// Length, its checksum, the message, its checksum.
fn frame(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let mut out = length.to_vec();
    out.extend(masked_crc(&length).to_le_bytes());
    out.extend_from_slice(message);
    out.extend(masked_crc(message).to_le_bytes());
    out
}

/// CRC32C, rotated and offset, so that a checksum of data that holds checksums stays sound.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_bytes() {
        assert_eq!(varint(300), [0xac, 0x02]);
        assert_eq!(string_field(3, "ab"), [0x1a, 2, b'a', b'b']);
        assert_eq!(scalar("t", 1.0), [0x0a, 8, 0x0a, 1, b't', 0x15, 0, 0, 0x80, 0x3f]);
        // The header of a 24-byte record as TensorFlow writes it: length 24 and its masked checksum.
        assert_eq!(frame(&[0; 24])[..12], [24, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
    }
}
