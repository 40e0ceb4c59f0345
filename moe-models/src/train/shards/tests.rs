//! What indexes, parts and reports are refused for. Whole checkpoints are in `tests/it/reshard.rs`.

use super::index::Index;
use super::*;
use crate::Error;
use crate::hf::{NameTable, WeightForm};
use moe_core::{ParamInit, ParamSpec, SplitKind};
use moe_parallel::{Extent, ParallelDims, Placement};
use std::ops::Range;
use std::path::Path;

const SAVE: Save = Save { step: 7, id: 0xabc };
const NO_RULES: NameTable = NameTable::new(&[]);

fn entry(kind: Kind, name: &str, start: &[usize], size: &[usize], file: &str) -> Entry {
    let tensor = format!("{kind}.{name}{start:?}");
    Entry {
        kind,
        name: name.into(),
        start: start.to_vec(),
        size: size.to_vec(),
        file: file.into(),
        tensor,
        place: None,
    }
}

/// `w` `[4, 3]`, trained, in the files of two ranks; `n` `[2]`, frozen.
fn index() -> Index {
    let info = |shape: &[usize], trained| TensorInfo { shape: shape.to_vec(), trained };
    let tensors = [("w".to_owned(), info(&[4, 3], true)), ("n".to_owned(), info(&[2], false))];
    let mut index = Index::new(SAVE, WeightForm::Parts, tensors.into());
    let check = |name: &str| super::super::checkpoint::FileCheck { name: name.into(), bytes: 1, crc32c: 0 };
    index.files = vec![check("a"), check("b")];
    for kind in Kind::ALL {
        index.entries.push(entry(kind, "w", &[0, 0], &[3, 3], "a"));
        index.entries.push(entry(kind, "w", &[3, 0], &[1, 3], "b"));
    }
    index.entries.push(entry(Kind::Weight, "n", &[0], &[2], "b"));
    index
}

#[track_caller]
fn refused(change: impl FnOnce(&mut Index), parts: &[&str]) {
    let mut index = index();
    change(&mut index);
    let text = index.check(Path::new("folder/index")).unwrap_err().to_string();
    assert!(text.starts_with("folder/index: "), "{text}");
    parts.iter().for_each(|part| assert!(text.contains(part), "{text:?} should name {part:?}"));
}

#[test]
fn indexes_that_are_no_whole_model_are_refused() {
    index().check(Path::new("index")).unwrap();
    refused(|i| _ = i.entries.remove(3), &["exp_avg of w", "[3..4, 0..3] is in no file", "other parts are in a"]);
    refused(|i| _ = i.entries.pop(), &["weight of n", "[0..2] is in no file", "no other part"]);
    let again = |i: &mut Index| i.entries.push(entry(Kind::Weight, "w", &[2, 1], &[1, 1], "b"));
    refused(again, &["weight of w", "[2..3, 1..2] is in a as weight.w[0, 0] and in b as weight.w[2, 1]"]);
    refused(|i| i.entries.push(i.entries[0].clone()), &["tensor weight.w[0, 0] of a is in two entries"]);
    refused(|i| i.entries[0].name = "v".into(), &["weight of v", "no such tensor"]);
    refused(|i| i.entries[0].file = "c".into(), &["weight of w", "c is not one of the files"]);
    refused(|i| i.entries[0].size = vec![5, 3], &["weight of w", "[5, 3] is not inside of [4, 3]"]);
    refused(|i| i.entries[0].start = vec![usize::MAX, 0], &["weight of w", "not inside of"]);
    refused(|i| i.entries[0].start = vec![0], &["not inside of"]);
    refused(|i| i.entries[6].kind = Kind::ExpAvg, &["exp_avg of n", "not trained"]);
    refused(|i| i.files[1].name = "a".into(), &["file a is listed twice"]);
    for name in ["", ".", "..", "../a", "/a", "x/a", "a/"] {
        refused(|i| i.files[0].name = name.into(), &[&format!("{name:?} is not the name of a file")]);
    }
    for shape in [vec![usize::MAX, 2], vec![usize::MAX / 3], vec![0, usize::MAX, 2, usize::MAX]] {
        let zero = shape[0] == 0;
        let mut index = index();
        index.tensors.insert("huge".into(), TensorInfo { shape, trained: false });
        // Nothing is also nothing in the largest box; it needs no entry.
        assert_eq!(index.check(Path::new("index")).is_ok(), zero);
    }
}

#[test]
fn unknown_versions_and_fields_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    index().write(dir.path()).unwrap();
    assert_eq!(Index::read(dir.path()).unwrap(), index());
    let path = dir.path().join("checkpoint.index.json");
    let json = std::fs::read_to_string(&path).unwrap();
    for (find, replace, part) in [
        ("\"version\":1", "\"version\":2", "version 2 is not 1"),
        ("\"version\":1", "\"version\":1,\"color\":3", "unknown field `color`"),
        ("\"step\":7", "\"step\":-7", "not a whole index"),
        ("exp_avg_sq", "exp_avg_cube", "exp_avg_cube"),
        ("{", "[", "not a whole index"),
    ] {
        assert!(json.contains(find), "{find} in {json}");
        std::fs::write(&path, json.replacen(find, replace, 1)).unwrap();
        let text = Index::read(dir.path()).unwrap_err().to_string();
        assert!(text.contains("checkpoint.index.json") && text.contains(part), "{text}");
    }
}

/// Three experts of `[4]`.
fn experts() -> (ParamSpec, Vec<Extent>) {
    let spec = ParamSpec::new("b", &[4], ParamInit::Zeros).stacked(3);
    (spec.clone(), Placement::WHOLE.extents(&spec))
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let (dir, (spec, extents), values) = (tempfile::tempdir().unwrap(), experts(), [1.0; 12]);
    let part = SavingRank { save: SAVE, rank: 0, ranks: 2 };
    let weights = |values, writes| {
        let weights = WeightsPart { spec: &spec, extents: &extents, values, writes };
        write_part(dir.path(), part, NO_RULES, &[weights], &[])
    };
    let moments = |owned, exp_avg, exp_avg_sq, writes| {
        let moments = MomentsPart { extents: &extents, owned, exp_avg, exp_avg_sq, writes };
        write_part(dir.path(), part, NO_RULES, &[], &[moments])
    };
    let some = &values[..5];
    for (report, word) in [
        (weights(&values[..11], &[]), "12 elements here, but 11 values"),
        (weights(&values, &[0..4, 4..7]), "[4..7] cuts elements 4..8"),
        (weights(&values, &[0..2, 2..4]), "written whole or not at all"),
        (weights(&values, &[4..8, 0..4]), "no ascending ranges"),
        (weights(&values, &[4..13]), "no ascending ranges"),
        (moments(&[1..6], some, some, &[0..3]), "not all in what is owned"),
        (moments(&[1..6], some, some, &[4..7]), "not all in what is owned"),
        (moments(&[1..6], some, &values, &[]), "5 owned elements, but [5, 12] moments"),
        (moments(&[Range { start: 6, end: 1 }], &[], &[], &[]), "owned [6..1] are no ascending ranges"),
    ] {
        let error = report.unwrap_err();
        assert!(matches!(&error, Error::Argument(text) if text.starts_with("experts.0.b: ")), "{error}");
        assert!(error.to_string().contains(word), "{error} should say {word}");
    }
    let outside = SavingRank { rank: 2, ..part };
    assert!(write_part(dir.path(), outside, NO_RULES, &[], &[]).unwrap_err().to_string().contains("no rank 2 of 2"));
    let twice = WeightsPart { spec: &spec, extents: &extents, values: &values, writes: &[4..8] };
    let text = write_part(dir.path(), part, NO_RULES, &[twice, twice], &[]).unwrap_err().to_string();
    assert!(text.contains("experts.1.b is given to a checkpoint twice"), "{text}");
    let gone = write_part(&dir.path().join("gone"), part, NO_RULES, &[twice], &[]).unwrap_err();
    assert!(matches!(gone, Error::Io { .. }) && gone.to_string().contains("model-00001-of-00002"), "{gone}");
}

/// A rank with nothing to write leaves no file; what others write is in the files that its report names.
#[test]
fn reports_tell_what_was_written() {
    let (dir, (spec, extents), values) = (tempfile::tempdir().unwrap(), experts(), [1.0; 12]);
    let of = |rank| SavingRank { save: SAVE, rank, ranks: 2 };
    let none = write_part(dir.path(), of(0), NO_RULES, &[], &[]).unwrap();
    assert_eq!((none.rank(), none.files().len(), none.entries().len()), (0, 0, 0));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let weights = WeightsPart { spec: &spec, extents: &extents, values: &values, writes: &[4..12] };
    let moments = MomentsPart {
        extents: &extents,
        owned: &[2..5, 5..9],
        exp_avg: &values[..7],
        exp_avg_sq: &values[..7],
        writes: &[3..6],
    };
    let some = write_part(dir.path(), of(1), NO_RULES, &[weights], &[moments]).unwrap();
    let names: Vec<&str> = some.files().iter().map(|file| file.name.as_str()).collect();
    assert_eq!(names, ["model-00002-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"]);
    let told: Vec<String> = some.entries().iter().map(|entry| entry.tensor.clone()).collect();
    assert_eq!(
        told,
        [
            "experts.1.b",
            "experts.2.b",
            "exp_avg.experts.0.b[3..4]",
            "exp_avg.experts.1.b[0..1]",
            "exp_avg.experts.1.b[1..2]",
            "exp_avg_sq.experts.0.b[3..4]",
            "exp_avg_sq.experts.1.b[0..1]",
            "exp_avg_sq.experts.1.b[1..2]",
        ]
    );
    for file in some.files() {
        assert_eq!(super::super::checkpoint::FileCheck::of(&dir.path().join(&file.name)).unwrap(), *file);
    }
    assert_eq!(PartReport::from_words(1, &some.to_words().unwrap()).unwrap(), some);
}

#[test]
fn messages_that_are_no_reports_are_refused() {
    let report = PartReport::new(SavingRank { save: SAVE, rank: 1, ranks: 2 }, WeightForm::Whole);
    let words = report.to_words().unwrap();
    assert_eq!(PartReport::from_words(1, &words).unwrap(), report);
    let long = [words.as_slice(), &[0]].concat();
    let messages = [&[][..], &[0], &[1], &[u64::MAX], &[3, 5], &words[..words.len() - 1], &long, &words[1..]];
    for message in messages {
        let error = PartReport::from_words(1, message).unwrap_err();
        assert!(matches!(&error, Error::OtherRank { rank: 1, text } if text.contains("no report")), "{error}");
    }
    let error = PartReport::from_words(0, &words).unwrap_err().to_string();
    assert!(error.contains("rank 0") && error.contains("that of rank 1"), "{error}");
}

/// Columns of a matrix, whose rows do not lie in one piece, from two ranks: the entries, and what finish says of them.
#[test]
fn finish_wants_a_report_of_every_rank_and_every_element() {
    let spec = ParamSpec::new("w", &[2, 5], ParamInit::Zeros).split(SplitKind::Tensor, 1, 1);
    let (dir, dims) = (tempfile::tempdir().unwrap(), ParallelDims::new(1, 2, 2, 1));
    let plan = WritePlan::new(std::slice::from_ref(&spec), NO_RULES, dims).unwrap();
    let all = tensors(std::slice::from_ref(&spec), |_| false);
    let write = |rank: usize, save: Save| {
        let extents = Placement::new(dims, rank).unwrap().extents(&spec);
        let values: Vec<f32> = (0..10).filter(|i| (i % 5 < 3) == (rank == 0)).map(|i| i as f32).collect();
        let writes = plan.ranges(rank, &extents);
        let weights = WeightsPart { spec: &spec, extents: &extents, values: &values, writes: &writes };
        write_part(dir.path(), SavingRank { save, rank, ranks: 2 }, NO_RULES, &[weights], &[]).unwrap()
    };
    let reports = [write(0, SAVE), write(1, SAVE)];
    assert_eq!(reports[1].entries()[0].tensor, "w[0..2, 3..5]");
    let end = |reports: &[PartReport]| finish(dir.path(), SAVE, reports, all.clone());
    let refused = |reports: &[PartReport], word: &str| {
        let text = end(reports).unwrap_err().to_string();
        assert!(text.contains(word), "{text:?} should say {word:?}");
    };
    refused(&reports[..1], "one report of each rank, got 0 of 2");
    refused(&[reports[0].clone(), reports[0].clone()], "got 0 of 2, 0 of 2");
    let mut nothing = reports.clone();
    nothing[1].entries.clear();
    refused(&nothing, "weight of w [2, 5]: [0..2, 3..5] is in no file");
    refused(&[reports[0].clone(), write(1, Save { id: 1, ..SAVE })], "rank 1: wrote files of");
    let reports = [reports[0].clone(), write(1, SAVE)];
    let file = dir.path().join("model-00002-of-00002.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[1..]).unwrap();
    refused(&reports, "rank 1 wrote");
    std::fs::remove_file(&file).unwrap();
    refused(&reports, "do all ranks reach the same folder");
    std::fs::write(&file, bytes).unwrap();
    let checks = end(&reports).unwrap();
    let names: Vec<&str> = checks.iter().map(|check| check.name.as_str()).collect();
    let parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "checkpoint.index.json"];
    assert_eq!(names, parts, "and no index of whole tensors");
    let reader = Reader::open(dir.path()).unwrap();
    reader.verify(0..2).unwrap();
    assert!(reader.verify(1..3).unwrap_err().to_string().contains("1..3"));
    let mut values = [0.0; 10];
    reader.read_weights(&Placement::WHOLE.extents(&spec), &mut values).unwrap();
    assert_eq!(values.map(|value| value as usize), std::array::from_fn(|i| i));
    assert!(reader.read(Kind::ExpAvg, &Placement::WHOLE.extents(&spec), &[0..1], &mut [0.0]).is_err());
}
