//! The sampler against distributions worked out by hand.

use super::*;

/// Logits whose softmax is 0.5, 0.25, 0.15, 0.10.
fn logits() -> Vec<f32> {
    [0.5f32, 0.25, 0.15, 0.10].iter().map(|p| p.ln()).collect()
}

/// Share of each id when `uniform` runs over a fine grid: the distribution itself.
#[track_caller]
fn check(params: &SamplingParams, prompt: &[u32], generated: &[u32], want: &[f64]) {
    let mut sampler = Sampler::new(params.clone(), want.len(), &[], prompt);
    generated.iter().for_each(|&id| sampler.push(id));
    let steps = 4000;
    let mut got = vec![0.0; want.len()];
    for i in 0..steps {
        let uniform = (f64::from(i) + 0.5) / f64::from(steps);
        let id = sampler.sample(&logits(), TokenLimits::default(), 0, uniform).expect("finite logits");
        got[id as usize] += 1.0 / f64::from(steps);
    }
    for (id, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() < 1e-3, "token {id}: got {got:.4}, want {want:.4}");
    }
}

#[test]
fn plain_softmax() {
    check(&SamplingParams::default(), &[], &[], &[0.5, 0.25, 0.15, 0.10]);
}

#[test]
fn temperature_half_squares_the_probabilities() {
    let sum = 0.25 + 0.0625 + 0.0225 + 0.01;
    let want = [0.25 / sum, 0.0625 / sum, 0.0225 / sum, 0.01 / sum];
    check(&SamplingParams { temperature: 0.5, ..Default::default() }, &[], &[], &want);
}

#[test]
fn top_k_keeps_two() {
    check(&SamplingParams { top_k: 2, ..Default::default() }, &[], &[], &[2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
}

#[test]
fn top_p_keeps_the_token_that_crosses_it() {
    // 0.5 + 0.25 < 0.8 <= 0.5 + 0.25 + 0.15
    check(&SamplingParams { top_p: 0.8, ..Default::default() }, &[], &[], &[0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0]);
    check(&SamplingParams { top_p: 1e-6, ..Default::default() }, &[], &[], &[1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn top_p_counts_what_top_k_left() {
    // After top-k 2 the likeliest holds 2/3 and alone reaches 0.6.
    check(&SamplingParams { top_k: 2, top_p: 0.6, ..Default::default() }, &[], &[], &[1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn min_p_is_relative_to_the_likeliest() {
    check(&SamplingParams { min_p: 0.29, ..Default::default() }, &[], &[], &[0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0]);
}

#[test]
fn repetition_penalty_covers_prompt_and_output_once_each() {
    // All logits are negative, so they are multiplied: p becomes p^2 for tokens 0 (prompt and output) and 1 (output).
    let sum = 0.25 + 0.0625 + 0.15 + 0.10;
    let want = [0.25 / sum, 0.0625 / sum, 0.15 / sum, 0.10 / sum];
    check(&SamplingParams { repetition_penalty: 2.0, ..Default::default() }, &[0], &[0, 1, 1], &want);
}

#[test]
fn presence_and_frequency_count_generated_tokens_only() {
    let ln2 = std::f32::consts::LN_2;
    // Token 1 came twice: its probability is divided by 2 (presence) and by 2 * 2 (frequency).
    let sum = 0.5 + 0.25 / 8.0 + 0.15 + 0.10;
    let want = [0.5 / sum, 0.25 / 8.0 / sum, 0.15 / sum, 0.10 / sum];
    let params = SamplingParams { presence_penalty: ln2, frequency_penalty: ln2, ..Default::default() };
    check(&params, &[0, 0], &[1, 1], &want);
}

#[test]
fn logit_bias_is_added_before_everything() {
    let params = SamplingParams { logit_bias: vec![(3, 100.0)], ..Default::default() };
    check(&params, &[], &[], &[0.0, 0.0, 0.0, 1.0]);
}

#[test]
fn greedy_takes_the_lowest_id_among_equals() {
    let params = SamplingParams { temperature: 0.0, ..Default::default() };
    let sampler = Sampler::new(params, 4, &[], &[]);
    assert_eq!(sampler.sample(&[1.0, 3.0, 3.0, 2.0], TokenLimits::default(), 0, 0.9).ok(), Some(1));
}

#[test]
fn padding_suppressed_and_forbidden_tokens_are_never_drawn() {
    for temperature in [0.0, 1.0, 2.0] {
        let params = SamplingParams { temperature, ..Default::default() };
        let sampler = Sampler::new(params, 3, &[1], &[]);
        for uniform in [0.0, 0.5, 0.999_999] {
            assert_eq!(sampler.sample(&[1.0, 9.0, 0.0, 50.0], forbid(&[0]), 0, uniform).ok(), Some(2));
        }
    }
}

fn forbid(forbidden: &[u32]) -> TokenLimits<'_> {
    TokenLimits { forbidden, ..TokenLimits::default() }
}

#[test]
fn only_allowed_tokens_are_drawn() {
    let logits: Vec<f32> = (0..70).map(|i| i as f32 / 10.0).collect();
    for (temperature, allowed, want) in [
        (0.0, vec![1 << 7, 1 << 3], vec![35]),
        (0.0, vec![1 << 7], vec![7]),
        (1.0, vec![1 << 7, 0, 1 << 2], vec![7, 66]),
    ] {
        let sampler = Sampler::new(SamplingParams { temperature, ..Default::default() }, 70, &[], &[]);
        for step in 0..200 {
            let limits = TokenLimits { forbidden: &[], allowed: Some(&allowed) };
            let got = sampler.sample(&logits, limits, 0, f64::from(step) / 200.0).expect("one is left");
            assert!(want.contains(&got), "{got} of {want:?}");
        }
        let limits = TokenLimits { forbidden: &[7, 35, 66], allowed: Some(&allowed) };
        assert!(matches!(sampler.sample(&logits, limits, 0, 0.5), Err(Error::NothingToSample)));
    }
}

#[test]
fn bad_logits_are_errors() {
    let params = SamplingParams::default();
    let sampler = Sampler::new(params, 2, &[], &[]);
    assert!(matches!(
        sampler.sample(&[0.0, f32::NAN], TokenLimits::default(), 7, 0.0),
        Err(Error::LogitsNotFinite { position: 7 })
    ));
    assert!(matches!(
        sampler.sample(&[0.0, f32::INFINITY], TokenLimits::default(), 0, 0.0),
        Err(Error::LogitsNotFinite { .. })
    ));
    assert!(matches!(sampler.sample(&[0.0, 0.0], forbid(&[0, 1]), 0, 0.0), Err(Error::NothingToSample)));
    let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
    let sampler = Sampler::new(greedy, 2, &[], &[]);
    assert!(matches!(
        sampler.sample(&[f32::NEG_INFINITY; 2], TokenLimits::default(), 0, 0.0),
        Err(Error::NothingToSample)
    ));
}

/// The draw by its definition: everything sorted, every step on its own.
fn drawn_slowly(params: &SamplingParams, logits: &[f32], uniform: f64) -> u32 {
    let mut all: Vec<(u32, f64)> =
        logits.iter().zip(0..).map(|(&x, id)| (id, f64::from(x) / f64::from(params.temperature))).collect();
    all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let max = all[0].1;
    all.iter_mut().for_each(|c| c.1 = (c.1 - max).exp());
    let normalise = |all: &mut Vec<(u32, f64)>| {
        let sum: f64 = all.iter().map(|c| c.1).sum();
        all.iter_mut().for_each(|c| c.1 /= sum);
    };
    if params.top_k > 0 {
        all.truncate(params.top_k);
    }
    normalise(&mut all);
    let mut sum = 0.0;
    let cut = all.iter().position(|c| {
        sum += c.1;
        sum >= f64::from(params.top_p)
    });
    all.truncate(cut.map_or(all.len(), |at| at + 1));
    let floor = f64::from(params.min_p) * all[0].1;
    all.retain(|c| c.1 >= floor);
    normalise(&mut all);
    let mut sum = 0.0;
    let at = all.iter().position(|c| {
        sum += c.1;
        sum > uniform
    });
    all[at.unwrap_or(all.len() - 1)].0
}

#[test]
fn partly_sorted_draws_are_those_of_the_definition() {
    let mut rng = moe_core::CounterRng::new(3, 0);
    let mut ids = std::collections::BTreeSet::new();
    for case in 0..400 {
        let len = 1 + rng.below(900) as usize;
        let spread = [0.01, 1.0, 4.0, 30.0][case % 4];
        let logits: Vec<f32> = (0..len).map(|_| (rng.normal_f64() * spread) as f32).collect();
        let params = SamplingParams {
            temperature: [0.3, 1.0, 1.9][case % 3],
            top_k: [0, 0, 1, 7, 100, 2000][rng.below(6) as usize],
            top_p: [1.0, 0.95, 0.5, 1e-5][rng.below(4) as usize],
            min_p: [0.0, 0.0, 0.1, 1.0][rng.below(4) as usize],
            ..Default::default()
        };
        let sampler = Sampler::new(params.clone(), len, &[], &[]);
        for uniform in [0.0, rng.uniform_f64(), rng.uniform_f64(), 0.999_999] {
            let got = sampler.sample(&logits, TokenLimits::default(), 0, uniform).expect("finite");
            assert_eq!(got, drawn_slowly(&params, &logits, uniform), "case {case}: {params:?} at {uniform}");
            ids.insert(got);
        }
    }
    assert!(ids.len() > 100, "the cases differ");
}
