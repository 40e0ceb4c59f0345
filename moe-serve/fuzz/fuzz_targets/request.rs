//! A request's body on one of four routes, chosen by its first byte: refused with a message and a status of the client's fault, or ready
//! for the engine.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_serve::ServedModel;
use moe_serve::api::check_request;
use moe_serve::moe_models::Precision;
use std::sync::LazyLock;

const PATHS: [&str; 4] = ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"];

static MODEL: LazyLock<ServedModel> =
    LazyLock::new(|| ServedModel::embedded(None, Precision::Bf16).expect("the built-in model"));

fuzz_target!(|input: &[u8]| {
    let Some((&first, body)) = input.split_first() else { return };
    if let Err(error) = check_request(PATHS[usize::from(first) % PATHS.len()], body, &MODEL) {
        assert!(error.status.is_client_error() && !error.message.is_empty(), "{error:?}");
    }
});
