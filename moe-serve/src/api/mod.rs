//! OpenAI's wire format over HTTP: requests read and checked, answers whole or streamed, errors, metrics, the page.

mod access;
mod activity;
mod answer_reader;
mod body;
mod chat_request;
mod check;
mod common_request;
mod completion_request;
mod connections;
mod error;
mod fields;
mod grammar_request;
mod json;
mod limits;
mod message_request;
mod metrics;
mod models;
#[cfg(test)]
mod openapi_tests;
mod page;
mod piece;
mod prepare;
mod render;
mod responses;
mod routes;
mod server;
mod stream;
mod tls;
mod tokens;
mod tool_request;
mod types;

pub use check::check_request;
pub use error::ApiError;
pub use limits::Limits;
pub(crate) use server::DEFAULT_KV_CACHE_BYTES;
pub use server::{Server, ServerConfig, terminated};
pub use tls::Tls;
