//! Command-line arguments, and what of them does not go together.

use anyhow::{Context, Result, ensure};
use clap::Parser;
use moe_compress::eval::{Item, Task};
use moe_models::cli::PrecisionArg;
use std::path::{Path, PathBuf};

/// Evaluate a model: bits per byte and perplexity of text, and zero-shot tasks scored as lm-eval 0.4.13 does.
#[derive(Debug, Parser)]
#[command(version, about)]
pub(crate) struct Args {
    /// Folder with config.json, model.safetensors and tokenizer.json, or a GGUF file.
    #[arg(long, value_name = "PATH")]
    pub(crate) model: PathBuf,
    /// Text: .txt or .jsonl files (also .xz), or folders of them; a line "<|endoftext|>" separates documents of a .txt. Each file
    /// is a source.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(crate) text: Vec<String>,
    /// Tokens evaluated of each source of text, spread over it; without it, the whole text.
    #[arg(long, value_name = "N", requires = "text", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) max_tokens: Option<usize>,
    /// Zero-shot tasks, separated by commas: lambada, piqa, hellaswag, boolq, arc_easy, arc_challenge, openbookqa, winogrande,
    /// triviaqa, webqs.
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "task_dir")]
    tasks: Vec<String>,
    /// Folder with the files of the tasks, such as piqa.validation.jsonl.xz.
    #[arg(long, value_name = "DIR", requires = "tasks")]
    task_dir: Option<PathBuf>,
    /// Items of each task, from its beginning; without it, all.
    #[arg(long, value_name = "N", requires = "tasks", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    pub(crate) limit: Option<usize>,
    /// Tokens of a window of text, and most tokens read of a task's request, which loses its beginning past that; by default the
    /// model's own length.
    #[arg(long, value_name = "N", value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    max_length: Option<usize>,
    /// What the matrix products read; sums, softmax and routing are f32 in either case.
    #[arg(long, value_enum, default_value = "bf16")]
    pub(crate) precision: PrecisionArg,
    /// Writes the results to this file too.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

/// A task with its items.
pub(crate) type TaskItems = (&'static Task, Vec<Item>);

impl Args {
    pub(crate) fn evaluates_text(&self) -> bool {
        !self.text.is_empty()
    }

    /// The tasks with their items.
    pub(crate) fn tasks(&self) -> Result<Vec<TaskItems>> {
        let Some(dir) = &self.task_dir else {
            ensure!(
                self.evaluates_text(),
                "nothing to evaluate: give --text PATH, or --tasks NAMES with --task-dir DIR"
            );
            return Ok(Vec::new());
        };
        let task = |name: &String| {
            let task = Task::named(name).context("--tasks")?;
            Ok((task, task.items(dir, self.limit).context("--task-dir")?))
        };
        self.tasks.iter().map(task).collect()
    }

    /// Refuses a file for the results that could not be written when they are there.
    pub(crate) fn check_json(&self) -> Result<()> {
        let Some(path) = &self.json else { return Ok(()) };
        ensure!(!path.is_dir(), "--json {} is a folder; name a file", path.display());
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let free = format!(".moe-eval-{}", std::process::id());
        let attempt = folder.join(free);
        std::fs::write(&attempt, []).with_context(|| format!("--json {}: writing into its folder", path.display()))?;
        std::fs::remove_file(&attempt).with_context(|| format!("--json {}", path.display()))
    }

    /// The longest sequence, for a model that allows `max_seq_len`.
    pub(crate) fn max_length_of(&self, max_seq_len: usize) -> Result<usize> {
        let max_length = self.max_length.unwrap_or(max_seq_len);
        ensure!(
            max_length <= max_seq_len,
            "--max-length {max_length} is longer than the model's {max_seq_len} tokens; lower it"
        );
        Ok(max_length)
    }

    pub(crate) fn precision_name(&self) -> String {
        match self.precision {
            PrecisionArg::Bf16 => "bf16".into(),
            PrecisionArg::F32 => "f32".into(),
        }
    }
}
