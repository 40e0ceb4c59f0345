//! How text is cut into words before byte pairs of them are merged, by the names that files give it.
//!
//! # Source
//! The expressions in the `tokenizer.json` of the models that these names were given for, and in tiktoken; llama.cpp's (July 2026),
//! which stand for the same.

use crate::fields::Checked;
use serde_json::{Value, json};

/// GPT-2's words, which are also the ones of a byte-level pre-tokenizer.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// o200k's: a word ends where a small letter is followed by a capital one.
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// Letters that have two cases, of the Unicode of its time.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[A-Za-z",
    r"\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}",
    r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}",
    r"\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}",
    r"\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}",
    r"\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}",
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}",
    r"\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}",
    r"\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}",
    r"\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}",
    r"\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}",
    r"\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}",
    r"\x{1E900}-\x{1E943}",
    "]+"
);
const DEEPSEEK: [&str; 6] = [
    r"[\r\n]",
    DEEPSEEK_LETTERS,
    r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
    r"\s+$",
    r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
    r"\p{N}",
];
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// A way to cut text.
struct Cut {
    /// What files call it.
    names: &'static [&'static str],
    /// Each cuts what the one before has left.
    words: &'static [&'static str],
    /// Whether text is put into Unicode's composed form first.
    composes: bool,
    /// Whether a word that is a token is that token, whatever merges would give.
    whole_words: bool,
    /// Whether texts begin with a token, unless the file says otherwise.
    adds_bos: bool,
}

const CUTS: [Cut; 8] = [
    Cut { names: &["gpt-2"], words: &[GPT2], composes: false, whole_words: false, adds_bos: false },
    Cut { names: &["olmo"], words: &[GPT2], composes: true, whole_words: false, adds_bos: false },
    Cut {
        names: &["smollm", "starcoder"],
        words: &[r"\p{N}", GPT2],
        composes: false,
        whole_words: false,
        adds_bos: false,
    },
    Cut {
        names: &["llama-bpe", "llama3", "llama-v3"],
        words: &[LLAMA3],
        composes: false,
        whole_words: true,
        adds_bos: true,
    },
    // A word that is a token is that token to tiktoken.
    Cut { names: &["gpt-4o"], words: &[GPT4O], composes: false, whole_words: true, adds_bos: false },
    Cut { names: &["qwen2", "deepseek-r1-qwen"], words: &[QWEN2], composes: true, whole_words: false, adds_bos: false },
    Cut { names: &["deepseek-llm"], words: &DEEPSEEK, composes: false, whole_words: false, adds_bos: false },
    Cut { names: &["deepseek-v3"], words: &DEEPSEEK_V3, composes: false, whole_words: false, adds_bos: false },
];

fn find(name: &str) -> Checked<&'static Cut> {
    CUTS.iter().find(|cut| cut.names.contains(&name)).ok_or_else(|| {
        let known: Vec<&str> = CUTS.iter().flat_map(|cut| cut.names).copied().collect();
        format!(
            "tokenizer.ggml.pre {name:?} is not one of {}: how it cuts text is not known here; take the model's Hugging Face folder",
            known.join(", ")
        )
    })
}

/// Whether texts begin with a token where the file does not say.
pub(super) fn adds_bos(name: &str) -> bool {
    find(name).is_ok_and(|cut| cut.adds_bos)
}

/// Whether a word that is a token is that token.
pub(super) fn keeps_whole_words(name: &str) -> Checked<bool> {
    Ok(find(name)?.whole_words)
}

/// The `normalizer` and the `pre_tokenizer` of a `tokenizer.json`.
pub(super) fn stages(name: &str) -> Checked<[Value; 2]> {
    let cut = find(name)?;
    let split = |words: &&str| json!({ "type": "Split", "pattern": { "Regex": words }, "behavior": "Isolated", "invert": false });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let stages: Vec<Value> = cut.words.iter().map(split).chain([bytes]).collect();
    let normalizer = if cut.composes { json!({ "type": "NFC" }) } else { Value::Null };
    Ok([normalizer, json!({ "type": "Sequence", "pretokenizers": stages })])
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::PreTokenizerWrapper;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    const PIECES: &str = include_str!("../../../tests/fixtures/gguf/pieces.json");

    /// Pieces of texts are those that tiktoken cuts.
    #[test]
    fn text_is_cut_as_its_name_says() {
        let expected: Value = serde_json::from_str(PIECES).unwrap();
        let mut texts = 0;
        for (name, samples) in expected.as_object().unwrap() {
            let [_, cut] = stages(name).unwrap();
            // Without the last stage, which writes bytes as other characters.
            let words = cut["pretokenizers"].as_array().unwrap().split_last().unwrap().1;
            let words: PreTokenizerWrapper =
                serde_json::from_value(json!({ "type": "Sequence", "pretokenizers": words })).unwrap();
            for sample in samples.as_array().unwrap() {
                let mut text = PreTokenizedString::from(sample["text"].as_str().unwrap());
                words.pre_tokenize(&mut text).unwrap();
                let pieces: Vec<_> = text
                    .get_splits(OffsetReferential::Original, OffsetType::Byte)
                    .into_iter()
                    .map(|(piece, ..)| piece)
                    .collect();
                assert_eq!(json!(pieces), sample["pieces"], "{name}");
                texts += 1;
            }
        }
        assert_eq!(texts, 12);
    }
}
