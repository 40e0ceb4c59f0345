//! [`Activity`]: what a connection is doing, and since when; [`WatchedIo`] and [`WatchedBody`] tell it.
//!
//! A timer inside the socket cannot tell an idle connection from one whose answer takes its time, and one around the
//! requests does not see a client that stops reading. This knows both ends. It closes nothing itself.

use super::limits::{Limits, deadline};
use axum::body::Body;
use axum::body::Bytes;
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// What a connection waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Its first request.
    New,
    /// A request after others.
    Idle,
    /// The rest of a request's head.
    Head,
    /// The rest of a request's body, for which its client has a time of its own.
    Body,
    /// The server: a request is being read or answered.
    Busy,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    since: Instant,
    /// When its last request began.
    asked: Instant,
    /// Since when the client takes nothing of what is ready for it.
    blocked: Option<Instant>,
    /// Whether it is to be closed for the sake of another one.
    gives_way: bool,
}

impl State {
    /// Whether nothing is lost with it.
    fn waits_for_client(&self) -> bool {
        self.phase != Phase::Busy && self.blocked.is_none()
    }
}

/// What one connection is doing.
#[derive(Debug)]
pub(super) struct Activity {
    state: Mutex<State>,
    changed: Notify,
}

impl Activity {
    pub(super) fn new() -> Arc<Self> {
        let now = Instant::now();
        let state = State { phase: Phase::New, since: now, asked: now, blocked: None, gives_way: false };
        Arc::new(Self { state: Mutex::new(state), changed: Notify::new() })
    }

    /// Marks the connection as busy until the guard is dropped: with its client, as long as a body is still to come.
    pub(super) fn busy(self: &Arc<Self>, body_is_to_come: bool) -> Busy {
        self.enter(if body_is_to_come { Phase::Body } else { Phase::Busy });
        Busy(self.clone())
    }

    /// The body has come, or is not waited for any more.
    fn has_body(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Body {
            state.phase = Phase::Busy;
        }
    }

    /// Completes when a limit is exceeded, with the limit's name.
    pub(super) async fn overdue(&self, limits: &Limits) -> &'static str {
        loop {
            let changed = self.changed.notified();
            let (at, name) = self.due(limits);
            if at <= Instant::now() {
                return name;
            }
            tokio::select! {
                () = sleep_until(at) => {}
                () = changed => {}
            }
        }
    }

    /// When the connection exceeds which limit if nothing changes.
    fn due(&self, limits: &Limits) -> (Instant, &'static str) {
        let state = self.lock();
        let State { phase, since, asked, blocked, gives_way } = *state;
        if gives_way && state.waits_for_client() {
            return (since, "max_connections");
        }
        // An answer ends itself at its limit, and then has what a client may take for the last of it: who takes a little now and then is
        // never blocked for long.
        let answered = deadline(asked, limits.request_timeout.saturating_add(limits.write_timeout));
        let answered = (answered, "request_timeout");
        match (blocked, phase) {
            (Some(blocked), _) => (deadline(blocked, limits.write_timeout), "write_timeout").min(answered),
            (None, Phase::New | Phase::Head) => (deadline(since, limits.header_timeout), "header_timeout"),
            (None, Phase::Idle) => (deadline(since, limits.keep_alive_timeout), "keep_alive_timeout"),
            (None, Phase::Busy | Phase::Body) => answered,
        }
    }

    fn enter(&self, phase: Phase) {
        let mut state = self.lock();
        let now = Instant::now();
        (state.phase, state.since, state.gives_way) = (phase, now, false);
        if matches!(phase, Phase::Busy | Phase::Body) {
            state.asked = now;
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Since when it waits for its client, if it does and has not been told to give way.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let state = self.lock();
        (state.waits_for_client() && !state.gives_way).then_some(state.since)
    }

    /// Has the connection closed, unless its client has asked meanwhile.
    pub(super) fn give_way(&self) {
        self.lock().gives_way = true;
        self.changed.notify_one();
    }

    fn has_read(&self) {
        if self.lock().phase == Phase::Idle {
            self.enter(Phase::Head);
        }
    }

    fn has_written(&self, ready: bool) {
        let mut state = self.lock();
        let before = state.blocked;
        state.blocked = (!ready).then(|| before.unwrap_or_else(Instant::now));
        let changed = before.is_some() == ready;
        if changed && ready {
            // What was left of the answer took its time: only now is the connection idle.
            state.since = Instant::now();
        }
        drop(state);
        if changed {
            self.changed.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request is being read or answered.
#[derive(Debug)]
pub(super) struct Busy(Arc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.enter(Phase::Idle);
    }
}

/// A request's body, which its connection waits for.
#[derive(Debug)]
pub(super) struct ComingBody {
    pub(super) body: Incoming,
    pub(super) activity: Arc<Activity>,
}

impl HttpBody for ComingBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = Pin::new(&mut self.body).poll_frame(cx);
        if self.body.is_end_stream() || matches!(frame, Poll::Ready(None | Some(Err(_)))) {
            self.activity.has_body();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Whoever answers without it does not wait for it.
impl Drop for ComingBody {
    fn drop(&mut self) {
        self.activity.has_body();
    }
}

/// A body that keeps its connection busy.
#[derive(Debug)]
pub(super) struct WatchedBody {
    pub(super) body: Body,
    pub(super) _busy: Busy,
}

impl HttpBody for WatchedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// A socket that tells of its progress.
#[derive(Debug)]
pub(super) struct WatchedIo<S> {
    pub(super) stream: S,
    pub(super) activity: Arc<Activity>,
}

impl<S: AsyncRead + Unpin> AsyncRead for WatchedIo<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.has_read();
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WatchedIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.activity.has_written(result.is_ready());
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.activity.has_written(result.is_ready());
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
