//! The crate from outside.

mod calibrate;
mod compress_cli;
mod distill;
mod distill_cli;
mod eval_cli;
mod eval_request;
mod eval_scorer;
mod experts;
mod teacher;
mod upcycle;
