//! Keys, origins, and the small routes.

use crate::support::{Reply, ScriptedLm, TestServer, ids, served, tokenizer};
use moe_serve::api::{Limits, Server, ServerConfig};
use moe_serve::text::TextTokenizer;
use serde_json::{Value, json};
use std::sync::Arc;

fn server(config: ServerConfig) -> TestServer {
    TestServer::with(served(Arc::new(ScriptedLm::new("the cat sat on the mat"))), config)
}

fn text(value: &str) -> String {
    value.to_owned()
}

#[test]
fn every_route_but_health_needs_a_key() {
    let config = ServerConfig { api_keys: vec![text("one"), text("two")], ..ServerConfig::default() };
    let server = server(ServerConfig { admin_key: Some(text("root")), ..config });
    let get = |path, key: Option<&'static str>| server.client.with_key(key).get(path);
    for path in ["/health", "/ready", "/version"] {
        assert_eq!(get(path, None).status, 200, "{path}");
    }
    for path in ["/", "/v1/models", "/metrics", "/v1/completions", "/tokenize", "/nowhere", "/reset_prefix_cache"] {
        for key in [None, Some("wrong"), Some("")] {
            let reply = get(path, key);
            assert_eq!((reply.status, &reply.json()["error"]["code"]), (401, &json!("invalid_api_key")), "{path}");
            assert!(reply.headers.contains("www-authenticate: Basic"), "{}", reply.headers);
        }
    }
    assert_eq!(get("/v1/models", Some("two")).status, 200);
    assert_eq!(get("/", Some("one")).status, 200);
    assert_eq!(get("/metrics", Some("one")).status, 401, "that is the admin's");
    assert_eq!(get("/metrics", Some("root")).status, 200);
    let body = json!({"prompt": "the", "max_tokens": 2});
    server.client.with_key(Some("one")).post("/v1/completions", &body).ok();
    assert_eq!(server.client.with_key(Some("root")).request("POST", "/reset_prefix_cache").status, 200);
}

#[test]
fn foreign_pages_ask_only_where_they_are_allowed_to() {
    let origin = "https://example.org";
    let ask = |server: &TestServer, origin: &str| -> Reply {
        let headers = format!(
            "origin: {origin}\r\naccess-control-request-method: POST\r\naccess-control-request-headers: x-stainless-lang\r\n"
        );
        server.client.with_headers("OPTIONS", "/v1/completions", &headers)
    };
    let closed = server(ServerConfig::default());
    assert!(!ask(&closed, origin).headers.contains("access-control-allow-origin"));
    let config =
        ServerConfig { allowed_origins: vec![text(origin)], api_keys: vec![text("k")], ..ServerConfig::default() };
    let open = server(config);
    let reply = ask(&open, origin);
    assert!(reply.status < 300, "{}", reply.status);
    assert!(reply.headers.contains("access-control-allow-origin: https://example.org"), "{}", reply.headers);
    // Clients send headers of their own.
    assert!(reply.headers.contains("access-control-allow-headers: x-stainless-lang"), "{}", reply.headers);
    assert!(!ask(&open, "https://example.com").headers.contains("access-control-allow-origin"));
    for bad in ["example.org", "https://", "https://a.org/path", "https://a\nb"] {
        let model = served(Arc::new(ScriptedLm::new("the cat")));
        let error = Server::new(model, ServerConfig { allowed_origins: vec![text(bad)], ..ServerConfig::default() });
        assert!(error.expect_err(bad).to_string().contains("allowed origin"), "{bad}");
    }
}

#[test]
fn tokens_of_a_text_and_back() {
    let server = server(ServerConfig::default());
    let reply = server.client.post("/tokenize", &json!({"prompt": "the cat sat", "return_token_strs": true})).ok();
    assert_eq!((&reply["tokens"], &reply["max_model_len"]), (&json!(ids("the cat sat")), &json!(128)));
    assert_eq!(reply["count"], json!(ids("the cat sat").len()));
    assert_eq!(reply["token_strs"].as_array().expect("asked for").len(), ids("the cat sat").len());
    let back = server.client.post("/detokenize", &json!({"tokens": reply["tokens"]})).ok();
    assert_eq!(back["prompt"], "the cat sat");
    let chat =
        server.client.post("/tokenize", &json!({"messages": [{"role": "user", "content": "how are you?"}]})).ok();
    assert_eq!((&chat["tokens"], &chat["token_strs"]), (&json!(ids("A: how are you?\nB:")), &json!(null)));
    for (path, body, field) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "messages"),
        ("/tokenize", json!({"prompt": "a", "add_special_tokens": 1}), "add_special_tokens"),
        (
            "/tokenize",
            json!({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": false}),
            "add_special_tokens",
        ),
        ("/tokenize", json!({"prompt": "a", "add_generation_prompt": false}), "add_generation_prompt"),
        ("/tokenize", json!({"prompt": "a", "extra": 1}), "extra"),
        ("/tokenize", json!({"prompt": "a ".repeat(1 << 20)}), "prompt"),
        ("/tokenize", json!({"messages": [{"role": "user", "content": "a ".repeat(1 << 20)}]}), "messages"),
        ("/tokenize", json!({"messages": [{"role": "user"}]}), "messages[0].content"),
        ("/detokenize", json!({"tokens": [1, 4_000_000]}), "tokens"),
        ("/detokenize", json!({"tokens": "abc"}), "tokens"),
        ("/detokenize", json!({}), "tokens"),
    ] {
        let reply = server.client.post(path, &body);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(field)), "{body}");
    }
    assert_eq!(server.client.post("/tokenize", &json!({"prompt": "a", "model": "other"})).status, 404);
    assert_eq!(server.client.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn tokens_of_a_text_with_what_begins_it_or_without() {
    use tokenizers::processors::template::TemplateProcessing;
    let mut begins = TemplateProcessing::builder();
    begins.try_single("<|endoftext|> $A").expect("a template");
    let begins = begins.special_tokens(vec![("<|endoftext|>", 0)]).build().expect("complete");
    let mut inner = tokenizer();
    inner.with_post_processor(Some(begins));
    let mut model = served(Arc::new(ScriptedLm::new("the cat")));
    model.tokenizer = Arc::new(TextTokenizer::new(inner, model.lm.vocab_size()).expect("byte-level"));
    let server = TestServer::start(model, Limits::default());
    let tokens = |body: Value| server.client.post("/tokenize", &body).ok()["tokens"].clone();
    let whole = ids("the cat");
    let begun = [&[0], whole.as_slice()].concat();
    assert_eq!(tokens(json!({"prompt": "the cat"})), json!(begun));
    assert_eq!(tokens(json!({"prompt": "the cat", "add_special_tokens": true})), json!(begun));
    assert_eq!(tokens(json!({"prompt": "the cat", "add_special_tokens": false})), json!(whole));
    let chat = json!([{"role": "user", "content": "a"}]);
    assert_eq!(tokens(json!({"messages": chat, "add_special_tokens": true})), tokens(json!({"messages": chat})));
}

#[test]
fn what_was_kept_of_prompts_can_be_forgotten() {
    let server = server(ServerConfig::default());
    let body = json!({"prompt": ids(&"the cat sat on the mat ".repeat(8)), "max_tokens": 1});
    let cached =
        || server.client.post("/v1/completions", &body).ok()["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert_eq!((cached(), cached()), (json!(0), json!(32)));
    server.client.post("/reset_prefix_cache", &json!({}));
    assert_eq!((cached(), cached()), (json!(0), json!(32)));
}
