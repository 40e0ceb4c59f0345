//! [`Server`]: the listening socket, the engine behind it, and an orderly end.

use super::access::{Keys, Origins};
use super::body::BodyBudget;
use super::connections::{Served, serve};
use super::error::ApiError;
use super::limits::Limits;
use super::metrics::ServerMetrics;
use super::render::Endpoint;
use super::routes::router;
use super::tls::Tls;
use crate::engine::{Engine, EngineConfig, EngineThread, Replicas, SchedulingConfig};
use crate::{Error, Result, ServedModel};
use axum::http::{HeaderValue, Method};
use moe_core::CounterRng;
use std::future::Future;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::sync::oneshot;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

/// Memory for keys and values where nobody says how much; taken as it is used.
pub(crate) const DEFAULT_KV_CACHE_BYTES: usize = 1 << 30;

const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// What clients of an engine that is gone have to read why.
const LOST_GRACE: Duration = Duration::from_secs(1);

/// How a server behaves.
#[derive(Clone)]
pub struct ServerConfig {
    /// Bounds on requests.
    pub limits: Limits,
    /// Requests without a seed draw theirs from this one; without it, from the clock.
    pub seed: Option<u64>,
    /// Keys, each of which opens all routes but those of the admin key; with none they are open.
    pub api_keys: Vec<String>,
    /// The key of `/metrics` and `/reset_prefix_cache`, which then need it; it opens all others too.
    pub admin_key: Option<String>,
    /// Origins whose pages may ask from a browser; `*` for all.
    pub allowed_origins: Vec<String>,
    /// Whether each expert of each layer has a series in `/metrics`.
    pub per_expert_metrics: bool,
    /// How the engine divides its time.
    pub scheduling: SchedulingConfig,
    /// Memory for keys and values; at least one sequence of the model's length always fits.
    pub kv_cache_bytes: usize,
    /// What connections are encrypted with; without it they are not.
    pub tls: Option<Tls>,
}

/// Without the keys.
impl std::fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { limits, seed, api_keys, admin_key, allowed_origins, per_expert_metrics, scheduling, .. } = self;
        f.debug_struct("ServerConfig")
            .field("limits", limits)
            .field("seed", seed)
            .field("api_keys", &api_keys.len())
            .field("admin_key", &admin_key.is_some())
            .field("allowed_origins", allowed_origins)
            .field("per_expert_metrics", per_expert_metrics)
            .field("scheduling", scheduling)
            .field("kv_cache_bytes", &self.kv_cache_bytes)
            .field("tls", &self.tls)
            .finish()
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            seed: None,
            api_keys: Vec::new(),
            admin_key: None,
            allowed_origins: Vec::new(),
            per_expert_metrics: false,
            scheduling: SchedulingConfig::default(),
            kv_cache_bytes: DEFAULT_KV_CACHE_BYTES,
            tls: None,
        }
    }
}

/// What handlers share.
pub(super) struct AppState {
    pub(super) model: ServedModel,
    pub(super) engine: Engine,
    pub(super) metrics: Arc<ServerMetrics>,
    pub(super) limits: Limits,
    pub(super) bodies: BodyBudget,
    /// Requests that are made ready at one time: as many as there are cores, and one.
    pub(super) desks: Arc<Semaphore>,
    pub(super) origins: Origins,
    pub(super) keys: Keys,
    pub(super) cors: CorsLayer,
    tls: Option<Tls>,
    /// When the server started, in seconds since 1970.
    pub(super) created: u64,
    /// The same to the nanosecond, and which process this is.
    started: u64,
    seed: u64,
    requests: AtomicU64,
}

impl AppState {
    /// A seed for a request that names none.
    pub(super) fn fresh_seed(&self) -> u64 {
        CounterRng::mix(self.seed, &[self.requests.fetch_add(1, Ordering::Relaxed)])
    }

    /// An id for an answer.
    pub(super) fn fresh_id(&self, endpoint: Endpoint) -> String {
        let prefix = match endpoint {
            Endpoint::Completions => "cmpl",
            Endpoint::Chat => "chatcmpl",
        };
        format!("{prefix}-{}", self.fresh_number())
    }

    /// What an id ends with.
    pub(super) fn fresh_number(&self) -> String {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        format!("{:016x}", CounterRng::mix(self.started, &[number]))
    }

    /// Refuses a model that is not served; a request may leave the name out.
    pub(super) fn check_model(&self, asked: Option<&str>) -> std::result::Result<(), ApiError> {
        match asked {
            Some(asked) if asked != self.model.name => Err(ApiError::unknown_model(asked, &self.model.name)),
            _ => Ok(()),
        }
    }
}

/// A server that is ready to run.
pub struct Server {
    state: Arc<AppState>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("model", &self.state.model.name).finish_non_exhaustive()
    }
}

impl Server {
    /// Starts the engine of `model`, on a thread of its own.
    ///
    /// # Errors
    /// As [`Engine::start`]; [`crate::Error::Field`] for an origin that is none.
    pub fn new(model: ServedModel, config: ServerConfig) -> Result<Self> {
        let (metrics, engine_config) = prepare(&model, &config)?;
        let engine = Engine::start(model.lm.clone(), engine_config, metrics.clone())?;
        Self::of(model, config, engine, metrics)
    }

    /// A server of `model` whose steps `replicas` run, and its engine, which is still to be run on a thread of the caller's.
    ///
    /// # Errors
    /// As [`Engine::over`]; [`crate::Error::Field`] for an origin that is none.
    pub fn over(model: ServedModel, config: ServerConfig, replicas: Box<dyn Replicas>) -> Result<(Self, EngineThread)> {
        let (metrics, engine_config) = prepare(&model, &config)?;
        let (engine, work) = Engine::over(replicas, model.lm.as_ref(), engine_config, metrics.clone())?;
        Ok((Self::of(model, config, engine, metrics)?, work))
    }

    fn of(model: ServedModel, config: ServerConfig, engine: Engine, metrics: Arc<ServerMetrics>) -> Result<Self> {
        let state = AppState {
            model,
            engine,
            metrics,
            keys: Keys::new(&config.api_keys, config.admin_key.as_ref()),
            cors: cors(&config.allowed_origins)?,
            bodies: BodyBudget::new(config.limits.max_body_bytes),
            desks: Arc::new(Semaphore::new(1 + std::thread::available_parallelism().map_or(1, NonZero::get))),
            origins: Origins::new(&config),
            limits: config.limits,
            tls: config.tls,
            created: unix_seconds(),
            started: CounterRng::mix(clock_seed(), &[u64::from(std::process::id())]),
            seed: config.seed.unwrap_or_else(clock_seed),
            requests: AtomicU64::new(0),
        };
        Ok(Self { state: Arc::new(state) })
    }

    /// Serves `listener` until `shutdown` completes, then takes no more requests, lets the running ones end within
    /// [`Limits::shutdown_grace`], and cancels the rest.
    pub async fn run(self, listener: TcpListener, shutdown: impl Future<Output = ()> + Send + 'static) {
        let state = self.state;
        state.origins.listens_at(listener.local_addr().ok());
        let upkeep = tokio::spawn(upkeep(state.metrics.clone()));
        let (stopping, stopped) = oneshot::channel();
        let closing = state.clone();
        let signal = async move {
            shutdown.await;
            closing.engine.close();
            // The receiver is gone only if serving already ended.
            stopping.send(()).ok();
        };
        let served = Served { router: router(state.clone()), limits: state.limits.clone(), tls: state.tls.clone() };
        let serve = serve(listener, served, signal);
        let over = async {
            stopped.await.ok();
            // Of an engine that is gone nothing more comes than what its listeners were told.
            let grace = if state.engine.is_alive() { state.limits.shutdown_grace } else { LOST_GRACE };
            tokio::time::sleep(grace).await;
            tracing::warn!(grace_s = grace.as_secs(), "cancelling what is still running");
        };
        tokio::select! {
            () = serve => {}
            () = over => {}
        }
        state.engine.stop();
        upkeep.abort();
    }
}

/// Who watches an engine, and what it is told.
fn prepare(model: &ServedModel, config: &ServerConfig) -> Result<(Arc<ServerMetrics>, EngineConfig)> {
    let metrics = ServerMetrics::new(&model.name, &model.lm.moe_layers(), config.per_expert_metrics)?;
    let engine = EngineConfig {
        max_queue: config.limits.max_queue,
        scheduling: config.scheduling.clone(),
        kv_cache_bytes: config.kv_cache_bytes,
        ..model.engine_config()
    };
    Ok((Arc::new(metrics), engine))
}

/// Which pages may ask from a browser. None, unless their origins are named.
fn cors(origins: &[String]) -> Result<CorsLayer> {
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        // Clients send headers of their own, none of which means anything here.
        .allow_headers(AllowHeaders::mirror_request());
    if origins.is_empty() {
        return Ok(layer);
    }
    if origins.iter().any(|origin| origin == "*") {
        return Ok(layer.allow_origin(AllowOrigin::any()));
    }
    let origin = |origin: &String| {
        let text = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
        let host = text.filter(|host| !host.is_empty() && !host.contains('/'));
        host.and_then(|_| HeaderValue::from_str(origin).ok()).ok_or_else(|| {
            let message = format!("an allowed origin must look like https://example.org, found `{origin:.80}`");
            Error::field("allowed_origins", message)
        })
    };
    Ok(layer.allow_origin(origins.iter().map(origin).collect::<Result<Vec<_>>>()?))
}

async fn upkeep(metrics: Arc<ServerMetrics>) {
    let mut ticks = tokio::time::interval(UPKEEP_INTERVAL);
    loop {
        ticks.tick().await;
        metrics.run_upkeep();
    }
}

/// Completes on Ctrl-C, and on SIGTERM where there is one.
///
/// # Errors
/// The system's, if signals cannot be watched.
pub async fn terminated() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            result = tokio::signal::ctrl_c() => result,
            _ = terminate.recv() => Ok(()),
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

fn clock_seed() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_nanos() as u64)
}
