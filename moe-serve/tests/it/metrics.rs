//! `/metrics`.

use crate::support::{ScriptedLm, TestServer, ids, served};
use moe_serve::api::ServerConfig;
use serde_json::json;
use std::sync::Arc;

#[track_caller]
pub(crate) fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    let number = line.and_then(|line| line.rsplit(' ').next()).and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("{series} is missing in\n{text}"))
}

#[test]
fn continuations_side_by_side_take_no_less_time_per_token() {
    let step = std::time::Duration::from_millis(20);
    let server = TestServer::with(served(Arc::new(ScriptedLm::new("").slow(step))), ServerConfig::default());
    server.client.post("/v1/completions", &json!({"prompt": "the", "max_tokens": 5, "n": 4, "ignore_eos": true})).ok();
    let text = server.client.get("/metrics").body;
    let sum = value(&text, "vllm:request_time_per_output_token_seconds_sum{model_name=\"tiny\"}");
    assert!(sum >= step.as_secs_f64(), "{sum} s");
}

#[test]
fn counts_what_happened() {
    let model = served(Arc::new(ScriptedLm::new("the cat sat on the mat")));
    let server = TestServer::with(model, ServerConfig { per_expert_metrics: true, ..ServerConfig::default() });
    let prompt = ids("the cat");
    for _ in 0..2 {
        server.client.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 3})).ok();
    }
    let text = server.client.get("/metrics").body;
    let vllm = |name: &str| value(&text, &format!("vllm:{name}{{model_name=\"tiny\"}}"));
    assert_eq!(vllm("prompt_tokens_total"), 2.0 * prompt.len() as f64);
    assert_eq!(vllm("generation_tokens_total"), 6.0);
    assert_eq!(value(&text, "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"length\"}"), 2.0);
    assert_eq!(vllm("num_requests_running"), 0.0);
    assert_eq!(vllm("prefix_cache_queries_total"), 2.0 * prompt.len() as f64);
    for histogram in [
        "time_to_first_token_seconds",
        "e2e_request_latency_seconds",
        "request_queue_time_seconds",
        "request_prefill_time_seconds",
        "request_decode_time_seconds",
        "request_time_per_output_token_seconds",
        "request_prompt_tokens",
        "request_generation_tokens",
    ] {
        assert_eq!(vllm(&format!("{histogram}_count")), 2.0, "{histogram}");
    }
    assert_eq!(vllm("request_generation_tokens_sum"), 6.0);
    assert_eq!(vllm("inter_token_latency_seconds_count"), 4.0);
    // Each request takes a step for its prompt and two for tokens.
    assert_eq!(vllm("iteration_tokens_total_count"), 6.0);
    assert_eq!(value(&text, "moe_serve_step_model_seconds_count"), 6.0);
    // Layer 1 has top-1 of 4: every token read counts once. The last token of each answer was sampled, not read.
    let reads = 2.0 * (prompt.len() as f64 + 2.0);
    let per_expert = |e| value(&text, &format!("moe_serve_expert_tokens_total{{layer=\"1\",expert=\"{e}\"}}"));
    let counts: Vec<f64> = (0..4).map(per_expert).collect();
    assert_eq!(counts.iter().sum::<f64>(), reads);
    let imbalance = counts.iter().copied().fold(0.0, f64::max) / (reads / 4.0);
    assert!((value(&text, "moe_serve_layer_imbalance_ratio{layer=\"1\"}") - imbalance).abs() < 1e-9);
    assert_eq!(value(&text, "moe_serve_tokens_dropped_total{layer=\"1\"}"), 0.0);
}
