//! A real server on a free port, driven over TCP as any client would.

mod access;
mod bad_requests;
mod bench;
mod chat;
mod completions;
mod connections;
mod damaged;
mod engine;
mod faults;
mod gguf;
mod gpt;
mod lifecycle;
mod metrics;
mod prefill;
mod quantized;
mod ranks;
mod responses;
mod structured;
mod support;
mod templates;
mod tls;
mod tools;
