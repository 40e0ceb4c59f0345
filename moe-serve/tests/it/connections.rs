//! Connections that cost and do nothing are closed in time; those that do something are not.

use crate::support::{ScriptedLm, TestServer, served};
use moe_serve::api::Limits;
use serde_json::json;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_millis(300);
/// What a busy machine may add.
const SLACK: Duration = Duration::from_secs(5);
/// Far beyond every wait of a test.
const NEVER: Duration = Duration::from_secs(600);

const GET: &[u8] = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n";

fn lenient() -> Limits {
    Limits { header_timeout: NEVER, keep_alive_timeout: NEVER, write_timeout: NEVER, ..Limits::default() }
}

fn server(limits: Limits) -> TestServer {
    TestServer::start(served(Arc::new(ScriptedLm::new(&"the cat sat on the mat. ".repeat(20)))), limits)
}

fn connect(server: &TestServer) -> TcpStream {
    let stream = TcpStream::connect(server.client.address).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    stream
}

/// Reads one answer of known length and returns its head.
fn read_answer(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).expect("a head");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("UTF-8");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).expect("a length");
    stream.read_exact(&mut vec![0; length.parse().expect("a number")]).expect("a body");
    head
}

/// The server closes the connection after `limit` and not much later, without another byte.
#[track_caller]
fn assert_closed_after(limit: Duration, since: Instant, stream: &mut TcpStream) {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => assert_eq!(rest, b"", "no answer without a request"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}"),
    }
    let took = since.elapsed();
    assert!(
        took >= limit - Duration::from_millis(20) && took < limit + SLACK,
        "closed after {took:?}, limit {limit:?}"
    );
}

#[test]
fn a_connection_that_sends_nothing_is_closed() {
    let server = server(Limits { header_timeout: LIMIT, ..lenient() });
    let begun = Instant::now();
    assert_closed_after(LIMIT, begun, &mut connect(&server));
}

#[test]
fn half_a_head_is_not_waited_for() {
    let server = server(Limits { header_timeout: LIMIT, ..lenient() });
    let begun = Instant::now();
    let mut stream = connect(&server);
    // One byte after another does not help.
    for byte in &GET[..6] {
        stream.write_all(&[*byte]).expect("open");
        std::thread::sleep(LIMIT / 10);
    }
    assert_closed_after(LIMIT, begun, &mut stream);
    // Nor does an earlier request on the same connection.
    let mut stream = connect(&server);
    stream.write_all(GET).expect("open");
    read_answer(&mut stream);
    stream.write_all(&GET[..GET.len() - 2]).expect("open");
    let begun = Instant::now();
    assert_closed_after(LIMIT, begun, &mut stream);
}

#[test]
fn a_connection_is_closed_when_it_stays_idle_after_an_answer() {
    let server = server(Limits { keep_alive_timeout: LIMIT, ..lenient() });
    let mut stream = connect(&server);
    // Each request in time gives the connection a new term.
    for _ in 0..4 {
        std::thread::sleep(LIMIT / 2);
        stream.write_all(GET).expect("open");
        assert!(read_answer(&mut stream).starts_with("HTTP/1.1 200"));
    }
    let begun = Instant::now();
    assert_closed_after(LIMIT, begun, &mut stream);
}

#[test]
fn a_stream_that_is_not_read_is_closed() {
    let server = server(Limits { write_timeout: LIMIT, ..lenient() });
    // Some 20 MB: more than the sockets' buffers hold.
    let body =
        json!({"prompt": vec!["the"; 128], "max_tokens": 100, "ignore_eos": true, "stream": true, "logprobs": 20});
    let mut stream = server.client.write_only("/v1/completions", &body);
    std::thread::sleep(Duration::from_secs(2));
    // What the sockets held is still there; what would have followed had the server waited is not.
    let mut sent = Vec::new();
    stream.read_to_end(&mut sent).ok();
    assert!(sent.starts_with(b"HTTP/1.1 200"));
    assert!(!sent.ends_with(b"0\r\n\r\n"), "the whole answer came: {} bytes", sent.len());
}

#[test]
fn a_stream_that_is_read_too_slowly_ends_at_the_requests_limit() {
    let limits = Limits { request_timeout: Duration::from_secs(1), write_timeout: LIMIT, ..lenient() };
    let server = server(limits);
    // Some 20 MB, for which a client that takes a little every 20 ms needs far longer.
    let body =
        json!({"prompt": vec!["the"; 128], "max_tokens": 100, "ignore_eos": true, "stream": true, "logprobs": 20});
    let mut stream = server.client.write_only("/v1/completions", &body);
    let (mut sent, mut part) = (Vec::new(), vec![0; 1 << 16]);
    // Closed, at the end or before it.
    while let Ok(1..) = stream.read(&mut part).inspect(|&bytes| sent.extend_from_slice(&part[..bytes])) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let text = String::from_utf8_lossy(&sent);
    assert!(text.starts_with("HTTP/1.1 200"));
    let finished = text.matches("\"finish_reason\":\"length\"").count();
    assert!(finished < 128, "the whole answer came: {} bytes", sent.len());
}

#[test]
fn a_slow_stream_that_is_read_goes_on_past_every_limit() {
    let limit = Duration::from_millis(200);
    let limits = Limits { header_timeout: limit, keep_alive_timeout: limit, write_timeout: limit, ..lenient() };
    // A piece every 300 ms: longer than each limit.
    let lm = ScriptedLm::new(&"the cat sat on the mat. ".repeat(20)).slow(Duration::from_millis(300));
    let server = TestServer::start(served(Arc::new(lm)), limits);
    let body = json!({"prompt": "the", "max_tokens": 6, "ignore_eos": true, "stream": true});
    let begun = Instant::now();
    let events = server.client.post("/v1/completions", &body).events();
    assert_eq!(events.last().expect("chunks")["choices"][0]["finish_reason"], "length");
    // So does an answer that comes whole.
    let body = json!({"prompt": "the", "max_tokens": 4, "ignore_eos": true});
    server.client.post("/v1/completions", &body).ok();
    assert!(begun.elapsed() > 8 * limit, "the answers took their time");
}

#[test]
fn more_connections_than_allowed_wait_for_one_to_close() {
    let lm = ScriptedLm::new(&"the cat sat on the mat. ".repeat(20)).slow(Duration::from_millis(20));
    let server = TestServer::start(served(Arc::new(lm)), Limits { max_connections: 2, ..lenient() });
    let long = json!({"prompt": "the", "max_tokens": 100, "ignore_eos": true, "stream": true});
    let first = server.client.open("/v1/completions", &long);
    let second = server.client.open("/v1/completions", &long);
    let mut third = connect(&server);
    third.write_all(GET).expect("the system takes it");
    third.set_read_timeout(Some(LIMIT)).expect("a socket");
    let error = third.read(&mut [0]).expect_err("nobody answers");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    drop(first);
    third.set_read_timeout(Some(Duration::from_secs(60))).expect("a socket");
    assert!(read_answer(&mut third).starts_with("HTTP/1.1 200"));
    // Who was answered was not disturbed.
    assert_eq!(second.whole().events().last().expect("chunks")["choices"][0]["finish_reason"], "length");
}

#[test]
fn connections_that_ask_for_nothing_give_way_to_others() {
    let server = server(Limits { max_connections: 3, ..lenient() });
    let mut silent: Vec<TcpStream> = (0..2).map(|_| connect(&server)).collect();
    std::thread::sleep(LIMIT);
    let mut kept = connect(&server);
    for round in 0..4 {
        kept.write_all(GET).expect("open");
        assert!(read_answer(&mut kept).starts_with("HTTP/1.1 200"), "{round}");
        // One more, which asks for something.
        let mut next = connect(&server);
        next.write_all(GET).expect("open");
        assert!(read_answer(&mut next).starts_with("HTTP/1.1 200"), "{round}");
        silent.push(next);
    }
    // The first ones were closed, in their order, and the last ones are open.
    for (i, stream) in silent.iter_mut().enumerate() {
        stream.set_read_timeout(Some(LIMIT)).expect("a socket");
        let closed = stream.read(&mut [0]).is_ok_and(|bytes| bytes == 0);
        assert_eq!(closed, i < 4, "{i}");
    }
}

#[test]
fn stopping_does_not_wait_for_idle_connections() {
    let mut server = server(Limits { shutdown_grace: NEVER, ..lenient() });
    let mut idle = connect(&server);
    idle.write_all(GET).expect("open");
    read_answer(&mut idle);
    let begun = Instant::now();
    server.ask_to_stop();
    server.wait();
    assert!(begun.elapsed() < SLACK, "took {:?}", begun.elapsed());
    assert_eq!(idle.read(&mut [0]).expect("an orderly end"), 0);
}

#[test]
fn bodies_that_do_not_come_keep_nobody_out() {
    let server = server(Limits { max_connections: 2, body_timeout: NEVER, ..lenient() });
    let head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n";
    let mut unsent: Vec<TcpStream> = (0..2).map(|_| connect(&server)).collect();
    for stream in &mut unsent {
        stream.write_all(head).expect("open");
        // So that it is certain which one waits longer.
        std::thread::sleep(LIMIT);
    }
    let mut next = connect(&server);
    next.write_all(GET).expect("open");
    assert!(read_answer(&mut next).starts_with("HTTP/1.1 200"));
    assert_eq!(unsent[0].read(&mut [0]).expect("closed"), 0);
    // The other one can still send it.
    unsent[1].write_all(b"{\"a\": 1} ").expect("open");
    assert!(read_answer(&mut unsent[1]).starts_with("HTTP/1.1 400"));
}
