//! AdamW against an f64 re-statement of its formula, and its behaviour at the edges.

use super::update::TOGETHER;
use super::*;
use candle_core::{Device, Tensor};
use moe_kernels::adamw::CHUNK;

fn var(values: &[f32], shape: &[usize]) -> Var {
    Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
}

fn rules(params: &[(String, Var)]) -> Vec<UpdateRule> {
    params.iter().map(|(_, var)| UpdateRule::for_shape(var.dims())).collect()
}

/// An optimizer that owns everything.
fn new(config: AdamWConfig, params: &[(String, Var)]) -> Result<AdamW> {
    AdamW::new(config, Owned::everything(Units::of_params(params)?), rules(params))
}

fn values(var: &Var) -> Vec<f32> {
    var.flatten_all().unwrap().to_vec1().unwrap()
}

/// The textbook formula, one number, in f64; the gradient is given after clipping.
struct Oracle {
    p: f64,
    m: f64,
    v: f64,
    t: i32,
}

impl Oracle {
    fn step(&mut self, g: f64, lr: f64, decay: f64) {
        self.t += 1;
        self.p *= 1.0 - lr * decay;
        self.m = 0.9 * self.m + 0.1 * g;
        self.v = 0.95 * self.v + 0.05 * g * g;
        let m_hat = self.m / (1.0 - 0.9f64.powi(self.t));
        let v_hat = self.v / (1.0 - 0.95f64.powi(self.t));
        self.p -= lr * m_hat / (v_hat.sqrt() + 1e-8);
    }
}

fn config(clip_grad: f64) -> AdamWConfig {
    AdamWConfig { clip_grad, ..AdamWConfig::default() }
}

#[test]
fn three_steps_follow_the_formula_with_and_without_clipping() {
    let start = [0.5, -1.25, 2.0, 0.125];
    let grads = [[0.1f32, -0.4, 1.5, 0.0], [-0.3, 0.2, 0.7, 1e-4], [2.0, -3.0, 0.5, -1e-4]];
    for clip in [0.0, 0.5, 1e9] {
        let params = [("w".to_owned(), var(&start, &[2, 2])), ("b".to_owned(), var(&start, &[4]))];
        let mut optimizer = new(config(clip), &params).unwrap();
        let oracle = |&p: &f32| Oracle { p: f64::from(p), m: 0.0, v: 0.0, t: 0 };
        let mut oracles: Vec<Vec<Oracle>> = (0..2).map(|_| start.iter().map(oracle).collect()).collect();
        for (step, grad) in grads.iter().enumerate() {
            let lr = 0.01 * (step + 1) as f64;
            // The scale of 0.5 stands for a mean over two micro-batches.
            let report = optimizer.step(&params, &[grad.to_vec(), grad.to_vec()], 0.5, lr).unwrap();
            let norm = (2.0 * grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>()).sqrt() * 0.5;
            assert!((report.grad_norm - norm).abs() < 1e-12 * norm);
            let factor = 0.5 * if clip > 0.0 { (clip / (norm + 1e-6)).min(1.0) } else { 1.0 };
            for (row, decay) in oracles.iter_mut().zip([0.1, 0.0]) {
                row.iter_mut().zip(grad).for_each(|(o, g)| o.step(f64::from(*g) * factor, lr, decay));
            }
        }
        for ((_, var), row) in params.iter().zip(&oracles) {
            for (got, want) in values(var).iter().zip(row) {
                assert!((f64::from(*got) - want.p).abs() < 2e-6, "clip {clip}: {got} against {}", want.p);
            }
        }
    }
}

#[test]
fn decay_acts_on_matrices_only_and_without_a_gradient() {
    let params = [("w".to_owned(), var(&[1.0], &[1, 1])), ("b".to_owned(), var(&[1.0], &[1]))];
    new(config(1.0), &params).unwrap().step(&params, &[vec![0.0], vec![0.0]], 1.0, 0.5).unwrap();
    assert_eq!(values(&params[0].1), [0.95]);
    assert_eq!(values(&params[1].1), [1.0]);
}

#[test]
fn it_finds_the_minimum_of_a_parabola() {
    let target = [3.0f32, -2.0, 0.5];
    let params = [("x".to_owned(), var(&[0.0; 3], &[3]))];
    let mut optimizer = new(config(0.0), &params).unwrap();
    for step in 0..1500 {
        let grad: Vec<f32> = values(&params[0].1).iter().zip(target).map(|(x, t)| 2.0 * (x - t)).collect();
        optimizer.step(&params, &[grad], 1.0, 0.05 * (1.0 - step as f64 / 1500.0)).unwrap();
    }
    for (got, want) in values(&params[0].1).iter().zip(target) {
        assert!((got - want).abs() < 1e-3, "{got} against {want}");
    }
}

#[test]
fn non_finite_gradients_are_skipped_then_refused() {
    let params = [("w".to_owned(), var(&[1.0, 2.0], &[2]))];
    let mut optimizer = new(config(1.0), &params).unwrap();
    optimizer.step(&params, &[vec![0.1, 0.2]], 1.0, 0.01).unwrap();
    let (before, state) = (values(&params[0].1), optimizer.clone());
    for bad in [f32::NAN, f32::INFINITY] {
        let report = optimizer.step(&params, &[vec![0.1, bad]], 1.0, 0.01).unwrap();
        assert!(!report.applied && !report.grad_norm.is_finite());
        assert_eq!(report.non_finite.unwrap().gradient.as_deref(), Some("w"));
    }
    assert_eq!(values(&params[0].1), before);
    assert_eq!(optimizer.moments(), state.moments());
    assert_eq!((optimizer.updates(), optimizer.skipped_in_a_row()), (1, 2));
    assert!(optimizer.step(&params, &[vec![0.1, 0.2]], 1.0, 0.01).unwrap().applied);
    assert_eq!(optimizer.skipped_in_a_row(), 0, "a good step starts the count anew");
    let outcome = (0..MAX_SKIPPED_IN_A_ROW).map(|_| optimizer.step(&params, &[vec![f32::NAN; 2]], 1.0, 0.01));
    let error = outcome.last().unwrap().unwrap_err();
    assert!(matches!(error, Error::NonFinite { step: None, in_a_row: MAX_SKIPPED_IN_A_ROW, .. }), "{error:?}");
    let message = error.to_string();
    assert!(
        message.starts_with("the gradient of w is not finite; no update for 8 steps in a row; lower lr"),
        "{message}"
    );
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let size = 50_000;
    let wave = |k: usize| (0..size).map(|i| ((i * k) as f32 * 0.37).sin() * 1.3).collect::<Vec<f32>>();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let params = [("w".to_owned(), var(&wave(1), &[1, size])), ("b".to_owned(), var(&wave(2), &[size]))];
            let mut optimizer = new(config(1.0), &params).unwrap();
            let norms: Vec<u64> = (0..4)
                .map(|i| optimizer.step(&params, &[wave(i + 3), wave(i + 9)], 0.25, 0.01).unwrap().grad_norm.to_bits())
                .collect();
            (norms, values(&params[0].1), values(&params[1].1), optimizer)
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

#[test]
fn many_parameters_are_updated_as_one_is() {
    let one = |count: usize| {
        let params: Vec<_> = (0..count).map(|i| (format!("w{i}"), var(&[0.5, -2.0], &[2]))).collect();
        let grads = vec![vec![0.25, 1.0]; count];
        let mut optimizer = new(config(0.0), &params).unwrap();
        optimizer.step(&params, &grads, 1.0, 0.01).unwrap();
        params.iter().map(|(_, var)| values(var)).collect::<Vec<_>>()
    };
    assert_eq!(one(2 * TOGETHER + 3), vec![one(1)[0].clone(); 2 * TOGETHER + 3]);
}

#[test]
fn mismatches_are_named() {
    let params = [("w".to_owned(), var(&[1.0, 2.0], &[2]))];
    let mut optimizer = new(config(1.0), &params).unwrap();
    assert!(optimizer.step(&params, &[vec![0.1]], 1.0, 0.1).unwrap_err().to_string().contains('w'));
    assert!(optimizer.step(&params, &[] as &[Vec<f32>], 1.0, 0.1).is_err());
    let twice = [params[0].clone(), ("again".to_owned(), params[0].1.clone())];
    let mut both = new(config(1.0), &twice).unwrap();
    let message = both.step(&twice, &[vec![0.1; 2], vec![0.1; 2]], 1.0, 0.1).unwrap_err().to_string();
    assert!(message.contains("again") && message.contains("twice"), "{message}");
    for (bad, word) in [
        (AdamWConfig { beta1: 1.0, ..config(1.0) }, "beta1"),
        (AdamWConfig { eps: 0.0, ..config(1.0) }, "eps"),
        (AdamWConfig { weight_decay: f64::NAN, ..config(1.0) }, "weight_decay"),
        (AdamWConfig { clip_grad: -1.0, ..config(1.0) }, "clip_grad"),
    ] {
        assert!(new(bad, &params).unwrap_err().to_string().contains(word));
    }
}

fn wave(len: usize, k: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * k + 1) as f32 * 0.37).sin() * 1.3).collect()
}

/// Sizes of parameters as units and elements of a unit: experts of odd sizes, more of them than have names of one digit.
const SHAPES: [(usize, usize); 5] = [(1, 3 * CHUNK + 5), (12, CHUNK + 7), (1, 1), (1, 0), (3, 4 * CHUNK)];

fn shapes() -> Vec<(String, Var)> {
    let param = |(p, &(count, elements)): (usize, &(usize, usize))| {
        (format!("p{p}"), var(&wave(count * elements, p + 2), &[count, elements]))
    };
    SHAPES.iter().enumerate().map(param).collect()
}

/// The experts `experts` of each stack; what is no stack is whole.
fn units_of(experts: [std::ops::Range<usize>; 5]) -> Vec<Vec<Unit>> {
    let unit = |p: usize, elements| move |u| Unit { name: format!("p{p}.{u}"), elements };
    SHAPES.iter().enumerate().zip(experts).map(|((p, s), held)| held.map(unit(p, s.1)).collect()).collect()
}

fn all_experts() -> [std::ops::Range<usize>; 5] {
    SHAPES.map(|(count, _)| 0..count)
}

/// What two steps of an optimizer whose elements are spread over ranks give: norms, values and moments of whole parameters.
fn spread(parts: usize, order: impl Fn(&mut Vec<ChunkSum>)) -> (Vec<u64>, Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let units = Units::new(&units_of(all_experts())).unwrap();
    // Two lists, as of two groups of ranks.
    let list = |params: &[usize], index| PartOf { params: params.to_vec(), index, parts };
    let mut ranks: Vec<(AdamW, Vec<(String, Var)>)> = (0..parts)
        .map(|rank| {
            let owned = Owned::parts(units.clone(), &[list(&[3, 1], rank), list(&[0, 2, 4], rank)]).unwrap();
            let params = shapes();
            (AdamW::new(config(1.0), owned, rules(&params)).unwrap(), params)
        })
        .collect();
    let mut norms = Vec::new();
    for step in 0..2 {
        let grads: Vec<_> = SHAPES.iter().map(|(count, elements)| wave(count * elements, 7 + step)).collect();
        // Whole gradients in one step, those that are owned alone in the other.
        let owned = |optimizer: &AdamW| -> Vec<Vec<f32>> {
            grads.iter().enumerate().map(|(p, grad)| optimizer.owned().cut(p, grad)).collect()
        };
        let owned: Vec<_> = ranks.iter().map(|(optimizer, _)| owned(optimizer)).collect();
        let grads_of = |rank: usize| match step {
            0 => Grads::whole(&grads),
            _ => Grads::Owned(owned[rank].iter().map(Vec::as_slice).collect()),
        };
        let all = ranks.iter().enumerate();
        let all = all.flat_map(|(rank, (optimizer, params))| optimizer.squares(params, &grads_of(rank)).unwrap());
        let mut squares: Vec<ChunkSum> = all.collect();
        order(&mut squares);
        for (rank, (optimizer, params)) in ranks.iter_mut().enumerate() {
            let grad_norm = optimizer.norm(&squares).unwrap() * 0.5;
            let update = Update { lr: 0.01, grad_scale: 0.5, grad_norm };
            assert!(optimizer.apply(params, &grads_of(rank), update, &WeightCopies::default()).unwrap().applied);
            norms.push(grad_norm.to_bits());
        }
    }
    norms.dedup();
    let zeros = || SHAPES.map(|(count, elements)| vec![f32::NAN; count * elements]).to_vec();
    let (mut whole, mut moments) = (zeros(), zeros());
    let start = shapes();
    for (optimizer, params) in &ranks {
        for (p, (_, var)) in params.iter().enumerate() {
            let (owned, now) = (optimizer.owned(), values(var));
            let mut untouched = now.clone();
            let before = owned.cut(p, &values(&start[p].1));
            owned.paste(p, &before, &mut untouched);
            assert_eq!(untouched, values(&start[p].1), "what is not owned stays as it is");
            owned.paste(p, &owned.cut(p, &now), &mut whole[p]);
            owned.paste(p, &optimizer.moments()[p].exp_avg_sq, &mut moments[p]);
        }
    }
    (norms, whole, moments)
}

/// Over any number of ranks, whose sums come in any order: the bits of one that owns everything.
#[test]
fn no_split_of_elements_changes_a_bit() {
    let want = spread(1, |_| ());
    assert_eq!(want.0.len(), 2);
    assert!(want.1.iter().flatten().all(|v| v.is_finite()), "all is owned");
    for parts in [2, 3, 4, 9] {
        assert!(spread(parts, |squares| squares.reverse()) == want, "{parts} parts");
    }
}

/// Experts over ranks, dense parameters on all: every rank computes the norm that one rank with everything does.
#[test]
fn no_split_of_experts_changes_a_bit_of_the_norm() {
    let grads: Vec<_> = SHAPES.iter().map(|(count, elements)| wave(count * elements, 5)).collect();
    let params = shapes();
    let everything = Owned::everything(Units::new(&units_of(all_experts())).unwrap());
    let whole = AdamW::new(config(1.0), everything, rules(&params)).unwrap();
    let want = whole.norm(&whole.squares(&params, &Grads::whole(&grads)).unwrap()).unwrap();
    let exact: f64 = grads.iter().flatten().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
    assert!((want - exact).abs() < 1e-12 * exact);
    for cut in [1, 5, 11] {
        let held = |experts: std::ops::Range<usize>| {
            let held = units_of([0..1, experts.clone(), 0..1, 0..1, 0..3]);
            let units = Units::within(units_of(all_experts()).concat(), &held).unwrap();
            let size = SHAPES[1].1;
            let slice = &grads[1][experts.start * size..experts.end * size];
            let mut params = params.clone();
            params[1].1 = var(slice, &[experts.len(), size]);
            let grads: Vec<&[f32]> =
                grads.iter().enumerate().map(|(p, g)| if p == 1 { slice } else { g.as_slice() }).collect();
            let optimizer = AdamW::new(config(1.0), Owned::everything(units), rules(&params)).unwrap();
            let squares = optimizer.squares(&params, &Grads::whole(&grads)).unwrap();
            (optimizer, squares)
        };
        let (first, second) = (held(0..cut), held(cut..12));
        let all = [second.1.clone(), first.1.clone()].concat();
        for (optimizer, _) in [&first, &second] {
            assert_eq!(optimizer.norm(&all).unwrap().to_bits(), want.to_bits(), "{cut} experts on the first rank");
        }
        let message = first.0.norm(&first.1).unwrap_err().to_string();
        assert!(message.contains("no rank gave") && message.contains("p1."), "{message}");
        let mut drifted = all;
        drifted[0].sum += 1.0;
        let message = first.0.norm(&drifted).unwrap_err().to_string();
        assert!(message.contains("different gradients of p0.0"), "{message}");
    }
    let stray = Units::within(vec![], &[vec![Unit { name: "a".into(), elements: 1 }]]).unwrap_err().to_string();
    assert!(stray.contains("a of 1 elements"), "{stray}");
    assert!(Units::new(&[vec![Unit { name: "a".into(), elements: 1 }; 2]]).unwrap_err().to_string().contains("twice"));
}

/// A factor on the rate or the decay of a parameter is that rate or decay.
#[test]
fn rules_scale_rate_and_decay() {
    let step = |rule: UpdateRule, lr: f64, weight_decay: f64| {
        let params = [("w".to_owned(), var(&[1.0, -3.0], &[1, 2]))];
        let owned = Owned::everything(Units::of_params(&params).unwrap());
        let mut optimizer = AdamW::new(AdamWConfig { weight_decay, ..config(0.0) }, owned, vec![rule]).unwrap();
        optimizer.step(&params, &[[0.5, -0.25]], 1.0, lr).unwrap();
        values(&params[0].1)
    };
    let plain = UpdateRule::decays(true);
    assert_eq!(step(UpdateRule { lr_scale: 0.5, ..plain }, 0.5, 0.25), step(plain, 0.25, 0.25));
    assert_eq!(step(UpdateRule { weight_decay: 2.0, ..plain }, 0.5, 0.25), step(plain, 0.5, 0.5));
    assert_eq!(step(UpdateRule::decays(false), 0.5, 0.25), step(plain, 0.5, 0.0));
    assert_ne!(step(plain, 0.5, 0.25), step(plain, 0.5, 0.0));
    assert_eq!(step(UpdateRule { lr_scale: 0.0, ..plain }, 0.5, 0.25), [1.0, -3.0]);
    let bad = UpdateRule { lr_scale: f64::NAN, ..plain };
    let params = [("w".to_owned(), var(&[1.0], &[1]))];
    let owned = Owned::everything(Units::of_params(&params).unwrap());
    assert!(AdamW::new(config(0.0), owned, vec![bad]).unwrap_err().to_string().contains("lr_scale"));
}
