//! Tables on standard output.

use moe_compress::eval::{TaskReport, TextReport};

/// A row per source, and one for all.
pub(crate) fn print_text(report: &TextReport) {
    println!("text: {}", report.counted);
    println!(
        "{:<24}{:>12}{:>12}{:>12}{:>16}{:>14}{:>14}",
        "source", "tokens", "bytes", "words", "bits per byte", "ppl/token", "ppl/word"
    );
    for source in &report.sources {
        let loss = &source.loss;
        println!(
            "{:<24}{:>12}{:>12}{:>12}{:>16.4}{:>14.4}{:>14.2}",
            loss.name,
            loss.tokens,
            loss.bytes,
            source.words,
            loss.bits_per_byte(),
            source.token_perplexity(),
            source.word_perplexity()
        );
    }
}

/// What the rows of tasks are.
pub(crate) fn print_task_head(limit: Option<usize>) {
    let part = limit.map_or_else(|| "all items".to_owned(), |limit| format!("the first {limit} items"));
    println!("tasks: zero-shot, log-likelihood protocol of lm-eval 0.4.13; {part} of each");
    println!("{:<16}{:<14}{:>12}{:>12}{:>10}{:>8}  file", "task", "metric", "value", "+-", "chance", "items");
}

/// A row per metric.
pub(crate) fn print_task(report: &TaskReport) {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
    for row in &report.metrics {
        println!(
            "{:<16}{:<14}{:>12.4}{:>12}{:>10}{:>8}  {}",
            report.task,
            row.metric.name(),
            row.estimate.value,
            number(row.estimate.stderr),
            number(row.chance),
            report.items,
            report.file
        );
    }
}
