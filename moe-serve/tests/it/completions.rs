//! `/v1/models` and `/v1/completions`.

use crate::support::{MODEL, TestServer, ids};
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";
const SCRIPT: &str = "the cat sat on the mat and the dog sat on the cat";

fn texts(answer: &Value) -> Vec<&str> {
    answer["choices"].as_array().expect("choices").iter().map(|c| c["text"].as_str().expect("text")).collect()
}

#[test]
fn models_are_listed_and_found() {
    let server = TestServer::scripted(SCRIPT);
    let list = server.client.get("/v1/models").ok();
    assert_eq!(list["object"], "list");
    let entry = &list["data"][0];
    assert_eq!((&entry["id"], &entry["object"]), (&json!(MODEL), &json!("model")));
    let layers = json!([{"layer": 1, "num_experts": 4}, {"layer": 3, "num_experts": 8}]);
    assert_eq!(entry["moe"], json!({"num_layers": 4, "layers": layers}));
    assert_eq!(&server.client.get("/v1/models/tiny").ok(), entry);
    let unknown = server.client.get("/v1/models/other/one");
    assert_eq!((unknown.status, &unknown.json()["error"]["code"]), (404, &json!("model_not_found")));
}

#[test]
fn page_and_health() {
    let server = TestServer::scripted(SCRIPT);
    assert_eq!(server.client.get("/health").ok(), json!({"status": "ok"}));
    let page = server.client.get("/");
    assert_eq!(page.status, 200);
    assert!(page.headers.contains("text/html") && page.headers.contains("default-src 'none'"), "{}", page.headers);
    assert!(page.body.contains("</html>"));
    for foreign in ["src=\"http", "href=\"http", "@import", "url(http"] {
        assert!(!page.body.contains(foreign), "the page asks another server: {foreign}");
    }
}

#[test]
fn a_text_is_continued_to_its_end() {
    let server = TestServer::scripted(SCRIPT);
    let answer = server.client.post(PATH, &json!({"model": MODEL, "prompt": "the cat", "max_tokens": 100})).ok();
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(texts(&answer), [&SCRIPT["the cat".len()..]]);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    let (prompt, all) = (ids("the cat").len(), ids(SCRIPT).len());
    // The end-of-text token counts as generated.
    let usage = json!({"prompt_tokens": prompt, "completion_tokens": all - prompt + 1, "total_tokens": all + 1,
        "prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}});
    assert_eq!(answer["usage"], usage);
}

#[test]
fn max_tokens_ends_by_length() {
    let server = TestServer::scripted(SCRIPT);
    let answer = server.client.post(PATH, &json!({"prompt": "the cat", "max_tokens": 2, "temperature": 0})).ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    // Without it, OpenAI's 16, and never beyond the context of 128.
    let answer = server.client.post(PATH, &json!({"prompt": "the cat", "ignore_eos": true})).ok();
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    let answer = server.client.post(PATH, &json!({"prompt": "the cat", "ignore_eos": true, "max_tokens": 128})).ok();
    assert_eq!(answer["usage"]["total_tokens"], 128);
}

#[test]
fn four_forms_of_prompt() {
    let server = TestServer::scripted(SCRIPT);
    let (a, b) = (ids("the cat"), ids("the"));
    for (prompt, count) in
        [(json!("the cat"), 1), (json!(["the cat", "the"]), 2), (json!(a), 1), (json!([a, b, ids("the cat sat")]), 3)]
    {
        let answer = server.client.post(PATH, &json!({"prompt": prompt, "max_tokens": 1, "n": 2})).ok();
        let indices: Vec<u64> =
            answer["choices"].as_array().expect("choices").iter().filter_map(|c| c["index"].as_u64()).collect();
        assert_eq!(indices, (0..2 * count).collect::<Vec<u64>>(), "{prompt}");
    }
}

#[test]
fn an_empty_prompt_begins_with_the_models_first_token() {
    let server = TestServer::scripted(SCRIPT);
    let answer = server.client.post(PATH, &json!({"prompt": "", "max_tokens": 1, "echo": true})).ok();
    assert_eq!(answer["usage"]["prompt_tokens"], 1);
}

#[test]
fn a_stream_adds_up_to_the_whole() {
    let server = TestServer::scripted(SCRIPT);
    let mut body = json!({"prompt": "the cat", "max_tokens": 9, "logprobs": 2, "echo": true});
    let whole = server.client.post(PATH, &body).ok();
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let mut events = server.client.post(PATH, &body).events();
    let usage = events.pop().expect("a last chunk");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], whole["usage"]);
    let text: String = events.iter().flat_map(texts).collect();
    assert_eq!(text, texts(&whole)[0]);
    let gather = |list: &str| -> Vec<Value> {
        events.iter().filter_map(|e| e["choices"][0]["logprobs"][list].as_array()).flatten().cloned().collect()
    };
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(json!(gather(list)), whole["choices"][0]["logprobs"][list], "{list}");
    }
    assert_eq!(events.last().expect("chunks")["choices"][0]["finish_reason"], "length");
}

#[test]
fn continuous_usage_counts_up() {
    let server = TestServer::scripted(SCRIPT);
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let events = server
        .client
        .post(PATH, &json!({"prompt": "the", "max_tokens": 4, "stream": true, "stream_options": options}))
        .events();
    let counts: Vec<u64> = events.iter().filter_map(|e| e["usage"]["completion_tokens"].as_u64()).collect();
    assert!(counts.len() >= 4 && counts.is_sorted() && counts.last() == Some(&4), "{counts:?}");
}

#[test]
fn stop_strings_across_tokens() {
    let server = TestServer::scripted(SCRIPT);
    let stopped = |stop: Value, stream: bool| {
        let body = json!({"prompt": "the cat", "max_tokens": 100, "stop": stop, "stream": stream});
        let reply = server.client.post(PATH, &body);
        let events = if stream { reply.events() } else { vec![reply.ok()] };
        assert_eq!(events.last().expect("chunks")["choices"][0]["finish_reason"], "stop");
        events.iter().flat_map(texts).collect::<String>()
    };
    for stream in [false, true] {
        assert_eq!(stopped(json!("mat and the d"), stream), " sat on the ", "spans several tokens");
        assert_eq!(stopped(json!(["xyz", "n the"]), stream), " sat o", "begins inside a token");
        assert_eq!(stopped(json!("mat or"), stream), SCRIPT["the cat".len()..], "a false alarm is released");
        assert_eq!(stopped(json!("catch"), stream), SCRIPT["the cat".len()..], "held back text comes at the end");
    }
}

#[test]
fn characters_split_over_tokens_come_whole() {
    let text = "né 漢字 🦀 und so weiter";
    let server = TestServer::scripted(text);
    assert!(ids("🦀").len() > 1, "the crab must be split for this test to mean anything");
    let events = server.client.post(PATH, &json!({"prompt": "n", "max_tokens": 100, "stream": true})).events();
    let pieces: Vec<&str> = events.iter().flat_map(texts).collect();
    assert_eq!(pieces.concat(), text[1..]);
    assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')), "{pieces:?}");
    // Cut in the middle of the crab, the unfinished character shows as U+FFFD, once.
    let cut = ids("né 漢字 🦀").len() - ids("n").len() - 1;
    let answer = server.client.post(PATH, &json!({"prompt": "n", "max_tokens": cut})).ok();
    assert_eq!(texts(&answer), ["é 漢字 \u{fffd}"]);
}

#[test]
fn unfinished_characters_are_bytes_among_the_logprobs() {
    let server = TestServer::scripted("n🦀");
    let answer = server.client.post(PATH, &json!({"prompt": "n", "max_tokens": 10, "logprobs": 0})).ok();
    let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().expect("tokens").clone();
    assert!(tokens.iter().any(|t| t.as_str().is_some_and(|t| t.starts_with("bytes:\\xf0"))), "{tokens:?}");
    assert_eq!(tokens.last(), Some(&json!("<|endoftext|>")));
}

#[test]
fn the_log_likelihood_request_of_lm_eval() {
    let server = TestServer::scripted(SCRIPT);
    let prompts = [ids("the cat sat"), ids("the mat")];
    let body = json!({"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true});
    let answer = server.client.post(PATH, &body).ok();
    for (i, prompt) in prompts.iter().enumerate() {
        let choice = &answer["choices"][i];
        assert_eq!(choice["index"], i);
        let (logprobs, top) = (&choice["logprobs"]["token_logprobs"], &choice["logprobs"]["top_logprobs"]);
        assert_eq!(logprobs.as_array().map(Vec::len), Some(prompt.len() + 1));
        assert_eq!(top.as_array().map(Vec::len), Some(prompt.len() + 1));
        assert_eq!((&logprobs[0], &top[0]), (&Value::Null, &Value::Null));
        assert!(logprobs[1].as_f64().is_some_and(|x| x < 0.0));
    }
}

#[test]
fn a_text_is_repeated_as_it_came() {
    let server = TestServer::scripted(SCRIPT);
    let prompt = "the<|endoftext|> cat é";
    let body = json!({"prompt": prompt, "max_tokens": 2, "echo": true, "logprobs": 1});
    let choice = server.client.post(PATH, &body).ok()["choices"][0].clone();
    assert!(choice["text"].as_str().is_some_and(|text| text.starts_with(prompt)), "{choice}");
    let (tokens, offsets) = (&choice["logprobs"]["tokens"], &choice["logprobs"]["text_offset"]);
    let offsets: Vec<usize> =
        offsets.as_array().expect("offsets").iter().map(|x| x.as_u64().expect("a number") as usize).collect();
    let at = tokens.as_array().expect("tokens").iter().position(|token| token == "<|endoftext|>").expect("is there");
    assert_eq!((offsets[at], offsets[at + 1]), (3, 3 + "<|endoftext|>".len()));
    assert_eq!(offsets[ids(prompt).len()], prompt.chars().count(), "where the answer begins");
}

#[test]
fn echo_alone_scores_the_prompt() {
    let server = TestServer::scripted(SCRIPT);
    let body = json!({"prompt": "the cat sat", "max_tokens": 0, "echo": true, "logprobs": 1});
    let answer = server.client.post(PATH, &body).ok();
    assert_eq!(texts(&answer), ["the cat sat"]);
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let lists = &answer["choices"][0]["logprobs"];
    assert_eq!(lists["tokens"].as_array().map(Vec::len), Some(ids("the cat sat").len()));
    assert_eq!(lists["text_offset"][0], 0);
}

#[test]
fn a_padded_vocabulary_is_never_sampled() {
    // The scripted model finds its padding likelier than anything else.
    let server = TestServer::scripted(SCRIPT);
    for temperature in [0.0, 2.0] {
        let body =
            json!({"prompt": "the", "max_tokens": 100, "temperature": temperature, "ignore_eos": true, "logprobs": 5});
        let answer = server.client.post(PATH, &body).ok();
        let tokens = answer["choices"][0]["logprobs"]["tokens"].as_array().expect("tokens");
        assert_eq!(tokens.len(), 100);
        assert!(tokens.iter().all(|t| t != ""), "a token without text is padding");
    }
}

#[test]
fn expert_choices_cover_prompt_and_answer() {
    let server = TestServer::scripted(SCRIPT);
    let mut body = json!({"prompt": "the cat", "max_tokens": 3, "return_expert_choices": true});
    let whole = server.client.post(PATH, &body).ok();
    let choices = whole["choices"][0]["expert_choices"].as_array().expect("expert choices").clone();
    let prompt = ids("the cat");
    let positions: Vec<u64> = choices.iter().filter_map(|t| t["position"].as_u64()).collect();
    assert_eq!(positions, (0..prompt.len() as u64 + 3).collect::<Vec<_>>());
    for (i, token) in choices.iter().enumerate() {
        let id = ids(SCRIPT)[i];
        assert_eq!((&token["token_id"], &token["prompt"]), (&json!(id), &json!(i < prompt.len())));
        let layers = json!([
            {"layer": 1, "expert_ids": [id % 4], "weights": [0.75]},
            {"layer": 3, "expert_ids": [id % 8, (id + 1) % 8], "weights": [0.75, 0.25]},
        ]);
        assert_eq!(token["layers"], layers);
    }
    body["stream"] = true.into();
    let events = server.client.post(PATH, &body).events();
    assert_eq!(events[0]["choices"][0]["expert_choices"].as_array().map(Vec::len), Some(prompt.len()));
    let streamed: Vec<Value> =
        events.iter().filter_map(|e| e["choices"][0]["expert_choices"].as_array()).flatten().cloned().collect();
    assert_eq!(streamed, choices);
}

#[test]
fn min_tokens_and_stop_tokens() {
    let server = TestServer::scripted("the cat");
    let answer = server.client.post(PATH, &json!({"prompt": "the", "max_tokens": 20, "min_tokens": 10})).ok();
    assert!(answer["usage"]["completion_tokens"].as_u64() >= Some(10), "{answer}");
    let server = TestServer::scripted(SCRIPT);
    let stop = ids("the cat sat")[ids("the cat").len()];
    let answer =
        server.client.post(PATH, &json!({"prompt": "the cat", "max_tokens": 20, "stop_token_ids": [stop]})).ok();
    assert_eq!((texts(&answer), &answer["choices"][0]["finish_reason"]), (vec![""], &json!("stop")));
}

#[test]
fn logit_bias_forbids_and_forces() {
    let server = TestServer::scripted(SCRIPT);
    let dog = ids(" dog")[0];
    let body = json!({"prompt": "the cat", "max_tokens": 1, "logit_bias": {dog.to_string(): 100}, "temperature": 0, "logprobs": 0});
    let answer = server.client.post(PATH, &body).ok();
    let first = ids(" dog").len() == 1;
    assert!(!first || texts(&answer) == [" dog"], "{answer}");
    assert_ne!(answer["choices"][0]["text"], " sat");
}
