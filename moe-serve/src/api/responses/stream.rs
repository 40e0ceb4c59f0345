//! A running response: collected, or sent as events that each bear their type's name.

use super::super::error::ApiError;
use super::super::piece::Piece;
use super::super::stream::{EventWriter, Running};
use super::super::types::Usage;
use super::output::ResponseWriter;
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::Value;

/// Waits for the whole answer.
pub(in super::super) async fn collect(mut running: Running, mut writer: ResponseWriter) -> Result<Response, ApiError> {
    while let Some(pieces) = running.next().await? {
        for piece in pieces {
            writer.push(piece);
        }
    }
    Ok(Json(writer.whole(running.maker.usage())).into_response())
}

impl EventWriter for ResponseWriter {
    fn begin(&mut self, out: &mut Vec<u8>) {
        write(self.begin(), out);
    }

    fn piece(&mut self, piece: Piece, _: &dyn Fn() -> Usage, out: &mut Vec<u8>) {
        write(self.push(piece), out);
    }

    fn end(&mut self, usage: Usage, out: &mut Vec<u8>) {
        write(self.end(usage), out);
    }

    fn error(&mut self, error: &ApiError, out: &mut Vec<u8>) {
        write([self.error(&error.body()["error"])], out);
    }
}

fn write(events: impl IntoIterator<Item = Value>, out: &mut Vec<u8>) {
    for event in events {
        let kind = event["type"].as_str().unwrap_or_default();
        out.extend_from_slice(format!("event: {kind}\ndata: {event}\n\n").as_bytes());
    }
}
