//! Public behaviour of `moe-models`, one module per topic.

mod golden;
mod toy;
mod train_checkpoint;
mod train_cli;
mod train_gpt;
mod train_metrics;
mod train_resume;
