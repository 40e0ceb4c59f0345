//! Accepts connections, as many as may be open at one time, closes those that exceed a limit, and ends them in good order.
//!
//! In place of `axum::serve`, which bounds neither their number nor their idleness. HTTP/1.1 only, as before.

use super::activity::{Activity, WatchedBody, WatchedIo};
use super::limits::Limits;
use axum::Router;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use std::convert::Infallible;
use std::future::Future;
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// After the system refused a connection, for lack of open files as a rule.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Serves `listener` until `shutdown` completes; then accepts no more, and returns when the last connection has ended.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let limits = Arc::new(limits);
    let slots = Arc::new(Semaphore::new(limits.max_connections.min(Semaphore::MAX_PERMITS)));
    // Each connection holds a receiver: it hears of the end, and its own end is heard of.
    let (stopping, connections) = watch::channel(false);
    let accept_all = async {
        loop {
            let slot = free_slot(&slots, &limits).await;
            let Some(stream) = accept(&listener).await else { continue };
            let (router, limits, stopped) = (router.clone(), limits.clone(), connections.clone());
            tokio::spawn(async move { connection(stream, router, &limits, stopped, slot).await });
        }
    };
    tokio::select! {
        () = accept_all => {}
        () = shutdown => {}
    }
    drop((listener, connections));
    stopping.send(true).ok();
    stopping.closed().await;
}

/// Room for one more connection. While there is none, clients wait to be accepted.
async fn free_slot(slots: &Arc<Semaphore>, limits: &Limits) -> Option<OwnedSemaphorePermit> {
    if slots.available_permits() == 0 {
        tracing::warn!(max_connections = limits.max_connections, "no more connections until one closes");
    }
    // The semaphore is never closed.
    slots.clone().acquire_owned().await.ok()
}

/// The next connection, or none if its client left or the system refused it.
async fn accept(listener: &TcpListener) -> Option<TcpStream> {
    match listener.accept().await {
        Ok((stream, _)) => {
            // Pieces of an answer are small, and each is wanted at once.
            stream.set_nodelay(true).ok();
            Some(stream)
        }
        Err(error) => {
            use ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
            if !matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
                tracing::error!(%error, "a connection was not accepted");
                tokio::time::sleep(RETRY_AFTER).await;
            }
            None
        }
    }
}

/// Serves one connection until either side ends it, it exceeds a limit, or the server stops and it has nothing to do.
async fn connection(
    stream: TcpStream,
    router: Router,
    limits: &Limits,
    mut stopped: watch::Receiver<bool>,
    _slot: Option<OwnedSemaphorePermit>,
) {
    let activity = Activity::new();
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let busy = activity.busy();
        let answer = router.call(request);
        async move { answer.await.map(|r| r.map(|body| WatchedBody { body, _busy: busy })) as Result<_, Infallible> }
    });
    let io = TokioIo::new(WatchedIo { stream, activity: activity.clone() });
    let mut served = pin!(http1::Builder::new().serve_connection(io, service));
    let mut overdue = pin!(activity.overdue(limits));
    let mut stops = false;
    loop {
        tokio::select! {
            result = served.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            limit = overdue.as_mut() => {
                tracing::debug!(limit, "closing a connection");
                return;
            }
            // A sender that is gone stops too.
            _ = stopped.wait_for(|stopped| *stopped), if !stops => {
                stops = true;
                served.as_mut().graceful_shutdown();
            }
        }
    }
}
