//! [`check_request`]: a body as a route reads it, without a server.

use super::chat_request::ChatRequest;
use super::completion_request::CompletionRequest;
use super::error::ApiError;
use super::json::parse_object;
use super::prepare;
use super::responses::ResponseRequest;
use super::tokens::take_tokens;
use crate::ServedModel;
use axum::http::StatusCode;

/// Reads a body as the route `path` would, up to what the engine would be given.
///
/// # Errors
/// What a client would be answered; a 404 for a path that reads no bodies.
pub fn check_request(path: &str, body: &[u8], model: &ServedModel) -> Result<(), ApiError> {
    let body = parse_object(body)?;
    match path {
        "/v1/completions" => drop(prepare::completion(CompletionRequest::from_json(body, model)?, model, 0)?),
        "/v1/chat/completions" => drop(prepare::chat(ChatRequest::from_json(body, model)?, model, 0)?),
        "/v1/responses" => drop(prepare::chat(ResponseRequest::from_json(body, model)?.chat, model, 0)?),
        "/tokenize" => drop(take_tokens(&mut super::fields::Fields::new(body), model)?),
        _ => return Err(ApiError::new(StatusCode::NOT_FOUND, format!("{path:.80} reads no bodies"))),
    }
    Ok(())
}
