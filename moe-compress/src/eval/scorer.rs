//! [`Scorer`]: log-likelihoods of continuations, over the inference pass of any model. Knows no text.

use super::request::TokenRequest;
use crate::{Error, Result};
use candle_core::Tensor;
use moe_models::{CachedSequence, CausalLm, KvPool, LogitsOf, PoolConfig, SequenceStep};
use std::ops::Range;

/// Pages of a pass over contexts and their continuations, unless one context alone needs more.
const BATCH_PAGES: usize = 128;
/// Logits held at once, in elements.
const BATCH_LOGITS: usize = 1 << 24;

/// How likely a continuation is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogLikelihood {
    /// Natural logarithm of its probability.
    pub logprob: f64,
    /// Whether each of its tokens is the likeliest at its place, the lower id among equals.
    pub is_greedy: bool,
}

/// Scores requests with one model.
pub struct Scorer<'a> {
    lm: &'a dyn CausalLm,
    num_tokens: usize,
}

impl<'a> Scorer<'a> {
    /// Ids from `num_tokens` on are padding of the vocabulary: they count in the softmax, but are nobody's likeliest token.
    pub fn new(lm: &'a dyn CausalLm, num_tokens: usize) -> Self {
        Self { lm, num_tokens: num_tokens.min(lm.vocab_size()) }
    }

    /// The log-likelihood of each request. A context that neighbours share is computed once: continuations begin with its
    /// pages, which changes no bit. `progress` hears how many requests are done.
    ///
    /// # Errors
    /// What the model returns; [`Error::Argument`] for a request with an empty part or an id outside the vocabulary, or logits
    /// that are not finite.
    pub fn log_likelihoods(
        &self,
        requests: &[TokenRequest],
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<LogLikelihood>> {
        requests.iter().try_for_each(|request| self.check(request))?;
        let groups = groups(requests);
        let pages: Vec<usize> = groups.iter().map(|group| pages_of(&requests[group.clone()])).collect();
        let batches = split(&pages, BATCH_PAGES);
        let num_pages = batches.iter().map(|batch| pages[batch.clone()].iter().sum()).max().unwrap_or(1);
        let pool = self.lm.new_pool(PoolConfig { num_pages, page_size: PoolConfig::PAGE_SIZE })?;
        let mut scores = Vec::with_capacity(requests.len());
        for batch in batches {
            scores.extend(self.score_groups(requests, &groups[batch], &pool)?);
            progress(scores.len());
        }
        Ok(scores)
    }

    fn check(&self, request: &TokenRequest) -> Result<()> {
        if request.context.is_empty() || request.continuation.is_empty() {
            return Err(Error::Argument("a request needs at least one token of context and of continuation".into()));
        }
        // The model never reads a continuation's last token, and so does not refuse it.
        let vocab_size = self.lm.vocab_size();
        match request.continuation.iter().find(|&&id| id as usize >= vocab_size) {
            Some(id) => Err(Error::Argument(format!("token {id} is outside the model's vocabulary of {vocab_size}"))),
            None => Ok(()),
        }
    }

    /// The scores of neighbouring groups, in the order of their requests.
    fn score_groups(
        &self,
        requests: &[TokenRequest],
        groups: &[Range<usize>],
        pool: &KvPool,
    ) -> Result<Vec<LogLikelihood>> {
        // 1. Each context once; what follows its last token is the first token of every continuation.
        let mut contexts: Vec<CachedSequence> = groups.iter().map(|_| pool.sequence()).collect();
        let context = |(sequence, group): (_, &Range<usize>)| SequenceStep {
            sequence,
            token_ids: &requests[group.start].context,
            logits: LogitsOf::Last,
        };
        let mut steps: Vec<_> = contexts.iter_mut().zip(groups).map(context).collect();
        let logits = self.lm.forward(&mut steps, pool)?.logits;
        let mut scores = Vec::new();
        for (row, group) in groups.iter().enumerate() {
            let row = finite_row(&logits, row)?;
            scores.extend(requests[group.clone()].iter().map(|request| self.score(&row, request.continuation[0])));
        }

        // 2. The tokens of the continuations that have others after them.
        let owners: Vec<usize> =
            groups.iter().enumerate().flat_map(|(i, group)| group.clone().map(move |_| i)).collect();
        let requests = &requests[groups[0].start..groups[groups.len() - 1].end];
        let rows: Vec<usize> = requests.iter().map(|request| request.continuation.len() - 1).collect();
        for part in split(&rows, BATCH_LOGITS / self.lm.vocab_size()) {
            let sequences = owners[part.clone()].iter().map(|&owner| contexts[owner].clone()).collect();
            let more = self.score_rests(&requests[part.clone()], sequences, pool)?;
            scores[part].iter_mut().zip(more).for_each(|(score, more)| *score = score.and(more));
        }
        Ok(scores)
    }

    /// The log-likelihood of each continuation without its first token, after the `sequences` of their contexts.
    fn score_rests(
        &self,
        requests: &[TokenRequest],
        mut sequences: Vec<CachedSequence>,
        pool: &KvPool,
    ) -> Result<Vec<LogLikelihood>> {
        let mut steps: Vec<_> = sequences
            .iter_mut()
            .zip(requests)
            .map(|(sequence, request)| {
                let token_ids = &request.continuation[..request.continuation.len() - 1];
                SequenceStep { sequence, token_ids, logits: LogitsOf::All }
            })
            .filter(|step| !step.token_ids.is_empty())
            .collect();
        if steps.is_empty() {
            return Ok(vec![LogLikelihood::CERTAIN; requests.len()]);
        }
        let logits = self.lm.forward(&mut steps, pool)?.logits;
        let mut row = 0;
        let mut rest = |request: &TokenRequest| {
            request.continuation[1..].iter().try_fold(LogLikelihood::CERTAIN, |sum, &token_id| {
                row += 1;
                Ok(sum.and(self.score(&finite_row(&logits, row - 1)?, token_id)))
            })
        };
        requests.iter().map(&mut rest).collect()
    }

    /// Log-softmax of `logits`, `[vocab_size]`, at `token_id`.
    fn score(&self, logits: &[f32], token_id: u32) -> LogLikelihood {
        let logprob = f64::from(logits[token_id as usize]) - log_sum_exp(logits);
        LogLikelihood { logprob, is_greedy: likeliest(&logits[..self.num_tokens]) == token_id }
    }
}

impl LogLikelihood {
    /// Of no tokens.
    const CERTAIN: Self = Self { logprob: 0.0, is_greedy: true };

    /// Of this and then `next`.
    fn and(self, next: Self) -> Self {
        Self { logprob: self.logprob + next.logprob, is_greedy: self.is_greedy && next.is_greedy }
    }
}

/// The likeliest id, the lowest among equals.
pub(super) fn likeliest(logits: &[f32]) -> u32 {
    let better = |best: usize, id: usize| if logits[id] > logits[best] { id } else { best };
    (0..logits.len()).reduce(better).unwrap_or(0) as u32
}

/// Row `index` of `logits`, `[rows, vocab_size]`.
pub(super) fn finite_row(logits: &Tensor, index: usize) -> Result<Vec<f32>> {
    let row = logits.get(index)?.to_vec1::<f32>()?;
    if row.iter().any(|x| x.is_nan() || *x == f32::INFINITY) {
        return Err(Error::Argument(
            "the model gives logits that are not finite: its weights are damaged, or too large for bf16; try --precision f32"
                .into(),
        ));
    }
    Ok(row)
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// Runs of neighbours with one context.
fn groups(requests: &[TokenRequest]) -> Vec<Range<usize>> {
    let mut start = 0;
    let same = requests.chunk_by(|a, b| a.context == b.context);
    same.map(|group| {
        start += group.len();
        start - group.len()..start
    })
    .collect()
}

/// Pages that one context and its continuations take: they share those that the context fills.
fn pages_of(group: &[TokenRequest]) -> usize {
    let context = group[0].context.len();
    let own = |request: &TokenRequest| {
        let read = context + request.continuation.len() - 1;
        read.div_ceil(PoolConfig::PAGE_SIZE) - context / PoolConfig::PAGE_SIZE
    };
    context.div_ceil(PoolConfig::PAGE_SIZE) + group.iter().map(own).sum::<usize>()
}

/// Runs of neighbours whose weights sum to at most `limit`, or that are one alone.
fn split(weights: &[usize], limit: usize) -> Vec<Range<usize>> {
    let (mut runs, mut start, mut sum) = (Vec::new(), 0, 0);
    for (i, &weight) in weights.iter().enumerate() {
        if i > start && sum + weight > limit {
            runs.push(start..i);
            (start, sum) = (i, 0);
        }
        sum += weight;
    }
    if start < weights.len() {
        runs.push(start..weights.len());
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(context: usize, continuation: usize) -> TokenRequest {
        TokenRequest { context: vec![1; context], continuation: vec![2; continuation] }
    }

    #[test]
    fn runs_stay_below_the_limit() {
        assert_eq!(split(&[3, 4, 1, 9, 2, 2], 7), [0..2, 2..3, 3..4, 4..6]);
        assert_eq!(split(&[0, 0], 0), [0..2; 1]);
        assert!(split(&[], 7).is_empty());
    }

    #[test]
    fn neighbours_share_a_context() {
        let all = [request(3, 1), request(3, 4), request(2, 1), request(3, 1)];
        assert_eq!(groups(&all), [0..2, 2..3, 3..4]);
    }

    #[test]
    fn pages_are_those_of_the_context_and_the_rest_of_each() {
        let size = PoolConfig::PAGE_SIZE;
        // The last page of the context is half full, so each continuation copies it.
        assert_eq!(pages_of(&[request(size + size / 2, 2), request(size + size / 2, size)]), 2 + 1 + 2);
        assert_eq!(pages_of(&[request(size, 1)]), 1);
        assert_eq!(pages_of(&[request(size, 2)]), 2);
    }

    #[test]
    fn the_lower_id_wins_among_equals() {
        assert_eq!(likeliest(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(likeliest(&[f32::NEG_INFINITY, -5.0]), 1);
    }
}
