//! Runs one submitted request to its answer: collected into one body, or as server-sent events.

use super::common_request::StreamOptions;
use super::error::ApiError;
use super::piece::{Piece, PieceMaker};
use super::render::{Endpoint, Renderer};
use super::types::Usage;
use crate::Error;
use crate::text::{Event, EventReceiver};
use axum::Json;
use axum::body::{Body, Bytes};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use serde_json::Value;
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// A request the engine works on.
pub(super) struct Running {
    pub(super) receiver: EventReceiver,
    pub(super) maker: PieceMaker,
    /// When the answer must be complete.
    pub(super) deadline: Instant,
    pub(super) limit: Duration,
}

impl Running {
    /// The next event, or the error that ends the request. Dropping `self` afterwards cancels the job.
    pub(super) async fn next(&mut self) -> Result<Option<Vec<Piece>>, ApiError> {
        let timeout = || Error::Timeout { limit_s: self.limit.as_secs() };
        let event = timeout_at(self.deadline, self.receiver.next()).await.map_err(|_| timeout())?;
        self.pieces(event)
    }

    /// The same if there is one already.
    fn ready(&mut self) -> Option<Result<Option<Vec<Piece>>, ApiError>> {
        let event = self.receiver.ready()?;
        Some(self.pieces(event))
    }

    fn pieces(&mut self, event: Event) -> Result<Option<Vec<Piece>>, ApiError> {
        match event {
            Event::Done(result) => result.map(|()| None).map_err(ApiError::from),
            event => Ok(Some(self.maker.pieces(event))),
        }
    }

    /// Waits for the whole answer.
    pub(super) async fn collect(mut self, renderer: &Renderer) -> Result<Response, ApiError> {
        let choice = |choice| Piece { choice, ..Piece::default() };
        let mut choices: Vec<Piece> = (0..self.maker.num_choices()).map(choice).collect();
        while let Some(pieces) = self.next().await? {
            for piece in pieces {
                choices[piece.choice].extend(piece);
            }
        }
        Ok(Json(renderer.whole(choices, self.maker.usage())).into_response())
    }

    /// Answers at once and sends each piece as it comes.
    pub(super) fn stream(self, renderer: Renderer, options: StreamOptions) -> Response {
        let begun = vec![false; self.maker.num_choices()];
        let state = SseState { running: self, renderer, options, begun, ready: Vec::new(), ended: false };
        event_stream(futures_util::stream::unfold(state, |mut state| async move {
            state.next_frame().await.map(|frame| (frame, state))
        }))
    }
}

/// An answer of server-sent events.
pub(super) fn event_stream(frames: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let body = Body::from_stream(frames.map(Ok::<_, Infallible>));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Asks a reverse proxy not to hold the pieces back.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

struct SseState {
    running: Running,
    renderer: Renderer,
    options: StreamOptions,
    /// Per choice, whether a chunk was sent.
    begun: Vec<bool>,
    /// What has not been sent.
    ready: Vec<u8>,
    ended: bool,
}

impl SseState {
    /// All that there is to send, once there is something: who reads slower than tokens come gets several at a time.
    async fn next_frame(&mut self) -> Option<Bytes> {
        while !self.ended {
            let next = match self.running.ready() {
                Some(next) => next,
                None if self.ready.is_empty() => self.running.next().await,
                None => break,
            };
            match next {
                Ok(Some(pieces)) => pieces.into_iter().for_each(|piece| self.push(piece)),
                Ok(None) => self.end(),
                Err(error) => {
                    self.running.receiver.cancel_flag().cancel();
                    self.send(&error.body());
                    self.end_marker();
                }
            }
        }
        let ready = std::mem::take(&mut self.ready);
        (!ready.is_empty()).then(|| ready.into())
    }

    fn send(&mut self, value: &Value) {
        self.ready.extend_from_slice(format!("data: {value}\n\n").as_bytes());
    }

    fn push(&mut self, piece: Piece) {
        let first = !std::mem::replace(&mut self.begun[piece.choice], true);
        let announces = first && self.renderer.endpoint == Endpoint::Chat;
        if piece.is_empty() && !announces {
            self.begun[piece.choice] = !first;
            return;
        }
        let usage: Option<Usage> = self.options.continuous_usage.then(|| self.running.maker.usage());
        let chunk = self.renderer.chunk(piece, first, usage);
        self.send(&chunk);
    }

    fn end(&mut self) {
        if self.options.include_usage {
            let chunk = self.renderer.usage_chunk(self.running.maker.usage());
            self.send(&chunk);
        }
        self.end_marker();
    }

    fn end_marker(&mut self) {
        self.ready.extend_from_slice(b"data: [DONE]\n\n");
        self.ended = true;
    }
}
