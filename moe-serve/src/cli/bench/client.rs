//! One streamed completion from any OpenAI-compatible server, with the time of every piece.

use anyhow::{Context, Result, bail, ensure};
use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// Which server, and how it is asked.
#[derive(Debug, Clone)]
pub(super) struct Target {
    host: String,
    port: u16,
    path: String,
    pub(super) model: String,
    key: Option<String>,
}

/// What came of a request.
#[derive(Debug, Clone)]
pub(super) struct Outcome {
    pub(super) status: StatusCode,
    pub(super) prompt_tokens: usize,
    pub(super) cached_tokens: usize,
    pub(super) output_tokens: usize,
    /// From sending to each piece of text.
    pub(super) pieces: Vec<Duration>,
    pub(super) total: Duration,
}

impl Target {
    /// `url` without a path, such as `http://127.0.0.1:8000`; without a `model` the first one that the server names.
    pub(super) async fn find(url: &str, model: Option<String>, key: Option<String>) -> Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("--url {url}"))?;
        ensure!(uri.scheme_str() == Some("http"), "--url: expected http://HOST:PORT, found {url}");
        let host = uri.host().with_context(|| format!("--url {url} names no host"))?;
        // An address of IPv6 stands in brackets in a URL alone.
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let (port, path) = (uri.port_u16().unwrap_or(80), uri.path().trim_end_matches('/').to_owned());
        let mut target = Self { host, port, path, model: String::new(), key };
        target.model = match model {
            Some(model) => model,
            None => {
                let (status, body) = target.get("/v1/models").await?;
                ensure!(status.is_success(), "{url}/v1/models answered {status}");
                body["data"][0]["id"].as_str().context("the server names no model; give --model")?.to_owned()
            }
        };
        Ok(target)
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<hyper::Response<hyper::body::Incoming>> {
        let address = (self.host.as_str(), self.port);
        let stream =
            TcpStream::connect(address).await.with_context(|| format!("connecting to {}:{}", self.host, self.port))?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender.send_request(request).await?)
    }

    /// As it stands in a URL.
    fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }

    fn request(&self, method: &str, path: &str, body: String) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.path))
            .header(header::HOST, self.authority())
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        Ok(request.body(Full::new(Bytes::from(body)))?)
    }

    async fn get(&self, path: &str) -> Result<(StatusCode, Value)> {
        let response = self.send(self.request("GET", path, String::new())?).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
    }

    /// Sends a prompt and reads the stream to its end. Times are since `due`, when it was to be sent.
    pub(super) async fn complete(&self, prompt: &[u32], output_len: usize, due: Instant) -> Result<Outcome> {
        let body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_len,
            "ignore_eos": true,
            "temperature": 0,
            "stream": true,
            "stream_options": {"include_usage": true},
        });
        let request = self.request("POST", "/v1/completions", body.to_string())?;
        let mut response = self.send(request).await?;
        let mut outcome = Outcome {
            status: response.status(),
            prompt_tokens: prompt.len(),
            cached_tokens: 0,
            output_tokens: 0,
            pieces: Vec::new(),
            total: Duration::ZERO,
        };
        let mut pending = Vec::new();
        while let Some(frame) = response.frame().await {
            if let Ok(data) = frame?.into_data() {
                pending.extend_from_slice(&data);
            }
            while let Some(end) = event_end(&pending) {
                let event: Vec<u8> = pending.drain(..end).collect();
                outcome.read(&event, due.elapsed())?;
            }
        }
        outcome.total = due.elapsed();
        Ok(outcome)
    }
}

/// Where the first event of a stream ends, with either kind of line ends.
fn event_end(stream: &[u8]) -> Option<usize> {
    let after = |mark: &[u8]| stream.windows(mark.len()).position(|bytes| bytes == mark).map(|at| at + mark.len());
    [after(b"\n\n"), after(b"\r\n\r\n")].into_iter().flatten().min()
}

impl Outcome {
    /// One event of the stream.
    fn read(&mut self, event: &[u8], at: Duration) -> Result<()> {
        let text = std::str::from_utf8(event)?.trim();
        let Some(data) = text.strip_prefix("data:").map(str::trim).filter(|data| *data != "[DONE]") else {
            return Ok(());
        };
        let value: Value = serde_json::from_str(data).with_context(|| format!("an event of the stream: {data:.80}"))?;
        if let Some(error) = value["error"]["message"].as_str() {
            bail!("{error}");
        }
        let is_piece = |choice: &Value| {
            let text = choice["text"].as_str().unwrap_or_default();
            // Some servers tell the end apart from the last token.
            !text.is_empty() || choice["finish_reason"].is_null()
        };
        if value["choices"].as_array().is_some_and(|choices| choices.iter().any(is_piece)) {
            self.pieces.push(at);
        }
        let count = |value: &Value| value.as_u64().unwrap_or(0) as usize;
        if value["usage"].is_object() {
            self.output_tokens = count(&value["usage"]["completion_tokens"]);
            self.cached_tokens = count(&value["usage"]["prompt_tokens_details"]["cached_tokens"]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_end_with_either_kind_of_line_ends() {
        for (stream, want) in
            [("data: 1\n\ndata: 2\n\n", Some(9)), ("data: 1\r\n\r\nx\n\n", Some(11)), ("data: 1\n", None)]
        {
            assert_eq!(event_end(stream.as_bytes()), want, "{stream:?}");
        }
    }

    #[test]
    fn an_end_told_apart_from_the_last_token_is_no_piece() {
        let mut outcome = Outcome {
            status: StatusCode::OK,
            prompt_tokens: 1,
            cached_tokens: 0,
            output_tokens: 0,
            pieces: Vec::new(),
            total: Duration::ZERO,
        };
        for (choices, pieces) in [
            (json!([{"text": "a", "finish_reason": null}]), 1),
            (json!([{"text": "", "finish_reason": null}]), 2),
            (json!([{"text": "", "finish_reason": "length"}]), 2),
            (json!([{"text": "b", "finish_reason": "length"}]), 3),
            (json!([]), 3),
        ] {
            let event = format!("data: {}\r\n\r\n", json!({"choices": choices}));
            outcome.read(event.as_bytes(), Duration::ZERO).expect("an event");
            assert_eq!(outcome.pieces.len(), pieces, "{event}");
        }
    }
}
