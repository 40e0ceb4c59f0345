//! Faults that public issue trackers tell of, where no other test meets them: experts that are damaged, forms without an end, bodies at
//! the limit.

use crate::gpt::tiny;
use crate::support::{Client, TestServer, ids, tokenizer};
use candle_core::DType;
use moe_models::Precision;
use moe_serve::ServedModel;
use moe_serve::api::Limits;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const COMPLETIONS: &str = "/v1/completions";
const MIB: usize = 1 << 20;

/// A folder of the tiny model.
fn folder() -> (TempDir, PathBuf) {
    let dir = TempDir::new().expect("a folder");
    tiny().save(dir.path(), DType::F32).expect("saves");
    tokenizer().save(dir.path().join("tokenizer.json"), false).expect("saves");
    let weights = dir.path().join("model.safetensors");
    (dir, weights)
}

/// The header of a safetensors file, and where its tensors begin.
fn header(bytes: &[u8]) -> (Value, usize) {
    let begin = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    (serde_json::from_slice(&bytes[8..begin]).expect("JSON"), begin)
}

fn load(dir: &Path) -> moe_serve::Result<ServedModel> {
    ServedModel::load(dir, None, Precision::F32)
}

fn tensor_of_an_expert(header: &Value) -> String {
    let names = header.as_object().expect("an object").keys();
    names
        .filter(|name| name.contains("experts.1.") && name.ends_with("weight"))
        .max()
        .expect("there are experts")
        .clone()
}

/// Requests whose tokens it works on are told so, and nobody else notices.
#[test]
fn an_expert_of_nan_costs_the_requests_that_it_works_on() {
    let (dir, weights) = folder();
    let whole = TestServer::start(load(dir.path()).expect("loads"), Limits::default());
    let mut bytes = std::fs::read(&weights).expect("reads");
    let (header, begin) = header(&bytes);
    let offsets = header[tensor_of_an_expert(&header)]["data_offsets"].clone();
    let [from, to] = [0, 1].map(|i| begin + offsets[i].as_u64().expect("an offset") as usize);
    bytes[from..to].chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&f32::NAN.to_le_bytes()));
    std::fs::write(&weights, bytes).expect("writes");
    let damaged = TestServer::start(load(dir.path()).expect("its shapes are right"), Limits::default());
    let ask = |client: Client, token: u32| {
        client.post(COMPLETIONS, &json!({"prompt": [token], "max_tokens": 1, "temperature": 0, "logprobs": 2}))
    };
    let tokens: Vec<u32> = (40..80).collect();
    let want: Vec<Value> = tokens.iter().map(|&token| ask(whole.client, token).ok()["choices"].clone()).collect();
    // Side by side, so that steps mix both kinds.
    let client = damaged.client;
    let threads: Vec<_> = tokens.iter().map(|&token| std::thread::spawn(move || ask(client, token))).collect();
    let (mut answered, mut failed) = (0, 0);
    for (thread, want) in threads.into_iter().zip(&want) {
        let reply = thread.join().expect("a reply");
        if reply.status == 200 {
            assert_eq!(&reply.json()["choices"], want, "an answer that has met a neighbour's NaN");
            answered += 1;
        } else {
            assert_eq!(reply.status, 500, "{}", reply.body);
            assert!(reply.body.contains("not a number"), "{}", reply.body);
            failed += 1;
        }
    }
    assert!(answered > 4 && failed > 4, "{answered} answered, {failed} failed");
}

#[test]
fn two_experts_of_one_name_are_refused() {
    let (dir, weights) = folder();
    let bytes = std::fs::read(&weights).expect("reads");
    let (header, begin) = header(&bytes);
    let name = tensor_of_an_expert(&header);
    let mut text = String::from_utf8(bytes[8..begin].to_vec()).expect("UTF-8");
    // Of the same length, so that all else stays in its place.
    text = text.replace(&format!("\"{name}\""), &format!("\"{}\"", name.replace("experts.1.", "experts.0.")));
    let damaged = [&bytes[..8], text.as_bytes(), &bytes[begin..]].concat();
    std::fs::write(&weights, damaged).expect("writes");
    let error = load(dir.path()).expect_err("one of them is missing").to_string();
    assert!(error.contains("model.safetensors"), "{error}");
}

#[test]
fn a_grammar_that_never_ends_ends_with_the_context() {
    let server = crate::gpt::server();
    for outputs in [
        json!({"grammar": "start: \"ab\" start"}),
        json!({"grammar": "start: x\nx: \"a\" y\ny: \"b\" x"}),
        json!({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}},
            "required": ["a"], "additionalProperties": false}}}}),
    ] {
        let reply =
            server.client.post(COMPLETIONS, &json!({"prompt": "the", "structured_outputs": outputs, "max_tokens": 40}));
        let choice = reply.ok()["choices"][0].clone();
        assert_eq!(
            (&choice["finish_reason"], &reply.json()["usage"]["completion_tokens"]),
            (&json!("length"), &json!(40))
        );
    }
    // Without a number of tokens the context is the end.
    let body = json!({"messages": [{"role": "user", "content": "a"}], "structured_outputs": {"regex": "(ab)*c?(ab)*"}, "logit_bias": {"0": -100}});
    assert_eq!(server.client.post("/v1/chat/completions", &body).ok()["choices"][0]["finish_reason"], "length");
}

#[test]
fn log_probabilities_of_the_whole_vocabulary_are_too_many() {
    let server = TestServer::scripted("the cat");
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, body, field) in [
        (COMPLETIONS, json!({"prompt": "the", "logprobs": 320}), "logprobs"),
        (COMPLETIONS, json!({"prompt": "the", "logprobs": -1}), "logprobs"),
        ("/v1/chat/completions", json!({"messages": messages, "logprobs": true, "top_logprobs": 320}), "top_logprobs"),
        (
            "/v1/responses",
            json!({"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 320}),
            "top_logprobs",
        ),
    ] {
        let reply = server.client.post(path, &body);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(field)), "{path}: {}", reply.body);
    }
}

#[test]
fn a_body_of_32_mib_is_read_and_a_larger_one_is_not() {
    let server = TestServer::scripted("the cat");
    let frame = json!({"prompt": ""}).to_string().len();
    let post = |bytes: usize| server.client.post(COMPLETIONS, &json!({"prompt": "x".repeat(bytes - frame)}));
    let reply = post(32 * MIB);
    assert_eq!(
        (reply.status, &reply.json()["error"]["code"]),
        (400, &json!("context_length_exceeded")),
        "{}",
        reply.body
    );
    let reply = post(32 * MIB + 1);
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (413, &json!("body_too_large")), "{}", reply.body);
    server.client.post(COMPLETIONS, &json!({"prompt": ids("the"), "max_tokens": 1})).ok();
}
