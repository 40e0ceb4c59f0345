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
        let event = timeout_at(self.deadline, self.receiver.next()).await.map_err(|_| self.timeout())?;
        self.pieces(event)
    }

    /// The same if there is one already. Who reads slower than tokens come is never without one, and has no longer for it.
    fn ready(&mut self) -> Option<Result<Option<Vec<Piece>>, ApiError>> {
        if Instant::now() >= self.deadline {
            return Some(Err(self.timeout().into()));
        }
        let event = self.receiver.ready()?;
        Some(self.pieces(event))
    }

    fn timeout(&self) -> Error {
        Error::Timeout { limit_s: self.limit.as_secs() }
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

    /// Answers at once with what `writer` makes of the pieces: all that there are, once there are any, so that who reads slower than
    /// tokens come gets several at a time.
    pub(super) fn stream(self, mut writer: impl EventWriter) -> Response {
        let mut ready = Vec::new();
        writer.begin(&mut ready);
        let state = Sending { running: self, writer, ready, ended: false };
        event_stream(futures_util::stream::unfold(state, |mut state| async move {
            state.next_frame().await.map(|frame| (frame, state))
        }))
    }
}

/// Writes the events of an answer.
pub(super) trait EventWriter: Send + 'static {
    /// What goes before any piece.
    fn begin(&mut self, out: &mut Vec<u8>);
    /// `usage` is what has been used so far.
    fn piece(&mut self, piece: Piece, usage: &dyn Fn() -> Usage, out: &mut Vec<u8>);
    /// The answer is whole.
    fn end(&mut self, usage: Usage, out: &mut Vec<u8>);
    /// It ends by an error.
    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>);
}

/// An answer of server-sent events.
fn event_stream(frames: impl Stream<Item = Bytes> + Send + 'static) -> Response {
    let body = Body::from_stream(frames.map(Ok::<_, Infallible>));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-cache"),
        // Asks a reverse proxy not to hold the pieces back.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, body).into_response()
}

struct Sending<W> {
    running: Running,
    writer: W,
    /// What has not been sent.
    ready: Vec<u8>,
    ended: bool,
}

impl<W: EventWriter> Sending<W> {
    async fn next_frame(&mut self) -> Option<Bytes> {
        while !self.ended {
            let next = match self.running.ready() {
                Some(next) => next,
                None if self.ready.is_empty() => self.running.next().await,
                None => break,
            };
            self.ended = !matches!(next, Ok(Some(_)));
            let Self { running, writer, ready, .. } = self;
            match next {
                Ok(Some(pieces)) => {
                    pieces.into_iter().for_each(|piece| writer.piece(piece, &|| running.maker.usage(), ready))
                }
                Ok(None) => writer.end(running.maker.usage(), ready),
                Err(error) => {
                    running.receiver.cancel_flag().cancel();
                    writer.error(&error, ready);
                }
            }
        }
        let ready = std::mem::take(&mut self.ready);
        (!ready.is_empty()).then(|| ready.into())
    }
}

/// Writes the chunks of a completion, or of a chat.
pub(super) struct ChunkWriter {
    renderer: Renderer,
    options: StreamOptions,
    /// Per choice, whether a chunk was written.
    begun: Vec<bool>,
}

impl ChunkWriter {
    pub(super) fn new(renderer: Renderer, options: StreamOptions, num_choices: usize) -> Self {
        Self { renderer, options, begun: vec![false; num_choices] }
    }
}

impl EventWriter for ChunkWriter {
    fn begin(&mut self, _: &mut Vec<u8>) {}

    fn piece(&mut self, piece: Piece, usage: &dyn Fn() -> Usage, out: &mut Vec<u8>) {
        let first = !std::mem::replace(&mut self.begun[piece.choice], true);
        let announces = first && self.renderer.endpoint == Endpoint::Chat;
        if piece.is_empty() && !announces {
            self.begun[piece.choice] = !first;
            return;
        }
        write(&self.renderer.chunk(piece, first, self.options.continuous_usage.then(usage)), out);
    }

    fn end(&mut self, usage: Usage, out: &mut Vec<u8>) {
        if self.options.include_usage {
            write(&self.renderer.usage_chunk(usage), out);
        }
        out.extend_from_slice(END);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        write(&error.body(), out);
        out.extend_from_slice(END);
    }
}

const END: &[u8] = b"data: [DONE]\n\n";

fn write(value: &Value, out: &mut Vec<u8>) {
    out.extend_from_slice(format!("data: {value}\n\n").as_bytes());
}
