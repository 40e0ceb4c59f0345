//! The least HTTP/1.1 client that can see everything: status, headers, the exact framing of a stream.

use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const JSON: &str = "application/json";

#[derive(Debug, Clone, Copy)]
pub(crate) struct Client {
    pub(crate) address: SocketAddr,
    /// Sent with every request.
    key: Option<&'static str>,
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: String,
    pub(crate) body: String,
}

impl Reply {
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }

    /// The JSON of an answer that must be a 200.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }

    /// The payloads of a stream, which must be framed as `data: ...\n\n` and end with `[DONE]`.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert!(self.headers.contains("content-type: text/event-stream"), "{}", self.headers);
        let mut frames: Vec<&str> = self.body.split("\n\n").collect();
        assert_eq!(frames.pop(), Some(""), "the last frame is closed");
        assert_eq!(frames.pop(), Some("data: [DONE]"));
        let payload = |frame: &str| frame.strip_prefix("data: ").map(|json| serde_json::from_str(json).expect(json));
        frames.into_iter().map(|frame| payload(frame).unwrap_or_else(|| panic!("not a data frame: {frame}"))).collect()
    }
}

impl Client {
    pub(crate) fn new(address: SocketAddr) -> Self {
        Self { address, key: None }
    }

    pub(crate) fn with_key(&self, key: Option<&'static str>) -> Self {
        Self { key, ..*self }
    }

    /// A request without a body and with further headers.
    pub(crate) fn with_headers(&self, method: &str, path: &str, headers: &str) -> Reply {
        Stream::new(self.connect(method, path, JSON, headers, b"")).whole()
    }

    pub(crate) fn get(&self, path: &str) -> Reply {
        self.send("GET", path, JSON, b"").whole()
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.post_raw(path, JSON, body.to_string().as_bytes())
    }

    pub(crate) fn post_raw(&self, path: &str, content_type: &str, body: &[u8]) -> Reply {
        self.send("POST", path, content_type, body).whole()
    }

    pub(crate) fn request(&self, method: &str, path: &str) -> Reply {
        self.send(method, path, JSON, b"").whole()
    }

    /// Sends a request and returns once the answer's head is there.
    pub(crate) fn open(&self, path: &str, body: &Value) -> Stream {
        self.send("POST", path, JSON, body.to_string().as_bytes())
    }

    /// Sends a request without waiting for anything.
    pub(crate) fn write_only(&self, path: &str, body: &Value) -> TcpStream {
        let body = body.to_string();
        self.connect("POST", path, JSON, "", body.as_bytes())
    }

    fn send(&self, method: &str, path: &str, content_type: &str, body: &[u8]) -> Stream {
        Stream::new(self.connect(method, path, content_type, "", body))
    }

    fn connect(&self, method: &str, path: &str, content_type: &str, headers: &str, body: &[u8]) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
        let key = self.key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: {content_type}\r\n\
             {key}{headers}content-length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes()).expect("the server reads");
        // A server may refuse a body before it has read it all.
        stream.write_all(body).ok();
        stream
    }
}

/// An answer that is read piece by piece.
pub(crate) struct Stream {
    pub(crate) status: u16,
    headers: String,
    reader: BufReader<TcpStream>,
}

impl Stream {
    fn new(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut headers = String::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).expect("a head");
            if line.trim().is_empty() {
                break;
            }
            headers.push_str(&line);
        }
        let status = headers.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        Self { status, headers, reader }
    }

    /// The next chunk of a chunked body; empty at the end.
    pub(crate) fn chunk(&mut self) -> Vec<u8> {
        let mut size = String::new();
        self.reader.read_line(&mut size).expect("a chunk's size");
        let size = usize::from_str_radix(size.trim(), 16).expect("a hexadecimal size");
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).expect("a whole chunk");
        chunk.truncate(size);
        chunk
    }

    pub(crate) fn whole(mut self) -> Reply {
        let mut body = Vec::new();
        if self.headers.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            loop {
                let chunk = self.chunk();
                if chunk.is_empty() {
                    break;
                }
                body.extend(chunk);
            }
        } else {
            self.reader.read_to_end(&mut body).expect("a body");
        }
        Reply { status: self.status, headers: self.headers, body: String::from_utf8(body).expect("UTF-8") }
    }
}
