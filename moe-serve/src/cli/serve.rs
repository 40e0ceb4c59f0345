//! `moe-serve`: the server.

use super::engine::EngineArgs;
use super::load::ModelArgs;
use crate::ServedModel;
use crate::api::{Limits, Server, ServerConfig, Tls, terminated};
use crate::text::ToolFormat;
use anyhow::{Context, ensure};
use moe_models::cli::ranks::RankArgs;
use std::future::Future;
use std::io::Write;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::TcpListener;

/// What requests that are being read may still take once the server has ended.
const LAST_REQUESTS: Duration = Duration::from_secs(1);

/// How to serve.
#[derive(Debug, Clone, clap::Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Name clients use for the model; by default the folder's.
    #[arg(long, value_name = "NAME")]
    pub(super) served_model_name: Option<String>,
    /// Requests that may wait beyond those that could start at once; more are refused with 429.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_queue)]
    max_queue: usize,
    /// Seconds a request may take, waiting included.
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().request_timeout.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    request_timeout_s: u64,
    /// Bytes a request's body may have.
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().max_body_bytes)]
    max_body_bytes: usize,
    /// Connections open at one time, each an open file. Where all are taken, the one that has waited for its client the longest is closed
    /// for the next; those that are answered are not, and more wait.
    #[arg(long, value_name = "N", default_value_t = Limits::default().max_connections as u32,
        value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    max_connections: u32,
    /// Seconds a client may take to send a request's head, from its first byte on or, for the first request, from the
    /// connection's begin.
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().header_timeout.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    header_timeout_s: u64,
    /// Seconds a connection may stay open between two requests.
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().keep_alive_timeout.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    keep_alive_timeout_s: u64,
    /// Seconds a client may leave what is ready for it unread.
    #[arg(long, value_name = "SECONDS", default_value_t = Limits::default().write_timeout.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=86_400))]
    write_timeout_s: u64,
    /// A key that requests must bring (`Authorization: Bearer KEY`); may be given several times. MOE_SERVE_API_KEY, where this is not
    /// given, does not show in the list of processes.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    /// The key of /metrics and /reset_prefix_cache, which API keys then do not open; or MOE_SERVE_ADMIN_KEY.
    #[arg(long, value_name = "KEY")]
    admin_key: Option<String>,
    /// A PEM file with the server's certificate, and those between it and its authority: clients are then answered over TLS alone.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// A PEM file with the key of --tls-cert.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Origin whose pages may ask from a browser, such as `https://example.org`; may be given several times; * for all.
    #[arg(long, value_name = "ORIGIN")]
    allowed_origin: Vec<String>,
    /// A series for each expert of each layer in /metrics: as many as the model has experts.
    #[arg(long)]
    per_expert_metrics: bool,
    /// How the model writes calls of tools, where its chat template does not show it: dialogue, hermes, mistral, deepseek_v3,
    /// deepseek_v31, llama3_json, llama4_json, granite, glm45, openai.
    #[arg(long, value_name = "NAME", value_parser = tool_format)]
    tool_call_parser: Option<ToolFormat>,
    #[command(flatten)]
    pub(super) engine: EngineArgs,
    #[command(flatten)]
    pub(super) ranks: RankArgs,
    /// Seed of requests that name none; by default the clock's.
    #[arg(long)]
    seed: Option<u64>,
}

impl ServeArgs {
    /// Serves until Ctrl-C or SIGTERM: alone, or as one of several ranks.
    ///
    /// # Errors
    /// If the model cannot be loaded, the address cannot be used, or another rank fails.
    pub fn run(self) -> anyhow::Result<()> {
        super::ranks::run(&self)
    }

    /// Serves a model that is loaded in this process.
    pub(super) fn serve_alone(&self) -> anyhow::Result<()> {
        let model = self.told(self.model.load(self.served_model_name.clone())?);
        let name = model.name.clone();
        let server = Server::new(model, self.config()?)?;
        self.listen(server, &name, std::future::pending(), &Arc::default())
    }

    /// The model with what the command line says of it.
    pub(super) fn told(&self, mut model: ServedModel) -> ServedModel {
        if let Some(format) = self.tool_call_parser {
            model.chat = model.chat.with_tool_format(format);
        }
        model
    }

    /// What the server is told.
    pub(super) fn config(&self) -> anyhow::Result<ServerConfig> {
        let mut api_keys = self.api_key.clone();
        if api_keys.is_empty() {
            api_keys.extend(key_of("MOE_SERVE_API_KEY")?);
        }
        let admin_key = match &self.admin_key {
            Some(key) => Some(key.clone()),
            None => key_of("MOE_SERVE_ADMIN_KEY")?,
        };
        ensure!(!api_keys.iter().chain(&admin_key).any(String::is_empty), "a key must not be empty");
        let limits = Limits {
            max_body_bytes: self.max_body_bytes,
            max_queue: self.max_queue,
            request_timeout: Duration::from_secs(self.request_timeout_s),
            header_timeout: Duration::from_secs(self.header_timeout_s),
            keep_alive_timeout: Duration::from_secs(self.keep_alive_timeout_s),
            write_timeout: Duration::from_secs(self.write_timeout_s),
            max_connections: self.max_connections as usize,
            ..Limits::default()
        };
        Ok(ServerConfig {
            limits,
            seed: self.seed,
            api_keys,
            admin_key,
            allowed_origins: self.allowed_origin.clone(),
            per_expert_metrics: self.per_expert_metrics,
            scheduling: self.engine.scheduling(),
            kv_cache_bytes: self.engine.kv_cache_memory_bytes,
            tls: match (&self.tls_cert, &self.tls_key) {
                (Some(certificate), Some(key)) => Some(Tls::from_files(certificate, key)?),
                _ => None,
            },
        })
    }

    /// Listens until a signal comes, which sets `told_to_stop`, or `ended` completes.
    pub(super) fn listen(
        &self,
        server: Server,
        name: &str,
        ended: impl Future<Output = ()> + Send + 'static,
        told_to_stop: &Arc<AtomicBool>,
    ) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Runtime::new().context("starting the network's threads")?;
        runtime.block_on(async {
            let address = (self.host, self.port);
            let listener = TcpListener::bind(address)
                .await
                .with_context(|| format!("listening on {}:{}; choose another --port", self.host, self.port))?;
            let scheme = if self.tls_cert.is_some() { "https" } else { "http" };
            let url = format!("{scheme}://{}", listener.local_addr()?);
            writeln!(std::io::stdout(), "serving {name} on {url} (API at {url}/v1, Ctrl-C ends)").ok();
            let told_to_stop = Arc::clone(told_to_stop);
            let shutdown = async move {
                tokio::select! {
                    result = terminated() => {
                        if let Err(error) = result {
                            tracing::error!(%error, "signals cannot be watched; stopping");
                        }
                        told_to_stop.store(true, Ordering::Relaxed);
                        tracing::info!("stopping: no new requests, running ones may end");
                    }
                    () = ended => tracing::error!("stopping: the engine has ended"),
                }
            };
            server.run(listener, shutdown).await;
            anyhow::Ok(())
        })?;
        // Requests are made ready on threads that cannot be stopped, and whose clients are gone.
        runtime.shutdown_timeout(LAST_REQUESTS);
        Ok(())
    }
}

fn tool_format(name: &str) -> Result<ToolFormat, String> {
    ToolFormat::named(name).ok_or_else(|| format!("expected one of {}", ToolFormat::all_names().join(", ")))
}

/// A key from the environment.
fn key_of(name: &str) -> anyhow::Result<Option<String>> {
    match std::env::var(name) {
        Ok(key) => Ok(Some(key)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {name}")),
    }
}
