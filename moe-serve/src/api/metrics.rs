//! Prometheus series. Those that vLLM has bear its names, so that its dashboards work; ours begin with `moe_serve_`. Each server has its
//! own recorder, none is global.

use crate::engine::{FinishReason, JobStats, Observer, Outcome, StepStats};
use crate::{Error, Result};
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use moe_models::LayerExperts;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

/// vLLM's buckets for whole requests and for the time to the first token, thinned.
const REQUEST_BUCKETS_S: [f64; 12] = [0.01, 0.05, 0.1, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];
/// Of one token, and of a step's phases.
const TOKEN_BUCKETS_S: [f64; 12] = [0.0003, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5];
/// Numbers of tokens.
const COUNT_BUCKETS: [f64; 14] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 1e5];

/// The tokens one layer's experts have seen since the start.
struct LayerLoad {
    layer: usize,
    tokens_per_expert: Vec<AtomicU64>,
    dropped: AtomicU64,
    /// Empty where a series for each expert was not asked for.
    counters: Vec<Counter>,
    dropped_counter: Counter,
    imbalance_ratio: Gauge,
}

/// All series of one server.
pub(super) struct ServerMetrics {
    handle: PrometheusHandle,
    running: Gauge,
    waiting: Gauge,
    kv_cache_usage: Gauge,
    preemptions: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    success: [Counter; 4],
    corrupted: Counter,
    rejections: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    draft_tokens: Counter,
    accepted_tokens: Counter,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e_request_latency: Histogram,
    request_queue_time: Histogram,
    request_prefill_time: Histogram,
    request_decode_time: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    iteration_tokens: Histogram,
    model_seconds: Histogram,
    engine_seconds: Histogram,
    layers: Vec<LayerLoad>,
}

impl ServerMetrics {
    /// `moe_layers` are `(layer, num_experts)`; with `per_expert` each expert of each layer has a series.
    pub(super) fn new(model: &str, moe_layers: &[(usize, usize)], per_expert: bool) -> Result<Self> {
        let recorder = recorder()?;
        let ours = Series { recorder: &recorder, prefix: "moe_serve_", model: None };
        let vllm = Series { recorder: &recorder, prefix: "vllm:", model: Some(model) };
        let success = |reason: &str| {
            let labels = vec![("finished_reason", reason.to_owned())];
            vllm.counter("request_success_total", "Requests that ended, by reason.", labels)
        };
        let layer = |&(layer, num_experts): &(usize, usize)| ours.layer(layer, num_experts, per_expert);
        Ok(Self {
            running: vllm.gauge("num_requests_running", "Requests the engine works on.", vec![]),
            waiting: vllm.gauge("num_requests_waiting", "Requests in the queue.", vec![]),
            kv_cache_usage: vllm.gauge("kv_cache_usage_perc", "Share of the cache's pages in use, 1 for all.", vec![]),
            preemptions: vllm.counter("num_preemptions_total", "Sequences whose pages were taken away.", vec![]),
            prompt_tokens: vllm.counter("prompt_tokens_total", "Prompt tokens read.", vec![]),
            generation_tokens: vllm.counter("generation_tokens_total", "Tokens generated.", vec![]),
            success: REASONS.map(success),
            corrupted: vllm.counter("corrupted_requests_total", "Requests with a logit that is not a number.", vec![]),
            rejections: vllm.counter("admission_rejections_total", "Requests refused for a full queue.", vec![]),
            prefix_queries: vllm.counter("prefix_cache_queries_total", "Prompt tokens looked for.", vec![]),
            prefix_hits: vllm.counter("prefix_cache_hits_total", "Prompt tokens that were kept.", vec![]),
            draft_tokens: vllm.counter("spec_decode_num_draft_tokens_total", "Tokens guessed.", vec![]),
            accepted_tokens: vllm.counter("spec_decode_num_accepted_tokens_total", "Guesses that came true.", vec![]),
            time_to_first_token: vllm.histogram("time_to_first_token_seconds", "Submission to first token."),
            inter_token_latency: vllm.histogram("inter_token_latency_seconds", "Between two tokens of a sequence."),
            time_per_output_token: vllm.histogram(
                "request_time_per_output_token_seconds",
                "First token to end, by each token after the first.",
            ),
            e2e_request_latency: vllm.histogram("e2e_request_latency_seconds", "Submission to end."),
            request_queue_time: vllm.histogram("request_queue_time_seconds", "Submission to start."),
            request_prefill_time: vllm.histogram("request_prefill_time_seconds", "Start to first token."),
            request_decode_time: vllm.histogram("request_decode_time_seconds", "First token to end."),
            request_prompt_tokens: vllm.histogram("request_prompt_tokens", "Prompt tokens of a request."),
            request_generation_tokens: vllm.histogram("request_generation_tokens", "Tokens generated for a request."),
            iteration_tokens: vllm.histogram("iteration_tokens_total", "Tokens of a step."),
            model_seconds: ours.histogram("step_model_seconds", "The model's part of a step."),
            engine_seconds: ours.histogram("step_engine_seconds", "The rest of a step: drawing and telling tokens."),
            layers: moe_layers.iter().map(layer).collect(),
            handle: recorder.handle(),
        })
    }

    /// The exposition text.
    pub(super) fn render(&self, waiting: usize) -> String {
        self.waiting.set(waiting as f64);
        for layer in &self.layers {
            let tokens: Vec<u64> = layer.tokens_per_expert.iter().map(|t| t.load(Ordering::Relaxed)).collect();
            layer.counters.iter().zip(&tokens).for_each(|(counter, &tokens)| counter.absolute(tokens));
            layer.dropped_counter.absolute(layer.dropped.load(Ordering::Relaxed));
            layer.imbalance_ratio.set(imbalance_ratio(&tokens));
        }
        self.handle.render()
    }

    /// A request was refused for a full queue.
    pub(super) fn rejected(&self) {
        self.rejections.increment(1);
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
    let full = |name: &str| Matcher::Full(name.to_owned());
    let build = || {
        let mut builder = PrometheusBuilder::new().set_buckets(&REQUEST_BUCKETS_S)?;
        for name in ["vllm:inter_token_latency_seconds", "vllm:request_time_per_output_token_seconds"] {
            builder = builder.set_buckets_for_metric(full(name), &TOKEN_BUCKETS_S)?;
        }
        builder = builder.set_buckets_for_metric(Matcher::Prefix("moe_serve_step_".into()), &TOKEN_BUCKETS_S)?;
        for name in ["vllm:request_prompt_tokens", "vllm:request_generation_tokens", "vllm:iteration_tokens_total"] {
            builder = builder.set_buckets_for_metric(full(name), &COUNT_BUCKETS)?;
        }
        Ok(builder.build_recorder())
    };
    build().map_err(|e: metrics_exporter_prometheus::BuildError| Error::Metrics(e.to_string()))
}

/// Registers series under a prefix.
struct Series<'a> {
    recorder: &'a PrometheusRecorder,
    prefix: &'static str,
    /// Of the label `model_name`.
    model: Option<&'a str>,
}

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, Some(module_path!()));

impl Series<'_> {
    fn key(&self, name: &str, labels: Vec<(&'static str, String)>) -> (Key, KeyName) {
        let name = format!("{}{name}", self.prefix);
        let model = self.model.map(|model| ("model_name", model.to_owned()));
        let labels: Vec<Label> = model.into_iter().chain(labels).map(|(k, v)| Label::new(k, v)).collect();
        (Key::from_parts(name.clone(), labels), KeyName::from(name))
    }

    fn counter(&self, name: &str, help: &'static str, labels: Vec<(&'static str, String)>) -> Counter {
        let (key, name) = self.key(name, labels);
        self.recorder.describe_counter(name, None, SharedString::const_str(help));
        let counter = self.recorder.register_counter(&key, &METADATA);
        counter.absolute(0);
        counter
    }

    fn gauge(&self, name: &str, help: &'static str, labels: Vec<(&'static str, String)>) -> Gauge {
        let (key, name) = self.key(name, labels);
        self.recorder.describe_gauge(name, None, SharedString::const_str(help));
        let gauge = self.recorder.register_gauge(&key, &METADATA);
        gauge.set(0.0);
        gauge
    }

    fn histogram(&self, name: &str, help: &'static str) -> Histogram {
        let (key, name) = self.key(name, vec![]);
        self.recorder.describe_histogram(name, None, SharedString::const_str(help));
        self.recorder.register_histogram(&key, &METADATA)
    }

    fn layer(&self, layer: usize, num_experts: usize, per_expert: bool) -> LayerLoad {
        let label = ("layer", layer.to_string());
        let counter = |expert: usize| {
            let labels = vec![label.clone(), ("expert", expert.to_string())];
            self.counter("expert_tokens_total", "Tokens each expert has worked on.", labels)
        };
        let help = "Tokens of the busiest expert over the mean, since the start.";
        let dropped = "Choices dropped for an expert's capacity.";
        LayerLoad {
            layer,
            tokens_per_expert: (0..num_experts).map(|_| AtomicU64::new(0)).collect(),
            dropped: AtomicU64::new(0),
            counters: (0..if per_expert { num_experts } else { 0 }).map(counter).collect(),
            dropped_counter: self.counter("tokens_dropped_total", dropped, vec![label.clone()]),
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
            let mut tokens = vec![0; load.tokens_per_expert.len()];
            let mut dropped = 0;
            // A dropped choice has an id no expert has.
            for &id in &used.expert_ids {
                *tokens.get_mut(id as usize).unwrap_or(&mut dropped) += 1;
            }
            for (sum, tokens) in load.tokens_per_expert.iter().zip(tokens) {
                sum.fetch_add(tokens, Ordering::Relaxed);
            }
            load.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
    }

    fn step(&self, stats: &StepStats) {
        self.iteration_tokens.record(stats.tokens as f64);
        self.kv_cache_usage.set(stats.page_usage);
        self.preemptions.absolute(stats.preemptions);
        self.prefix_queries.absolute(stats.prefix.0);
        self.prefix_hits.absolute(stats.prefix.1);
        self.draft_tokens.increment(stats.drafts.0 as u64);
        self.accepted_tokens.increment(stats.drafts.1 as u64);
        let (total, model) = stats.seconds;
        self.model_seconds.record(model);
        self.engine_seconds.record(total - model);
    }

    fn finished(&self, outcome: Outcome, stats: &JobStats) {
        self.running.decrement(1.0);
        self.e2e_request_latency.record(stats.total);
        self.request_prompt_tokens.record(stats.prompt_tokens as f64);
        self.request_generation_tokens.record(stats.generated_tokens as f64);
        if let Some(first) = stats.first_token {
            let decode = stats.total - first;
            self.request_prefill_time.record(first - stats.queued);
            self.request_decode_time.record(decode);
        }
        if let Some(time) = stats.time_per_token {
            self.time_per_output_token.record(time);
        }
        let reason = match outcome {
            Outcome::Finished(FinishReason::Stop) => 0,
            Outcome::Finished(FinishReason::Length) => 1,
            Outcome::Aborted => 2,
            Outcome::Corrupted => {
                self.corrupted.increment(1);
                3
            }
            Outcome::Failed => 3,
        };
        self.success[reason].increment(1);
    }

    fn abandoned(&self) {
        self.success[2].increment(1);
    }

    fn drained(&self) {
        self.kv_cache_usage.set(0.0);
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
        let metrics = ServerMetrics::new("m", &[(1, 2)], true).expect("buckets are not empty");
        metrics.experts(&[LayerExperts {
            layer: 1,
            num_experts: 2,
            top_k: 1,
            expert_ids: vec![1, u32::MAX],
            weights: vec![1.0, 0.0],
        }]);
        let text = metrics.render(3);
        for line in [
            "vllm:num_requests_waiting{model_name=\"m\"} 3",
            "vllm:num_requests_running{model_name=\"m\"} 0",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"abort\"} 0",
            "vllm:num_preemptions_total{model_name=\"m\"} 0",
            "moe_serve_expert_tokens_total{layer=\"1\",expert=\"1\"} 1",
            "moe_serve_expert_tokens_total{layer=\"1\",expert=\"0\"} 0",
            "moe_serve_tokens_dropped_total{layer=\"1\"} 1",
            "moe_serve_layer_imbalance_ratio{layer=\"1\"} 2",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
        }
        let few = ServerMetrics::new("m", &[(1, 256)], false).expect("buckets are not empty").render(0);
        assert!(!few.contains("expert=") && few.contains("imbalance_ratio{layer=\"1\"} 1"), "{few}");
    }
}
