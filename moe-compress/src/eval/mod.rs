//! How good a model folder is: bits per byte and perplexity of text ([`text`]), and zero-shot tasks ([`tasks`]) by the
//! log-likelihood protocol of lm-eval 0.4.13, whose scores these are comparable with.
//!
//! ```text
//! a line of a task's file  ->  Item (requests as text)  ->  TokenRequest  ->  LogLikelihood  ->  metrics
//!          items.rs              tasks/*.rs               request.rs         scorer.rs        metrics.rs
//! ```
//!
//! Few-shot examples and chat templates are not part of it.

pub mod generate;
pub mod items;
pub mod metrics;
mod python;
pub mod report;
pub mod request;
pub mod scorer;
pub mod tasks;
pub mod text;

pub use generate::Generator;
pub use items::{Item, TaskFile};
pub use metrics::{Estimate, Metric};
pub use report::{Report, TaskReport, TextReport};
pub use request::{Request, RequestEncoder, TokenRequest};
pub use scorer::{LogLikelihood, Scorer};
pub use tasks::{TASKS, Task, TaskModel};
pub use text::{TextOptions, evaluate_sources, evaluate_text};
