//! [`PlainDraw`]: the draw of a token that takes nothing but a row of logits and a few numbers, so that it can be made where the row
//! is. Over ranks a token then travels in the place of as many logits as the vocabulary has entries.
//!
//! Not made so: draws with penalties, biases of logits or a grammar, which need what was generated before, and those whose logits are
//! asked for (log-probabilities).

use super::request::SamplingParams;
use super::sampler::{Sampler, TokenLimits};
use crate::{Error, Result};

/// How one token is drawn. The same as [`Sampler::sample`] without penalties and biases.
#[derive(Debug, Clone, PartialEq)]
pub struct PlainDraw {
    pub(super) temperature: f32,
    pub(super) top_k: usize,
    pub(super) top_p: f32,
    pub(super) min_p: f32,
    /// Ids below this may be drawn.
    pub(super) num_tokens: usize,
    /// These may not.
    pub(super) forbidden: Vec<u32>,
    /// The token's.
    pub(super) position: usize,
    /// The random number, in `[0, 1)`.
    pub(super) uniform: f64,
}

/// What came of a draw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlainDrawn {
    /// This token.
    Token(u32),
    /// [`Error::LogitsNotFinite`].
    LogitsNotFinite,
    /// [`Error::NothingToSample`].
    NothingToSample,
}

/// Numbers before the forbidden ids.
const NUMBERS: usize = 9;

impl PlainDraw {
    /// Draws from `logits`, `[vocab_size]`.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn draw(&self, logits: &[f32]) -> Result<u32> {
        let &Self { temperature, top_k, top_p, min_p, num_tokens, position, uniform, .. } = self;
        let params = SamplingParams { temperature, top_k, top_p, min_p, ..SamplingParams::default() };
        let sampler = Sampler::new(params, num_tokens, &self.forbidden, &[]);
        sampler.sample(logits, TokenLimits::default(), position, uniform)
    }

    /// Appends it as numbers; [`PlainDraw::from_words`] reads them.
    pub(super) fn to_words(&self, words: &mut Vec<u32>) {
        let uniform = self.uniform.to_bits();
        words.extend([
            self.temperature.to_bits(),
            self.top_k.min(u32::MAX as usize) as u32,
            self.top_p.to_bits(),
            self.min_p.to_bits(),
            self.num_tokens as u32,
            self.position as u32,
            uniform as u32,
            (uniform >> 32) as u32,
            self.forbidden.len() as u32,
        ]);
        words.extend(&self.forbidden);
    }

    /// Takes it from the front of `words`; `None` if it is not there.
    pub(super) fn from_words(words: &mut &[u32]) -> Option<Self> {
        let (numbers, rest) = words.split_at_checked(NUMBERS)?;
        let (forbidden, rest) = rest.split_at_checked(numbers[8] as usize)?;
        *words = rest;
        Some(Self {
            temperature: f32::from_bits(numbers[0]),
            top_k: numbers[1] as usize,
            top_p: f32::from_bits(numbers[2]),
            min_p: f32::from_bits(numbers[3]),
            num_tokens: numbers[4] as usize,
            position: numbers[5] as usize,
            uniform: f64::from_bits(u64::from(numbers[6]) | u64::from(numbers[7]) << 32),
            forbidden: forbidden.to_vec(),
        })
    }
}

impl PlainDrawn {
    /// Words of one.
    pub(super) const WORDS: usize = 2;

    /// What a draw has come to. Other errors than those of a sampler it has not.
    pub(super) fn of(drawn: &Result<u32>) -> Self {
        match drawn {
            Ok(token) => Self::Token(*token),
            Err(Error::LogitsNotFinite { .. }) => Self::LogitsNotFinite,
            Err(_) => Self::NothingToSample,
        }
    }

    /// The token at `position`.
    ///
    /// # Errors
    /// What kept it from being drawn.
    pub(super) fn token(self, position: usize) -> Result<u32> {
        match self {
            Self::Token(token) => Ok(token),
            Self::LogitsNotFinite => Err(Error::LogitsNotFinite { position }),
            Self::NothingToSample => Err(Error::NothingToSample),
        }
    }

    pub(super) fn to_words(self) -> [u32; Self::WORDS] {
        match self {
            Self::Token(token) => [0, token],
            Self::LogitsNotFinite => [1, 0],
            Self::NothingToSample => [2, 0],
        }
    }

    pub(super) fn from_words(words: [u32; Self::WORDS]) -> Option<Self> {
        match words {
            [0, token] => Some(Self::Token(token)),
            [1, _] => Some(Self::LogitsNotFinite),
            [2, _] => Some(Self::NothingToSample),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw() -> PlainDraw {
        PlainDraw {
            temperature: 0.7,
            top_k: 3,
            top_p: 0.9,
            min_p: 0.01,
            num_tokens: 5,
            forbidden: vec![4, 1],
            position: 17,
            uniform: 0.3,
        }
    }

    #[test]
    fn words_say_all_of_a_draw() {
        let mut words = vec![];
        draw().to_words(&mut words);
        words.push(99);
        let mut rest = &words[..];
        assert_eq!(PlainDraw::from_words(&mut rest), Some(draw()));
        assert_eq!(rest, [99]);
        for len in 0..words.len() - 1 {
            assert_eq!(PlainDraw::from_words(&mut &words[..len]), None, "{len} words");
        }
        for drawn in [PlainDrawn::Token(7), PlainDrawn::LogitsNotFinite, PlainDrawn::NothingToSample] {
            assert_eq!(PlainDrawn::from_words(drawn.to_words()), Some(drawn));
        }
        assert_eq!(PlainDrawn::from_words([3, 0]), None);
    }

    #[test]
    fn errors_of_a_draw_travel() {
        let of = |logits: [f32; 6]| PlainDrawn::of(&draw().draw(&logits));
        // 4 and 1 are forbidden, 5 is padding.
        assert!(matches!(of([0.0, 9.0, 0.0, 0.0, 9.0, 9.0]), PlainDrawn::Token(0 | 2 | 3)));
        assert_eq!(of([f32::NAN; 6]), PlainDrawn::LogitsNotFinite);
        let low = f32::NEG_INFINITY;
        assert_eq!(of([low, 9.0, low, low, 9.0, 9.0]), PlainDrawn::NothingToSample);
        assert!(matches!(PlainDrawn::LogitsNotFinite.token(17), Err(Error::LogitsNotFinite { position: 17 })));
    }
}
