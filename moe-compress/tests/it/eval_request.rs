//! The rule by which text becomes requests of token ids, on a real tokenizer.

use moe_compress::eval::{Request, RequestEncoder, TokenRequest};
use moe_models::train::tokenizer;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;
use tokenizers::processors::template::TemplateProcessing;

/// A small trained model with its tokenizer.
pub(crate) fn model_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-serve/model")
}

pub(crate) fn tokenizer() -> Tokenizer {
    tokenizer::load(&model_folder().join("tokenizer.json")).unwrap()
}

fn ids(text: &str) -> Vec<u32> {
    tokenizer().encode(text, false).unwrap().get_ids().to_vec()
}

fn encode(context: &str, continuation: &str, max_length: usize) -> moe_compress::Result<TokenRequest> {
    let encoder = RequestEncoder::new(tokenizer(), 4096, max_length).unwrap();
    encoder.encode(&Request { context: context.into(), continuation: continuation.into() })
}

#[track_caller]
fn check(context: &str, continuation: &str, want: (&[u32], &[u32])) {
    let got = encode(context, continuation, 256).unwrap();
    assert_eq!((&got.context[..], &got.continuation[..]), want);
}

#[test]
fn the_whole_is_split_where_the_context_ends() {
    let (context, whole) = (ids("The old man"), ids("The old man looked away"));
    check("The old man", " looked away", (&context, &whole[context.len()..]));
}

#[test]
fn space_at_the_contexts_end_goes_to_the_continuation() {
    let (context, whole) = (ids("The old man"), ids("The old man \n looked"));
    check("The old man \n ", "looked", (&context, &whole[context.len()..]));
}

#[test]
fn a_word_across_the_border_is_split_by_count() {
    let (context, whole) = (ids("There was an anim"), ids("There was an animal"));
    assert_ne!(&whole[..context.len()], &context[..], "the case must have a token across the border");
    // As lm-eval does: the context is encoded alone, the continuation is what the whole has past as many tokens.
    let encoder = RequestEncoder::new(tokenizer(), 4096, 256).unwrap();
    let request =
        |continuation: &str| Request { context: "There was an anim".into(), continuation: continuation.into() };
    let got = encoder.encode(&request("al, he said")).unwrap();
    let longer = ids("There was an animal, he said");
    assert_eq!((got.context, &got.continuation[..]), (context.clone(), &longer[context.len()..]));
}

#[test]
fn nothing_is_given_but_the_end_of_a_document() {
    check("", " word", (&[0], &ids(" word")));
    check("  ", "word", (&[0], &ids("  word")));
    // A continuation that begins with that token gives it away.
    check("", "<|endoftext|> word", (&[0], &ids(" word")));
}

#[test]
fn the_context_loses_its_beginning() {
    let (context, whole) = (ids("one two three four five"), ids("one two three four five six"));
    let continuation = &whole[context.len()..];
    // The last token is only predicted, so one more fits than the model reads.
    let room = 5 + 1 - continuation.len();
    let got = encode("one two three four five", " six", 5).unwrap();
    assert_eq!(got.context, context[context.len() - room..]);
    assert_eq!(got.continuation, continuation);
    let fits = encode("one two three four five", " six", whole.len() - 1).unwrap();
    assert_eq!(fits.context, context);
}

/// As Llama's, which put `<s>` before a text.
#[test]
fn what_a_tokenizer_begins_texts_with_stands_before_contexts() {
    let mut with_bos = tokenizer();
    with_bos.add_special_tokens([tokenizers::AddedToken::from("<s>", true)]).unwrap();
    let bos = with_bos.token_to_id("<s>").unwrap();
    let mut template = TemplateProcessing::builder();
    let template = template.try_single("<s> $A").unwrap().special_tokens(vec![("<s>", bos)]).build().unwrap();
    with_bos.with_post_processor(Some(template));
    let encoder = RequestEncoder::new(with_bos, 4097, 256).unwrap();
    let after_bos = |text: &str| [&[bos], &ids(text)[..]].concat();
    let encode = |context: &str, continuation: &str| {
        let request = Request { context: context.into(), continuation: continuation.into() };
        let TokenRequest { context, continuation } = encoder.encode(&request).unwrap();
        (context, continuation)
    };
    assert_eq!(encode("The old man", " looked"), (after_bos("The old man"), ids(" looked")));
    assert_eq!(encode("<s>The old man", " looked"), (after_bos("The old man"), ids(" looked")), "once");
    assert_eq!(encode("", " word"), (vec![bos], ids(" word")));
    assert_eq!(encode("", "<s> word"), (vec![bos], ids(" word")));
    assert_eq!(encoder.encode_prompt("The old man", 200).unwrap(), after_bos("The old man"));
    assert_eq!(encoder.encode_prompt("", 200).unwrap(), [bos]);
    assert_eq!(encoder.eos_id(), 0, "texts still end as they did");
}

#[test]
fn what_cannot_be_scored_is_refused() {
    let long = " a b c d e f";
    assert!(ids(long).len() > 5);
    let message = encode("context", long, 5).unwrap_err().to_string();
    assert!(message.contains("--max-length") && message.contains(long), "{message}");
    let message = encode("context", "", 5).unwrap_err().to_string();
    assert!(message.contains("no tokens"), "{message}");
    assert!(RequestEncoder::new(tokenizer(), 4096, 0).unwrap_err().to_string().contains("max_length"));
    assert!(RequestEncoder::new(tokenizer(), 300, 5).unwrap_err().to_string().contains("300"));
}
