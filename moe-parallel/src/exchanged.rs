//! Communication as candle operations: the one place of this crate that knows candle's trait for custom operations.

use crate::Result;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Storage, Tensor};
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
    output: Mutex<Option<Tensor>>,
    back: Back,
}

/// What has arrived in return for `input`, as a tensor of the graph: its gradient goes back by `back`.
pub(crate) fn exchanged(
    name: &'static str,
    input: &Tensor,
    output: Tensor,
    back: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !input.track_op() {
        return Ok(output);
    }
    let op = Exchanged { name, output: Mutex::new(Some(output)), back: Box::new(back) };
    Ok(input.apply_op1(op)?)
}

impl CustomOp1 for Exchanged {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let output = self.output.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(output) = output else { candle_core::bail!("{} was applied twice", self.name) };
        let output = output.contiguous()?;
        let (storage, layout) = output.storage_and_layout();
        match &*storage {
            Storage::Cpu(cpu) if layout.start_offset() == 0 => Ok((cpu.clone(), output.shape().clone())),
            _ => candle_core::bail!("{} exchanges tensors on the CPU", self.name),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some((self.back)(&grad.contiguous()?)?))
    }
}

/// The values of a tensor, row by row.
pub(crate) fn values<T: candle_core::WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    Ok(tensor.flatten_all()?.to_vec1()?)
}
