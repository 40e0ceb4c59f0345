//! Answers of a given form, from a model of random weights that would say anything.

use crate::gpt::server;
use crate::support::{TestServer, served};
use moe_serve::api::ServerConfig;
use moe_serve::engine::{SchedulingConfig, SpeculationConfig};
use serde_json::{Value, json};
use std::sync::Arc;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 3},
        },
        "required": ["name", "age", "pets"],
        "additionalProperties": false,
    })
}

#[track_caller]
fn check_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(value["name"].as_str().is_some_and(|name| name.chars().count() <= 8), "{text}");
    assert!(value["age"].as_u64().is_some_and(|age| age <= 120), "{text}");
    let pets = value["pets"].as_array().expect(text);
    assert!(pets.len() <= 3 && pets.iter().all(|pet| pet == "cat" || pet == "dog"), "{text}");
}

#[test]
fn json_of_a_schema_whole_and_streamed() {
    let server = server();
    for seed in 0..8 {
        let mut body = json!({
            "messages": [{"role": "user", "content": "who?"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": person(), "strict": true}},
            "temperature": 1.5, "seed": seed, "max_tokens": 110,
        });
        let choice = server.client.post(CHAT, &body).ok()["choices"][0].clone();
        let text = choice["message"]["content"].as_str().expect("text").to_owned();
        // White space may be said as long as one likes.
        if choice["finish_reason"] == "stop" {
            check_person(&text);
        } else {
            assert!(text.trim_start().starts_with('{'), "{text}");
        }
        body["stream"] = true.into();
        let events = server.client.post(CHAT, &body).events();
        let piece = |event: &Value| event["choices"][0]["delta"]["content"].as_str().map(str::to_owned);
        assert_eq!(events.iter().filter_map(piece).collect::<String>(), text, "the same, streamed");
    }
}

#[test]
fn choices_regular_expressions_and_grammars() {
    let server = server();
    let ask = |outputs: Value, seed: u64| {
        let body =
            json!({"prompt": "the", "structured_outputs": outputs, "temperature": 1.2, "seed": seed, "max_tokens": 60});
        let choice = server.client.post(COMPLETIONS, &body).ok()["choices"][0].clone();
        (choice["text"].as_str().expect("text").to_owned(), choice["finish_reason"].clone())
    };
    let mut said = std::collections::BTreeSet::new();
    for seed in 0..12 {
        let (text, finish) = ask(json!({"choice": ["the cat", "the dog", "nobody"]}), seed);
        assert!(["the cat", "the dog", "nobody"].contains(&text.as_str()) && finish == "stop", "{text}");
        said.insert(text);
        let (text, finish) = ask(json!({"regex": "[0-9]{3}-[ab]{2}"}), seed);
        let (digits, letters) = text.split_once('-').expect("a dash");
        assert!(digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit()), "{text}");
        assert!(letters.len() == 2 && letters.bytes().all(|b| b == b'a' || b == b'b') && finish == "stop", "{text}");
        let (text, _) = ask(json!({"grammar": "start: \"(\" inner \")\"\ninner: \"x\" | start"}), seed);
        assert!(text.bytes().all(|b| b"(x)".contains(&b)), "{text}");
    }
    assert!(said.len() > 1, "{said:?}");
}

#[test]
fn a_form_ends_where_it_does_whatever_is_ignored() {
    let server = server();
    let mut ended_early = 0;
    for seed in 0..12 {
        let mut body = json!({"prompt": "the", "structured_outputs": {"regex": "[ab]{2}(cd)?"}, "temperature": 1.2, "seed": seed,
            "max_tokens": 60, "ignore_eos": true});
        let choice = server.client.post(COMPLETIONS, &body).ok()["choices"][0].clone();
        // It may end after two letters, but that is ignored.
        assert!(choice["text"].as_str().is_some_and(|text| text.ends_with("cd")), "{choice}");
        assert_eq!(choice["finish_reason"], "stop");
        body["stop_token_ids"] = json!([0]);
        let choice = server.client.post(COMPLETIONS, &body).ok()["choices"][0].clone();
        ended_early += usize::from(choice["text"].as_str().is_some_and(|text| text.len() == 2));
    }
    // Unless it is named itself.
    assert!(ended_early > 0);
}

#[test]
fn guesses_and_company_change_no_answer_of_a_form() {
    let body = |seed: u64| json!({"prompt": "the cat", "structured_outputs": {"json": person()}, "temperature": 1.0, "seed": seed, "max_tokens": 60, "n": 2});
    let alone = server();
    let want: Vec<Value> =
        (0..6).map(|seed| alone.client.post(COMPLETIONS, &body(seed)).ok()["choices"].clone()).collect();
    let speculation = SpeculationConfig { num_tokens: 4, min_ngram: 1, max_ngram: 3 };
    let scheduling =
        SchedulingConfig { speculation, max_batch_tokens: 16, max_sequences: 16, ..SchedulingConfig::default() };
    let model = served(Arc::new(crate::gpt::tiny().into_packed().expect("packs")));
    let server = TestServer::with(model, ServerConfig { scheduling, ..ServerConfig::default() });
    let client = server.client;
    let threads: Vec<_> = (0..6)
        .map(|seed| std::thread::spawn(move || client.post(COMPLETIONS, &body(seed)).ok()["choices"].clone()))
        .collect();
    let got: Vec<Value> = threads.into_iter().map(|thread| thread.join().expect("an answer")).collect();
    assert_eq!(got, want);
}

#[test]
fn impossible_forms_name_their_field() {
    let server = server();
    let schema = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}});
    for (fields, param) in [
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}),
            "response_format.json_schema.schema",
        ),
        (json!({"response_format": {"type": "text", "more": 1}}), "response_format.more"),
        (json!({"response_format": "json"}), "response_format"),
        (schema(json!({"type": "nonsense"})), "response_format"),
        (schema(json!({"type": "string", "pattern": "("})), "response_format"),
        (schema(json!({"$ref": "file:///etc/passwd"})), "response_format"),
        (schema(json!({"description": "x".repeat(70_000)})), "response_format.json_schema.schema"),
        (json!({"structured_outputs": {}}), "structured_outputs.json"),
        (json!({"structured_outputs": {"regex": "a", "choice": ["b"]}}), "structured_outputs.json"),
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs"),
        (json!({"structured_outputs": {"choice": []}}), "structured_outputs.choice"),
        (json!({"structured_outputs": {"choice": ["a", 3]}}), "structured_outputs.choice"),
        (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs.structural_tag"),
        (
            json!({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}),
            "structured_outputs",
        ),
    ] {
        let mut body = json!({"prompt": "the", "max_tokens": 4});
        body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        let reply = server.client.post(COMPLETIONS, &body);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{fields}: {}", reply.body);
    }
}
