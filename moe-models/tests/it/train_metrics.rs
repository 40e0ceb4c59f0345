//! The event files, parsed back byte by byte by a reader that shares no code with the writer.

use crate::toy::{Toy, config, corpus};
use moe_models::train::metrics::tensorboard::EventWriter;
use moe_models::train::metrics::{MetricsWriter, Record};
use moe_models::train::{Silent, Trainer};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

/// CRC32C bit by bit.
fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = u32::MAX;
    for byte in bytes {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
        }
    }
    !crc
}

fn unmasked(masked: u32) -> u32 {
    masked.wrapping_sub(0xa282_ead8).rotate_left(15)
}

#[derive(Debug, PartialEq)]
enum Field<'a> {
    Varint(u64),
    Fixed64(f64),
    Fixed32(f32),
    Bytes(&'a [u8]),
}

fn varint(bytes: &mut &[u8]) -> u64 {
    let mut value = 0;
    for shift in (0..).step_by(7) {
        let byte = bytes[0];
        *bytes = &bytes[1..];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return value;
        }
    }
    unreachable!()
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (head, tail) = bytes.split_at(count);
    *bytes = tail;
    head
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Field<'_>)> {
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let value = match key & 7 {
            0 => Field::Varint(varint(&mut bytes)),
            1 => Field::Fixed64(f64::from_le_bytes(take(&mut bytes, 8).try_into().unwrap())),
            5 => Field::Fixed32(f32::from_le_bytes(take(&mut bytes, 4).try_into().unwrap())),
            2 => {
                let length = varint(&mut bytes) as usize;
                Field::Bytes(take(&mut bytes, length))
            }
            other => panic!("wire type {other}"),
        };
        out.push((key >> 3, value));
    }
    out
}

fn records(bytes: &[u8]) -> Vec<&[u8]> {
    let (mut rest, mut out) = (bytes, Vec::new());
    while !rest.is_empty() {
        let length = take(&mut rest, 8);
        let check = u32::from_le_bytes(take(&mut rest, 4).try_into().unwrap());
        assert_eq!(unmasked(check), crc32c(length), "checksum of the length");
        let message = take(&mut rest, u64::from_le_bytes(length.try_into().unwrap()) as usize);
        let check = u32::from_le_bytes(take(&mut rest, 4).try_into().unwrap());
        assert_eq!(unmasked(check), crc32c(message), "checksum of the message");
        out.push(message);
    }
    out
}

fn event_files(dir: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|p| std::fs::read(p).unwrap()).collect()
}

/// Step and tags with values of a summary event.
fn summary(message: &[u8]) -> Option<(u64, BTreeMap<String, f32>)> {
    let (mut step, mut values) = (0, None);
    for (number, field) in fields(message) {
        match (number, field) {
            (1, Field::Fixed64(time)) => assert!(time > 1.7e9, "wall time in seconds, got {time}"),
            (2, Field::Varint(value)) => step = value,
            (5, Field::Bytes(bytes)) => values = Some(fields(bytes).iter().map(|(_, v)| tag_and_value(v)).collect()),
            _ => {}
        }
    }
    Some((step, values?))
}

fn tag_and_value(value: &Field) -> (String, f32) {
    let Field::Bytes(bytes) = value else { panic!("a summary value is a message") };
    match fields(bytes).as_slice() {
        [(1, Field::Bytes(tag)), (2, Field::Fixed32(x))] => (String::from_utf8(tag.to_vec()).unwrap(), *x),
        other => panic!("{other:?}"),
    }
}

#[test]
fn event_files_parse_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut record = Record::new(300, 999);
    record.push("train/loss", 2.5);
    record.push("valid/bits_per_byte/räuber", -0.125);
    EventWriter::create(dir.path(), None).unwrap().write(&record).unwrap();
    EventWriter::create(dir.path(), Some(301)).unwrap();
    let files = event_files(dir.path());
    let first = records(&files[0]);
    assert!(fields(first[0]).contains(&(3, Field::Bytes(b"brain.Event:2"))));
    let want = BTreeMap::from([("train/loss".to_owned(), 2.5), ("valid/bits_per_byte/räuber".to_owned(), -0.125)]);
    assert_eq!(summary(first[1]), Some((300, want)));
    let second = records(&files[1]);
    let purge = fields(second[1]);
    assert!(purge.contains(&(2, Field::Varint(301))));
    assert!(purge.contains(&(7, Field::Bytes(&[0x08, 0x01]))), "a session start at the resumed step: {purge:?}");
}

#[test]
fn a_run_writes_the_same_tags_to_both_files() {
    let dir = tempfile::tempdir().unwrap();
    let config = config();
    let (corpus, tokenizer) = corpus(&config);
    let mut trainer = Trainer::new(Toy::new(3), config, corpus, tokenizer, dir.path()).unwrap();
    trainer.run(&AtomicBool::new(false), &mut Silent).unwrap();
    let file = event_files(&dir.path().join("tensorboard")).remove(0);
    let events: Vec<_> = records(&file).into_iter().filter_map(summary).collect();
    let jsonl = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Map<String, serde_json::Value>> =
        jsonl.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((events.len(), lines.len()), (12, 12));
    for ((step, values), line) in events.iter().zip(&lines) {
        assert_eq!(*step, line["step"].as_u64().unwrap());
        assert_eq!(line["tokens"].as_u64().unwrap(), step * 48);
        assert_eq!(line.len(), values.len() + 2);
        values.iter().for_each(|(tag, x)| assert_eq!(*x, line[tag].as_f64().unwrap() as f32, "{tag}"));
    }
    let tags: Vec<&str> = events[11].1.keys().map(String::as_str).collect();
    assert_eq!(
        tags,
        [
            "moe/layer_1/drop_rate",
            "moe/layer_1/imbalance",
            "moe/layer_1/tokens_per_expert/0",
            "moe/layer_1/tokens_per_expert/1",
            "train/aux_loss",
            "train/grad_norm",
            "train/lm_loss",
            "train/load_balance_loss",
            "train/loss",
            "train/lr",
            "train/peak_memory_bytes",
            "train/router_z_loss",
            "train/tokens_per_second",
            "valid/bits_per_byte",
            "valid/bits_per_byte/one",
            "valid/bits_per_byte/two",
            "valid/loss",
        ]
    );
    let last = &events[11].1;
    let tokens = last["moe/layer_1/tokens_per_expert/0"] + last["moe/layer_1/tokens_per_expert/1"];
    assert_eq!(tokens, 48.0, "loads are summed over the micro-batches");
    assert_eq!(last["moe/layer_1/drop_rate"], 3.0 / 48.0);
}

#[test]
fn an_unwritable_metrics_file_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("metrics.jsonl")).unwrap();
    let message = MetricsWriter::open(dir.path(), 0).unwrap_err().to_string();
    assert!(message.contains("metrics.jsonl"), "{message}");
}
