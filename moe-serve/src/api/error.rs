//! [`ApiError`]: the only place where a failure becomes an HTTP status.

use crate::Error;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// Seconds a client refused for a full queue should wait.
const RETRY_AFTER_S: &str = "1";

/// A failure in OpenAI's shape.
#[derive(Debug)]
pub struct ApiError {
    /// The HTTP status.
    pub status: StatusCode,
    /// For a person: what was expected, what came, what to change.
    pub message: String,
    /// OpenAI's class of error.
    pub kind: &'static str,
    /// The field at fault.
    pub param: Option<String>,
    /// For a program.
    pub code: Option<&'static str>,
}

impl ApiError {
    /// A 400 for the field `param`.
    pub(super) fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message).with_param(param)
    }

    /// An error of the class that fits `status`.
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            StatusCode::GATEWAY_TIMEOUT => "timeout_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        Self { status, message: message.into(), kind, param: None, code: None }
    }

    pub(super) fn with_param(mut self, param: Option<&str>) -> Self {
        self.param = param.map(str::to_owned);
        self
    }

    pub(super) fn with_code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    /// A 404 for a model that is not served.
    pub(super) fn unknown_model(asked: &str, served: &str) -> Self {
        let message = format!("the model `{asked}` is not served here; this server has `{served}`");
        Self::new(StatusCode::NOT_FOUND, message).with_param(Some("model")).with_code("model_not_found")
    }

    /// The body on the wire, also used inside a stream.
    pub(super) fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Field { field, .. } => Self::invalid(Some(&field), message).with_code("invalid_value"),
            Error::ContextLength { field, .. } => {
                Self::invalid(Some(&field), message).with_code("context_length_exceeded")
            }
            Error::Template(_) => Self::invalid(Some("messages"), message).with_code("invalid_value"),
            Error::Grammar(_) => Self::invalid(None, message).with_code("invalid_value"),
            Error::NothingToSample => Self::invalid(Some("logit_bias"), message).with_code("invalid_value"),
            Error::QueueFull { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("queue_full"),
            Error::ShuttingDown | Error::Cancelled | Error::EngineLost(_) => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, message).with_code("unavailable")
            }
            Error::Timeout { .. } => Self::new(StatusCode::GATEWAY_TIMEOUT, message).with_code("timeout"),
            Error::Model(_)
            | Error::Candle(_)
            | Error::Io { .. }
            | Error::ModelFile { .. }
            | Error::Tls { .. }
            | Error::Tokenizer(_)
            | Error::UnknownToken { .. }
            | Error::Metrics(_)
            | Error::LogitsNotFinite { .. }
            | Error::EnginePanic(_) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_S));
        }
        response
    }
}
