//! Communication as operations with gradients, recorded on the tape or candle's: the one place of this crate that knows how.

use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Storage, Tensor, WithDType};
use moe_core::tape::{self, Edge};
use std::sync::{Mutex, PoisonError};

/// Runs `$body` with `$T` as the element type of a tensor that can be sent.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            candle_core::DType::BF16 => {
                type $T = half::bf16;
                $body
            }
            other => Err($crate::Error::Argument(format!("tensors of f32, f64 and bf16 are exchanged, got {other:?}"))),
        }
    };
}
pub(crate) use by_dtype;

/// The gradient of the input from the gradient of the output.
type Back = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

struct Exchanged {
    name: &'static str,
    output: Mutex<Option<(CpuStorage, Shape)>>,
    back: Back,
}

/// What has arrived in return for `input`, as a tensor of the graph: its gradient goes back by `back`.
pub(crate) fn exchanged<T: WithDType>(
    name: &'static str,
    input: &Tensor,
    (values, shape): (Vec<T>, impl Into<Shape>),
    back: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let shape = shape.into();
    if !tape::tracks(&[input]) {
        return Ok(Tensor::from_vec(values, shape, input.device())?);
    }
    if tape::is_recording() {
        let (out, edge) = (tape::output(values, shape.dims(), input.device())?, Edge::of(input));
        tape::record(&[&out], move |gradients, into| {
            let Some(Some(gradient)) = gradients.into_iter().next() else { return Ok(()) };
            into.give(&edge, back(&gradient.contiguous()?)?)
        });
        return Ok(out);
    }
    let output = Mutex::new(Some((T::to_cpu_storage_owned(values), shape)));
    Ok(input.apply_op1(Exchanged { name, output, back: Box::new(back) })?)
}

impl CustomOp1 for Exchanged {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        output.ok_or_else(|| candle_core::Error::msg(format!("{} was applied twice", self.name)))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some((self.back)(&grad.contiguous()?)?))
    }
}

/// Calls `body` with the values of a tensor on the CPU, row by row.
pub(crate) fn with_values<T: WithDType, R>(tensor: &Tensor, body: impl FnOnce(&[T]) -> Result<R>) -> Result<R> {
    let tensor = tensor.contiguous()?;
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        // A part of a tensor without elements may begin past its end.
        (Storage::Cpu(cpu), Some((start, end))) if start < end => body(&cpu.as_slice::<T>()?[start..end]),
        (Storage::Cpu(_), Some(_)) => body(&[]),
        _ => Err(Error::Argument(format!("tensors on the CPU are exchanged, got one on {:?}", tensor.device()))),
    }
}
