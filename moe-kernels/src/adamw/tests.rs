//! The update against the textbook formula in f64, and its independence of threads, instruction set and neighbours.

use super::*;

/// Lengths around a chunk and a vector.
const LENS: [usize; 6] = [0, 1, 33, CHUNK - 1, CHUNK, 2 * CHUNK + 77];

fn settings(index: usize, updates: u64) -> Settings {
    let weight_decay = if index.is_multiple_of(2) { 0.1 } else { 0.0 };
    Settings { lr: 0.01, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay, updates, grad_scale: 0.25 }
}

fn wave(len: usize, k: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * k + 1) as f32 * 0.37).sin() * 1.3).collect()
}

/// Values and moments of one parameter.
type State = [Vec<f32>; 3];

fn start() -> Vec<State> {
    LENS.iter().enumerate().map(|(i, &len)| [wave(len, i + 1), vec![0.0; len], vec![0.0; len]]).collect()
}

fn step(isa: Isa, states: &mut [State], first: usize, updates: u64) {
    let grads: Vec<_> = states.iter().map(|s| wave(s[0].len(), 5 + updates as usize)).collect();
    let mut parameters: Vec<_> = states
        .iter_mut()
        .zip(&grads)
        .enumerate()
        .map(|(i, ([values, exp_avg, exp_avg_sq], grad))| Parameter {
            settings: settings(first + i, updates),
            values,
            exp_avg,
            exp_avg_sq,
            grad,
            rounded: None,
        })
        .collect();
    update(isa, &mut parameters).unwrap();
}

fn on_threads<R: Send>(threads: usize, body: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(body)
}

#[test]
fn three_updates_follow_the_formula() {
    for isa in Isa::available() {
        let mut states = start();
        (1..=3).for_each(|t| step(isa, &mut states, 0, t));
        for (index, (state, start)) in states.iter().zip(start()).enumerate() {
            let grads: Vec<_> = (1..=3).map(|t| wave(start[0].len(), 5 + t)).collect();
            for i in 0..start[0].len() {
                let (mut p, mut m, mut v) = (f64::from(start[0][i]), 0.0, 0.0);
                for (t, grad) in grads.iter().enumerate() {
                    let s = settings(index, t as u64 + 1);
                    let g = f64::from(grad[i]) * s.grad_scale;
                    (m, v) = (s.beta1 * m + (1.0 - s.beta1) * g, s.beta2 * v + (1.0 - s.beta2) * g * g);
                    let m_hat = m / (1.0 - s.beta1.powi(t as i32 + 1));
                    let v_hat: f64 = v / (1.0 - s.beta2.powi(t as i32 + 1));
                    p -= s.lr * (m_hat / (v_hat.sqrt() + s.eps) + s.weight_decay * p);
                }
                for (got, want) in state.iter().zip([p, m, v]) {
                    assert!((f64::from(got[i]) - want).abs() < 2e-6, "{isa}: {index}[{i}] {} against {want}", got[i]);
                }
            }
        }
    }
}

#[test]
fn neither_threads_nor_instruction_set_nor_neighbours_change_a_bit() {
    let mut want = start();
    for (index, state) in want.iter_mut().enumerate() {
        (1..=2).for_each(|t| step(Isa::Portable, std::slice::from_mut(state), index, t));
    }
    for isa in Isa::available() {
        for threads in [1, 2, 3, 5] {
            let mut states = start();
            on_threads(threads, || (1..=2).for_each(|t| step(isa, &mut states, 0, t)));
            assert!(states == want, "{threads} threads, {isa}");
        }
    }
}

#[test]
fn sums_of_squares_are_accurate_and_have_one_order() {
    let grads: Vec<_> = LENS.iter().map(|&len| wave(len, 3)).collect();
    let chunks: Vec<&[f32]> = grads.iter().flat_map(|grad| grad.chunks(CHUNK)).collect();
    let want = on_threads(1, || sums_of_squares(Isa::Portable, &chunks));
    for (got, chunk) in want.iter().zip(&chunks) {
        let exact: f64 = chunk.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
        assert!((got - exact).abs() <= 1e-12 * exact, "{got} against {exact}");
    }
    for isa in Isa::available() {
        for threads in [1, 2, 3, 5] {
            let got = on_threads(threads, || sums_of_squares(isa, &chunks));
            assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{threads} threads, {isa}");
            assert_eq!(got.len(), want.len());
        }
    }
    assert!(sums_of_squares(Isa::Portable, &[]).is_empty());
    let sums = sums_of_squares(Isa::Portable, &[&[1.0, f32::NAN], &[2.0]]);
    assert!(sums[0].is_nan() && sums[1] == 4.0, "a sum is of its own chunk alone: {sums:?}");
}

#[test]
fn lengths_that_differ_are_named() {
    let (mut p, mut m, mut v) = ([1.0; 2], [0.0; 2], [0.0; 3]);
    let mut parameters = [Parameter {
        settings: settings(0, 1),
        values: &mut p,
        exp_avg: &mut m,
        exp_avg_sq: &mut v,
        grad: &[1.0; 2],
        rounded: None,
    }];
    let message = update(Isa::Portable, &mut parameters).unwrap_err().to_string();
    assert!(message.contains("parameter 0") && message.contains("[2, 3, 2]"), "{message}");
    assert_eq!(p, [1.0; 2]);
}

/// The copy is of the values after the update, each rounded; one of another length is refused before anything changes.
#[test]
fn copies_are_the_new_values_rounded() {
    let len = LENS[LENS.len() - 1];
    for isa in Isa::available() {
        let (mut p, mut m, mut v, g) = (wave(len, 1), vec![0.0; len], vec![0.0; len], wave(len, 5));
        let mut rounded = vec![7; len];
        let mut run = |p: &mut [f32], rounded: &mut [u16]| {
            let (settings, rounded) = (settings(0, 1), Some(rounded));
            update(
                isa,
                &mut [Parameter { settings, values: p, exp_avg: &mut m, exp_avg_sq: &mut v, grad: &g, rounded }],
            )
        };
        let before = p.clone();
        assert!(run(&mut p, &mut rounded[1..]).unwrap_err().to_string().contains("copy"));
        assert_eq!(p, before);
        run(&mut p, &mut rounded).unwrap();
        let want: Vec<u16> = p.iter().map(|v| (crate::gemm::bf16_round(*v).to_bits() >> 16) as u16).collect();
        assert!(p != before && rounded == want, "{isa}");
    }
}
