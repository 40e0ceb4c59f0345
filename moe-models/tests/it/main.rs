//! Public behaviour of `moe-models`, one module per topic.

mod toy;
mod train_checkpoint;
mod train_metrics;
mod train_resume;
