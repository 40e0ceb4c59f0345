//! `moe-serve bench`, on the command line as users have it.

use crate::support::{TestServer, served};
use clap::Parser;
use moe_serve::api::ServerConfig;
use moe_serve::cli::Cli;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

fn run(args: &[&str], json: &Path) -> anyhow::Result<Value> {
    let json = json.to_str().expect("a path of text");
    let args = [&["moe-serve", "bench"], args, &["--json", json]].concat();
    Cli::try_parse_from(args)?.run()?;
    Ok(serde_json::from_slice(&std::fs::read(json)?)?)
}

#[test]
fn a_server_that_runs() {
    let dir = tempfile::tempdir().expect("a folder");
    let model = served(Arc::new(crate::gpt::tiny().into_packed().expect("packs")));
    let server = TestServer::with(model, ServerConfig { api_keys: vec!["k".into()], ..ServerConfig::default() });
    let url = format!("http://{}", server.client.address);
    let online = ["online", "--url", &url, "--input-len", "40", "--output-len", "6", "--num-requests", "12"];
    let args = |more: &[&'static str]| online.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();
    let file = dir.path().join("a.json");
    let report =
        run(&args(&["--api-key", "k", "--request-rate", "500", "--good-ttft-ms", "60000"]), &file).expect("runs");
    assert_eq!(report["requests"], serde_json::json!({"200": 12}));
    assert_eq!((&report["output_tokens"], &report["prompt_tokens"]), (&72.into(), &480.into()));
    assert_eq!(report["goodput_requests_per_s"], report["requests_per_s"]);
    for times in ["ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"] {
        assert!(report[times]["p50"].as_f64() <= report[times]["p99"].as_f64(), "{times}: {report}");
        assert!(report[times]["p99"].as_f64() > Some(0.0), "{times}: {report}");
    }
    let nothing_is_good = args(&["--api-key", "k", "--concurrency", "2", "--good-ttft-ms", "0"]);
    let report = run(&nothing_is_good, &file).expect("runs");
    assert_eq!(report["goodput_requests_per_s"], 0.0);
    assert_eq!(report["cached_tokens"].as_u64(), Some(12 * 32), "the same prompts as before");
    for (bad, name) in [
        (args(&["--api-key", "wrong"]), "401"),
        (args(&["--api-key", "k", "--request-rate", "0"]), "--request-rate"),
        (args(&["--api-key", "k", "--concurrency", "0"]), "--concurrency"),
        (vec!["online", "--url", "ftp://x"], "--url"),
        (vec!["online", "--url", "http://127.0.0.1:1"], "connecting"),
    ] {
        let error = format!("{:#}", run(&bad, &file).expect_err(name));
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn the_engine_alone() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("a.json");
    let offline = ["offline", "--concurrency", "1,3", "--input-len", "9", "--output-len", "5", "--rounds", "1"];
    let report = run(&offline, &file).expect("runs");
    let cases = report["cases"].as_array().expect("a list");
    assert_eq!(cases.iter().map(|case| case["sequences"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(3)]);
    assert!(cases.iter().all(|case| case["decode_tokens_per_s"].as_f64() > Some(0.0)), "{report}");
    for (bad, name) in [
        (["offline", "--output-len", "1"], "--output-len"),
        (["offline", "--input-len", "4000"], "the model's context is 256"),
        (["offline", "--rounds", "0"], "--rounds"),
    ] {
        let error = format!("{:#}", run(&bad, &file).expect_err(name));
        assert!(error.contains(name), "{error}");
    }
}

/// Spans are the whole process's, so this one has its own.
#[test]
fn parts_of_a_step() {
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("a.json");
    let output = Command::new(env!("CARGO_BIN_EXE_moe-serve"))
        .args([
            "bench",
            "offline",
            "--input-len",
            "8",
            "--output-len",
            "4",
            "--concurrency",
            "2",
            "--rounds",
            "1",
            "--phases",
        ])
        .arg("--json")
        .arg(&file)
        .output()
        .expect("starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&std::fs::read(&file).expect("a file")).expect("JSON");
    let phases = &report["cases"][0]["phases"];
    let shares = phases.as_object().expect("shares").values().map(|share| share.as_f64().expect("a number"));
    assert!((shares.sum::<f64>() - 1.0).abs() < 1e-9, "{phases}");
    for name in ["step", "plan", "draw", "pass", "attention", "norm", "route", "experts", "logits"] {
        assert!(phases[name].as_f64() > Some(0.0), "{name}: {phases}");
    }
}
