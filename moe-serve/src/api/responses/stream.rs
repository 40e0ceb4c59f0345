//! A running response: collected, or sent as events that each bear their type's name.

use super::super::error::ApiError;
use super::super::stream::{Running, event_stream};
use super::output::ResponseWriter;
use axum::Json;
use axum::body::Bytes;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::collections::VecDeque;

/// Waits for the whole answer.
pub(in super::super) async fn collect(mut running: Running, mut writer: ResponseWriter) -> Result<Response, ApiError> {
    while let Some(pieces) = running.next().await? {
        for piece in pieces {
            writer.push(piece);
        }
    }
    Ok(Json(writer.whole(running.maker.usage())).into_response())
}

/// Answers at once and sends each event as it comes.
pub(in super::super) fn stream(running: Running, mut writer: ResponseWriter) -> Response {
    let ready = writer.begin().iter().map(frame).collect();
    let state = Sending { running, writer, ready, ended: false };
    event_stream(futures_util::stream::unfold(state, |mut state| async move {
        state.next_frame().await.map(|frame| (frame, state))
    }))
}

struct Sending {
    running: Running,
    writer: ResponseWriter,
    ready: VecDeque<Bytes>,
    ended: bool,
}

impl Sending {
    async fn next_frame(&mut self) -> Option<Bytes> {
        while self.ready.is_empty() && !self.ended {
            let events = match self.running.next().await {
                Ok(Some(pieces)) => pieces.into_iter().flat_map(|piece| self.writer.push(piece)).collect(),
                Ok(None) => {
                    self.ended = true;
                    self.writer.end(self.running.maker.usage())
                }
                Err(error) => {
                    self.running.receiver.cancel_flag().cancel();
                    self.ended = true;
                    vec![self.writer.error(&error.body()["error"])]
                }
            };
            self.ready.extend(events.iter().map(frame));
        }
        self.ready.pop_front()
    }
}

fn frame(event: &Value) -> Bytes {
    let kind = event["type"].as_str().unwrap_or_default();
    Bytes::from(format!("event: {kind}\ndata: {event}\n\n"))
}
