//! `GET /v1/models` and `/v1/models/{id}`.

use super::error::ApiError;
use super::server::AppState;
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

/// The models of this server: one.
pub(super) async fn list(State(state): State<Arc<AppState>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [entry(&state)]}))
}

/// One model.
pub(super) async fn one(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    if id != state.model.name {
        return Err(ApiError::unknown_model(&id, &state.model.name));
    }
    Ok(Json(entry(&state)))
}

/// OpenAI's fields, vLLM's `max_model_len`, and `moe`: what the page must know to draw the experts.
fn entry(state: &AppState) -> Value {
    let lm = &state.model.lm;
    let layers: Vec<Value> = lm
        .moe_layers()
        .into_iter()
        .map(|(layer, num_experts)| json!({"layer": layer, "num_experts": num_experts}))
        .collect();
    json!({
        "id": state.model.name,
        "object": "model",
        "created": state.created,
        "owned_by": "moe-serve",
        "max_model_len": lm.max_seq_len(),
        "moe": {"num_layers": lm.num_layers(), "layers": layers},
    })
}
