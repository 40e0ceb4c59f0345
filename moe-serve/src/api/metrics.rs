//! Prometheus series, with vLLM's names where it has one. Each server has its own recorder, none is global.

use crate::engine::{FinishReason, Observer, Outcome};
use crate::{Error, Result};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use moe_models::LayerExperts;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

/// vLLM's buckets for whole requests and for the time to the first token, thinned.
const REQUEST_BUCKETS_S: [f64; 12] = [0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Between two tokens.
const TOKEN_BUCKETS_S: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];

/// The tokens one layer's experts have seen since the start.
struct LayerLoad {
    layer: usize,
    tokens_per_expert: Vec<AtomicU64>,
    counters: Vec<Counter>,
    imbalance_ratio: Gauge,
}

/// All series of one server.
pub(super) struct ServerMetrics {
    handle: PrometheusHandle,
    running: Gauge,
    waiting: Gauge,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: [Counter; 4],
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_request_latency: Histogram,
    request_queue_time: Histogram,
    layers: Vec<LayerLoad>,
}

impl ServerMetrics {
    /// `moe_layers` are `(layer, num_experts)`.
    pub(super) fn new(moe_layers: &[(usize, usize)]) -> Result<Self> {
        let recorder = recorder()?;
        let series = Series(&recorder);
        let reason = |reason| {
            series.counter(
                "request_success_total",
                "Requests that ended, by reason.",
                vec![("finished_reason", reason)],
            )
        };
        Ok(Self {
            running: series.gauge("requests_running", "Requests the engine works on.", vec![]),
            waiting: series.gauge("requests_waiting", "Requests in the queue.", vec![]),
            prompt_tokens: series.counter("prompt_tokens_total", "Prompt tokens read.", vec![]),
            generation_tokens: series.counter("generation_tokens_total", "Tokens generated.", vec![]),
            success: REASONS.map(|r| reason(r.to_owned())),
            time_to_first_token: series.histogram("time_to_first_token_seconds", "Submission to first token."),
            inter_token_latency: series.histogram("inter_token_latency_seconds", "Between two tokens of a sequence."),
            e2e_request_latency: series.histogram("e2e_request_latency_seconds", "Submission to end."),
            request_queue_time: series.histogram("request_queue_time_seconds", "Submission to start."),
            layers: moe_layers.iter().map(|&(layer, num_experts)| series.layer(layer, num_experts)).collect(),
            handle: recorder.handle(),
        })
    }

    /// The exposition text.
    pub(super) fn render(&self, waiting: usize) -> String {
        self.waiting.set(waiting as f64);
        for layer in &self.layers {
            let tokens: Vec<u64> = layer.tokens_per_expert.iter().map(|t| t.load(Ordering::Relaxed)).collect();
            layer.counters.iter().zip(&tokens).for_each(|(counter, &tokens)| counter.absolute(tokens));
            layer.imbalance_ratio.set(imbalance_ratio(&tokens));
        }
        self.handle.render()
    }

    /// Folds histogram samples into their buckets; without it they pile up until someone scrapes.
    pub(super) fn run_upkeep(&self) {
        self.handle.run_upkeep();
    }
}

/// Load of the busiest expert over the mean; 1 before any token came.
fn imbalance_ratio(tokens: &[u64]) -> f64 {
    let sum: u64 = tokens.iter().sum();
    let max = tokens.iter().copied().max().unwrap_or(0);
    if sum == 0 { 1.0 } else { max as f64 * tokens.len() as f64 / sum as f64 }
}

fn recorder() -> Result<PrometheusRecorder> {
    let token_buckets = Matcher::Full("moe_serve_inter_token_latency_seconds".into());
    let builder = PrometheusBuilder::new()
        .set_buckets(&REQUEST_BUCKETS_S)
        .and_then(|builder| builder.set_buckets_for_metric(token_buckets, &TOKEN_BUCKETS_S));
    Ok(builder.map_err(|e| Error::Metrics(e.to_string()))?.build_recorder())
}

/// Registers series under our prefix.
struct Series<'a>(&'a PrometheusRecorder);

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

impl Series<'_> {
    fn key(name: &str, labels: Vec<(&'static str, String)>) -> (Key, KeyName) {
        let name = format!("moe_serve_{name}");
        let labels: Vec<Label> = labels.into_iter().map(|(k, v)| Label::new(k, v)).collect();
        (Key::from_parts(name.clone(), labels), KeyName::from(name))
    }

    fn counter(&self, name: &str, help: &'static str, labels: Vec<(&'static str, String)>) -> Counter {
        let (key, name) = Self::key(name, labels);
        self.0.describe_counter(name, None, SharedString::const_str(help));
        let counter = self.0.register_counter(&key, &METADATA);
        counter.absolute(0);
        counter
    }

    fn gauge(&self, name: &str, help: &'static str, labels: Vec<(&'static str, String)>) -> Gauge {
        let (key, name) = Self::key(name, labels);
        self.0.describe_gauge(name, None, SharedString::const_str(help));
        let gauge = self.0.register_gauge(&key, &METADATA);
        gauge.set(0.0);
        gauge
    }

    fn histogram(&self, name: &str, help: &'static str) -> Histogram {
        let (key, name) = Self::key(name, vec![]);
        self.0.describe_histogram(name, None, SharedString::const_str(help));
        self.0.register_histogram(&key, &METADATA)
    }

    fn layer(&self, layer: usize, num_experts: usize) -> LayerLoad {
        let label = ("layer", layer.to_string());
        let counter = |expert: usize| {
            let labels = vec![label.clone(), ("expert", expert.to_string())];
            self.counter("expert_tokens_total", "Tokens each expert has worked on.", labels)
        };
        let help = "Tokens of the busiest expert over the mean, since the start.";
        LayerLoad {
            layer,
            tokens_per_expert: (0..num_experts).map(|_| AtomicU64::new(0)).collect(),
            counters: (0..num_experts).map(counter).collect(),
            imbalance_ratio: self.gauge("layer_imbalance_ratio", help, vec![label.clone()]),
        }
    }
}

impl Observer for ServerMetrics {
    fn started(&self, queued: Duration) {
        self.running.increment(1.0);
        self.request_queue_time.record(queued);
    }

    fn prompt(&self, num_tokens: usize, _cached: usize) {
        self.prompt_tokens.increment(num_tokens as u64);
    }

    fn token(&self, first_of_job: bool, first_of_choice: bool, elapsed: Duration) {
        self.generation_tokens.increment(1);
        if first_of_job {
            self.time_to_first_token.record(elapsed);
        } else if !first_of_choice {
            self.inter_token_latency.record(elapsed);
        }
    }

    fn experts(&self, experts: &[LayerExperts]) {
        for used in experts {
            let Some(load) = self.layers.iter().find(|load| load.layer == used.layer) else { continue };
            // A dropped choice has an id no expert has.
            let counts = used.expert_ids.iter().filter_map(|&id| load.tokens_per_expert.get(id as usize));
            counts.for_each(|count| _ = count.fetch_add(1, Ordering::Relaxed));
        }
    }

    fn finished(&self, outcome: Outcome, elapsed: Duration) {
        self.running.decrement(1.0);
        self.e2e_request_latency.record(elapsed);
        let reason = match outcome {
            Outcome::Finished(FinishReason::Stop) => 0,
            Outcome::Finished(FinishReason::Length) => 1,
            Outcome::Aborted => 2,
            Outcome::Failed => 3,
        };
        self.success[reason].increment(1);
    }

    fn abandoned(&self) {
        self.success[2].increment(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imbalance_is_max_over_mean() {
        assert_eq!(imbalance_ratio(&[0, 0]), 1.0);
        assert_eq!(imbalance_ratio(&[3, 3]), 1.0);
        assert_eq!(imbalance_ratio(&[9, 1, 1, 1]), 3.0);
    }

    #[test]
    fn every_series_is_there_before_the_first_request() {
        let metrics = ServerMetrics::new(&[(1, 2)]).expect("buckets are not empty");
        metrics.experts(&[LayerExperts {
            layer: 1,
            num_experts: 2,
            top_k: 1,
            expert_ids: vec![1, u32::MAX],
            weights: vec![1.0, 0.0],
        }]);
        let text = metrics.render(3);
        for line in [
            "moe_serve_requests_waiting 3",
            "moe_serve_requests_running 0",
            "moe_serve_request_success_total{finished_reason=\"abort\"} 0",
            "moe_serve_expert_tokens_total{layer=\"1\",expert=\"1\"} 1",
            "moe_serve_expert_tokens_total{layer=\"1\",expert=\"0\"} 0",
            "moe_serve_layer_imbalance_ratio{layer=\"1\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
    }
}
