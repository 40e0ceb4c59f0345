//! Who may ask: keys, and the origins of foreign pages.

use super::error::ApiError;
use super::server::AppState;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use std::sync::Arc;

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
