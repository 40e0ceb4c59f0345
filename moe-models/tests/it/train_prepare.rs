//! From text to tokens: the same ids as ever for ordinary text, and bounded work for any other.

use moe_models::train::data::{Documents, Packer};
use moe_models::train::{Event, RunText, Silent, TokenizerChoice, tokenizer};

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
    let text = RunText::read(&[], &[], &mut Silent).unwrap();
    let trained = text.tokenizer(&TokenizerChoice::Train { vocab_size: 2048 }, &mut Silent).unwrap();
    let (packed, _) = text.pack(&trained, 2048, &mut Silent).unwrap();
    let prints: Vec<_> = packed.iter().map(|source| source.fingerprint()).collect();
    let ids: Vec<_> = prints.iter().map(|print| (print.name.as_str(), print.tokens, print.crc32c)).collect();
    assert_eq!(ids, IDS);
}

/// One letter, and a long word that repeats nothing: minutes and hours, if the tokenizer saw either whole.
#[test]
fn text_without_spaces_is_prepared_and_told_of() {
    let letter = |i: u64| char::from(b'a' + (i * i % 1_000_003 * 7 % 26) as u8);
    let texts = vec!["a".repeat(20 << 20), (0..1 << 20).map(letter).collect()];
    let documents = vec![Documents { name: "solid".into(), weight: None, texts }];
    let bytes = documents[0].text_bytes();
    let trained = tokenizer::train_bpe(&documents, 270).unwrap();
    let packer = Packer::new(&trained, 0, 270).unwrap();
    let mut done = Vec::new();
    let packed = packer.pack_watched(&documents[0], &mut |bytes| done.push(bytes)).unwrap();
    assert!(done.len() > 4 && done.is_sorted() && done.last() == Some(&bytes), "{done:?}");
    assert!(packed.num_tokens() as u64 > bytes / 1024, "no token is longer than what the trainer was handed");
}

#[test]
fn training_a_tokenizer_reports_from_the_calling_thread() {
    let words: String = (1..300_000u64).map(|i| format!("{:x} ", i.wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect();
    let text = RunText { train: vec![Documents { name: "w".into(), weight: None, texts: vec![words] }], valid: vec![] };
    let total = text.train[0].text_bytes();
    let mut seen = Vec::new();
    let mut observer = |event: &Event| seen.push(event.clone());
    text.tokenizer(&TokenizerChoice::Train { vocab_size: 2000 }, &mut observer).unwrap();
    assert!(matches!(&seen[0], Event::Preparing { what } if what.contains("2000")), "{seen:?}");
    let fits = |event: &Event| matches!(event, Event::Prepared { done, total: t } if done <= t && *t == total);
    assert!(seen.len() > 1 && seen[1..].iter().all(fits), "{seen:?}");
}
