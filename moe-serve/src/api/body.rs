//! [`BodyBudget`]: reads request bodies within bounds on size, time and memory.

use super::error::ApiError;
use super::limits::MAX_LARGEST_BODIES;
use axum::body::{Body, Bytes, to_bytes};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use std::error::Error as StdError;
use std::time::Duration;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// The unit in which memory is shared out.
const SHARE_BYTES: usize = 1024;

/// Memory for bodies that are being read or parsed. A body holds as much as it announced.
#[derive(Debug)]
pub(super) struct BodyBudget {
    shares: Semaphore,
    max_body_bytes: usize,
}

impl BodyBudget {
    pub(super) fn new(max_body_bytes: usize) -> Self {
        Self { shares: Semaphore::new(MAX_LARGEST_BODIES * shares(max_body_bytes) as usize), max_body_bytes }
    }

    /// Reads a JSON body. Its share of the budget is free again when the permit is dropped.
    ///
    /// # Errors
    /// 415 if it is not announced as JSON, 413 if it is too large, 408 if it takes too long, 400 if it breaks off.
    pub(super) async fn read(
        &self,
        headers: &HeaderMap,
        body: Body,
        limit: Duration,
    ) -> Result<(SemaphorePermit<'_>, Bytes), ApiError> {
        check_media_type(headers)?;
        let announced = text(headers, header::CONTENT_LENGTH).parse().unwrap_or(self.max_body_bytes);
        if announced > self.max_body_bytes {
            return Err(self.too_large());
        }
        let read = async {
            let permit = self.shares.acquire_many(shares(announced)).await;
            let permit = permit.map_err(|_| ApiError::from(crate::Error::ShuttingDown))?;
            let body = to_bytes(body, self.max_body_bytes).await.map_err(|error| self.broken(&error))?;
            Ok((permit, body))
        };
        timeout(limit, read).await.map_err(|_| {
            let text = format!("the body did not arrive within {} s", limit.as_secs());
            ApiError::new(StatusCode::REQUEST_TIMEOUT, text).with_code("body_timeout")
        })?
    }

    fn too_large(&self) -> ApiError {
        let text =
            format!("the body is larger than {} bytes; send less or raise --max-body-bytes", self.max_body_bytes);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, text).with_code("body_too_large")
    }

    fn broken(&self, error: &axum::Error) -> ApiError {
        let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
        while let Some(error) = cause {
            if error.to_string().contains("length limit") {
                return self.too_large();
            }
            cause = error.source();
        }
        ApiError::invalid(None, format!("the body broke off: {error}"))
    }
}

fn shares(bytes: usize) -> u32 {
    u32::try_from(bytes / SHARE_BYTES + 1).unwrap_or(u32::MAX)
}

fn text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// Only JSON is read: a foreign web page can send a form or plain text here unasked, but not JSON.
fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let media_type = text(headers, header::CONTENT_TYPE).split(';').next().unwrap_or_default().trim();
    if media_type.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let text = format!("expected the header `content-type: application/json`, found `{media_type:.80}`");
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text).with_code("unsupported_media_type"))
}
