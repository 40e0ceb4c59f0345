//! [`BodyBudget`]: reads request bodies within bounds on size, time and memory.

use super::error::ApiError;
use super::limits::{MAX_LARGEST_BODIES, UNSHARED_BODY_BYTES, deadline};
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use http_body_util::BodyExt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// The unit in which memory is shared out.
const SHARE_BYTES: usize = 1024;

/// Memory for bodies that are being read or parsed. A body takes it as it comes, so that who announces much and sends nothing keeps
/// nobody waiting; and none for its beginning, so that who sends little waits for nobody: of those there are at most as many as
/// connections and desks. Room for one of the largest is set aside: bodies that have taken all the rest between them go there one after another,
/// so that each comes to its end.
#[derive(Debug)]
pub(super) struct BodyBudget {
    shares: Arc<Semaphore>,
    aside: Arc<Semaphore>,
    max_body_bytes: usize,
}

/// What a body holds of the budget.
#[derive(Debug, Default)]
struct Share {
    taken: Option<OwnedSemaphorePermit>,
    /// The room set aside, which holds all that is still to come.
    aside: Option<OwnedSemaphorePermit>,
}

/// A body, and its share of the budget until this is dropped.
#[derive(Debug)]
pub(super) struct SharedBody {
    bytes: Vec<u8>,
    _share: Share,
}

impl SharedBody {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

impl BodyBudget {
    pub(super) fn new(max_body_bytes: usize) -> Self {
        let shares = (MAX_LARGEST_BODIES - 1) * shares_of(max_body_bytes) as usize;
        let shares = Arc::new(Semaphore::new(shares.min(Semaphore::MAX_PERMITS)));
        Self { shares, aside: Arc::new(Semaphore::new(1)), max_body_bytes }
    }

    /// Reads a JSON body.
    ///
    /// # Errors
    /// 415 if it is not announced as JSON, 413 if it is too large, 408 if it takes too long, 429 if it does so for want of memory, 400
    /// if it breaks off.
    pub(super) async fn read(
        &self,
        headers: &HeaderMap,
        mut body: Body,
        limit: Duration,
    ) -> Result<SharedBody, ApiError> {
        check_media_type(headers)?;
        let announced = text(headers, header::CONTENT_LENGTH).parse().unwrap_or(0);
        if announced > self.max_body_bytes {
            return Err(self.too_large());
        }
        let deadline = deadline(Instant::now(), limit);
        let (mut bytes, mut share) = (Vec::new(), Share::default());
        while let Some(frame) = timeout_at(deadline, body.frame()).await.map_err(|_| late(limit))? {
            let frame = frame.map_err(|error| ApiError::invalid(None, format!("the body broke off: {error}")))?;
            let Ok(data) = frame.into_data() else { continue };
            if data.len() > self.max_body_bytes - bytes.len() {
                return Err(self.too_large());
            }
            self.take_share(&mut share, bytes.len() + data.len(), deadline).await?;
            bytes.extend_from_slice(&data);
        }
        Ok(SharedBody { bytes, _share: share })
    }

    /// Has `share` cover a body of so many bytes.
    async fn take_share(&self, share: &mut Share, bytes: usize, deadline: Instant) -> Result<(), ApiError> {
        let held = share.taken.as_ref().map_or(0, OwnedSemaphorePermit::num_permits) as u32;
        let missing = shares_of(bytes.saturating_sub(UNSHARED_BODY_BYTES)).saturating_sub(held);
        if missing == 0 || share.aside.is_some() {
            return Ok(());
        }
        let room = async {
            tokio::select! {
                biased;
                more = self.shares.clone().acquire_many_owned(missing) => (more, false),
                aside = self.aside.clone().acquire_owned() => (aside, true),
            }
        };
        let (more, is_aside) = timeout_at(deadline, room).await.map_err(|_| {
            let text = "too many large bodies are being read at this time; try again later";
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, text).with_code("bodies_full")
        })?;
        let more = more.map_err(|_| ApiError::from(crate::Error::ShuttingDown))?;
        match &mut share.taken {
            _ if is_aside => share.aside = Some(more),
            Some(taken) => taken.merge(more),
            None => share.taken = Some(more),
        }
        Ok(())
    }

    fn too_large(&self) -> ApiError {
        let text =
            format!("the body is larger than {} bytes; send less or raise --max-body-bytes", self.max_body_bytes);
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, text).with_code("body_too_large")
    }
}

fn late(limit: Duration) -> ApiError {
    let text = format!("the body did not arrive within {} s", limit.as_secs());
    ApiError::new(StatusCode::REQUEST_TIMEOUT, text).with_code("body_timeout")
}

fn shares_of(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(SHARE_BYTES)).unwrap_or(u32::MAX)
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

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt;
    use futures_util::stream;
    use std::convert::Infallible;

    const LARGEST: usize = 1 << 20;

    fn headers() -> HeaderMap {
        [(header::CONTENT_TYPE, "application/json".parse().expect("a value"))].into_iter().collect()
    }

    fn of(chunks: usize) -> impl futures_util::Stream<Item = Result<Vec<u8>, Infallible>> + Send + 'static {
        stream::iter(vec![Ok(vec![b'x'; UNSHARED_BODY_BYTES]); chunks])
    }

    /// A body that stays out after so many chunks.
    fn stalled(chunks: usize) -> Body {
        Body::from_stream(of(chunks).chain(stream::pending()))
    }

    async fn read(budget: &BodyBudget, body: Body, limit: Duration) -> Result<SharedBody, ApiError> {
        budget.read(&headers(), body, limit).await
    }

    #[tokio::test]
    async fn memory_is_taken_as_it_comes_and_given_back() {
        let budget = BodyBudget::new(LARGEST);
        let all = budget.shares.available_permits();
        let body = read(&budget, Body::from_stream(of(3)), Duration::from_secs(60)).await.expect("arrives");
        assert_eq!(body.bytes.len(), 3 * UNSHARED_BODY_BYTES);
        assert_eq!(budget.shares.available_permits(), all - 2 * UNSHARED_BODY_BYTES / SHARE_BYTES);
        drop(body);
        assert_eq!(budget.shares.available_permits(), all);
    }

    #[tokio::test]
    async fn stalled_bodies_keep_small_ones_from_nothing() {
        let budget = BodyBudget::new(LARGEST);
        let chunks = LARGEST / UNSHARED_BODY_BYTES;
        // As much as there is.
        let hold = budget.shares.clone().acquire_many_owned(budget.shares.available_permits() as u32).await;
        let aside = budget.aside.clone().acquire_owned().await;
        let status = |result: Result<SharedBody, ApiError>| result.map(|body| body.bytes.len()).map_err(|e| e.status);
        let limit = Duration::from_millis(100);
        assert_eq!(status(read(&budget, Body::from_stream(of(1)), limit).await), Ok(UNSHARED_BODY_BYTES));
        let late = read(&budget, Body::from_stream(of(2)), limit).await;
        assert_eq!(status(late), Err(StatusCode::TOO_MANY_REQUESTS));
        drop((hold, aside));
        assert_eq!(status(read(&budget, stalled(1), limit).await), Err(StatusCode::REQUEST_TIMEOUT));
        assert_eq!(status(read(&budget, Body::from_stream(of(chunks)), limit).await), Ok(LARGEST));
        let large = read(&budget, Body::from_stream(of(chunks + 1)), limit).await;
        assert_eq!(status(large), Err(StatusCode::PAYLOAD_TOO_LARGE));
    }

    #[tokio::test]
    async fn bodies_that_want_more_than_there_is_come_one_after_another() {
        let budget = Arc::new(BodyBudget::new(LARGEST));
        let chunks = LARGEST / UNSHARED_BODY_BYTES;
        // All of them begin before any has ended.
        let reading = || {
            let budget = budget.clone();
            let slowly = of(chunks).then(|chunk| async {
                tokio::task::yield_now().await;
                chunk
            });
            tokio::spawn(async move {
                let body = read(&budget, Body::from_stream(slowly), Duration::from_secs(60)).await;
                body.map(|body| body.bytes().len()).map_err(|error| error.status)
            })
        };
        let readings: Vec<_> = (0..3 * MAX_LARGEST_BODIES).map(|_| reading()).collect();
        for reading in readings {
            assert_eq!(reading.await.expect("no panic"), Ok(LARGEST));
        }
    }
}
