//! [`Workload`]: which requests are sent when: drawn, or of a trace. Pure, but for the reading of a trace's file.

use anyhow::{Context, Result, bail, ensure};
use lzma_rust2::XzReader;
use moe_core::CounterRng;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::time::Duration;

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Planned {
    /// After the begin; 0 where requests are sent as others end.
    pub(super) at: Duration,
    pub(super) prompt: Vec<u32>,
    pub(super) output_len: usize,
}

/// Ids that prompts are made of: every tokenizer has them, and none is a special one as a rule.
const IDS: std::ops::Range<u32> = 10..250;
/// Tokens that stand for a block of a trace whose blocks repeat.
const TRACE_BLOCK: usize = 512;

fn draw(rng: &mut CounterRng, count: usize) -> Vec<u32> {
    (0..count).map(|_| IDS.start + rng.below(IDS.end - IDS.start)).collect()
}

/// Requests of one size, arriving as a Poisson process of `rate` per second (exponential gaps), or all at once without a rate.
pub(super) fn drawn(count: usize, input_len: usize, output_len: usize, rate: Option<f64>, seed: u64) -> Vec<Planned> {
    let (mut rng, mut arrivals) = (CounterRng::new(seed, 0), CounterRng::new(seed, 1));
    let mut at = 0.0;
    let mut request = |_| {
        at += rate.map_or(0.0, |rate| -(1.0 - arrivals.uniform_f64()).ln() / rate);
        Planned { at: Duration::from_secs_f64(at), prompt: draw(&mut rng, input_len), output_len }
    };
    (0..count).map(&mut request).collect()
}

/// How a trace is made to fit a server.
#[derive(Debug, Clone, Copy)]
pub(super) struct TraceScale {
    /// Requests are taken from the begin.
    pub(super) count: usize,
    /// Lengths are divided by it, and are at least 1.
    pub(super) shrink: usize,
    /// Tokens of prompt and answer together, at most; prompts are cut.
    pub(super) max_len: usize,
    /// Time runs so much faster.
    pub(super) speed: f64,
}

/// Requests of a trace: Azure's (CSV with a header: timestamp, context tokens, generated tokens) or Mooncake's (lines of JSON with
/// `timestamp` in ms, `input_length`, `output_length` and `hash_ids` of blocks, which repeat), also compressed (`.xz`).
pub(super) fn traced(path: &Path, scale: TraceScale, seed: u64) -> Result<Vec<Planned>> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let reader: Box<dyn Read> = match path.extension() {
        Some(extension) if extension == "xz" => Box::new(XzReader::new(file, false)),
        _ => Box::new(file),
    };
    let mut planned = Vec::new();
    let mut begin = None;
    for (number, line) in BufReader::new(reader).lines().enumerate() {
        let line = line.with_context(|| format!("reading {}", path.display()))?;
        if planned.len() == scale.count {
            break;
        }
        let entry = if line.starts_with('{') { mooncake(&line) } else { azure(&line) };
        let Some((seconds, input, output, blocks)) = entry else {
            ensure!(number == 0 || line.trim().is_empty(), "{}: line {} is no request", path.display(), number + 1);
            continue;
        };
        let begin = *begin.get_or_insert(seconds);
        let output_len = (output / scale.shrink).clamp(1, scale.max_len / 2);
        let input_len = (input / scale.shrink).clamp(1, scale.max_len - output_len);
        let block = (TRACE_BLOCK / scale.shrink).max(1);
        // The same block is the same tokens wherever it comes.
        let mut prompt: Vec<u32> =
            blocks.iter().flat_map(|&hash| draw(&mut CounterRng::new(seed, 1 + hash), block)).take(input_len).collect();
        let mut rest = CounterRng::new(seed ^ u64::MAX, number as u64);
        let missing = input_len - prompt.len();
        prompt.extend(draw(&mut rest, missing));
        let at = Duration::from_secs_f64((seconds - begin).max(0.0) / scale.speed);
        planned.push(Planned { at, prompt, output_len });
    }
    if planned.is_empty() {
        bail!("{} has no requests", path.display());
    }
    Ok(planned)
}

/// Seconds, tokens in and out, hashes of blocks.
type Entry = (f64, usize, usize, Vec<u64>);

fn mooncake(line: &str) -> Option<Entry> {
    let value: Value = serde_json::from_str(line).ok()?;
    let length = |name: &str| value[name].as_u64().map(|length| length as usize);
    let blocks = value["hash_ids"].as_array().map(|ids| ids.iter().filter_map(Value::as_u64).collect());
    Some((
        value["timestamp"].as_f64()? / 1e3,
        length("input_length")?,
        length("output_length")?,
        blocks.unwrap_or_default(),
    ))
}

/// `2023-11-16 18:15:46.6805900,374,44`; only the time of day counts.
fn azure(line: &str) -> Option<Entry> {
    let mut fields = line.split(',');
    let (time, input, output) = (fields.next()?, fields.next()?, fields.next()?);
    let (date, clock) = time.split_once(' ')?;
    let day: f64 = date.rsplit('-').next()?.parse().ok()?;
    let mut parts = clock.split(':').map(|part| part.parse::<f64>().ok());
    let (hours, minutes, seconds) = (parts.next()??, parts.next()??, parts.next()??);
    let seconds = ((day * 24.0 + hours) * 60.0 + minutes) * 60.0 + seconds;
    Some((seconds, input.trim().parse().ok()?, output.trim().parse().ok()?, Vec::new()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn poisson_arrivals_have_the_rate() {
        let requests = drawn(4000, 3, 5, Some(20.0), 1);
        let last = requests.last().expect("some").at.as_secs_f64();
        assert!((last / 200.0 - 1.0).abs() < 0.05, "{last} s for 4000 requests at 20 a second");
        assert!(requests.windows(2).all(|pair| pair[0].at <= pair[1].at));
        assert!(requests.iter().all(|r| r.prompt.len() == 3 && r.prompt.iter().all(|id| IDS.contains(id))));
        assert!(drawn(3, 1, 1, None, 1).iter().all(|r| r.at == Duration::ZERO));
    }

    fn written(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(text.as_bytes()).expect("written");
        file
    }

    #[test]
    fn both_kinds_of_trace() {
        let scale = TraceScale { count: 9, shrink: 4, max_len: 60, speed: 2.0 };
        let azure = written(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 23:59:59.5,374,44\n2023-11-17 00:00:01.5,40,4000\n",
        );
        let requests = traced(azure.path(), scale, 7).expect("a trace");
        let sizes: Vec<_> = requests.iter().map(|r| (r.at.as_secs_f64(), r.prompt.len(), r.output_len)).collect();
        assert_eq!(sizes, [(0.0, 49, 11), (1.0, 10, 30)]);

        let mooncake = written(
            "{\"timestamp\": 500, \"input_length\": 200, \"output_length\": 8, \"hash_ids\": [1, 2]}\n\
             {\"timestamp\": 1500, \"input_length\": 200, \"output_length\": 8, \"hash_ids\": [1, 3]}\n",
        );
        let scale = TraceScale { count: 9, shrink: 64, max_len: 60, speed: 1.0 };
        let requests = traced(mooncake.path(), TraceScale { shrink: 16, ..scale }, 7).expect("a trace");
        assert_eq!(requests[1].at, Duration::from_secs(1));
        assert_eq!(requests[0].prompt, requests[1].prompt, "12 tokens of the block they share");
        let more = written("{\"timestamp\": 0, \"input_length\": 999, \"output_length\": 8, \"hash_ids\": [1, 2]}");
        assert!(
            traced(more.path(), TraceScale { shrink: 16, ..scale }, 7).expect("a trace")[0]
                .prompt
                .starts_with(&requests[0].prompt)
        );
        for bad in ["", "a,b\nno request\n", "{\"timestamp\": 0}\n{\"timestamp\": 1}\n"] {
            assert!(traced(written(bad).path(), scale, 0).is_err(), "{bad}");
        }
    }
}
