//! Accepts connections, as many as may be open at one time, closes those that exceed a limit, and ends them in good order.
//!
//! Where all are taken, the one that has waited for its client the longest gives way to the next: connections that ask for nothing, or do not
//! send all of what they ask, keep nobody out. Those that are being answered stay, and more wait.
//!
//! In place of `axum::serve`, which bounds neither their number nor their idleness. HTTP/1.1 only, as before.

use super::activity::{Activity, ComingBody, WatchedBody, WatchedIo};
use super::limits::Limits;
use super::tls::Tls;
use axum::Router;
use axum::body::Body;
use hyper::body::{Body as _, Incoming};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::io::ErrorKind;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// After the system refused a connection, for lack of open files as a rule.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// So long a client may take to ask before its connection gives way: what it sends is on its way, or it is busy itself.
const MIN_WAIT: Duration = Duration::from_secs(1);

/// Before another connection is asked to give way, because the last one had something to do after all or has not waited long enough.
const RETRY_GIVE_WAY: Duration = Duration::from_millis(20);

/// What every connection is served with.
#[derive(Debug, Clone)]
pub(super) struct Served {
    pub(super) router: Router,
    pub(super) limits: Limits,
    pub(super) tls: Option<Tls>,
}

/// Serves `listener` until `shutdown` completes; then accepts no more, and returns when the last connection has ended.
pub(super) async fn serve(listener: TcpListener, served: Served, shutdown: impl Future<Output = ()> + Send + 'static) {
    let served = Arc::new(served);
    let slots = Arc::new(Slots::new(served.limits.max_connections));
    // Each connection holds a receiver: it hears of the end, and its own end is heard of.
    let (stopping, connections) = watch::channel(false);
    let accept_all = async {
        loop {
            let Some(stream) = accept(&listener).await else { continue };
            let room = slots.free().await;
            let (slots, served, stopped) = (slots.clone(), served.clone(), connections.clone());
            tokio::spawn(async move {
                // Its time runs from when it is looked after, which on a busy machine is not at once.
                let slot = slots.take(room);
                connection(stream, &slot.activity, &served, stopped).await;
            });
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

/// Room for connections, and who has it.
struct Slots {
    max: usize,
    free: Arc<Semaphore>,
    taken: Mutex<HashMap<u64, Arc<Activity>>>,
    next: AtomicU64,
}

/// The room of one connection, until it is dropped.
struct Slot {
    id: u64,
    activity: Arc<Activity>,
    slots: Arc<Slots>,
    _room: Option<OwnedSemaphorePermit>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.lock().remove(&self.id);
    }
}

impl Slots {
    fn new(max: usize) -> Self {
        let free = Arc::new(Semaphore::new(max.min(Semaphore::MAX_PERMITS)));
        Self { max, free, taken: Mutex::default(), next: AtomicU64::new(0) }
    }

    /// Room for one more connection. While all have something to do it waits, and clients wait to be accepted.
    async fn free(&self) -> Option<OwnedSemaphorePermit> {
        let mut acquired = pin!(self.free.clone().acquire_owned());
        let mut warned = false;
        loop {
            if self.free.available_permits() == 0 && !self.make_way() && !warned {
                tracing::warn!(max_connections = self.max, "no more connections until one closes");
                warned = true;
            }
            tokio::select! {
                biased;
                // The semaphore is never closed.
                room = acquired.as_mut() => return room.ok(),
                () = tokio::time::sleep(RETRY_GIVE_WAY) => {}
            }
        }
    }

    /// A connection that begins.
    fn take(self: &Arc<Self>, room: Option<OwnedSemaphorePermit>) -> Slot {
        let (id, activity) = (self.next.fetch_add(1, Ordering::Relaxed), Activity::new());
        self.lock().insert(id, activity.clone());
        Slot { id, activity, slots: self.clone(), _room: room }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Activity>>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the connection closed that has waited for its client the longest, if that was long enough; false if none waits.
    fn make_way(&self) -> bool {
        let taken = self.lock();
        let longest = taken.values().filter_map(|activity| Some((activity.waiting_since()?, activity)));
        let longest = longest.min_by_key(|(since, _)| *since);
        if let Some((_, activity)) = longest.filter(|(since, _)| since.elapsed() >= MIN_WAIT) {
            activity.give_way();
        }
        longest.is_some()
    }
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
async fn connection(stream: TcpStream, activity: &Arc<Activity>, served: &Served, mut stopped: watch::Receiver<bool>) {
    // Below TLS, where a client that takes nothing is seen at once.
    let io = WatchedIo { stream, activity: activity.clone() };
    let Some(tls) = &served.tls else { return exchange(io, activity, served, stopped).await };
    let encrypted = tokio::select! {
        result = tls.accept(io) => result,
        limit = activity.overdue(&served.limits) => return closing(limit),
        _ = stopped.wait_for(|stopped| *stopped) => return,
    };
    match encrypted {
        Ok(io) => exchange(io, activity, served, stopped).await,
        Err(error) => tracing::debug!(%error, "no TLS"),
    }
}

/// Requests and answers, one after another.
async fn exchange(
    io: impl AsyncRead + AsyncWrite + Unpin,
    activity: &Arc<Activity>,
    served: &Served,
    mut stopped: watch::Receiver<bool>,
) {
    let router = TowerToHyperService::new(served.router.clone());
    let service = service_fn(|request: hyper::Request<Incoming>| {
        let busy = activity.busy(!request.body().is_end_stream());
        let answer = router.call(request.map(|body| Body::new(ComingBody { body, activity: activity.clone() })));
        async move { answer.await.map(|r| r.map(|body| WatchedBody { body, _busy: busy })) as Result<_, Infallible> }
    });
    let mut exchanged = pin!(http1::Builder::new().serve_connection(TokioIo::new(io), service));
    let mut overdue = pin!(activity.overdue(&served.limits));
    let mut stops = false;
    loop {
        tokio::select! {
            // What has come is read before a limit is said to be exceeded.
            biased;
            result = exchanged.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            limit = overdue.as_mut() => return closing(limit),
            // A sender that is gone stops too.
            _ = stopped.wait_for(|stopped| *stopped), if !stops => {
                stops = true;
                exchanged.as_mut().graceful_shutdown();
            }
        }
    }
}

fn closing(limit: &str) {
    tracing::debug!(limit, "closing a connection");
}
