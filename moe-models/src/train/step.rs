//! Losses and gradients of one global batch: micro-batches on several threads, summed in micro-batch order.
//!
//! Many of candle's CPU operations use one thread, so whole micro-batches side by side are the data parallelism of one
//! machine; the kernels of each then stay on its thread. The order of summation does not depend on which thread finishes
//! first: the result is bit-identical for any number of workers. Knows no optimizer.

use super::model::{LayerLoad, LossOutput, Pass, TokenBatch, TrainModel};
use super::non_finite::NonFiniteLoss;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, Storage, Tensor, Var};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

/// Sums over the micro-batches of one global batch.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchSums {
    /// Micro-batches summed.
    pub micro_batches: usize,
    /// Sum of the gradients, flat, one per parameter; divide by `micro_batches` for the mean.
    pub grads: Vec<Vec<f32>>,
    /// Mean total loss (language model and scaled auxiliary parts), nats per token.
    pub loss: f64,
    /// Mean language-model loss, nats per token.
    pub lm_loss: f64,
    /// Mean auxiliary loss, as the model reports it.
    pub aux_loss: f64,
    /// Loads of each MoE layer, summed over the micro-batches.
    pub layers: Vec<LayerLoad>,
    /// The first loss that is not finite, if any.
    pub non_finite: Option<NonFiniteLoss>,
}

/// Runs `work(i)` for `i` in `0..count` on `workers` threads and hands the results to `consume` in the order of `i`.
/// At most `workers` results wait at a time. The first error (by `i` among those reached) stops the rest: each thread
/// ends when the work it is in returns.
///
/// A panic counts as an error: a thread that just ended would leave the others waiting for its turn for ever, and a run
/// that ends with an error keeps the checkpoints it has.
///
/// # Errors
/// Whatever `work` or `consume` returned; [`Error::Panic`] with the text of a panic in one of them.
pub fn ordered_parallel<T: Send>(
    count: usize,
    workers: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
    consume: impl FnMut(T) -> Result<()> + Send,
) -> Result<()> {
    struct Turn<C> {
        next: usize,
        error: Option<Error>,
        consume: C,
    }
    let turn = Mutex::new(Turn { next: 0, error: None, consume });
    let (changed, claimed) = (Condvar::new(), AtomicUsize::new(0));
    let run = || {
        loop {
            let i = claimed.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            let result = no_panic(i, || work(i));
            let mut turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
            while turn.next != i && turn.error.is_none() {
                turn = changed.wait(turn).unwrap_or_else(PoisonError::into_inner);
            }
            if turn.error.is_some() {
                return;
            }
            turn.error = result.and_then(|value| no_panic(i, || (turn.consume)(value))).err();
            turn.next += 1;
            changed.notify_all();
            if turn.error.is_some() {
                return;
            }
        }
    };
    if workers.min(count) <= 1 {
        run();
    } else {
        run_on_threads(workers.min(count), &run)?;
    }
    match turn.into_inner().unwrap_or_else(PoisonError::into_inner).error {
        Some(e) => Err(e),
        None => Ok(()),
    }
}

/// Turns a panic in the work on micro-batch `i` into an error.
///
/// What the panic left half done is seen by nobody: the error ends the call that owns the results.
fn no_panic<T>(i: usize, body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a text");
        Err(Error::Panic { micro_batch: i, text: text.to_owned() })
    })
}

/// Stack of a worker: candle walks the graph by recursion, 20,000 operations fit in far less.
const WORKER_STACK_BYTES: usize = 64 << 20;

fn run_on_threads(workers: usize, run: &(impl Fn() + Sync)) -> Result<()> {
    std::thread::scope(|scope| {
        for index in 0..workers {
            std::thread::Builder::new()
                .name(format!("train-{index}"))
                .stack_size(WORKER_STACK_BYTES)
                .spawn_scoped(scope, || moe_kernels::parallel::serially(run))
                .map_err(|e| {
                    Error::Argument(format!("cannot start worker {index} of {workers}: {e}; lower workers"))
                })?;
        }
        Ok(())
    })
}

/// Loss and gradient sums of `batches`; `seeds[i]` drives the random draws of micro-batch `i`.
///
/// # Errors
/// [`Error::Argument`] if the lengths differ or there is no batch; otherwise what the model returns.
pub fn accumulate<M: TrainModel>(
    model: &M,
    batches: &[TokenBatch],
    seeds: &[u64],
    workers: usize,
) -> Result<BatchSums> {
    if batches.is_empty() || batches.len() != seeds.len() {
        let (have, given) = (batches.len(), seeds.len());
        return Err(Error::Argument(format!(
            "expected at least one micro-batch and a seed for each, got {have} and {given}"
        )));
    }
    let params = model.params();
    let mut sums = BatchSums {
        micro_batches: batches.len(),
        grads: params.iter().map(|(_, var)| vec![0.0; var.elem_count()]).collect(),
        loss: 0.0,
        lm_loss: 0.0,
        aux_loss: 0.0,
        layers: Vec::new(),
        non_finite: None,
    };
    let work = |i: usize| {
        let output = model.loss(&batches[i], Pass::Train { seed: seeds[i] })?;
        let grads = output.loss.backward()?;
        let loss = f64::from(output.loss.to_scalar::<f32>()?);
        let LossOutput { lm_loss, aux_loss, layers, .. } = output;
        Ok((LossParts { micro_batch: i, loss, lm_loss, aux_loss, layers }, grads))
    };
    ordered_parallel(batches.len(), workers, work, |(parts, grads)| sums.add(params, parts, &grads))?;
    let count = batches.len() as f64;
    sums.loss /= count;
    sums.lm_loss /= count;
    sums.aux_loss /= count;
    Ok(sums)
}

/// A [`super::model::LossOutput`] without its graph.
struct LossParts {
    micro_batch: usize,
    loss: f64,
    lm_loss: f64,
    aux_loss: f64,
    layers: Vec<LayerLoad>,
}

impl BatchSums {
    fn add(&mut self, params: &[(String, Var)], parts: LossParts, grads: &GradStore) -> Result<()> {
        self.loss += parts.loss;
        self.lm_loss += parts.lm_loss;
        self.aux_loss += parts.aux_loss;
        add_loads(&mut self.layers, &parts.layers);
        let LossParts { micro_batch, loss, lm_loss, aux_loss, .. } = parts;
        if self.non_finite.is_none() && [loss, lm_loss, aux_loss].iter().any(|x| !x.is_finite()) {
            self.non_finite = Some(NonFiniteLoss { micro_batch, loss, lm_loss, aux_loss });
        }
        for ((_, var), sum) in params.iter().zip(&mut self.grads) {
            // No entry: the parameter took no part, as an expert without tokens. Its gradient is zero.
            if let Some(grad) = grads.get(var) {
                add_tensor(sum, grad)?;
            }
        }
        Ok(())
    }
}

/// Adds the loads of one micro-batch, layer by layer.
pub fn add_loads(sum: &mut Vec<LayerLoad>, loads: &[LayerLoad]) {
    if sum.is_empty() {
        sum.extend_from_slice(loads);
        return;
    }
    for (sum, load) in sum.iter_mut().zip(loads) {
        sum.load.add(&load.load);
    }
}

/// `sum += grad`, reading the gradient in place where it lies contiguous on the CPU.
fn add_tensor(sum: &mut [f32], grad: &Tensor) -> Result<()> {
    let (storage, layout) = grad.storage_and_layout();
    if let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        add_slice(sum, &values[start..end]);
        return Ok(());
    }
    drop(storage);
    add_slice(sum, &grad.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

fn add_slice(sum: &mut [f32], values: &[f32]) {
    debug_assert_eq!(sum.len(), values.len());
    moe_core::ops::host::dispatch(|| sum.iter_mut().zip(values).for_each(|(s, v)| *s += v));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_arrive_in_order_for_any_number_of_workers() {
        for workers in [1, 2, 3, 16] {
            let mut seen = Vec::new();
            let work = |i: usize| {
                std::thread::sleep(std::time::Duration::from_millis(((i * 7) % 5) as u64));
                Ok(i)
            };
            ordered_parallel(20, workers, work, |i| {
                seen.push(i);
                Ok(())
            })
            .unwrap();
            assert_eq!(seen, (0..20).collect::<Vec<_>>(), "{workers} workers");
        }
    }

    #[test]
    fn an_error_stops_the_rest_and_comes_out() {
        for workers in [1, 2, 4] {
            let mut seen = Vec::new();
            let work = |i: usize| if i == 5 { Err(Error::Argument("five".into())) } else { Ok(i) };
            let error = ordered_parallel(1000, workers, work, |i| {
                seen.push(i);
                Ok(())
            });
            assert_eq!(error.unwrap_err().to_string(), "five");
            assert_eq!(seen, [0, 1, 2, 3, 4]);
        }
    }

    /// Runs `body` on a thread of its own, so that a hang fails the test and not the whole run.
    fn must_end<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::spawn(move || sender.send(body()));
        receiver.recv_timeout(std::time::Duration::from_secs(60)).expect("a panicking worker must not hang the others")
    }

    #[test]
    fn a_panic_in_a_worker_ends_in_an_error_with_its_text() {
        for workers in [1, 2, 4] {
            let (error, started) = must_end(move || {
                let started = AtomicUsize::new(0);
                let work = |i: usize| {
                    started.fetch_add(1, Ordering::Relaxed);
                    assert!(i != 5, "index {i} out of bounds");
                    Ok(i)
                };
                let error = ordered_parallel(1000, workers, work, |_| Ok(())).unwrap_err();
                (error, started.into_inner())
            });
            assert!(matches!(error, Error::Panic { micro_batch: 5, .. }), "{workers}: {error:?}");
            let text = error.to_string();
            assert!(text.contains("micro-batch 5") && text.contains("index 5 out of bounds"), "{workers}: {text}");
            assert!(started <= 5 + workers, "{workers} workers went on: {started} pieces of work were begun");
        }
    }

    #[test]
    fn a_panic_of_the_consumer_ends_in_an_error_with_its_text() {
        for workers in [1, 3] {
            let (error, seen) = must_end(move || {
                let mut seen = 0;
                let consume = |i: usize| {
                    if i == 7 {
                        std::panic::panic_any("a constant text");
                    }
                    seen += 1;
                    Ok(())
                };
                let error = ordered_parallel(1000, workers, Ok, consume).unwrap_err();
                (error.to_string(), seen)
            });
            assert!(error.contains("micro-batch 7") && error.contains("a constant text"), "{workers}: {error}");
            assert_eq!(seen, 7, "{workers} workers");
        }
    }
}
