//! What is kept is found again, and nothing else is: not what is damaged, nor what was made from anything else.

use super::*;
use crate::train::data::{Documents, SourceSpec};
use crate::train::observer::Silent;
use crate::train::tokenizer::train_bpe;
use std::fs::File;
use tokenizers::Tokenizer;

const TEXT: &str = "the cat sat on the mat\nand the other cat sat on the cat\n<|endoftext|>\nthe mat was closed 1234\n";

fn tokenizer(text: &str) -> Tokenizer {
    train_bpe(&[Documents { name: "d".into(), weight: None, texts: vec![text.repeat(5)] }], 275).unwrap()
}

fn packer() -> Packer {
    Packer::new(&tokenizer(TEXT), 0, 275).unwrap()
}

struct Fixture {
    dir: tempfile::TempDir,
    cache: DataCache,
}

/// What was packed, and what was told of it.
struct Packed {
    ids: Vec<u32>,
    told: Vec<String>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let cache = DataCache::Folder(dir.path().join("deep/cache"));
        Self { dir, cache }
    }

    fn source(&self, name: &str, content: &str) -> TextSource {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        let list = SourceSpec::parse_list(&[path.display().to_string()]).unwrap();
        TextSource::open(&list[0], &mut |_, _| ()).unwrap()
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.dir.path().join("deep/cache")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    fn only_file(&self) -> PathBuf {
        let files = self.files();
        assert_eq!(files.len(), 1, "{files:?}");
        files[0].clone()
    }
}

fn pack(cache: &DataCache, packer: &Packer, source: &TextSource) -> Packed {
    let mut told = Vec::new();
    let mut observer = |event: &Event| {
        if let Event::Preparing { what } = event {
            told.push(what.clone());
        }
    };
    let source = cache.pack(packer, source, &mut observer).unwrap();
    Packed { ids: ids(&source), told }
}

fn ids(source: &PackedSource) -> Vec<u32> {
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    source.append_sequence(0, source.num_tokens() - 1, &mut inputs, &mut targets);
    inputs.extend(targets.last());
    inputs
}

#[test]
fn the_second_run_finds_the_tokens_of_the_first() {
    let fixture = Fixture::new();
    let (packer, source) = (packer(), fixture.source("a.txt", TEXT));
    let held = pack(&DataCache::Memory, &packer, &source);
    let cold = pack(&fixture.cache, &packer, &source);
    let modified = |path: PathBuf| std::fs::metadata(path).unwrap().modified().unwrap();
    let written = modified(fixture.only_file());
    let warm = pack(&fixture.cache, &packer, &source);
    assert_eq!(
        (cold.told, warm.told),
        (vec!["tokenising a".to_owned()], vec!["checking the cached tokens of a".into()])
    );
    assert_eq!(modified(fixture.only_file()), written);
    assert!(held.ids.iter().filter(|&&id| id == 0).count() == 2, "two documents");
    assert_eq!((&cold.ids, &warm.ids), (&held.ids, &held.ids));
    // Neither the name nor the place counts.
    let renamed = pack(&fixture.cache, &packer, &fixture.source("b.txt", TEXT));
    assert_eq!((renamed.told, renamed.ids), (vec!["checking the cached tokens of b".into()], held.ids));
}

#[test]
fn a_damaged_file_is_made_anew() {
    let fixture = Fixture::new();
    let (packer, source) = (packer(), fixture.source("a.txt", TEXT));
    let want = pack(&fixture.cache, &packer, &source).ids;
    let whole = std::fs::read(fixture.only_file()).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let cut = |length: usize| whole[..length].to_vec();
    for damaged in
        [cut(0), cut(50), cut(whole.len() - 4), flipped(0), flipped(17), flipped(60), flipped(whole.len() - 2)]
    {
        std::fs::write(fixture.only_file(), damaged).unwrap();
        let packed = pack(&fixture.cache, &packer, &source);
        assert!(packed.told[1].starts_with("tokenising a again: "), "{:?}", packed.told);
        assert_eq!(packed.ids, want);
        assert!(std::fs::read(fixture.only_file()).unwrap() == whole, "whole again");
    }
}

#[test]
fn anything_the_tokens_depend_on_makes_another_file() {
    let fixture = Fixture::new();
    let mut count = 0;
    let mut check_new = |packer: &Packer, source: &TextSource| {
        let want = pack(&DataCache::Memory, packer, source).ids;
        let packed = pack(&fixture.cache, packer, source);
        count += 1;
        assert_eq!((packed.told[0].as_str(), packed.ids, fixture.files().len()), ("tokenising a", want, count));
    };
    check_new(&packer(), &fixture.source("a.txt", TEXT));
    let json = format!("{}\n", serde_json::json!({ "text": TEXT }));
    // The same bytes, read in another way.
    check_new(&packer(), &fixture.source("a.txt", &json));
    check_new(&packer(), &fixture.source("a.jsonl", &json));
    let source = fixture.source("a.txt", TEXT);
    check_new(&Packer::new(&tokenizer(&TEXT.replace("cat", "dog")), 0, 275).unwrap(), &source);
    check_new(&Packer::new(&tokenizer(TEXT), 0, 276).unwrap(), &source);
    check_new(&Packer::new(&tokenizer(TEXT), 1, 275).unwrap(), &source);
    check_new(&Packer::new(&tokenizer(TEXT), 0, 70_000).unwrap(), &source);
    check_new(&packer(), &fixture.source("a.txt", &TEXT.replace("1234", "4321")));
}

/// Many times, as what could go wrong needs two of them within microseconds.
#[test]
fn side_by_side_they_do_not_harm_each_other() {
    let packer = packer();
    for _ in 0..60 {
        let fixture = Fixture::new();
        let source = fixture.source("a.txt", &TEXT.repeat(50));
        let want = pack(&DataCache::Memory, &packer, &source).ids;
        let barrier = std::sync::Barrier::new(8);
        std::thread::scope(|scope| {
            let run = || {
                barrier.wait();
                assert!(pack(&fixture.cache, &packer, &source).ids == want);
            };
            (0..8).for_each(|_| _ = scope.spawn(run));
        });
        fixture.only_file();
    }
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_another_writes_is_not() {
    let fixture = Fixture::new();
    let (packer, source) = (packer(), fixture.source("a.txt", TEXT));
    let DataCache::Folder(dir) = &fixture.cache else { unreachable!() };
    create_dir(dir).unwrap();
    let (abandoned, written) = (dir.join(".tmp-1-0-aa.tokens"), dir.join(".tmp-2-0-bb.tokens"));
    let other = dir.join("notes.txt");
    [&abandoned, &written, &other].iter().for_each(|path| std::fs::write(path, "half").unwrap());
    let writer = File::open(&written).unwrap();
    writer.lock().unwrap();
    pack(&fixture.cache, &packer, &source);
    assert!(!abandoned.exists() && written.exists() && other.exists());
}

#[test]
fn an_error_leaves_no_file() {
    let fixture = Fixture::new();
    let broken = fixture.source("a.jsonl", &format!("{}\n{{\n", serde_json::json!({ "text": TEXT })));
    let message = fixture.cache.pack(&packer(), &broken, &mut Silent).unwrap_err().to_string();
    assert!(message.contains("line 2"), "{message}");
    let changed = fixture.source("b.txt", TEXT);
    fixture.source("b.txt", &TEXT.replace("cat", "dog"));
    let message = fixture.cache.pack(&packer(), &changed, &mut Silent).unwrap_err().to_string();
    assert!(message.contains("b.txt: the file was changed while it was read"), "{message}");
    assert!(fixture.files().is_empty(), "{:?}", fixture.files());
}
