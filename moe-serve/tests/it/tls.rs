//! The same server over TLS.

use crate::support::{ScriptedLm, TestServer, served};
use clap::Parser;
use moe_serve::api::{Limits, ServerConfig, Tls};
use moe_serve::cli::Cli;
use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use serde_json::{Value, json};
use std::fs::write;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

const LIMIT: Duration = Duration::from_millis(300);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(5);
const HEAD_OF_GET: &str = "GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";

/// A certificate for `localhost` that nobody but itself vouches for, and its files.
struct Certificate {
    of: CertifiedKey<KeyPair>,
    folder: TempDir,
}

impl Certificate {
    fn new() -> Self {
        let of = generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
        let certificate = Self { of, folder: TempDir::new().expect("a folder") };
        write(certificate.file("cert.pem"), certificate.of.cert.pem()).expect("written");
        write(certificate.file("key.pem"), certificate.of.signing_key.serialize_pem()).expect("written");
        certificate
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tls(&self) -> Tls {
        Tls::from_files(&self.file("cert.pem"), &self.file("key.pem")).expect("works")
    }

    fn server(&self, limits: Limits) -> TestServer {
        let lm = ScriptedLm::new(&"the cat sat on the mat. ".repeat(20));
        TestServer::with(
            served(Arc::new(lm)),
            ServerConfig { limits, tls: Some(self.tls()), ..ServerConfig::default() },
        )
    }

    /// A connection of a client that trusts this certificate.
    fn connect(&self, server: &TestServer) -> StreamOwned<ClientConnection, TcpStream> {
        let mut roots = RootCertStore::empty();
        roots.add(self.of.cert.der().clone()).expect("a certificate");
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = "localhost".try_into().expect("a name");
        let session = ClientConnection::new(Arc::new(config), name).expect("a session");
        StreamOwned::new(session, plain(server))
    }
}

fn plain(server: &TestServer) -> TcpStream {
    let stream = TcpStream::connect(server.client.address).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    stream
}

fn post(body: &Value) -> String {
    let body = body.to_string();
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// What the server sends until it closes.
fn answer(mut stream: impl Read + Write, request: &str) -> String {
    stream.write_all(request.as_bytes()).expect("the server reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("a whole answer");
    answer
}

#[test]
fn answers_whole_and_streamed() {
    let certificate = Certificate::new();
    let server = certificate.server(Limits::default());
    let whole = answer(certificate.connect(&server), HEAD_OF_GET);
    assert!(whole.starts_with("HTTP/1.1 200") && whole.ends_with("{\"status\":\"ok\"}"), "{whole}");
    let body = json!({"prompt": "the", "max_tokens": 6, "stream": true});
    let streamed = answer(certificate.connect(&server), &post(&body));
    assert!(streamed.starts_with("HTTP/1.1 200") && streamed.contains("data: [DONE]"), "{streamed}");
}

#[test]
fn a_client_without_tls_gets_no_answer() {
    let certificate = Certificate::new();
    let server = certificate.server(Limits::default());
    let mut stream = plain(&server);
    stream.write_all(HEAD_OF_GET.as_bytes()).expect("open");
    let mut sent = Vec::new();
    stream.read_to_end(&mut sent).ok();
    assert!(!sent.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&sent));
    assert!(answer(certificate.connect(&server), HEAD_OF_GET).starts_with("HTTP/1.1 200"));
}

#[test]
fn a_greeting_that_does_not_come_is_not_waited_for() {
    let certificate = Certificate::new();
    let mut server = certificate.server(Limits { header_timeout: LIMIT, ..Limits::default() });
    let begun = Instant::now();
    let mut stream = plain(&server);
    assert_eq!(stream.read(&mut [0]).expect("an orderly end"), 0);
    let took = begun.elapsed();
    assert!(took >= LIMIT - Duration::from_millis(20) && took < LIMIT + SLACK, "{took:?}");
    // Nor does one hold up the end.
    let _waiting = plain(&server);
    let begun = Instant::now();
    server.ask_to_stop();
    server.wait();
    assert!(begun.elapsed() < SLACK);
}

#[test]
fn a_connection_is_closed_when_it_stays_idle_after_an_answer() {
    let certificate = Certificate::new();
    let server = certificate.server(Limits { keep_alive_timeout: LIMIT, ..Limits::default() });
    let mut stream = certificate.connect(&server);
    let begun = Instant::now();
    stream.write_all(HEAD_OF_GET.replace("close", "keep-alive").as_bytes()).expect("open");
    let mut sent = Vec::new();
    // Closed without a last word of TLS, which some call an error.
    stream.read_to_end(&mut sent).ok();
    assert!(sent.starts_with(b"HTTP/1.1 200"));
    assert!(begun.elapsed() >= LIMIT - Duration::from_millis(20) && begun.elapsed() < LIMIT + SLACK);
}

#[test]
fn a_stream_that_is_not_read_is_closed() {
    let certificate = Certificate::new();
    let server = certificate.server(Limits { write_timeout: LIMIT, ..Limits::default() });
    // Some 20 MB: more than the sockets' buffers hold.
    let body =
        json!({"prompt": vec!["the"; 128], "max_tokens": 100, "ignore_eos": true, "stream": true, "logprobs": 20});
    let mut stream = certificate.connect(&server);
    stream.write_all(post(&body).as_bytes()).expect("the server reads");
    std::thread::sleep(Duration::from_secs(2));
    let mut sent = Vec::new();
    stream.read_to_end(&mut sent).ok();
    assert!(sent.starts_with(b"HTTP/1.1 200"));
    assert!(!sent.ends_with(b"0\r\n\r\n"), "the whole answer came: {} bytes", sent.len());
}

#[test]
fn files_that_cannot_be_used_name_their_flag() {
    let (certificate, other) = (Certificate::new(), Certificate::new());
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| certificate.file(name));
    write(certificate.file("text"), "no PEM at all").expect("written");
    write(certificate.file("broken"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .expect("written");
    let [text, broken, gone] = ["text", "broken", "gone"].map(|name| certificate.file(name));
    for (cert, key, flag, says) in [
        (&gone, &key, "--tls-cert", "No such file"),
        (&text, &key, "--tls-cert", "BEGIN"),
        (&key, &key, "--tls-cert", "certificate"),
        (&broken, &key, "--tls-cert", "certificate"),
        (&cert, &gone, "--tls-key", "No such file"),
        (&cert, &text, "--tls-key", "private key"),
        (&cert, &cert, "--tls-key", "private key"),
        (&cert, &other.file("key.pem"), "--tls-key", "not the key of the certificate"),
    ] {
        let error = Tls::from_files(cert, key).expect_err("refused").to_string();
        assert!(error.starts_with(flag) && error.contains(says), "{error:?} is not of {flag}, {says}");
    }
}

#[test]
fn each_file_needs_the_other() {
    for (flag, other) in [("--tls-cert", "--tls-key"), ("--tls-key", "--tls-cert")] {
        let error = Cli::try_parse_from(["moe-serve", flag, "file"]).expect_err("refused").to_string();
        assert!(error.contains(other), "{error}");
    }
}
