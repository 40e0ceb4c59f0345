//! Prompt lookup: what followed the last tokens where they stood before. Pure.
//!
//! # Source
//! Saxena, "Prompt Lookup Decoding" (2023).

use super::config::SpeculationConfig;

/// At most `limit` tokens that may follow `token_ids`: those after the latest earlier occurrence of its longest possible ending.
pub(super) fn propose(config: SpeculationConfig, token_ids: &[u32], limit: usize) -> Vec<u32> {
    let count = config.num_tokens.min(limit);
    if count == 0 {
        return Vec::new();
    }
    for ngram in (config.min_ngram..=config.max_ngram).rev() {
        let Some(ending_at) = token_ids.len().checked_sub(ngram).filter(|&at| at > 0) else { continue };
        let ending = &token_ids[ending_at..];
        // Occurrences end before the last token.
        let before = &token_ids[..token_ids.len() - 1];
        if let Some(at) = before.windows(ngram).rposition(|window| window == ending) {
            let following = &token_ids[at + ngram..];
            return following[..count.min(following.len())].to_vec();
        }
    }
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(token_ids: &[u32], limit: usize, want: &[u32]) {
        let config = SpeculationConfig { num_tokens: 3, min_ngram: 2, max_ngram: 3 };
        assert_eq!(propose(config, token_ids, limit), want, "{token_ids:?}");
    }

    #[test]
    fn what_followed_the_same_tokens_before() {
        check(&[1, 2, 3, 4, 5, 9, 1, 2], 9, &[3, 4, 5]);
        check(&[1, 2, 3, 4, 5, 9, 1, 2], 2, &[3, 4]);
        // The longer ending decides, and among equal ones the latest.
        check(&[7, 1, 2, 30, 8, 1, 2, 40, 7, 1, 2], 1, &[30]);
        check(&[1, 2, 30, 1, 2, 40, 1, 2], 1, &[40]);
        // It may overlap the ending.
        check(&[5, 5, 5], 9, &[5]);
    }

    #[test]
    fn nothing_where_nothing_is_found() {
        for token_ids in [&[][..], &[1], &[1, 2], &[1, 2, 3, 4], &[1, 2, 1]] {
            check(token_ids, 9, &[]);
        }
        check(&[1, 2, 3, 1, 2], 0, &[]);
        let none = SpeculationConfig { num_tokens: 0, ..SpeculationConfig::default() };
        assert!(propose(none, &[1, 2, 3, 1, 2], 9).is_empty());
    }
}
