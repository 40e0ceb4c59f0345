//! The OpenAPI document against the code: the same routes, the same fields of requests.

use super::chat_request::ChatRequest;
use super::completion_request::CompletionRequest;
use super::fields::asked_by;
use super::responses::ResponseRequest;
use super::routes::OPENAPI;
use super::tokens::take_tokens;
use crate::ServedModel;
use moe_models::Precision;
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;

fn document() -> Value {
    serde_json::from_str(OPENAPI).expect("JSON")
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

/// The properties of a request, of all its forms together.
fn properties(name: &str) -> BTreeSet<String> {
    let document = document();
    let schema = &document["components"]["schemas"][name];
    let forms = schema["oneOf"].as_array().map_or(std::slice::from_ref(schema), Vec::as_slice);
    forms.iter().flat_map(|form| object(form["properties"].clone()).into_iter().map(|(key, _)| key)).collect()
}

#[test]
fn it_has_the_fields_that_requests_are_read_by() {
    let model = ServedModel::embedded(None, Precision::Bf16).expect("loads");
    let check = |name: &str, asked: BTreeSet<String>, refused: &[&str]| {
        let asked: BTreeSet<String> = asked.into_iter().filter(|field| !refused.contains(&field.as_str())).collect();
        assert_eq!(asked, properties(name), "{name}");
    };
    let (read, asked) = asked_by(|| CompletionRequest::from_json(object(json!({"prompt": "a"})), &model));
    read.expect("reads");
    check("CompletionRequest", asked, &[]);
    let body = json!({"messages": [{"role": "user", "content": "a"}]});
    let (read, asked) = asked_by(|| ChatRequest::from_json(object(body.clone()), &model));
    read.expect("reads");
    check("ChatRequest", asked, &[]);
    let (read, asked) = asked_by(|| ResponseRequest::from_json(object(json!({"input": "a"})), &model));
    read.expect("reads");
    check("ResponseRequest", asked, &["n", "response_format", "return_expert_choices", "stream_options"]);
    let (read, asked) = asked_by(|| take_tokens(&mut super::fields::Fields::new(object(body)), &model));
    read.expect("reads");
    let own = ["model", "return_token_strs"].map(str::to_owned);
    check("TokenizeRequest", asked.into_iter().chain(own).collect(), &[]);
}

#[test]
fn it_has_the_routes() {
    let routes = include_str!("routes.rs").lines().filter_map(|line| {
        let (path, handler) = line.trim().strip_prefix(".route(\"")?.split_once("\", ")?;
        let method = handler.split('(').next()?;
        Some((path.replace("{*id}", "{id}"), method.to_owned()))
    });
    let document = document();
    let paths = object(document["paths"].clone());
    let methods = |(path, methods): (&String, &Value)| {
        let keys: Vec<String> =
            object(methods.clone()).into_iter().map(|(key, _)| key).filter(|key| key != "parameters").collect();
        keys.into_iter().map(|method| (path.clone(), method)).collect::<Vec<_>>()
    };
    let documented: BTreeSet<_> = paths.iter().flat_map(methods).collect();
    assert_eq!(routes.collect::<BTreeSet<_>>(), documented);
}
