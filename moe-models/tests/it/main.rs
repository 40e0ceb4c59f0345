//! Public behaviour of `moe-models`, one module per topic.

mod equality;
mod examples;
mod family;
mod golden;
mod init_cli;
mod layerwise;
mod quantized;
mod ragged;
mod ranks;
mod reshard;
mod toy;
mod train_checkpoint;
mod train_cli;
mod train_cli_ranks;
mod train_evaluate;
mod train_failures;
mod train_faults;
mod train_frozen;
mod train_gpt;
mod train_mesh;
mod train_metrics;
mod train_prepare;
mod train_ranks;
mod train_resume;
mod train_step;
mod train_tape;
