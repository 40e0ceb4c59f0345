//! `/metrics`.

use crate::support::{TestServer, ids};
use serde_json::json;

#[track_caller]
pub(crate) fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find(|line| line.strip_prefix(series).is_some_and(|rest| rest.starts_with(' ')));
    let number = line.and_then(|line| line.rsplit(' ').next()).and_then(|number| number.parse().ok());
    number.unwrap_or_else(|| panic!("{series} is missing in\n{text}"))
}

#[test]
fn counts_what_happened() {
    let server = TestServer::scripted("the cat sat on the mat");
    let prompt = ids("the cat");
    for _ in 0..2 {
        server.client.post("/v1/completions", &json!({"prompt": prompt, "max_tokens": 3})).ok();
    }
    let text = server.client.get("/metrics").body;
    assert_eq!(value(&text, "moe_serve_prompt_tokens_total"), 2.0 * prompt.len() as f64);
    assert_eq!(value(&text, "moe_serve_generation_tokens_total"), 6.0);
    assert_eq!(value(&text, "moe_serve_request_success_total{finished_reason=\"length\"}"), 2.0);
    assert_eq!(value(&text, "moe_serve_requests_running"), 0.0);
    for histogram in ["time_to_first_token", "e2e_request_latency", "request_queue_time"] {
        assert_eq!(value(&text, &format!("moe_serve_{histogram}_seconds_count")), 2.0);
    }
    assert_eq!(value(&text, "moe_serve_inter_token_latency_seconds_count"), 4.0);
    // Layer 1 has top-1 of 4: every token read counts once. The last token of each answer was sampled, not read.
    let reads = 2.0 * (prompt.len() as f64 + 2.0);
    let per_expert = |e| value(&text, &format!("moe_serve_expert_tokens_total{{layer=\"1\",expert=\"{e}\"}}"));
    let counts: Vec<f64> = (0..4).map(per_expert).collect();
    assert_eq!(counts.iter().sum::<f64>(), reads);
    let imbalance = counts.iter().copied().fold(0.0, f64::max) / (reads / 4.0);
    assert!((value(&text, "moe_serve_layer_imbalance_ratio{layer=\"1\"}") - imbalance).abs() < 1e-9);
}
