//! The reference against central differences in f64, and by hand where that is short.

use super::CandleOps;
use crate::ops::{
    AttentionShape, DecoderOps, Distillation, Dropout, HeadDropout, IGNORED, KvShape, LossOps, PagedKv, PagedSequence,
    Positions, RotaryLayout, RotaryTable, SoftTargets, StudentOutput,
};
use crate::testing::{assert_close, check_gradients, random, random_var, values};
use candle_core::{DType, Tensor};

fn square(y: crate::Result<Tensor>) -> Tensor {
    y.unwrap().sqr().unwrap().sum_all().unwrap()
}

#[test]
fn norms_by_central_differences() {
    let x = random_var(1, &[3, 7], 1.3, DType::F64);
    let (w, b) = (random_var(2, &[7], 1.0, DType::F64), random_var(3, &[7], 1.0, DType::F64));
    check_gradients(&[("x", &x), ("w", &w), ("b", &b)], || square(CandleOps.layer_norm(&x, &w, &b, 1e-5)));
    check_gradients(&[("x", &x), ("w", &w)], || square(CandleOps.rms_norm(&x, &w, 1e-5)));
    assert!(CandleOps.layer_norm(&x, &b.narrow(0, 0, 3).unwrap(), &b, 1e-5).is_err());
    assert!(CandleOps.rms_norm(&x, &b.narrow(0, 0, 3).unwrap(), 1e-5).is_err());
}

#[test]
fn half_types_are_rounded_once() {
    let (x, w) = (random(1, &[3, 40], 1.0, DType::BF16), random(2, &[40], 1.0, DType::BF16));
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let got = CandleOps.rms_norm(&x, &w, 1e-5).unwrap();
    assert_eq!(got.dtype(), DType::BF16);
    assert_close(&got, &CandleOps.rms_norm(&wide(&x), &wide(&w), 1e-5).unwrap(), 4e-3, "bf16");
}

#[test]
fn rotary_by_central_differences() {
    let x = random_var(1, &[3, 12], 1.0, DType::F64);
    let factors = random(2, &[3, 12], 1.0, DType::F64);
    let table = RotaryTable::new(6, 4, 100.0, 30).unwrap();
    for layout in [RotaryLayout::Halves, RotaryLayout::Interleaved] {
        check_gradients(&[("x", &x)], || {
            let y = CandleOps.rotary(&x, &table, layout, Positions::Each(&[7, 0, 29])).unwrap();
            (y.sqr().unwrap() * &factors).unwrap().sum_all().unwrap()
        });
    }
}

#[test]
fn attention_by_central_differences() {
    let qkv = random_var(8, &[1, 5, 12], 1.0, DType::F64);
    check_gradients(&[("qkv", &qkv)], || square(CandleOps.attention_fused(&qkv, 2, 5)));
    let shape = AttentionShape::new(4, 2);
    let [q, k, v] = [(1, 12), (2, 6), (3, 6)].map(|(seed, width)| random_var(seed, &[2, 3, width], 1.0, DType::F64));
    check_gradients(&[("q", &q), ("k", &k), ("v", &v)], || square(CandleOps.attention(&q, &k, &v, shape, 3)));
    let narrow = AttentionShape { window: Some(2), ..shape };
    check_gradients(&[("q", &q), ("k", &k), ("v", &v)], || square(CandleOps.attention(&q, &k, &v, narrow, 3)));
    // Chunks of two tokens: the first two see each other, the third itself.
    let chunked = AttentionShape { chunk: Some(2), ..shape };
    check_gradients(&[("q", &q), ("k", &k), ("v", &v)], || square(CandleOps.attention(&q, &k, &v, chunked, 3)));
    assert_eq!((chunked.seen(1), chunked.seen(2), chunked.seen(5)), (0..2, 2..3, 4..6));
    assert_eq!(AttentionShape { window: Some(1), ..chunked }.seen(1), 1..2);
    let none = AttentionShape { chunk: Some(0), ..shape };
    assert!(CandleOps.attention(&q, &k, &v, none, 3).unwrap_err().to_string().contains("chunk must be at least 1"));
    // A window of one token gives back its own values.
    let alone =
        CandleOps.attention(&q, &k, &v, AttentionShape { window: Some(1), ..AttentionShape::new(2, 2) }, 3).err();
    assert!(alone.is_some(), "heads that do not fit are still refused");
    let own = AttentionShape { window: Some(1), ..AttentionShape::new(2, 2) };
    assert_close(&CandleOps.attention(&k, &k, &v, own, 3).unwrap(), &v, 1e-12, "a window of one");
}

/// A head's sink takes its share of the probabilities, as a further key with a value of zeros would.
#[test]
fn sinks_by_hand_and_by_central_differences() {
    let shape = AttentionShape::new(2, 1);
    let [q, k, v] = [(1, 6), (2, 3), (3, 3)].map(|(seed, width)| random_var(seed, &[2, 4, width], 1.0, DType::F64));
    let sinks = random_var(4, &[2], 1.0, DType::F64);
    let attend = || CandleOps.attention_with_sinks([&q, &k, &v], &sinks, shape, 4, None);
    check_gradients(&[("q", &q), ("k", &k), ("v", &v), ("sinks", &sinks)], || square(attend()));
    // The first query sees one key: the softmax is that of two logits.
    let (out, q, k, v, sinks) = (values(&attend().unwrap()), values(&q), values(&k), values(&v), values(&sinks));
    for (head, sink) in sinks.iter().enumerate() {
        let logit = (0..3).map(|i| q[head * 3 + i] * k[i]).sum::<f64>() * f64::from(shape.scale(3));
        let share = 1.0 / (1.0 + (sink - logit).exp());
        for i in 0..3 {
            assert!((out[head * 3 + i] - share * v[i]).abs() < 1e-9, "head {head}");
        }
    }
}

/// With its mask fixed, as it is by its seed, dropout is a function like any other.
#[test]
fn dropout_by_hand_and_by_central_differences() {
    let dropout = Dropout::new(0.4, 6).unwrap();
    let x = random_var(1, &[3, 2, 5], 1.0, DType::F64);
    check_gradients(&[("x", &x)], || square(CandleOps.dropout(&x, dropout)));
    let want = (0..30).map(|i| values(&x)[i] * f64::from(dropout.row(i / 5).factor(i as u32 % 5)));
    assert_eq!(values(&CandleOps.dropout(&x, dropout).unwrap()), want.collect::<Vec<_>>());

    let shape = AttentionShape::new(4, 2);
    let [q, k, v] = [(1, 12), (2, 6), (3, 6)].map(|(seed, width)| random_var(seed, &[2, 7, width], 1.0, DType::F64));
    let heads = HeadDropout { first_head: 4, ..HeadDropout::of_all(dropout) };
    let attend = |heads| CandleOps.attention_dropped([&q, &k, &v], shape, 7, heads);
    check_gradients(&[("queries", &q), ("keys", &k), ("values", &v)], || square(attend(heads)));
    // The first query sees itself alone: its output is its value, once for each of its heads, scaled or gone.
    let out = values(&attend(heads).unwrap());
    for (sequence, head) in (0..2).flat_map(|sequence| (0..4).map(move |head| (sequence, head))) {
        let factor = f64::from(heads.head(sequence, head).row(0).factor(0));
        for column in 0..3 {
            let value = values(&v)[sequence * 42 + head / 2 * 3 + column];
            assert!((out[sequence * 84 + head * 3 + column] - value * factor).abs() < 1e-12, "{sequence} {head}");
        }
    }
    let fused = random_var(4, &[1, 5, 18], 1.0, DType::F64);
    check_gradients(&[("qkv", &fused)], || square(CandleOps.attention_fused_dropped(&fused, 3, 5, heads)));
}

#[test]
fn paged_attention_gives_the_last_rows_of_the_whole_pass() {
    let shape = AttentionShape::new(4, 2);
    let [q, k, v] = [(1, 12), (2, 6), (3, 6)].map(|(seed, width)| random(seed, &[1, 7, width], 1.0, DType::F64));
    let want = CandleOps.attention(&q, &k, &v, shape, 7).unwrap().squeeze(0).unwrap();
    let pages = || Tensor::zeros((4, 2, 6), DType::F64, q.device()).unwrap();
    let (keys, values) = (pages(), pages());
    let kv = KvShape { num_kv_heads: 2, head_dim: 3 };
    let pool = PagedKv { keys: &keys, values: &values, block_size: 2, shape: kv };
    let blocks = [2, 0, 3, 1];
    let slots: Vec<u32> = (0..7).map(|t| blocks[t as usize / 2] * 2 + t % 2).collect();
    CandleOps.write_pages(pool, &k.squeeze(0).unwrap(), &v.squeeze(0).unwrap(), &slots).unwrap();
    for new in [1, 3, 7] {
        let last = |t: &Tensor| t.narrow(0, 7 - new, new).unwrap();
        let sequence = PagedSequence { blocks: &blocks, len: 7, new };
        let got = CandleOps.paged_attention(&last(&q.squeeze(0).unwrap()), pool, &[sequence], shape).unwrap();
        assert_close(&got, &last(&want), 1e-12, &format!("{new} new"));
    }
}

#[test]
fn the_loss_by_hand_and_by_central_differences() {
    let (x, w) = (random_var(1, &[4, 3], 1.0, DType::F64), random_var(2, &[7, 3], 1.0, DType::F64));
    let targets = [3, 0, IGNORED, 6];
    let logits = values(&x.matmul(&w.t().unwrap()).unwrap());
    let nats = |row: usize, t: usize| {
        let row = &logits[row * 7..][..7];
        row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[t]
    };
    let want = (nats(0, 3) + nats(1, 0) + nats(3, 6)) / 3.0;
    let loss = || CandleOps.linear_cross_entropy(&x, &w.as_tensor().clone().into(), &targets).unwrap();
    assert!((loss().to_scalar::<f64>().unwrap() - want).abs() < 1e-12);
    check_gradients(&[("hidden", &x), ("weight", &w)], loss);
}

#[test]
fn embedding_by_central_differences() {
    let table = random_var(1, &[5, 3], 1.0, DType::F64);
    let rows = |ids: &[u32]| CandleOps.embedding(&table.as_tensor().clone().into(), ids);
    check_gradients(&[("table", &table)], || square(rows(&[4, 0, 4])));
    assert!(rows(&[0, 5]).unwrap_err().to_string().contains("id 5"));
}

/// The definition in plain loops: mean over the counted targets of cross-entropy and `T^2 KL`.
fn distilled_by_hand(student: &[f64], teacher: &[f64], targets: &[u32], vocab: usize, t: f64) -> [f64; 2] {
    let probs = |row: &[f64], t: f64| -> Vec<f64> {
        let sum: f64 = row.iter().map(|z| (z / t).exp()).sum();
        row.iter().map(|z| (z / t).exp() / sum).collect()
    };
    let (mut sums, mut counted) = ([0.0; 2], 0.0);
    for (token, &target) in targets.iter().enumerate().filter(|(_, target)| **target != IGNORED) {
        let [z, of] = [student, teacher].map(|all| &all[token * vocab..][..vocab]);
        let (p, q) = (probs(of, t), probs(z, t));
        sums[0] -= probs(z, 1.0)[target as usize].ln();
        sums[1] += t * t * p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
        counted += 1.0;
    }
    sums.map(|sum| sum / counted)
}

#[test]
fn the_distilled_loss_by_hand_and_by_central_differences() {
    let vocab = 7;
    let (x, w) = (random_var(1, &[4, 3], 1.0, DType::F64), random_var(2, &[vocab, 3], 1.0, DType::F64));
    let (hidden, weight) = (random(3, &[4, 5], 1.0, DType::F64), random(4, &[vocab, 5], 1.0, DType::F64));
    let targets = [3, 0, IGNORED, 6];
    let logits = |x: &Tensor, w: &Tensor| values(&x.matmul(&w.t().unwrap()).unwrap());
    for (alpha, temperature) in [(1.0, 1.0), (0.5, 2.0), (0.0, 3.0)] {
        let how = Distillation { weight: alpha, temperature };
        let run = |soft: SoftTargets<'_>| {
            let weight = w.as_tensor().clone().into();
            let student = StudentOutput { hidden: &x, weight: &weight, targets: &targets, part: None };
            CandleOps.linear_distillation(student, soft, how).unwrap()
        };
        let of_teacher = weight.clone().into();
        let layer = SoftTargets::Layer { hidden: &hidden, weight: &of_teacher };
        let teacher = logits(&hidden, &weight);
        let [lm, kl] = distilled_by_hand(&logits(&x, &w), &teacher, &targets, vocab, temperature);
        let got = run(layer);
        let total = got.loss.to_scalar::<f64>().unwrap();
        for (got, want) in [(got.cross_entropy, lm), (got.kd, alpha * kl), (total, lm + alpha * kl)] {
            assert!((got - want).abs() < 1e-12, "{got} {want}");
        }
        check_gradients(&[("hidden", &x), ("weight", &w)], || run(layer).loss);

        // All entries by name are the whole distribution; fewer say less.
        let whole: Vec<f32> = (0..4 * vocab)
            .map(|at| {
                let row = &teacher[at / vocab * vocab..][..vocab];
                let sum: f64 = row.iter().map(|z| (z / temperature).exp()).sum();
                ((row[at % vocab] / temperature).exp() / sum) as f32
            })
            .collect();
        let ids: Vec<u32> = (0..4 * vocab as u32).map(|i| i % vocab as u32).collect();
        let all = run(SoftTargets::TopK { k: vocab, ids: &ids, probs: &whole });
        assert!((all.kd - got.kd).abs() < 1e-6, "{} {}", all.kd, got.kd);
        let ids: Vec<u32> = (0..8).map(|i| i % 2 * 3).collect();
        let probs: Vec<f32> = (0..8).map(|i| whole[i / 2 * vocab + ids[i] as usize]).collect();
        let few = SoftTargets::TopK { k: 2, ids: &ids, probs: &probs };
        assert!(run(few).kd <= got.kd && (alpha == 0.0 || run(few).kd < got.kd));
        check_gradients(&[("hidden", &x), ("weight", &w)], || run(few).loss);
    }
}

#[test]
fn distillation_refuses_what_does_not_fit() {
    let [x, w, hidden] = [[4, 3], [7, 3], [4, 5]].map(|dims| random(1, &dims, 1.0, DType::F64));
    let (weight, of_teacher, other) = (w.clone().into(), random(2, &[7, 5], 1.0, DType::F64).into(), w.into());
    let student = StudentOutput { hidden: &x, weight: &weight, targets: &[1; 4], part: None };
    let refused =
        |soft: SoftTargets<'_>, how| CandleOps.linear_distillation(student, soft, how).unwrap_err().to_string();
    let layer = SoftTargets::Layer { hidden: &hidden, weight: &of_teacher };
    let how = Distillation::default();
    for (soft, how, part) in [
        (layer, Distillation { weight: -1.0, ..how }, "weight of the divergence"),
        (layer, Distillation { temperature: 0.0, ..how }, "temperature must be above 0"),
        (SoftTargets::Layer { hidden: &hidden, weight: &other }, how, "the teacher of 4 tokens"),
        (SoftTargets::TopK { k: 2, ids: &[1; 8], probs: &[0.1; 7] }, how, "as many ids"),
        (SoftTargets::TopK { k: 0, ids: &[], probs: &[] }, how, "at least one"),
        (SoftTargets::TopK { k: 1, ids: &[7; 4], probs: &[0.1; 4] }, how, "entry 7"),
    ] {
        assert!(refused(soft, how).contains(part), "{}", refused(soft, how));
    }
}
