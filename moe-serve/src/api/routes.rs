//! Paths to handlers.

use super::access::{check_key, check_origin};
use super::chat_request::ChatRequest;
use super::completion_request::CompletionRequest;
use super::error::ApiError;
use super::json::parse_object;
use super::limits::deadline;
use super::page::page;
use super::piece::PieceMaker;
use super::prepare::{self, Prepared};
use super::render::{Endpoint, Renderer};
use super::responses::{self, ResponseRequest, ResponseWriter};
use super::server::AppState;
use super::stream::{ChunkWriter, Running};
use super::{models, tokens};
use crate::Error;
use crate::text::TextListener;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode, Uri, header};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use tokio::time::Instant;
use tower_http::trace::TraceLayer;

/// What a client may send and get; a test holds it to the fields that requests are read by.
pub(super) const OPENAPI: &str = include_str!("openapi.json");

pub(super) fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/version", get(version))
        .route("/openapi.json", get(openapi))
        .route("/metrics", get(metrics))
        .route("/reset_prefix_cache", post(reset_prefix_cache))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/responses", post(respond))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .fallback(no_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), check_key))
        .layer(from_fn_with_state(state.clone(), check_origin))
        // Asks of foreign pages come before their requests, and without a key.
        .layer(state.cors.clone())
        .layer(TraceLayer::new_for_http())
        .with_state(state)
}

async fn health(State(state): State<Arc<AppState>>) -> Response {
    if state.engine.is_alive() {
        axum::Json(json!({"status": "ok"})).into_response()
    } else {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine's thread has ended; restart the server")
            .into_response()
    }
}

async fn ready(State(state): State<Arc<AppState>>) -> Response {
    if state.engine.is_ready() {
        axum::Json(json!({"status": "ready"})).into_response()
    } else {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server takes no new requests").into_response()
    }
}

async fn version() -> axum::Json<Value> {
    axum::Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

async fn reset_prefix_cache(State(state): State<Arc<AppState>>) -> StatusCode {
    state.engine.reset_prefix_cache();
    StatusCode::OK
}

async fn tokenize(State(state): State<Arc<AppState>>, request: Request) -> Result<axum::Json<Value>, ApiError> {
    read(&state, request, tokens::tokenize).await.map(axum::Json)
}

async fn detokenize(State(state): State<Arc<AppState>>, request: Request) -> Result<axum::Json<Value>, ApiError> {
    read(&state, request, tokens::detokenize).await.map(axum::Json)
}

async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let text = state.metrics.render(state.engine.waiting());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, format!("no such endpoint: {method} {}", uri.path())).with_code("not_found")
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let text = format!("{} does not answer {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, text).with_code("method_not_allowed")
}

async fn completions(State(state): State<Arc<AppState>>, request: Request) -> Result<Response, ApiError> {
    answer(state, request, Endpoint::Completions, |body, state| {
        let request = CompletionRequest::from_json(body, &state.model)?;
        state.check_model(request.common.model.as_deref())?;
        tracing::debug!(user = request.common.user, "completion");
        Ok(prepare::completion(request, &state.model, state.fresh_seed())?)
    })
    .await
}

async fn chat_completions(State(state): State<Arc<AppState>>, request: Request) -> Result<Response, ApiError> {
    answer(state, request, Endpoint::Chat, |body, state| {
        let request = ChatRequest::from_json(body, &state.model)?;
        state.check_model(request.common.model.as_deref())?;
        tracing::debug!(user = request.common.user, "chat completion");
        Ok(prepare::chat(request, &state.model, state.fresh_seed())?)
    })
    .await
}

/// What both endpoints do: read, check, queue, answer.
async fn answer(
    state: Arc<AppState>,
    request: Request,
    endpoint: Endpoint,
    prepare: fn(Map<String, Value>, &AppState) -> Result<Prepared, ApiError>,
) -> Result<Response, ApiError> {
    let deadline = deadline(Instant::now(), state.limits.request_timeout);
    check_room(&state)?;
    let prepared = read(&state, request, prepare).await?;
    let renderer = Renderer {
        endpoint,
        id: state.fresh_id(endpoint),
        created: super::server::unix_seconds(),
        model: state.model.name.clone(),
        tokenizer: state.model.tokenizer.clone(),
        logprobs: prepared.job.logprobs.is_some(),
        experts: prepared.job.experts,
    };
    let stream = prepared.stream;
    let running = submit(&state, prepared, deadline)?;
    match stream {
        Some(options) => {
            let writer = ChunkWriter::new(renderer, options, running.maker.num_choices());
            Ok(running.stream(writer))
        }
        None => running.collect(&renderer).await,
    }
}

async fn respond(State(state): State<Arc<AppState>>, request: Request) -> Result<Response, ApiError> {
    let deadline = deadline(Instant::now(), state.limits.request_timeout);
    check_room(&state)?;
    let (prepared, settings) = read(&state, request, |body, state| {
        let request = ResponseRequest::from_json(body, &state.model)?;
        state.check_model(request.chat.common.model.as_deref())?;
        tracing::debug!(user = request.chat.common.user, "response");
        Ok((prepare::chat(request.chat, &state.model, state.fresh_seed())?, request.settings))
    })
    .await?;
    let created = super::server::unix_seconds();
    let (model, tokenizer) = (state.model.name.clone(), state.model.tokenizer.clone());
    let writer = ResponseWriter::new(state.fresh_number(), created, model, tokenizer, settings);
    let stream = prepared.stream;
    let running = submit(&state, prepared, deadline)?;
    match stream {
        Some(_) => Ok(running.stream(writer)),
        None => responses::collect(running, writer).await,
    }
}

/// Refuses what would be refused when it is made ready.
fn check_room(state: &AppState) -> Result<(), ApiError> {
    Ok(state.engine.check_room().inspect_err(|error| count_refused(state, error))?)
}

fn count_refused(state: &AppState, error: &Error) {
    if let Error::QueueFull { .. } = error {
        state.metrics.rejected();
    }
}

/// Gives a request to the engine.
fn submit(state: &AppState, prepared: Prepared, deadline: Instant) -> Result<Running, ApiError> {
    let maker = PieceMaker::new(&prepared, state.model.tokenizer.clone(), state.fresh_seed());
    let (listener, receiver) = TextListener::new(state.model.tokenizer.clone(), prepared.text);
    let submitted = state.engine.submit(prepared.job, Box::new(listener), receiver.cancel_flag());
    submitted.inspect_err(|error| count_refused(state, error))?;
    Ok(Running { receiver, maker, deadline, limit: state.limits.request_timeout })
}

/// Reads a request, and makes of it what `prepare` does, where that may take its time.
async fn read<T: Send + 'static>(
    state: &Arc<AppState>,
    request: Request,
    prepare: fn(Map<String, Value>, &AppState) -> Result<T, ApiError>,
) -> Result<T, ApiError> {
    let (parts, body) = request.into_parts();
    let limit = state.limits.body_timeout.min(state.limits.request_timeout);
    let body = state.bodies.read(&parts.headers, body, limit).await?;
    let blocking_state = state.clone();
    // Who leaves while it waits for a desk has left; at one it is worked on to its end.
    let desk = state.desks.clone().acquire_owned().await.map_err(|_| Error::ShuttingDown)?;
    // It has its share of memory for as long as that, whether or not its client still waits.
    let work = move || {
        let _desk = desk;
        prepare(parse_object(body.bytes())?, &blocking_state)
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|e| ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, format!("reading the request failed: {e}")))?
}
