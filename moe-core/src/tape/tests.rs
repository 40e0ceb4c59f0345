//! The tape against candle's own graph, with an operation that both know.

use super::*;
use crate::testing::{assert_close, random, random_var, values};
use candle_core::DType;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// `x * x`, recorded while a tape is active.
fn squared(x: &Tensor) -> Result<Tensor> {
    if !is_active() {
        return Ok(x.sqr()?);
    }
    let squares: Vec<f32> = x.detach().sqr()?.flatten_all()?.to_vec1()?;
    if !tracks(&[x]) {
        return Ok(Tensor::from_vec(squares, x.shape(), x.device())?);
    }
    let out = output(squares, x.dims(), x.device())?;
    let (edge, kept) = (Edge::of(x), x.detach());
    record(&[&out], move |gradients, into| {
        let gradient = gradients.into_iter().flatten().next().expect("a gradient");
        into.give(&edge, ((gradient * kept)? * 2.0)?)
    });
    Ok(out)
}

/// A function in which records and candle's operations alternate, one value is used three times, and a parameter twice.
fn mixed(x: &Tensor, w: &Tensor, b: &Tensor) -> Result<Tensor> {
    let y = squared(&x.matmul(w)?)?;
    let z = squared(&(y.broadcast_add(b)? * 0.5)?)?;
    let gate = y.sum_keepdim(1)?.tanh()?;
    Ok((z.broadcast_mul(&gate)? + squared(&y)?)?.matmul(&w.t()?)?.mean_all()?)
}

fn registered(params: &[(&str, &Var)]) -> GradBuffers {
    GradBuffers::new(params.iter().copied()).unwrap()
}

/// The sum over `times` passes of the gradients of `loss`.
fn taped(buffers: &mut GradBuffers, times: usize, loss: impl Fn() -> Result<Tensor>) -> Vec<Tensor> {
    buffers.begin();
    for _ in 0..times {
        let (loss, tape) = Tape::record(&loss);
        let mut gradients = buffers.gradients();
        tape.backward_of(&loss.unwrap(), &mut gradients).unwrap();
        gradients.finish().unwrap();
    }
    buffers.finish();
    buffers.all().into_iter().map(|g| Tensor::from_slice(g, g.len(), &Device::Cpu).unwrap()).collect()
}

#[test]
fn records_and_segments_give_the_gradients_of_candles_graph() {
    let x = random_var(1, &[5, 4], 0.7, DType::F32);
    let (w, b) = (random_var(2, &[4, 3], 0.7, DType::F32), random_var(3, &[3], 0.7, DType::F32));
    let want = mixed(&x, &w, &b).unwrap().backward().unwrap();
    let mut buffers = registered(&[("x", &x), ("b", &b), ("w", &w)]);
    // Twice, so that what the first sum left is replaced.
    for times in [1, 3] {
        let got = taped(&mut buffers, times, || mixed(&x, &w, &b));
        for ((got, var), name) in got.iter().zip([&x, &b, &w]).zip(["x", "b", "w"]) {
            let want = (want.get(var).unwrap().flatten_all().unwrap() * times as f64).unwrap();
            assert_close(got, &want, 1e-6, name);
        }
    }
    assert!(!is_active());
}

#[test]
fn what_is_not_registered_is_handed_over_and_what_takes_no_part_is_zero() {
    let (x, idle) = (random_var(1, &[2, 3], 1.0, DType::F32), random_var(2, &[4], 1.0, DType::F32));
    let mut buffers = registered(&[("idle", &idle)]);
    buffers.finish();
    buffers.of_mut(0).fill(7.0);
    buffers.begin();
    let (loss, tape) = Tape::record(|| squared(&x).unwrap().sum_all().unwrap());
    let mut gradients = buffers.gradients();
    tape.backward_of(&loss, &mut gradients).unwrap();
    let of_x = gradients.take_leaf(x.id()).unwrap();
    assert_eq!(values(&of_x), values(&(x.as_tensor() * 2.0).unwrap()));
    buffers.finish();
    assert_eq!(buffers.of(0), [0.0; 4]);
}

/// The gradient of a frozen parameter is not asked for.
#[test]
fn constants_get_nothing() {
    let (x, frozen) = (random_var(1, &[3, 3], 1.0, DType::F32), random(2, &[3, 3], 1.0, DType::F32));
    assert!(!Edge::of(&frozen).is_wanted() && Edge::of(&x).is_wanted());
    let mut buffers = registered(&[("x", &x)]);
    let run = || squared(&x.matmul(&squared(&frozen)?)?)?.sum_all().map_err(Into::into);
    let (_, tape) = Tape::record(run);
    assert_eq!(tape.records.len(), 1, "squares of a constant are no record");
    let got = taped(&mut buffers, 1, run);
    let want = run().unwrap().backward().unwrap();
    assert_close(&got[0].reshape((3, 3)).unwrap(), want.get(&x).unwrap(), 1e-6, "x");
}

#[test]
fn recomputed_parts_run_twice_and_give_the_same_bits() {
    let x = random_var(1, &[5, 4], 0.7, DType::F32);
    let (w, b) = (random_var(2, &[4, 4], 0.7, DType::F32), random_var(3, &[4], 0.7, DType::F32));
    let runs = Rc::new(Cell::new(0));
    let block = |x: &Tensor| -> Result<[Tensor; 2]> {
        let y = squared(&x.matmul(&w)?.broadcast_add(&b)?)?;
        Ok([cut(&(x + &y)?)?, cut(&y.mean_all()?)?])
    };
    let plain = || -> Result<Tensor> {
        let [y, first] = block(&x)?;
        let [y, second] = block(&y)?;
        Ok(((y.sqr()?.mean_all()? + first)? + second)?)
    };
    let again = || -> Result<Tensor> {
        let step = |x: &Tensor| -> Result<Vec<Tensor>> {
            let (w, b, runs) = (w.clone(), b.clone(), Rc::clone(&runs));
            let run = move |inputs: &[Tensor]| {
                runs.set(runs.get() + 1);
                let y = squared(&inputs[0].matmul(&w)?.broadcast_add(&b)?)?;
                Ok((vec![(&inputs[0] + &y)?, y.mean_all()?], ()))
            };
            Ok(recomputed(std::slice::from_ref(x), run)?.0)
        };
        let first = step(&x)?;
        let second = step(&first[0])?;
        Ok(((second[0].sqr()?.mean_all()? + &first[1])? + &second[1])?)
    };
    let mut buffers = registered(&[("x", &x), ("w", &w), ("b", &b)]);
    let bits = |all: Vec<Tensor>| all.iter().map(values).collect::<Vec<_>>();
    let want = bits(taped(&mut buffers, 2, plain));
    assert_eq!(bits(taped(&mut buffers, 2, again)), want);
    assert_eq!(runs.get(), 8, "two blocks, forward and backward, two passes");
    // Without a tape it is an ordinary function.
    let grads = again().unwrap().backward().unwrap();
    assert_close(
        &grads.get(&w).unwrap().flatten_all().unwrap(),
        &Tensor::new(want[1].as_slice(), &Device::Cpu).unwrap().to_dtype(DType::F32).unwrap().affine(0.5, 0.0).unwrap(),
        1e-6,
        "w",
    );
    assert_eq!(runs.get(), 10);
}

#[test]
fn bad_gradients_and_registrations_are_refused() {
    let x = random_var(1, &[2, 3], 1.0, DType::F32);
    let twice = [("a", &x), ("b", &x)];
    assert!(GradBuffers::new(twice).unwrap_err().to_string().contains("b is registered twice"));
    let mut buffers = registered(&[("x", &x)]);
    let wrong = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
    let error = buffers.gradients().give(&Edge::of(&x), wrong).unwrap_err().to_string();
    assert!(error.contains("[3, 2]") && error.contains("[2, 3]"), "{error}");
}

/// A panic while recording leaves the thread as it was.
#[test]
fn a_panic_ends_the_recording() {
    let panicked = std::panic::catch_unwind(|| Tape::record(|| panic!("in between")));
    assert!(panicked.is_err() && !is_active());
    assert!(std::panic::catch_unwind(|| paused(|| panic!("in between"))).is_err() && !is_active());
}

/// A parameter that two operations read: each pass is finished before it is added to the one before it, though its terms arrive
/// one by one. Adding them one by one has other bits, so the test can fail.
#[test]
fn passes_are_finished_before_they_are_added() {
    let w = random_var(1, &[64], 1.0, DType::F32);
    let factors = |seed| random(seed, &[64], 1.0, DType::F32);
    let loss = |pass: u64| -> Result<Tensor> {
        let first = (squared(&w)? * factors(10 + pass))?;
        let second = (squared(&w)? * factors(20 + pass))?;
        Ok((first + second)?.sum_all()?)
    };
    let taped = |passes: &[u64]| {
        let mut buffers = registered(&[("w", &w)]);
        buffers.begin();
        for &pass in passes {
            let (loss, tape) = Tape::record(|| loss(pass));
            tape.backward_of(&loss.unwrap(), &mut buffers.gradients()).unwrap();
        }
        buffers.finish();
        buffers.of(0).to_vec()
    };
    let (one, other, both) = (taped(&[1]), taped(&[2]), taped(&[1, 2]));
    let sums: Vec<f32> = one.iter().zip(&other).map(|(a, b)| a + b).collect();
    assert_eq!(both, sums);
    let term = |seed| values(&((factors(seed) * w.as_tensor()).unwrap() * 2.0).unwrap());
    // The later operation's term arrives first.
    let one_by_one = one.iter().zip(term(22)).zip(term(12)).map(|((sum, b), a)| sum + b as f32 + a as f32);
    assert_ne!(one_by_one.collect::<Vec<f32>>(), sums);
}

/// `x * w`, whose backward pass is logged.
fn logged(x: &Tensor, w: &Var, log: &Rc<RefCell<Vec<String>>>, name: &'static str) -> Result<Tensor> {
    let products = values(&(x.detach() * w.detach())?).into_iter().map(|v| v as f32).collect();
    let out = output(products, x.dims(), x.device())?;
    let (edges, kept, log) = ([Edge::of(x), Edge::of(w)], [x.detach(), w.detach()], Rc::clone(log));
    record(&[&out], move |gradients, into| {
        let gradient = gradients.into_iter().flatten().next().expect("a gradient");
        log.borrow_mut().push(format!("back {name}"));
        into.give(&edges[1], (&gradient * &kept[0])?)?;
        into.give(&edges[0], (gradient * &kept[1])?)
    });
    Ok(out)
}

/// From the second pass on a group is told of as soon as its last gradient has arrived, in the order of the groups, with the sum
/// over all passes; a gradient that comes later is an error.
#[test]
fn complete_groups_are_told_of_while_the_pass_goes_on() {
    let vars = [1, 2, 3].map(|seed| random_var(seed, &[8], 1.0, DType::F32));
    let named = ["a", "b", "c"].into_iter().zip(&vars);
    let mut buffers = GradBuffers::new(named).unwrap();
    let log = Rc::new(RefCell::new(Vec::new()));
    let input = random(9, &[8], 1.0, DType::F32);
    let loss = |twice: bool| -> Result<Tensor> {
        let mut x = logged(&input, &vars[0], &log, "a")?;
        if twice {
            x = logged(&x, &vars[2], &log, "c again")?;
        }
        let x = logged(&x, &vars[1], &log, "b")?;
        Ok(logged(&x, &vars[2], &log, "c")?.sum_all()?)
    };
    let groups = [vec![2], vec![1, 0]];
    let mut told = Vec::new();
    let mut pass = |buffers: &mut GradBuffers, after: After, twice: bool| -> Result<Vec<String>> {
        log.borrow_mut().clear();
        told.clear();
        let (loss, tape) = Tape::record(|| loss(twice));
        let mut complete = Told(|group: usize, complete: &mut CompleteGrads<'_>| {
            log.borrow_mut().push(format!("group {group}"));
            let sums = complete.sums(group)?;
            told.push(sums.iter().map(|sum| sum.to_vec()).collect::<Vec<_>>());
            // What was told of is there to be changed, and nothing else.
            let (first, len) = (sums[0].to_vec(), sums.len());
            complete.sum_mut(group, 0)?.copy_from_slice(&first);
            let refused = [complete.sum_mut(group + 1, 0).is_err(), complete.sum_mut(group, len).is_err()];
            assert_eq!((refused, complete.sums(group + 1).is_err()), ([true; 2], true));
            Ok(after)
        });
        let mut into = buffers.watched(&groups, &mut complete);
        tape.backward_of(&loss?, &mut into)?;
        into.finish()?;
        let kept: Vec<Vec<f32>> = buffers.all().into_iter().map(<[f32]>::to_vec).collect();
        match after {
            After::Keep => assert_eq!(told, [vec![kept[2].clone()], vec![kept[1].clone(), kept[0].clone()]]),
            After::Release => assert!(kept.iter().all(Vec::is_empty) && told.concat().iter().all(|sum| sum.len() == 8)),
        }
        Ok(log.borrow().clone())
    };
    let late = ["back c", "back b", "back a", "group 0", "group 1"];
    let early = ["back c", "group 0", "back b", "back a", "group 1"];
    buffers.begin();
    assert_eq!(pass(&mut buffers, After::Keep, false).unwrap(), late);
    let first = buffers.of(0).to_vec();
    assert_eq!(pass(&mut buffers, After::Keep, false).unwrap(), early);
    assert!(buffers.of(0).iter().zip(&first).all(|(both, one)| *both == one + one), "the sum of two passes");
    buffers.begin();
    assert_eq!(pass(&mut buffers, After::Release, false).unwrap(), early);
    assert_eq!(pass(&mut buffers, After::Keep, false).unwrap(), early);
    assert_eq!(buffers.of(0), first, "what was released begins anew");
    let error = pass(&mut buffers, After::Keep, true).unwrap_err().to_string();
    assert!(error.contains("parameter 2") && error.contains("after it was complete"), "{error}");
    // Without any pass everything is zero.
    let mut zeros = GradBuffers::new([("a", &vars[0])]).unwrap();
    zeros.begin();
    let mut complete = Told(|group: usize, complete: &mut CompleteGrads<'_>| {
        assert_eq!(complete.sums(group)?, [[0.0; 8]]);
        Ok(After::Keep)
    });
    zeros.watched(&[vec![0]], &mut complete).finish().unwrap();
}

/// A closure as a watcher.
struct Told<F>(F);

impl<F: FnMut(usize, &mut CompleteGrads<'_>) -> Result<After>> Watcher for Told<F> {
    fn complete(&mut self, group: usize, complete: &mut CompleteGrads<'_>) -> Result<After> {
        self.0(group, complete)
    }
}
