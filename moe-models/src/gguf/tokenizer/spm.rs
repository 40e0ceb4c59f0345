//! `llama`: SentencePiece's byte pairs. The file has a score for each token and no merges: two neighbours merge to the token of the
//! highest score, so merges are all the ways in which a token is two others, those of high scores first.

use super::{Kind, Vocabulary};
use crate::fields::Checked;
use crate::gguf::file::GgufFile;
use serde_json::{Value, json};
use std::collections::HashMap;

/// What stands for a space.
const SPACE: &str = "\u{2581}";
/// Longest token that is looked at in all its parts. Those of published models have fewer than 100 bytes.
const MOST_BYTES: usize = 512;
/// Most pairs for each token, on the average. Those of published models have about two.
const MOST_PAIRS: usize = 64;

pub(super) fn tokenizer(file: &GgufFile, vocabulary: &Vocabulary<'_>) -> Checked<Value> {
    let most = vocabulary.tokens.len();
    let scores = file.numbers("tokenizer.ggml.scores", most)?.ok_or("tokenizer.ggml.scores is missing")?;
    if scores.len() != vocabulary.tokens.len() {
        let (scores, tokens) = (scores.len(), vocabulary.tokens.len());
        return Err(format!("tokenizer.ggml.scores has {scores} entries for {tokens} tokens"));
    }
    let unknown = match vocabulary.named(file, "unknown_token_id")? {
        Some((_, text)) => Some(text),
        None => vocabulary.used().find(|(.., kind)| *kind == Kind::Unknown).map(|(_, text, _)| text),
    };
    let prefix = file.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary.ids()?, "merges": merges(vocabulary, &scores)?,
        },
    }))
}

/// Pairs of tokens that are one, by its score, the highest first. Of one token, pairs of low ids come first.
fn merges<'a>(vocabulary: &Vocabulary<'a>, scores: &[f64]) -> Checked<Vec<[&'a str; 2]>> {
    let normal = || vocabulary.used().filter(|(.., kind)| *kind == Kind::Normal);
    let ids: HashMap<&str, u32> = normal().map(|(id, token, _)| (token, id)).collect();
    let (mut merges, most) = (Vec::new(), MOST_PAIRS * vocabulary.tokens.len());
    for (id, token, _) in normal() {
        if token.len() > MOST_BYTES {
            return Err(format!("token {id} has {} bytes, more than the {MOST_BYTES} that are read", token.len()));
        }
        let score = scores[id as usize];
        if score.is_nan() {
            return Err(format!("tokenizer.ggml.scores has no number for token {id}"));
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(left_id), Some(right_id)) = (ids.get(left), ids.get(right)) {
                merges.push((score, [*left_id, *right_id], [left, right]));
            }
        }
        if merges.len() > most {
            return Err(format!(
                "tokenizer.ggml.tokens are two others in more than {most} ways, {MOST_PAIRS} for each; no vocabulary of pieces is so"
            ));
        }
    }
    merges.sort_by(|(a, a_ids, _), (b, b_ids, _)| b.total_cmp(a).then(a_ids.cmp(b_ids)));
    Ok(merges.into_iter().map(|(.., pair)| pair).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each token is two others in all the ways that it can be cut.
    #[test]
    fn a_vocabulary_of_one_letter_is_refused_before_its_pairs_fill_memory() {
        let letters = "a".repeat(MOST_BYTES);
        let pairs = |count: usize| {
            let tokens: Vec<&str> = (1..=count).map(|len| &letters[..len]).collect();
            let vocabulary = Vocabulary { kinds: vec![Kind::Normal; count], tokens };
            merges(&vocabulary, &vec![0.0; count]).map(|pairs| pairs.len())
        };
        assert_eq!(pairs(100), Ok(99 * 100 / 2));
        let text = pairs(200).unwrap_err();
        assert!(text.contains("tokenizer.ggml.tokens") && text.contains("more than 12800 ways"), "{text}");
    }
}
