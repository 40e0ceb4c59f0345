//! Whatever is wrong with a request, the answer says what, names the field, and the server goes on.

use crate::support::{Client, Reply, ScriptedLm, TestServer, served};
use moe_serve::api::Limits;
use serde_json::{Value, json};
use std::sync::Arc;

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";
const JSON: &str = "application/json";

#[track_caller]
fn refused(reply: &Reply, status: u16, param: Option<&str>, says: &str) {
    assert_eq!(reply.status, status, "{}", reply.body);
    let error = reply.json()["error"].clone();
    assert_eq!(error["param"].as_str(), param, "{error}");
    assert!(error["type"].is_string(), "{error}");
    let message = error["message"].as_str().expect("a message");
    assert!(message.contains(says), "{message:?} does not say {says:?}");
}

#[track_caller]
fn still_up(client: Client) {
    client.post(COMPLETIONS, &json!({"prompt": "the", "max_tokens": 1})).ok();
}

#[test]
fn impossible_values_name_their_field() {
    let server = TestServer::scripted("the cat");
    for (field, value) in [
        ("temperature", json!(-0.1)),
        ("temperature", json!(999_999)),
        ("temperature", json!("hot")),
        ("top_p", json!(-1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("n", json!(0)),
        ("n", json!(16_384)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!(1_000_000)),
        ("max_tokens", json!(2.5)),
        ("min_tokens", json!(17)),
        ("logprobs", json!(21)),
        ("logprobs", json!(true)),
        ("echo", json!("yes")),
        ("stream", json!(1)),
        ("stream_options", json!({"include_usage": true})),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("x".repeat(1 << 20))),
        ("stop", json!("")),
        ("stop", json!([1])),
        ("stop_token_ids", json!([100_000])),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"100000": 1})),
        ("logit_bias", json!({"1": 101})),
        ("seed", json!(1.5)),
        ("best_of", json!(2)),
        ("suffix", json!("end")),
        ("user", json!("u".repeat(10_000))),
        ("return_expert_choices", json!(1)),
        ("prompt", json!([])),
        ("prompt", json!(null)),
        ("prompt", json!(5)),
        ("prompt", json!([[1], "a", 3])),
        ("prompt", json!([1, "a"])),
        ("prompt", json!([100_000])),
        ("prompt", json!([-1])),
        ("prompt", json!(vec!["a"; 257])),
        ("no_such_field", json!(1)),
        ("metadata", json!({})),
    ] {
        let mut body = json!({"prompt": "the", "max_tokens": 16});
        body[field] = value.clone();
        refused(&server.client.post(COMPLETIONS, &body), 400, Some(field), field);
    }
    still_up(server.client);
}

#[test]
fn impossible_chats_name_their_field() {
    let server = TestServer::scripted("the cat");
    let user = |content: Value| json!([{"role": "user", "content": content}]);
    for (field, value, param) in [
        ("messages", json!(null), "messages"),
        ("messages", json!([]), "messages"),
        ("messages", json!("hi"), "messages"),
        ("messages", json!(["hi"]), "messages[0]"),
        ("messages", json!([{"role": "robot", "content": "hi"}]), "messages[0].role"),
        ("messages", json!([{"content": "hi"}]), "messages[0].role"),
        ("messages", json!([{"role": "user"}]), "messages[0].content"),
        ("messages", json!([{"role": "user", "content": "hi", "colour": 1}]), "messages[0].colour"),
        ("messages", user(json!([{"type": "image_url", "image_url": {"url": "x"}}])), "messages[0].content[0]"),
        ("messages", user(json!([{"type": "text", "text": "x", "more": 1}])), "messages[0].content[0]"),
        ("response_format", json!({"type": "xml"}), "response_format.type"),
        ("top_logprobs", json!(2), "top_logprobs"),
        ("max_completion_tokens", json!(0), "max_completion_tokens"),
        ("max_completion_tokens", json!(5), "max_completion_tokens"),
        ("stream_options", json!({"x": 1}), "stream_options"),
        ("echo", json!(true), "echo"),
    ] {
        let mut body = json!({"messages": user(json!("hi")), "max_tokens": 4});
        body[field] = value;
        refused(&server.client.post(CHAT, &body), 400, Some(param), "");
    }
    let body = json!({"messages": user(json!("hi")), "stream": true, "stream_options": {"x": 1}});
    refused(&server.client.post(CHAT, &body), 400, Some("stream_options.x"), "unknown field");
    still_up(server.client);
}

#[test]
fn the_least_tokens_of_a_model_are_not_more_than_were_asked_for() {
    let mut model = served(Arc::new(ScriptedLm::new("the cat sat on the mat")));
    model.defaults.min_new_tokens = 5;
    let server = TestServer::start(model, Limits::default());
    let mut body = json!({"prompt": "the", "max_tokens": 2});
    assert_eq!(server.client.post(COMPLETIONS, &body).ok()["usage"]["completion_tokens"], 2);
    body["min_tokens"] = json!(5);
    refused(&server.client.post(COMPLETIONS, &body), 400, Some("min_tokens"), "max_tokens");
}

#[test]
fn fields_that_ask_for_nothing_are_accepted() {
    let server = TestServer::scripted("the cat");
    let body = json!({"prompt": "the", "max_tokens": 1, "suffix": null, "user": "me", "best_of": 1, "metadata": null});
    server.client.post(COMPLETIONS, &body).ok();
    let messages = json!([{"role": "user", "content": "hi", "name": null}]);
    let body = json!({"messages": messages, "max_tokens": 1, "response_format": {"type": "text"}, "tools": null});
    server.client.post(CHAT, &body).ok();
}

#[test]
fn broken_json_names_the_position() {
    let server = TestServer::scripted("the cat");
    for (body, says) in [
        (&b"{\"prompt\": \"the\","[..], "line 1 column"),
        (b"{\"prompt\": \"the\"\n \"n\": 1}", "line 2 column 2"),
        (b"", "EOF"),
        (b"[1]", "object"),
        (b"{\"prompt\": \"\xff\xfe\"}", "offset 12"),
        (b"{\"prompt\": \"\\ud800\"}", "column"),
    ] {
        refused(&server.client.post_raw(COMPLETIONS, JSON, body), 400, None, says);
    }
    let deep = format!("{{\"prompt\": {}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    refused(&server.client.post_raw(CHAT, JSON, deep.as_bytes()), 400, None, "nested deeper");
    still_up(server.client);
}

#[test]
fn a_prompt_of_ten_megabytes_is_too_long() {
    let server = TestServer::scripted("the cat");
    let long = "the cat sat. ".repeat(10 * (1 << 20) / 13);
    let begun = std::time::Instant::now();
    let reply = server.client.post(COMPLETIONS, &json!({"prompt": long}));
    refused(&reply, 400, Some("prompt"), "the model's context is 128 tokens");
    assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
    let reply = server.client.post(CHAT, &json!({"messages": [{"role": "user", "content": long}]}));
    refused(&reply, 400, Some("messages"), "the model's context is 128 tokens");
    let reply = server.client.post(COMPLETIONS, &json!({"prompt": vec![1; 1_000_000]}));
    refused(&reply, 400, Some("prompt"), "1000000 tokens");
    assert!(begun.elapsed().as_secs() < 20, "took {:?}", begun.elapsed());
    still_up(server.client);
}

#[test]
fn a_prompt_one_token_too_long() {
    let server = TestServer::scripted("the cat");
    let body = |len: usize, max_tokens: usize| json!({"prompt": vec![5; len], "max_tokens": max_tokens});
    server.client.post(COMPLETIONS, &body(127, 1)).ok();
    refused(&server.client.post(COMPLETIONS, &body(128, 1)), 400, Some("prompt"), "128 tokens");
    server.client.post(COMPLETIONS, &body(128, 0)).ok();
    refused(&server.client.post(COMPLETIONS, &body(129, 0)), 400, Some("prompt"), "129 tokens");
}

#[test]
fn bodies_and_headers() {
    let limits = Limits { max_body_bytes: 1000, ..Limits::default() };
    let server = TestServer::start(served(Arc::new(crate::support::ScriptedLm::new("the cat"))), limits);
    let body = json!({"prompt": "x".repeat(2000)});
    refused(&server.client.post(COMPLETIONS, &body), 413, None, "--max-body-bytes");
    let reply = server.client.post_raw(COMPLETIONS, "text/plain", b"{\"prompt\": \"the\"}");
    refused(&reply, 415, None, "application/json");
    refused(&server.client.get(COMPLETIONS), 405, None, "GET");
    refused(&server.client.request("DELETE", "/v1/models"), 405, None, "DELETE");
    refused(&server.client.get("/v1/embeddings"), 404, None, "/v1/embeddings");
    let body = json!({"model": "gpt-9", "prompt": "the"});
    refused(&server.client.post(COMPLETIONS, &body), 404, Some("model"), "gpt-9");
    still_up(server.client);
}
