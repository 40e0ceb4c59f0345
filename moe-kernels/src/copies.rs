//! [`WeightCopies`]: parameters rounded to bf16 once a step, by the optimizer while it has their values at hand, instead of in
//! every product that reads them.
//!
//! A copy is used on the thread that asked for it ([`with_copies`]), by operations on the very tensor it was made of: a
//! variable's, or the detached one of a parameter that is not trained. Whoever changes its values by other means must refresh it.

use crate::gemm::bf16_round;
use crate::parallel::{self, SharedMut};
use crate::select::vectorize;
use crate::{Error, Isa, Precision, Result, select};
use candle_core::{Tensor, TensorId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Bits of bf16 values, row-major.
#[derive(Debug, Default)]
pub struct RoundedCopy(RwLock<Vec<u16>>);

impl RoundedCopy {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, Vec<u16>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bits, to be written with the values they are of.
    pub fn write(&self) -> RwLockWriteGuard<'_, Vec<u16>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Copies of some of a run's parameters: of those that products asked for.
#[derive(Debug, Default)]
pub struct WeightCopies {
    by_id: HashMap<TensorId, OnceLock<Arc<RoundedCopy>>>,
}

/// Elements rounded per task.
const TASK: usize = 1 << 14;

impl WeightCopies {
    /// For these parameters, each the very tensor that products read; none is copied yet.
    pub fn new<'a>(params: impl IntoIterator<Item = &'a Tensor>) -> Arc<Self> {
        Arc::new(Self { by_id: params.into_iter().map(|param| (param.id(), OnceLock::new())).collect() })
    }

    /// The copy of a parameter, if a product has asked for it.
    pub fn get(&self, param: &Tensor) -> Option<&RoundedCopy> {
        self.by_id.get(&param.id())?.get().map(|copy| &**copy)
    }

    /// Size in memory of those there are.
    pub fn bytes(&self) -> usize {
        let copies = self.by_id.values().filter_map(OnceLock::get);
        copies.map(|copy| size_of_val(copy.read().as_slice())).sum()
    }

    /// Rounds the values of every copied parameter anew.
    ///
    /// # Errors
    /// [`Error::Argument`] for a parameter that is not f32 on the CPU.
    pub fn refresh<'a>(&self, params: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
        for param in params {
            if let Some(copy) = self.get(param) {
                round_into(param, &mut copy.write())?;
            }
        }
        Ok(())
    }

    fn of(&self, tensor: &Tensor) -> Option<Arc<RoundedCopy>> {
        let slot = self.by_id.get(&tensor.id())?;
        if let Some(copy) = slot.get() {
            return Some(Arc::clone(copy));
        }
        let copy = RoundedCopy::default();
        round_into(tensor, &mut copy.write()).ok()?;
        Some(Arc::clone(slot.get_or_init(|| Arc::new(copy))))
    }
}

fn round_into(tensor: &Tensor, to: &mut Vec<u16>) -> Result<()> {
    to.resize(tensor.elem_count(), 0);
    crate::custom::with_inputs("a copy in bf16", &[tensor], |inputs| {
        let (values, isa) = (inputs[0].values, select::current());
        let shared = SharedMut::new(to.as_mut_slice());
        parallel::for_each_if(values.len(), TASK, values.len().div_ceil(TASK), |task| {
            let range = task * TASK..((task + 1) * TASK).min(values.len());
            // SAFETY: tasks have elements of their own.
            let to = unsafe { shared.slice(range.start, range.len()) };
            vectorize!(isa, (values: &[f32] = &values[range], to: &mut [u16]) { round(values, to) });
        });
    })
}

/// Rounds values to bf16, to nearest even.
#[inline(always)]
pub(crate) fn round(values: &[f32], to: &mut [u16]) {
    to.iter_mut().zip(values).for_each(|(to, &value)| *to = (bf16_round(value).to_bits() >> 16) as u16);
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<WeightCopies>>> = const { RefCell::new(None) };
}

/// Runs `body`, whose products in bf16 on this thread read the copies of weights that have any.
pub fn with_copies<R>(copies: &Arc<WeightCopies>, body: impl FnOnce() -> R) -> R {
    struct Restore(Option<Arc<WeightCopies>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _restore = Restore(CURRENT.replace(Some(Arc::clone(copies))));
    body()
}

/// The copy of a weight for products of `precision` on `isa`. Without vectors that pack it, it would be slower than the values.
pub(crate) fn of(weight: &Tensor, precision: Precision, isa: Isa) -> Option<Arc<RoundedCopy>> {
    if precision != Precision::Bf16 || isa < Isa::Avx512 {
        return None;
    }
    CURRENT.with_borrow(|current| current.as_ref()?.of(weight))
}

/// Refuses a copy of another size than its parameter.
pub(crate) fn check_len(copy: &[u16], values: usize) -> Result<()> {
    if copy.len() == values {
        return Ok(());
    }
    Err(Error::Argument(format!("a parameter of {values} values has a copy of {}", copy.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grouped_linear::grouped_linear;
    use candle_core::DType;
    use moe_core::testing::{random, random_var, values};

    /// Products over copies have the bits of products over values; a copy that was not brought up to date is seen, so the test
    /// can fail.
    #[test]
    fn products_read_copies_and_have_the_same_bits() {
        let x = random_var(1, &[70, 40], 1.0, DType::F32);
        let (w, other) = (random_var(2, &[3, 66, 40], 1.0, DType::F32), random_var(3, &[3, 66, 40], 1.0, DType::F32));
        let run = |precision: Precision| {
            let y = grouped_linear(&x, &w, None, &[0, 33, 33, 70], precision).unwrap();
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            [values(&y), values(grads.get(&x).unwrap()), values(grads.get(&w).unwrap())]
        };
        let copies = WeightCopies::new([w.as_tensor()]);
        let want = run(Precision::Bf16);
        assert!(copies.get(&w).is_none(), "nobody has asked");
        assert_eq!(with_copies(&copies, || run(Precision::Bf16)), want);
        assert_eq!(with_copies(&copies, || run(Precision::F32)), run(Precision::F32), "f32 reads the values");
        if select::current() < Isa::Avx512 {
            assert!(copies.get(&w).is_none());
            return;
        }
        assert_eq!(copies.bytes(), 3 * 66 * 40 * 2);
        w.set(&random(9, &[3, 66, 40], 1.0, DType::F32)).unwrap();
        assert_eq!(with_copies(&copies, || run(Precision::Bf16))[0], want[0], "the copy is of the old values");
        copies.refresh([w.as_tensor(), other.as_tensor()]).unwrap();
        assert_eq!(with_copies(&copies, || run(Precision::Bf16)), run(Precision::Bf16));
        assert!(copies.get(&other).is_none());
    }
}
