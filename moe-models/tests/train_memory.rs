//! Text is prepared in memory that does not grow with it. A binary of its own, with one test: it counts what the whole
//! process allocates.

use moe_models::train::data::DataCache;
use moe_models::train::{RunText, Silent, TokenizerChoice, tokenizer};
use peak_alloc::PeakAlloc;
use std::io::Write;
use std::path::{Path, PathBuf};

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const MIB: usize = 1 << 20;
/// How much more a text of any size may hold at once than a smaller one.
const SLACK: usize = MIB;
const VOCAB: usize = 262;

/// Numbers and words, in lines of one document.
fn text(bytes: usize) -> String {
    let mut text: String = (0..bytes / 10).map(|i| format!("{} and {},\n", i * 37 % 91, i * i % 17)).collect();
    text.truncate(bytes);
    text
}

fn write_text(dir: &Path, bytes: usize) -> PathBuf {
    let path = dir.join(format!("{bytes}.txt"));
    std::fs::write(&path, text(bytes)).unwrap();
    path
}

fn write_jsonl_xz(dir: &Path, bytes: usize) -> PathBuf {
    let path = dir.join(format!("{bytes}.jsonl.xz"));
    let file = std::fs::File::create(&path).unwrap();
    let mut writer = lzma_rust2::XzWriter::new(file, lzma_rust2::XzOptions::with_preset(0)).unwrap();
    for document in text(bytes).as_bytes().chunks(10_000) {
        let text = std::str::from_utf8(document).unwrap();
        writeln!(writer, "{}", serde_json::json!({ "text": text })).unwrap();
    }
    writer.finish().unwrap();
    path
}

fn open(path: &Path) -> RunText {
    RunText::read(&[path.display().to_string()], &[], &mut Silent).unwrap()
}

/// The most that `work` holds at once, and what is held of it afterwards.
fn held<T>(work: impl FnOnce() -> T) -> (usize, usize) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = work();
    let held = (ALLOCATOR.peak_usage() - before, ALLOCATOR.current_usage().saturating_sub(before));
    drop(result);
    held
}

#[test]
fn text_of_any_size_is_prepared_in_the_same_memory() {
    // With one thread the same pieces are in work at once in every run.
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let train = TokenizerChoice::Train { vocab_size: VOCAB };

    let learn = |bytes: usize| {
        let path = write_jsonl_xz(dir.path(), bytes);
        held(|| open(&path).tokenizer(&train, &mut Silent).unwrap()).0
    };
    let (small, large) = (learn(2 * MIB), learn(8 * MIB));
    assert!(large < small + SLACK, "training a tokenizer holds {small} bytes of 2 MiB and {large} of 8 MiB");

    let trained = open(&write_text(dir.path(), MIB)).tokenizer(&train, &mut Silent).unwrap();
    let tokenizer_path = dir.path().join("tokenizer.json");
    std::fs::write(&tokenizer_path, tokenizer::to_json(&trained).unwrap()).unwrap();
    let cache = DataCache::Folder(dir.path().join("cache"));
    let pack = |path: &Path| {
        held(|| {
            let text = open(path);
            let tokenizer = text.tokenizer(&TokenizerChoice::File(tokenizer_path.clone()), &mut Silent).unwrap();
            let (packed, _) = text.pack(&tokenizer, VOCAB, &cache, &mut Silent).unwrap();
            // Reads every token.
            packed[0].fingerprint();
            packed
        })
    };
    // More than one batch, and twice as much.
    let (small, large) = (write_text(dir.path(), 5 * MIB), write_text(dir.path(), 10 * MIB));
    let ((small_peak, _), (large_peak, kept)) = (pack(&small), pack(&large));
    assert!(large_peak < small_peak + SLACK, "tokenising holds {small_peak} bytes of 5 MiB and {large_peak} of 10 MiB");
    assert!(kept < SLACK, "{kept} bytes of the tokens are held in memory");
    let (warm_peak, _) = pack(&large);
    assert!(warm_peak < 3 * SLACK, "finding the tokens holds {warm_peak} bytes");
}
