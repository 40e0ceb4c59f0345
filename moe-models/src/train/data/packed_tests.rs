//! What the stream of tokens holds: ids, ends of documents, bytes per token.

use super::*;
use crate::train::data::pieces::pieces;
use crate::train::data::{Documents, Packer};
use crate::train::files::crc32c;
use crate::train::tokenizer::train_bpe;
use tokenizers::{PaddingParams, PaddingStrategy, Tokenizer, TruncationParams};

fn documents(texts: &[&str]) -> Documents {
    Documents { name: "d".into(), weight: None, texts: texts.iter().map(|t| (*t).to_owned()).collect() }
}

fn tokenizer() -> Tokenizer {
    train_bpe(&[documents(&["the cat sat on the mat\n\n  and the cäse — of it\nwas closed 1234"; 8])], 280).unwrap()
}

fn stream(source: &PackedSource) -> Vec<u32> {
    source.file.ids(source.range.clone()).collect()
}

fn token_bytes(source: &PackedSource) -> Vec<u16> {
    source.file.text_bytes(source.range.clone()).collect()
}

#[test]
fn documents_are_joined_by_the_end_id_and_decode_back() {
    let tokenizer = tokenizer();
    let texts = ["the cat — sät\n", "on <|endoftext|> it"];
    let packed = Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents(&texts)).unwrap();
    let ids = stream(&packed);
    let parts: Vec<String> = ids.split(|&id| id == 0).map(|p| tokenizer.decode(p, false).unwrap()).collect();
    assert_eq!(parts, [texts[0], texts[1], ""], "a spelled-out separator must not become the end token");
    let bytes: u64 = token_bytes(&packed).into_iter().map(u64::from).sum();
    assert_eq!(bytes, texts.iter().map(|t| t.len() as u64).sum::<u64>());
}

/// A file for another model may cut texts short and fill them up.
#[test]
fn truncation_and_padding_of_the_tokenizer_are_left_out() {
    let plain = tokenizer();
    let mut other = plain.clone();
    let truncation = TruncationParams { max_length: 3, ..TruncationParams::default() };
    let padding = PaddingParams { strategy: PaddingStrategy::Fixed(64), ..PaddingParams::default() };
    other.with_padding(Some(padding)).with_truncation(Some(truncation)).unwrap();
    let packers = [plain, other].map(|tokenizer| Packer::new(&tokenizer, 0, 280).unwrap());
    let texts = documents(&["the cat sat on the mat", "closed"]);
    let [plain, other] = packers.map(|packer| stream(&packer.pack(&texts).unwrap()));
    assert!(plain.len() > 6);
    assert_eq!(plain, other);
}

#[test]
fn sequences_share_one_token_and_predict_every_token_once() {
    let tokenizer = tokenizer();
    let packed = Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents(&["the cat sat on the mat"; 5])).unwrap();
    let (ids, seq_len) = (stream(&packed), 7);
    let (mut inputs, mut targets, mut bytes) = (Vec::new(), Vec::new(), 0);
    for i in 0..packed.num_sequences(seq_len) {
        packed.append_sequence(i, seq_len, &mut inputs, &mut targets);
        bytes += packed.target_bytes(i, seq_len);
    }
    let n = inputs.len();
    assert_eq!(n, (ids.len() - 1) / seq_len * seq_len);
    assert_eq!(inputs, ids[..n]);
    assert_eq!(targets, ids[1..=n]);
    assert_eq!(bytes, token_bytes(&packed)[1..=n].iter().map(|&b| u64::from(b)).sum::<u64>());
}

#[test]
fn a_long_document_in_pieces_gives_the_ids_of_the_whole() {
    let tokenizer = tokenizer();
    let lines = "the cat sat\non the mat\n\n  and, the\n cäse\n— of it\nwas 12\n34\n".repeat(9000);
    let (spaces, code) = ("— of the cäse ".repeat(60_000), "it's=12;(the)".repeat(60_000));
    for text in [lines, spaces, code] {
        check_ids_of_the_whole(&tokenizer, &text);
    }
}

#[track_caller]
fn check_ids_of_the_whole(tokenizer: &Tokenizer, text: &str) {
    assert!(pieces(text).count() > 1);
    let packed = Packer::new(tokenizer, 0, 280).unwrap().pack(&documents(&[text])).unwrap();
    let mut whole = tokenizer.encode(text, false).unwrap().get_ids().to_vec();
    whole.push(0);
    assert!(stream(&packed) == whole, "the ids differ");
}

#[test]
fn the_tail_and_the_fingerprint() {
    let tokenizer = tokenizer();
    let mut packed = Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents(&["the cat sat"; 50])).unwrap();
    let (before, print) = (stream(&packed), packed.fingerprint());
    let whole: Vec<u8> = before.iter().flat_map(|id| id.to_le_bytes()).collect();
    assert_eq!((print.tokens, print.crc32c), (before.len() as u64, crc32c(&whole)));
    let bytes = token_bytes(&packed);
    let mut tail = packed.split_tail(0.1);
    assert_eq!(tail.num_tokens(), before.len() / 10);
    assert_ne!(packed.fingerprint(), print);
    // A tail can be cut again, and reads its own tokens.
    let last = tail.split_tail(0.5);
    assert_eq!([stream(&packed), stream(&tail), stream(&last)].concat(), before);
    assert_eq!([token_bytes(&packed), token_bytes(&tail), token_bytes(&last)].concat(), bytes);
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    last.append_sequence(0, 5, &mut inputs, &mut targets);
    let start = before.len() - last.num_tokens();
    assert_eq!((&inputs[..], &targets[..]), (&before[start..start + 5], &before[start + 1..start + 6]));
    assert_eq!(last.target_bytes(0, 5), bytes[start + 1..start + 6].iter().map(|&b| u64::from(b)).sum::<u64>());
}

#[test]
fn a_long_stream_has_the_checksum_of_the_whole() {
    let tokenizer = tokenizer();
    let packed = Packer::new(&tokenizer, 0, 280).unwrap().pack(&documents(&["12 the mat "; 20_000])).unwrap();
    assert!(packed.num_tokens() > 3 * FINGERPRINTED_TOKENS);
    let whole: Vec<u8> = stream(&packed).iter().flat_map(|id| id.to_le_bytes()).collect();
    assert_eq!(packed.fingerprint().crc32c, crc32c(&whole));
}

#[test]
fn ids_outside_the_vocabulary_are_refused() {
    let tokenizer = tokenizer();
    let packer = Packer::new(&tokenizer, 0, 260).unwrap();
    let message = packer.pack(&documents(&["the cat sat on the mat"])).unwrap_err().to_string();
    assert!(message.contains("260"), "{message}");
    assert!(Packer::new(&tokenizer, 280, 280).is_err());
}
