//! `/v1/chat/completions`.

use crate::support::{TestServer, ids};
use serde_json::{Value, json};

const PATH: &str = "/v1/chat/completions";
/// The prompt of one message, and what follows: an answer, then the other speaker's turn.
const SCRIPT: &str = "A: how are you?\nB: I am well, and you?\nA: the cat";
const ANSWER: &str = "I am well, and you?";

fn ask() -> Value {
    json!({"messages": [{"role": "user", "content": "how are you?"}]})
}

#[test]
fn an_answer_ends_where_the_other_speaks() {
    let server = TestServer::scripted(SCRIPT);
    let answer = server.client.post(PATH, &ask()).ok();
    assert_eq!(answer["object"], "chat.completion");
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": ANSWER, "refusal": null}));
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(answer["usage"]["prompt_tokens"], ids("A: how are you?\nB:").len());
}

#[test]
fn content_may_be_parts() {
    let server = TestServer::scripted(SCRIPT);
    let parts = json!([{"type": "text", "text": "how are"}, {"type": "text", "text": " you?"}]);
    let answer = server.client.post(PATH, &json!({"messages": [{"role": "user", "content": parts}]})).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], ANSWER);
}

#[test]
fn a_stream_begins_with_the_role() {
    let server = TestServer::scripted(SCRIPT);
    let mut body = ask();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let events = server.client.post(PATH, &body).events();
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (last, chunks) = events.split_last().expect("chunks");
    let text: String = chunks.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, ANSWER);
    let roles = chunks.iter().filter(|e| !e["choices"][0]["delta"]["role"].is_null()).count();
    assert_eq!(roles, 1);
    assert_eq!(chunks.last().expect("chunks")["choices"][0]["finish_reason"], "stop");
    assert!(last["usage"]["completion_tokens"].as_u64() > Some(0));
    let id = &events[0]["id"];
    assert!(events.iter().all(|e| &e["id"] == id), "one id for the whole answer");
}

#[test]
fn several_answers_are_told_apart() {
    let server = TestServer::scripted(SCRIPT);
    let mut body = ask();
    (body["n"], body["stream"], body["max_tokens"]) = (2.into(), true.into(), 2.into());
    let events = server.client.post(PATH, &body).events();
    for index in 0..2 {
        let own: Vec<&Value> = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index).collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert_eq!(own.last().expect("chunks")["finish_reason"], "length");
    }
}

#[test]
fn logprobs_have_bytes_and_alternatives() {
    let server = TestServer::scripted(SCRIPT);
    let mut body = ask();
    (body["logprobs"], body["top_logprobs"], body["max_completion_tokens"]) = (true.into(), 3.into(), 4.into());
    let answer = server.client.post(PATH, &body).ok();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("content").clone();
    assert_eq!(content.len(), 4);
    for token in &content {
        let bytes: Vec<u8> =
            token["bytes"].as_array().expect("bytes").iter().map(|b| b.as_u64().expect("byte") as u8).collect();
        assert_eq!(Some(String::from_utf8(bytes).expect("ASCII").as_str()), token["token"].as_str());
        let top = token["top_logprobs"].as_array().expect("alternatives");
        assert_eq!(top.len(), 3);
        assert!(top.windows(2).all(|pair| pair[0]["logprob"].as_f64() >= pair[1]["logprob"].as_f64()));
    }
}

#[test]
fn guidellms_request() {
    let server = TestServer::scripted(SCRIPT);
    let body = json!({
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "how are you?"}]}],
        "stream": true,
        "stream_options": {"include_usage": true, "continuous_usage_stats": true},
        "max_completion_tokens": 8,
        "ignore_eos": true,
    });
    let events = server.client.post(PATH, &body).events();
    assert!(events.last().expect("chunks")["usage"]["total_tokens"].as_u64() > Some(8));
}
