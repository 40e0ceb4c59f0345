//! From functions on slices to candle operations: the one place that knows candle's traits for custom operations.

use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Layout, Shape, Storage, Tensor};

/// The elements of one argument, contiguous.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) dims: &'a [usize],
}

impl Input<'_> {
    /// Size of the last dimension; 1 of a scalar.
    pub(crate) fn width(&self) -> usize {
        self.dims.last().copied().unwrap_or(1)
    }

    /// Elements before the last dimension.
    pub(crate) fn rows(&self) -> usize {
        self.dims[..self.dims.len().saturating_sub(1)].iter().product()
    }
}

/// An operation on slices with its gradient. Sizes are checked before it is applied.
pub(crate) trait SliceOp: Send + Sync {
    /// For error messages and profiles.
    fn name(&self) -> &'static str;

    /// Values and dimensions of the result.
    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>);

    /// The gradient of each input, of its size, from the result and its gradient.
    ///
    /// # Errors
    /// If the operation keeps nothing any more that the gradient needs.
    fn backward(&self, inputs: &[Input<'_>], out: &[f32], grad: &[f32]) -> Result<Vec<Vec<f32>>>;
}

/// Applies `op` to one to three tensors, made contiguous.
///
/// # Errors
/// [`Error::Argument`] for a tensor of another type than f32 or another device than the CPU.
pub(crate) fn apply<O: SliceOp + 'static>(op: O, inputs: &[&Tensor]) -> Result<Tensor> {
    expect_f32(op.name(), inputs)?;
    let inputs = inputs.iter().map(|input| input.contiguous()).collect::<candle_core::Result<Vec<_>>>()?;
    Ok(match inputs.as_slice() {
        [a] => a.apply_op1(Candle(op))?,
        [a, b] => a.apply_op2(b, Candle(op))?,
        [a, b, c] => a.apply_op3(b, c, Candle(op))?,
        _ => unreachable!("candle's operations have one to three arguments"),
    })
}

/// Refuses tensors that the kernels cannot take.
///
/// # Errors
/// [`Error::Argument`]
pub(crate) fn expect_f32(name: &str, tensors: &[&Tensor]) -> Result<()> {
    match tensors.iter().find(|t| !t.device().is_cpu() || t.dtype() != DType::F32) {
        None => Ok(()),
        Some(other) => Err(Error::Argument(format!(
            "{name} takes f32 tensors on the CPU, got {:?} on {:?}; moe_core::CandleOps takes every type and device",
            other.dtype(),
            other.device()
        ))),
    }
}

/// Calls `body` with the elements of f32 tensors on the CPU, made contiguous first.
///
/// # Errors
/// As [`expect_f32`].
pub(crate) fn with_inputs<R>(name: &str, tensors: &[&Tensor], body: impl FnOnce(&[Input<'_>]) -> R) -> Result<R> {
    expect_f32(name, tensors)?;
    Ok(with_cpu_inputs(tensors, body)?)
}

fn with_cpu_inputs<R>(tensors: &[&Tensor], body: impl FnOnce(&[Input<'_>]) -> R) -> candle_core::Result<R> {
    let tensors = tensors.iter().map(|t| t.contiguous()).collect::<candle_core::Result<Vec<_>>>()?;
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let inputs = guards
        .iter()
        .map(|(storage, layout)| match &**storage {
            Storage::Cpu(cpu) => input(cpu, layout),
            _ => candle_core::bail!("expected a tensor on the CPU"),
        })
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok(body(&inputs))
}

fn input<'a>(storage: &'a CpuStorage, layout: &'a Layout) -> candle_core::Result<Input<'a>> {
    Ok(Input { values: moe_core::ops::host::elements(storage, layout)?, dims: layout.dims() })
}

/// A [`SliceOp`] as candle sees it.
struct Candle<O>(O);

impl<O: SliceOp> Candle<O> {
    fn run(&self, inputs: &[(&CpuStorage, &Layout)]) -> candle_core::Result<(CpuStorage, Shape)> {
        let inputs = inputs.iter().map(|(s, l)| input(s, l)).collect::<candle_core::Result<Vec<_>>>()?;
        let (values, dims) = self.0.forward(&inputs);
        debug_assert_eq!(values.len(), dims.iter().product::<usize>(), "{}", self.0.name());
        Ok((CpuStorage::F32(values), Shape::from(dims)))
    }

    fn gradients<const N: usize>(
        &self,
        inputs: [&Tensor; N],
        out: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; N]> {
        let all: Vec<&Tensor> = inputs.iter().copied().chain([out, grad]).collect();
        let gradients = with_cpu_inputs(&all, |all| self.0.backward(&all[..N], all[N].values, all[N + 1].values))?
            .map_err(candle_core::Error::wrap)?;
        debug_assert_eq!(gradients.len(), N, "{}", self.0.name());
        let mut gradients = gradients.into_iter();
        let mut tensors = [const { None }; N];
        for (tensor, input) in tensors.iter_mut().zip(inputs) {
            let values = gradients.next().map(|values| Tensor::from_vec(values, input.shape(), input.device()));
            *tensor = values.transpose()?;
        }
        Ok(tensors)
    }
}

impl<O: SliceOp> CustomOp1 for Candle<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(&self, a: &CpuStorage, al: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[(a, al)])
    }

    fn bwd(&self, a: &Tensor, out: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let [da] = self.gradients([a], out, grad)?;
        Ok(da)
    }
}

impl<O: SliceOp> CustomOp2 for Candle<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[(a, al), (b, bl)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok(self.gradients([a, b], out, grad)?.into())
    }
}

impl<O: SliceOp> CustomOp3 for Candle<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
        c: &CpuStorage,
        cl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run(&[(a, al), (b, bl), (c, cl)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        Ok(self.gradients([a, b, c], out, grad)?.into())
    }
}
