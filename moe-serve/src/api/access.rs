//! Who may ask: keys, and the origins of foreign pages.

use super::error::ApiError;
use super::server::{AppState, ServerConfig};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};

/// Answered to anybody: whoever starts servers asks for them before he has a key.
const OPEN: [&str; 3] = ["/health", "/ready", "/version"];
/// Only for whoever runs the server, if he has a key of his own.
const ADMIN: [&str; 2] = ["/metrics", "/reset_prefix_cache"];

/// The keys of a server, as hashes: comparing these takes the same time whatever was guessed.
#[derive(Debug, Clone, Default)]
pub(super) struct Keys {
    api: Vec<blake3::Hash>,
    admin: Option<blake3::Hash>,
}

impl Keys {
    /// Without any key everything is open; an admin key opens all routes.
    pub(super) fn new(api: &[String], admin: Option<&String>) -> Self {
        let hash = |key: &String| blake3::hash(key.as_bytes());
        Self { api: api.iter().map(hash).collect(), admin: admin.map(hash) }
    }

    /// Whether `key` opens `path`.
    fn opens(&self, path: &str, key: Option<&[u8]>) -> bool {
        if OPEN.contains(&path) {
            return true;
        }
        let key = key.map(blake3::hash);
        // No branch on a single comparison, so that the number of keys that were compared tells nothing.
        let is_admin = self.admin.is_some() && self.admin == key;
        let is_api = self.api.iter().fold(false, |any, api| any | (Some(*api) == key));
        match (ADMIN.contains(&path), self.admin) {
            (true, Some(_)) => is_admin,
            _ => self.api.is_empty() | is_api | is_admin,
        }
    }
}

/// Whose pages may ask.
#[derive(Debug)]
pub(super) struct Origins {
    allowed: Vec<String>,
    /// Whether a page that reaches this server needs a key besides.
    keyless: bool,
    /// Whether only this machine reaches the server.
    loopback: OnceLock<bool>,
}

impl Origins {
    pub(super) fn new(config: &ServerConfig) -> Self {
        let keyless = config.api_keys.is_empty();
        Self { allowed: config.allowed_origins.clone(), keyless, loopback: OnceLock::new() }
    }

    /// Said once, before the first request.
    pub(super) fn listens_at(&self, address: Option<SocketAddr>) {
        self.loopback.get_or_init(|| address.is_some_and(|address| address.ip().is_loopback()));
    }

    /// Why a request is refused for where its page, or the name by which it has reached this server, is from.
    fn refusal(&self, headers: &HeaderMap) -> Option<String> {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let is_allowed = |origin: &str| self.allowed.iter().any(|allowed| allowed == "*" || allowed == origin);
        let host = text(header::HOST).unwrap_or_default();
        if let Some(origin) = text(header::ORIGIN) {
            // Browsers say it themselves, also where a proxy has changed the host's name.
            let same = headers.get("sec-fetch-site").is_some_and(|site| site == "same-origin");
            let of_host = origin.split_once("://").is_some_and(|(_, authority)| authority == host);
            if !same && !of_host && !is_allowed(origin) {
                return Some(format!("pages of {origin:.200} may not ask here; --allowed-origin lets them"));
            }
        }
        // A foreign page may have had its own name point here: then it is of the same origin as this server.
        let is_local = self.keyless && self.loopback.get() == Some(&true);
        if is_local && !is_loopback(host) && !["http", "https"].iter().any(|s| is_allowed(&format!("{s}://{host}"))) {
            return Some(format!(
                "this server has no key and is for this machine alone, which has no name like {host:.200}; --allowed-origin \
                 http://{host:.200} lets that in, as --api-key does"
            ));
        }
        None
    }
}

/// Whether the host of a request is this machine; one that is left out is nobody else's.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next(),
        None => host.split(':').next(),
    };
    let name = name.unwrap_or_default();
    let named = name.eq_ignore_ascii_case("localhost") || name.to_ascii_lowercase().ends_with(".localhost");
    name.is_empty() || named || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Lets a request through that no foreign page has made, unless its origin is allowed to.
pub(super) async fn check_origin(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    match state.origins.refusal(request.headers()) {
        None => next.run(request).await,
        Some(text) => ApiError::new(StatusCode::FORBIDDEN, text).with_code("origin_not_allowed").into_response(),
    }
}

/// Lets a request through that brings a key of its route: `Authorization: Bearer KEY`, or the password of `Basic`, which browsers ask
/// their user for.
pub(super) async fn check_key(State(state): State<Arc<AppState>>, request: Request, next: Next) -> Response {
    let key = presented(request.headers());
    if state.keys.opens(request.uri().path(), key.as_deref()) {
        return next.run(request).await;
    }
    let text = match key {
        Some(_) => "this key does not open this route",
        None => "this server needs a key: send the header `authorization: Bearer KEY`",
    };
    let mut response = ApiError::new(StatusCode::UNAUTHORIZED, text).with_code("invalid_api_key").into_response();
    let challenge = HeaderValue::from_static("Basic realm=\"moe-serve\", charset=\"UTF-8\"");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}

fn presented(headers: &HeaderMap) -> Option<Vec<u8>> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let at = value.iter().position(|&byte| byte == b' ')?;
    let (scheme, credentials) = (&value[..at], value[at..].trim_ascii());
    if scheme.eq_ignore_ascii_case(b"bearer") {
        return Some(credentials.to_vec());
    }
    if !scheme.eq_ignore_ascii_case(b"basic") {
        return None;
    }
    let pair = BASE64_STANDARD.decode(credentials).ok()?;
    let colon = pair.iter().position(|&byte| byte == b':')?;
    Some(pair[colon + 1..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(api: &[&str], admin: Option<&str>) -> Keys {
        let api: Vec<String> = api.iter().map(|key| (*key).to_owned()).collect();
        Keys::new(&api, admin.map(str::to_owned).as_ref())
    }

    #[test]
    fn keys_open_their_routes() {
        let (none, api, both) = (keys(&[], None), keys(&["a", "b"], None), keys(&["a"], Some("root")));
        for (path, key, want) in [
            ("/health", None, [true, true, true]),
            ("/", None, [true, false, false]),
            ("/v1/models", Some("b"), [true, true, false]),
            ("/v1/models", Some("a"), [true, true, true]),
            ("/v1/models", Some("aa"), [true, false, false]),
            ("/v1/models", Some("root"), [true, false, true]),
            ("/metrics", Some("a"), [true, true, false]),
            ("/metrics", Some("root"), [true, false, true]),
            ("/metrics", None, [true, false, false]),
        ] {
            let got = [&none, &api, &both].map(|keys| keys.opens(path, key.map(str::as_bytes)));
            assert_eq!(got, want, "{path} with {key:?}");
        }
        assert!(keys(&[], Some("root")).opens("/v1/models", None), "an admin key alone closes its own routes");
        assert!(!keys(&[], Some("root")).opens("/metrics", None));
    }

    #[test]
    fn foreign_pages_are_refused() {
        let origins = |allowed: &[&str], keys: &[&str], address: &str| {
            let text = |all: &[&str]| all.iter().map(|one| (*one).to_owned()).collect();
            let config =
                ServerConfig { allowed_origins: text(allowed), api_keys: text(keys), ..ServerConfig::default() };
            let origins = Origins::new(&config);
            origins.listens_at(address.parse().ok());
            origins
        };
        let local = origins(&[], &[], "127.0.0.1:8000");
        let keyed = origins(&[], &["a"], "127.0.0.1:8000");
        let open = origins(&["https://a.org"], &[], "0.0.0.0:8000");
        let any = origins(&["*"], &[], "[::1]:8000");
        for (host, origin, site, want) in [
            ("127.0.0.1:8000", None, None, [true, true, true, true]),
            ("[::1]:8000", None, None, [true, true, true, true]),
            ("LOCALHOST:8000", None, None, [true, true, true, true]),
            ("", None, None, [true, true, true, true]),
            ("127.0.0.1:8000", Some("http://127.0.0.1:8000"), None, [true, true, true, true]),
            ("127.0.0.1:8000", Some("http://evil.org"), Some("cross-site"), [false, false, false, true]),
            ("127.0.0.1:8000", Some("null"), Some("cross-site"), [false, false, false, true]),
            ("127.0.0.1:8000", Some("http://localhost:3000"), Some("cross-site"), [false, false, false, true]),
            ("127.0.0.1:8000", Some("https://a.org"), Some("cross-site"), [false, false, true, true]),
            // A proxy that gives the host another name.
            ("127.0.0.1:8000", Some("https://mine.org"), Some("same-origin"), [true, true, true, true]),
            // A name that was made to point here.
            ("evil.org:8000", Some("http://evil.org:8000"), Some("same-origin"), [false, true, true, true]),
            ("evil.org:8000", None, Some("same-origin"), [false, true, true, true]),
            ("127.0.0.1.evil.org", None, None, [false, true, true, true]),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_static(host));
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, HeaderValue::from_static(origin));
            }
            if let Some(site) = site {
                headers.insert("sec-fetch-site", HeaderValue::from_static(site));
            }
            let got = [&local, &keyed, &open, &any].map(|origins| origins.refusal(&headers).is_none());
            assert_eq!(got, want, "{host} {origin:?} {site:?}");
        }
    }

    #[test]
    fn credentials_of_both_schemes() {
        for (value, want) in [
            ("Bearer abc", Some("abc")),
            ("bearer  abc ", Some("abc")),
            ("Basic dXNlcjphYmM=", Some("abc")),
            ("Basic !!", None),
            ("Digest abc", None),
            ("abc", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, HeaderValue::from_static(value));
            assert_eq!(presented(&headers).as_deref(), want.map(str::as_bytes), "{value}");
        }
        assert_eq!(presented(&HeaderMap::new()), None);
    }
}
