//! From text to tokens: the same ids as ever for ordinary text, and bounded work for any other.

use crate::toy::{Toy, VOCAB, config};
use moe_models::train::checkpoint::CheckpointStore;
use moe_models::train::data::DataCache;
use moe_models::train::{Corpus, Event, RunText, Silent, TokenizerChoice, TrainConfig, Trainer, tokenizer};
use std::sync::atomic::AtomicBool;

/// Ids as they were before documents were cut into pieces for the trainer, so that runs made then can be resumed.
#[test]
fn ordinary_text_keeps_its_ids() {
    const IDS: [(&str, u64, u32); 6] = [
        ("code", 407_004, 2_545_899_258),
        ("dialogue", 326_530, 2_871_718_681),
        ("fiction", 356_615, 1_167_930_804),
        ("maths", 415_427, 1_822_618_805),
        ("reference", 433_016, 1_842_098_570),
        ("textbook", 323_715, 1_063_792_323),
    ];
    let dir = tempfile::tempdir().unwrap();
    let folder = DataCache::Folder(dir.path().to_owned());
    // In memory, written to a file, and found there.
    for cache in [&DataCache::Memory, &folder, &folder] {
        let text = RunText::read(&[], &[], &mut Silent).unwrap();
        let trained = text.tokenizer(&TokenizerChoice::Train { vocab_size: 2048 }, &mut Silent).unwrap();
        let (packed, _) = text.pack(&trained, 2048, cache, &mut Silent).unwrap();
        let prints: Vec<_> = packed.iter().map(|source| source.fingerprint()).collect();
        let ids: Vec<_> = prints.iter().map(|print| (print.name.as_str(), print.tokens, print.crc32c)).collect();
        assert_eq!(ids, IDS, "{cache:?}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), IDS.len());
}

/// One letter, and a long word that repeats nothing: minutes and hours, if the tokenizer saw either whole.
#[test]
fn text_without_spaces_is_prepared_and_told_of() {
    let letter = |i: u64| char::from(b'a' + (i * i % 1_000_003 * 7 % 26) as u8);
    let text: String =
        format!("{}\n<|endoftext|>\n{}", "a".repeat(20 << 20), (0..1 << 20).map(letter).collect::<String>());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("solid.txt");
    std::fs::write(&path, &text).unwrap();
    let (mut done, bytes) = (Vec::new(), text.len() as u64);
    let mut observer = |event: &Event| match event {
        Event::Preparing { .. } => done.clear(),
        Event::Prepared { done: read, total } => {
            assert_eq!(*total, bytes);
            done.push(*read);
        }
        _ => {}
    };
    let opened = RunText::read(&[path.display().to_string()], &[], &mut observer).unwrap();
    let trained = opened.tokenizer(&TokenizerChoice::Train { vocab_size: 270 }, &mut observer).unwrap();
    let (packed, _) = opened.pack(&trained, 270, &DataCache::Memory, &mut observer).unwrap();
    assert!(done.len() > 1 && done.is_sorted() && done.iter().all(|&read| read <= bytes), "{done:?}");
    let tokens = packed[0].num_tokens() as u64;
    assert!(tokens > bytes / 1024, "no token is longer than what the trainer was handed");
}

/// Where the tokens lie is no part of a run: its weights have the same bits, also when it is resumed from another place.
#[test]
fn any_cache_trains_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "left"];
    let sources = ["one", "two"].map(|name| {
        let salt = name.len() + usize::from(name == "two");
        let text: String = (0..900).map(|i| format!("{} ", words[(i * i + salt * i + i / 7) % words.len()])).collect();
        let path = dir.path().join(format!("{name}.txt"));
        std::fs::write(&path, format!("{text}\n<|endoftext|>\n{name} ends\n")).unwrap();
        path.display().to_string()
    });
    let folder = DataCache::Folder(dir.path().join("cache"));
    let prepare = |cache: &DataCache, config: &TrainConfig| {
        let text = RunText::read(&sources, &[], &mut Silent).unwrap();
        let trained = text.tokenizer(&TokenizerChoice::Train { vocab_size: VOCAB }, &mut Silent).unwrap();
        let (train, valid) = text.pack(&trained, VOCAB, cache, &mut Silent).unwrap();
        (Corpus::new(train, valid, config).unwrap(), tokenizer::to_json(&trained).unwrap())
    };
    let train = |trainer: &mut Trainer<Toy>| {
        trainer.run(&AtomicBool::new(false), &mut Silent).unwrap();
        (trainer.model().bits(), std::fs::read_to_string(trainer.dir().join("latest")).unwrap())
    };
    let mut ends = Vec::new();
    for (name, cache) in [("held", &DataCache::Memory), ("cold", &folder), ("warm", &folder)] {
        let (corpus, json) = prepare(cache, &config());
        ends.push(train(&mut Trainer::new(Toy::new(7), config(), corpus, json, &dir.path().join(name)).unwrap()));
    }
    assert_eq!(ends[0], ends[1]);
    assert_eq!(ends[0], ends[2]);
    // Begun in memory, ended from files.
    let out = dir.path().join("both");
    let first = TrainConfig { train_tokens: config().train_tokens / 2, ..config() };
    let (corpus, json) = prepare(&DataCache::Memory, &first);
    train(&mut Trainer::new(Toy::new(7), first, corpus, json, &out).unwrap());
    let checkpoint = CheckpointStore::open(&out, 2).unwrap().latest().unwrap().unwrap();
    let (corpus, json) = prepare(&folder, &config());
    let model = Toy::load(&checkpoint);
    assert_eq!(train(&mut Trainer::resume(model, config(), corpus, json, &out, &checkpoint).unwrap()), ends[0]);
}

#[test]
fn training_a_tokenizer_reports_from_the_calling_thread() {
    let words: String = (1..300_000u64).map(|i| format!("{:x} ", i.wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("w.txt");
    std::fs::write(&path, &words).unwrap();
    let text = RunText::read(&[path.display().to_string()], &[], &mut Silent).unwrap();
    let total = words.len() as u64;
    let mut seen = Vec::new();
    let mut observer = |event: &Event| seen.push(event.clone());
    text.tokenizer(&TokenizerChoice::Train { vocab_size: 2000 }, &mut observer).unwrap();
    assert!(matches!(&seen[0], Event::Preparing { what } if what.contains("2000")), "{seen:?}");
    let fits = |event: &Event| matches!(event, Event::Prepared { done, total: t } if done <= t && *t == total);
    assert!(seen.len() > 1 && seen[1..].iter().all(fits), "{seen:?}");
}
