//! `POST /v1/responses`: OpenAI's newer form of a chat. Nothing is kept between requests, so a conversation comes whole with each.

mod input;
mod output;
mod request;
mod stream;

pub(super) use output::ResponseWriter;
pub(super) use request::ResponseRequest;
pub(super) use stream::collect;
