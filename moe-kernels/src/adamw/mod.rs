//! The AdamW update in one pass over memory, and the sums of squares behind the global gradient norm, for all parameters
//! of a model in one queue.
//!
//! Sums run over fixed chunks in a fixed order and no multiply and add are fused: the bits are the same for any number
//! of threads, on any instruction set. Keeps no state and decides nothing; the optimizer does.

#[cfg(test)]
mod tests;

use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Result, copies, parallel};

/// Elements per task. Sums of squares are of such chunks; who adds them up decides in which order.
pub const CHUNK: usize = 1 << 14;
/// Partial sums kept side by side inside a chunk; fixed, so that the order of additions is.
const LANES: usize = 16;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 14;

/// What one update of one parameter depends on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Learning rate.
    pub lr: f64,
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Updates including this one: the exponent of the bias correction.
    pub updates: u64,
    /// Factor on the gradient: averaging and clipping.
    pub grad_scale: f64,
}

/// The scalars of one update, rounded to f32 once.
#[derive(Debug, Clone, Copy)]
struct Factors {
    scale: f32,
    beta1: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    /// `1 - lr * weight_decay`.
    keep: f32,
    /// `lr / (1 - beta1^t)`.
    step_size: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root_correction: f32,
    eps: f32,
}

impl Factors {
    fn new(s: &Settings) -> Self {
        let t = s.updates as f64;
        Self {
            scale: s.grad_scale as f32,
            beta1: s.beta1 as f32,
            one_minus_beta1: (1.0 - s.beta1) as f32,
            beta2: s.beta2 as f32,
            one_minus_beta2: (1.0 - s.beta2) as f32,
            keep: (1.0 - s.lr * s.weight_decay) as f32,
            step_size: (s.lr / (1.0 - s.beta1.powf(t))) as f32,
            root_correction: (1.0 / (1.0 - s.beta2.powf(t)).sqrt()) as f32,
            eps: s.eps as f32,
        }
    }
}

/// One parameter with its state and gradient, all of one length.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// How it is updated.
    pub settings: Settings,
    /// The values.
    pub values: &'a mut [f32],
    /// First moment.
    pub exp_avg: &'a mut [f32],
    /// Second moment.
    pub exp_avg_sq: &'a mut [f32],
    /// Gradient before `grad_scale`.
    pub grad: &'a [f32],
    /// Where the new values are also wanted, rounded to bf16: bits, of the same length.
    pub rounded: Option<&'a mut [u16]>,
}

/// Updates every parameter: `p -= lr * (m_hat / (sqrt(v_hat) + eps) + weight_decay * p)`.
///
/// # Errors
/// [`Error::Argument`] if the slices of a parameter differ in length; nothing is updated then.
///
/// # Panics
/// If this machine cannot run `isa`.
///
/// # Source
/// Loshchilov and Hutter 2019, Algorithm 2, in PyTorch's form (`torch.optim.AdamW`): the decay is applied first, with
/// the learning rate as its factor.
pub fn update(isa: Isa, parameters: &mut [Parameter<'_>]) -> Result<()> {
    isa.require();
    for (index, p) in parameters.iter().enumerate() {
        let lens = [p.exp_avg.len(), p.exp_avg_sq.len(), p.grad.len()];
        if lens != [p.values.len(); 3] {
            return Err(Error::Argument(format!(
                "parameter {index} of {} values needs moments and a gradient of that length, got {lens:?}",
                p.values.len()
            )));
        }
        if let Some(rounded) = &p.rounded {
            copies::check_len(rounded, p.values.len())?;
        }
    }
    let tasks = chunks(parameters.iter().map(|p| p.values.len()));
    let work: usize = parameters.iter().map(|p| p.values.len()).sum();
    let shared: Vec<_> = parameters
        .iter_mut()
        .map(|p| {
            let state = [&mut *p.values, &mut *p.exp_avg, &mut *p.exp_avg_sq].map(SharedMut::new);
            (Factors::new(&p.settings), state, p.grad, p.rounded.as_deref_mut().map(SharedMut::new))
        })
        .collect();
    parallel::for_each_if(work, LEAST_WORK, tasks.len(), |task| {
        let (index, start) = tasks[task];
        let (factors, state, grad, rounded) = &shared[index];
        let len = CHUNK.min(grad.len() - start);
        // SAFETY: each chunk belongs to one task, and the slices are borrowed for the whole call.
        let [p, m, v] = state.map(|s| unsafe { s.slice(start, len) });
        let g = &grad[start..start + len];
        vectorize!(isa, (factors: &Factors, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
            update_chunk(factors, p, m, v, g);
        });
        if let Some(rounded) = rounded {
            // SAFETY: as above.
            let rounded = unsafe { rounded.slice(start, len) };
            vectorize!(isa, (p: &[f32], rounded: &mut [u16]) { copies::round(p, rounded) });
        }
    });
    Ok(())
}

/// Number and first element of each chunk of vectors of these lengths.
fn chunks(lens: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    lens.enumerate().flat_map(|(index, len)| (0..len).step_by(CHUNK).map(move |start| (index, start))).collect()
}

#[inline(always)]
fn update_chunk(f: &Factors, p: &mut [f32], m: &mut [f32], v: &mut [f32], g: &[f32]) {
    for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(g) {
        let g = *g * f.scale;
        *m = f.beta1 * *m + f.one_minus_beta1 * g;
        *v = f.beta2 * *v + f.one_minus_beta2 * (g * g);
        *p = f.keep * *p - f.step_size * *m / (v.sqrt() * f.root_correction + f.eps);
    }
}

/// Sum of squares of each chunk in f64, all from one queue. A chunk's sum depends on nothing but its values; chunks are of
/// [`CHUNK`] elements at most if threads are to share the work.
///
/// # Panics
/// If this machine cannot run `isa`.
pub fn sums_of_squares(isa: Isa, chunks: &[&[f32]]) -> Vec<f64> {
    isa.require();
    let work: usize = chunks.iter().map(|chunk| chunk.len()).sum();
    let mut sums = vec![0.0; chunks.len()];
    let shared = SharedMut::new(&mut sums);
    parallel::for_each_if(work, LEAST_WORK, chunks.len(), |task| {
        // SAFETY: each sum belongs to one task.
        let sum = unsafe { shared.slice(task, 1) };
        sum[0] = vectorize!(isa, (part: &[f32] = chunks[task]) -> f64 { chunk_sum_of_squares(part) });
    });
    sums
}

#[inline(always)]
fn chunk_sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let (whole, rest) = values.as_chunks::<LANES>();
    for block in whole {
        for (lane, &x) in lanes.iter_mut().zip(block) {
            *lane += f64::from(x) * f64::from(x);
        }
    }
    let tail: f64 = rest.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    lanes.iter().sum::<f64>() + tail
}
