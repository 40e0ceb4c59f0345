//! Queueing, leaving, failing, stopping.

use crate::metrics::value;
use crate::support::{Client, NAN_TEXT, PANIC_TEXT, ScriptedLm, TestServer, served};
use moe_serve::api::{Limits, ServerConfig};
use moe_serve::engine::SchedulingConfig;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATH: &str = "/v1/completions";
const STEP: Duration = Duration::from_millis(20);

fn slow_server(limits: Limits) -> TestServer {
    let script = "the cat sat on the mat. ".repeat(20);
    TestServer::start(served(Arc::new(ScriptedLm::new(&script).slow(STEP))), limits)
}

/// About two seconds of work.
fn long() -> Value {
    json!({"prompt": "the", "max_tokens": 100, "ignore_eos": true, "stream": true})
}

fn short() -> Value {
    json!({"prompt": "the", "max_tokens": 1})
}

#[track_caller]
fn wait_until(client: Client, series: &str, want: f64) {
    let begun = Instant::now();
    loop {
        let got = value(&client.get("/metrics").body, series);
        if got == want {
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "{series} stays {got}, want {want}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let model = served(Arc::new(ScriptedLm::new(&"the cat sat on the mat. ".repeat(20)).slow(STEP)));
    let scheduling = SchedulingConfig { max_sequences: 1, ..SchedulingConfig::default() };
    let limits = Limits { max_queue: 1, ..Limits::default() };
    let server = TestServer::with(model, ServerConfig { limits, scheduling, ..ServerConfig::default() });
    let running = server.client.open(PATH, &long());
    wait_until(server.client, r#"vllm:num_requests_running{model_name="tiny"}"#, 1.0);
    let waiting = server.client.write_only(PATH, &short());
    wait_until(server.client, r#"vllm:num_requests_waiting{model_name="tiny"}"#, 1.0);
    let refused = server.client.post(PATH, &short());
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.headers.contains("retry-after: 1"), "{}", refused.headers);
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    wait_until(server.client, r#"vllm:admission_rejections_total{model_name="tiny"}"#, 1.0);
    // Who waits and leaves makes room.
    drop(waiting);
    wait_until(server.client, r#"vllm:num_requests_waiting{model_name="tiny"}"#, 0.0);
    drop(running);
    server.client.post(PATH, &short()).ok();
}

#[test]
fn a_client_that_leaves_frees_the_engine() {
    let server = slow_server(Limits::default());
    let abort = r#"vllm:request_success_total{model_name="tiny",finished_reason="abort"}"#;
    let mut stream = server.client.open(PATH, &long());
    assert_eq!(stream.status, 200);
    assert!(!stream.chunk().is_empty());
    drop(stream);
    wait_until(server.client, abort, 1.0);
    // Not streaming: the connection alone says that nobody waits any more.
    let mut whole = long();
    whole["stream"] = false.into();
    let connection = server.client.write_only(PATH, &whole);
    wait_until(server.client, r#"vllm:num_requests_running{model_name="tiny"}"#, 1.0);
    drop(connection);
    wait_until(server.client, abort, 2.0);
    let generated = value(&server.client.get("/metrics").body, r#"vllm:generation_tokens_total{model_name="tiny"}"#);
    assert!(generated < 150.0, "the two requests went on to {generated} of 200 tokens");
    wait_until(server.client, r#"vllm:kv_cache_usage_perc{model_name="tiny"}"#, 0.0);
    server.client.post(PATH, &short()).ok();
}

#[test]
fn tokens_arrive_while_others_are_generated() {
    let server = slow_server(Limits::default());
    let mut stream = server.client.open(PATH, &long());
    let mut chunks = 0;
    while !stream.chunk().is_empty() {
        chunks += 1;
    }
    assert!(chunks > 20, "only {chunks} chunks");
}

#[test]
fn a_panic_in_the_engine_costs_one_request() {
    let server = TestServer::scripted("the cat");
    for _ in 0..2 {
        let reply = server.client.post(PATH, &json!({"prompt": PANIC_TEXT}));
        assert_eq!(reply.status, 500, "{}", reply.body);
        assert!(reply.body.contains("the model read what it cannot bear"), "{}", reply.body);
        server.client.post(PATH, &short()).ok();
        server.client.get("/health").ok();
    }
    let events = server.client.post(PATH, &json!({"prompt": PANIC_TEXT, "stream": true})).events();
    assert_eq!(events.last().expect("an event")["error"]["type"], "server_error");
}

#[test]
fn nan_logits_are_an_error() {
    let server = TestServer::scripted("the cat");
    for body in [
        json!({"prompt": NAN_TEXT}),
        json!({"prompt": format!("{NAN_TEXT}the"), "echo": true, "logprobs": 1, "max_tokens": 0}),
    ] {
        let reply = server.client.post(PATH, &body);
        assert_eq!(reply.status, 500, "{}", reply.body);
        assert!(reply.body.contains("not a number"), "{}", reply.body);
    }
    server.client.post(PATH, &short()).ok();
}

#[test]
fn a_request_may_not_take_for_ever() {
    let server = slow_server(Limits { request_timeout: Duration::from_millis(200), ..Limits::default() });
    let mut body = long();
    let events = server.client.post(PATH, &body).events();
    assert_eq!(events.last().expect("an event")["error"]["code"], "timeout");
    body["stream"] = false.into();
    let reply = server.client.post(PATH, &body);
    assert_eq!((reply.status, &reply.json()["error"]["code"]), (504, &json!("timeout")));
    wait_until(server.client, r#"vllm:num_requests_running{model_name="tiny"}"#, 0.0);
    server.client.post(PATH, &short()).ok();
}

#[test]
fn stopping_lets_the_running_stream_end() {
    let mut server = slow_server(Limits::default());
    let mut body = long();
    body["max_tokens"] = 30.into();
    let stream = server.client.open(PATH, &body);
    server.ask_to_stop();
    let events = stream.whole().events();
    assert_eq!(events.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    server.wait();
    assert!(std::net::TcpStream::connect(server.client.address).is_err(), "nobody listens any more");
}

#[test]
fn stopping_does_not_wait_for_ever() {
    let mut server = slow_server(Limits { shutdown_grace: Duration::from_millis(100), ..Limits::default() });
    let stream = server.client.open(PATH, &long());
    let begun = Instant::now();
    server.ask_to_stop();
    server.wait();
    assert!(begun.elapsed() < Duration::from_millis(1500), "took {:?}", begun.elapsed());
    drop(stream);
}
