//! With a real, tiny GPT of random weights, and with the model inside the program.

use crate::support::{TestServer, ids, served, tokenizer};
use candle_core::{DType, Device};
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::{CausalLm, Family, LogitsOf, Model, PoolConfig, Precision, ReadFamily, SequenceStep, StepOutput};
use moe_serve::ServedModel;
use moe_serve::api::Limits;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

const PATH: &str = "/v1/completions";

pub(crate) fn tiny() -> Gpt {
    let mut config = GptConfig::preset("tiny-pr-moe").expect("a preset");
    // Large initial weights give sharp distributions, so that different draws show.
    (config.vocab_size, config.d_model, config.d_ff, config.num_heads, config.init_std) = (320, 16, 16, 2, 0.3);
    Gpt::new(config, 1, &Device::Cpu).expect("a valid configuration")
}

pub(crate) fn server() -> TestServer {
    TestServer::start(served(Arc::new(tiny().into_packed().expect("packs"))), Limits::default())
}

/// One forward pass over all of `ids`.
fn whole_pass(gpt: &Gpt, token_ids: &[u32]) -> StepOutput {
    let decoder = gpt.decoder();
    let config = PoolConfig::for_tokens(1, token_ids.len());
    let pool = decoder.new_pool(config).expect("a pool");
    let step = SequenceStep { sequence: &mut pool.sequence(), token_ids, logits: LogitsOf::All };
    decoder.forward(&mut [step], &pool).expect("runs")
}

/// Log-softmax of the model's logits after each token of `ids`, in one forward pass.
fn log_softmax(gpt: &Gpt, ids: &[u32]) -> Vec<Vec<f64>> {
    let rows = whole_pass(gpt, ids).logits.to_vec2::<f32>().expect("a matrix");
    let normalise = |row: Vec<f32>| {
        let log_sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        row.into_iter().map(|x| f64::from(x) - log_sum).collect()
    };
    rows.into_iter().map(normalise).collect()
}

fn numbers(list: &Value) -> Vec<f64> {
    list.as_array().expect("a list").iter().filter_map(Value::as_f64).collect()
}

#[test]
fn logprobs_are_the_models_own() {
    let server = server();
    let prompt = ids("the cat sat on the mat");
    let body = json!({"prompt": prompt, "max_tokens": 12, "temperature": 0, "logprobs": 3, "echo": true, "ignore_eos": true,
        "return_expert_choices": true});
    let choice = server.client.post(PATH, &body).ok()["choices"][0].clone();
    // The answer's ids, from the extension, give the whole sequence to check against one full forward pass.
    let all: Vec<u32> = choice["expert_choices"]
        .as_array()
        .expect("list")
        .iter()
        .map(|t| t["token_id"].as_u64().expect("id") as u32)
        .collect();
    assert_eq!(all.len(), prompt.len() + 12);
    assert_eq!(all[..prompt.len()], prompt);
    let want = log_softmax(&tiny(), &all);
    let got = numbers(&choice["logprobs"]["token_logprobs"]);
    for (i, got) in got.iter().enumerate() {
        let want = want[i][all[i + 1] as usize];
        assert!((got - want).abs() < 1e-4, "token {}: got {got}, want {want}", i + 1);
    }
    let num_tokens = tokenizer().get_vocab_size(true);
    for i in prompt.len() - 1..all.len() - 1 {
        let best = want[i][..num_tokens].iter().copied().fold(f64::NEG_INFINITY, f64::max);
        assert!((want[i][all[i + 1] as usize] - best).abs() < 1e-4, "temperature 0 takes the likeliest");
    }
}

#[test]
fn the_experts_are_the_models_own() {
    let prompt = ids("the dog sat on the cat");
    let body = json!({"prompt": prompt, "max_tokens": 5, "ignore_eos": true, "return_expert_choices": true});
    let choice = server().client.post(PATH, &body).ok()["choices"][0].clone();
    let tokens = choice["expert_choices"].as_array().expect("list").clone();
    let all: Vec<u32> = tokens.iter().map(|t| t["token_id"].as_u64().expect("id") as u32).collect();
    let step = whole_pass(&tiny(), &all);
    assert_eq!(step.experts.len(), 3, "every second of 6 layers");
    for (l, layer) in step.experts.iter().enumerate() {
        for (i, token) in tokens.iter().enumerate() {
            assert_eq!(token["layers"][l]["layer"], layer.layer);
            assert_eq!(
                token["layers"][l]["expert_ids"],
                json!(layer.expert_ids[i * layer.top_k..(i + 1) * layer.top_k])
            );
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_text() {
    let server = server();
    let body = |seed: Option<u64>| json!({"prompt": "the cat", "max_tokens": 30, "temperature": 1.2, "n": 2, "seed": seed, "ignore_eos": true});
    let texts = |seed| -> Vec<Value> {
        let answer = server.client.post(PATH, &body(seed)).ok();
        answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].clone()).collect()
    };
    let first = texts(Some(11));
    assert_eq!(texts(Some(11)), first);
    assert_ne!(first[0], first[1], "continuations of one request differ");
    assert_ne!(texts(Some(12)), first);
    assert_ne!(texts(None), texts(None), "without a seed each request has its own");
    // Streaming and a prompt's place in a batch change nothing but the number of the continuation.
    let mut streamed = body(Some(11));
    streamed["stream"] = true.into();
    let events = server.client.post(PATH, &streamed).events();
    for (index, text) in first.iter().enumerate() {
        let pieces = events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index);
        assert_eq!(json!(pieces.filter_map(|c| c["text"].as_str()).collect::<String>()), *text);
    }
}

#[test]
fn continuations_share_the_prompt_and_nothing_else() {
    let server = server();
    let body =
        |n: u64| json!({"prompt": "the cat sat", "max_tokens": 10, "temperature": 0, "n": n, "ignore_eos": true});
    let one = server.client.post(PATH, &body(1)).ok()["choices"][0]["text"].clone();
    let many = server.client.post(PATH, &body(3)).ok();
    assert!(many["choices"].as_array().expect("choices").iter().all(|c| c["text"] == one), "{many}");
}

#[test]
fn a_saved_model_is_served_from_its_folder() {
    let dir = tempfile::tempdir().expect("a folder");
    let missing = ServedModel::load(dir.path(), None, Precision::F32).expect_err("an empty folder").to_string();
    assert!(missing.contains("config.json"), "{missing}");
    tiny().save(dir.path(), DType::F32).expect("saves");
    let missing = ServedModel::load(dir.path(), None, Precision::F32).expect_err("no tokenizer").to_string();
    assert!(missing.contains("tokenizer.json"), "{missing}");
    tokenizer().save(dir.path().join("tokenizer.json"), false).expect("saves");
    let model = ServedModel::load(dir.path(), Some("mine".into()), Precision::F32).expect("loads");
    assert_eq!(model.defaults.eos_token_ids, [0], "from config.json where generation_config.json is missing");
    let from_dir = TestServer::start(model, Limits::default());
    let body = json!({"prompt": "the cat", "max_tokens": 10, "temperature": 0, "ignore_eos": true});
    let text = |server: &TestServer| server.client.post(PATH, &body).ok()["choices"][0]["text"].clone();
    assert_eq!(text(&from_dir), text(&server()));
    assert_eq!(from_dir.client.get("/v1/models").ok()["data"][0]["id"], "mine");
}

/// The folder of a published model, of whose ends only its configuration tells.
#[test]
fn every_end_that_a_configuration_names_ends_a_text() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = json!({
        "model_type": "olmoe", "hidden_act": "silu", "vocab_size": 320, "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 2, "num_experts_per_tok": 1,
        "max_position_embeddings": 64, "eos_token_id": [0, 5, 7],
    });
    let family = <Box<dyn Family>>::read(config.to_string().as_bytes(), Path::new("config.json")).expect("a family");
    Model::new(family, 1, &Device::Cpu).expect("a model").save(dir.path(), DType::F32).expect("saves");
    tokenizer().save(dir.path().join("tokenizer.json"), false).expect("saves");
    let ends = || ServedModel::load(dir.path(), None, Precision::F32).expect("loads").defaults.eos_token_ids;
    assert_eq!(ends(), [0, 5, 7], "as saving has written them");
    std::fs::remove_file(dir.path().join("generation_config.json")).expect("was there");
    assert_eq!(ends(), [0, 5, 7], "from config.json");
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    tiny().save(dir.path(), DType::F32).expect("saves");
    tokenizer().save(dir.path().join("tokenizer.json"), false).expect("saves");
    let refused = |file: &str, content: &str| {
        let path = dir.path().join(file);
        let before = std::fs::read(&path).ok();
        std::fs::write(&path, content).expect("writes");
        let error = ServedModel::load(dir.path(), None, Precision::F32).expect_err(file).to_string();
        match before {
            Some(before) => std::fs::write(&path, before).expect("writes"),
            None => std::fs::remove_file(&path).expect("removes"),
        }
        assert!(error.contains(file), "{error}");
    };
    refused("tokenizer.json", "{}");
    refused("tokenizer_config.json", "{\"chat_template\": 5}");
    refused("generation_config.json", "{\"eos_token_id\": 319}");
    refused("generation_config.json", "{\"temperature\": 9}");
    let gpt = || {
        let mut config = GptConfig::preset("tiny-dense").expect("a preset");
        (config.vocab_size, config.d_model, config.d_ff) = (200, 16, 16);
        Arc::new(Gpt::new(config, 1, &Device::Cpu).and_then(Gpt::into_packed).expect("valid"))
    };
    let tokenizer = moe_serve::text::TextTokenizer::new(tokenizer(), 320).expect("byte-level");
    let chat = moe_serve::text::ChatTemplate::dialogue().expect("compiles");
    let error = ServedModel::new("x", gpt(), tokenizer, chat, Default::default()).expect_err("too small a vocabulary");
    assert!(error.to_string().contains("vocab_size is 200"), "{error}");
}

#[test]
fn the_model_inside_the_program_answers() {
    let server = TestServer::start(ServedModel::embedded(None, Precision::Bf16).expect("loads"), Limits::default());
    let answer = server.client.post(PATH, &json!({"prompt": "Once upon a time", "max_tokens": 8})).ok();
    assert!(answer["usage"]["completion_tokens"].as_u64() > Some(0));
    let messages = json!([{"role": "user", "content": "Hello!"}]);
    let answer = server.client.post("/v1/chat/completions", &json!({"messages": messages, "max_tokens": 8})).ok();
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
}
