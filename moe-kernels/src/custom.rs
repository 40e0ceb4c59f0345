//! From functions on slices to candle operations: the one place that knows candle's traits for custom operations.

use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Storage, Tensor};
use moe_core::tape::{self, Edge, GradSlice, Gradients};

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

/// Where the gradient of one input goes.
#[derive(Debug)]
pub(crate) enum Target {
    /// Nobody wants it.
    Unwanted,
    /// A buffer of its own.
    Own(Option<Vec<f32>>),
    /// The sum that is kept of a parameter's gradients.
    Kept(GradSlice),
}

/// The targets of inputs with these edges.
pub(crate) fn targets(edges: &[Edge], into: &mut Gradients<'_>) -> Vec<Target> {
    let target = |edge: &Edge| match into.take(edge) {
        Some(slice) => Target::Kept(slice),
        None if edge.is_wanted() => Target::Own(None),
        None => Target::Unwanted,
    };
    edges.iter().map(target).collect()
}

/// Passes on what the targets hold.
///
/// # Errors
/// As [`Gradients::give`].
pub(crate) fn settle(
    edges: &[Edge],
    shapes: Vec<Shape>,
    targets: Vec<Target>,
    into: &mut Gradients<'_>,
) -> moe_core::Result<()> {
    for ((edge, target), shape) in edges.iter().zip(targets).zip(shapes) {
        match target {
            Target::Kept(slice) => into.put_back(edge, slice)?,
            Target::Own(Some(values)) => into.give(edge, Tensor::from_vec(values, shape, &Device::Cpu)?)?,
            Target::Own(None) | Target::Unwanted => {}
        }
    }
    Ok(())
}

impl Target {
    /// Brings a whole gradient, if it is wanted.
    pub(crate) fn bring(&mut self, gradient: impl FnOnce() -> Vec<f32>) {
        match self {
            Self::Unwanted => {}
            Self::Own(own) => *own = Some(gradient()),
            Self::Kept(slice) => slice.add(&gradient()),
        }
    }

    /// Calls `add` with `len` elements to add terms to, if they are wanted.
    pub(crate) fn add_to(&mut self, len: usize, add: impl FnOnce(&mut [f32])) {
        match self {
            Self::Unwanted => {}
            Self::Own(own) => add(own.get_or_insert_with(|| vec![0.0; len])),
            Self::Kept(slice) => add(slice.zeroed()),
        }
    }
}

/// An operation on slices with its gradient. Sizes are checked before it is applied.
pub(crate) trait SliceOp: Send + Sync {
    /// For error messages and profiles.
    fn name(&self) -> &'static str;

    /// Whether the gradient needs the values of the inputs; if not, [`SliceOp::backward`] may get none.
    fn needs_inputs(&self) -> bool {
        true
    }

    /// Whether the gradient needs the values of the output.
    fn needs_output(&self) -> bool {
        false
    }

    /// Values and dimensions of the result.
    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>);

    /// Brings the gradient of each input to its target, from the result and its gradient.
    ///
    /// # Errors
    /// If the operation keeps nothing any more that the gradient needs.
    fn backward(&self, inputs: &[Input<'_>], out: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()>;
}

/// Applies `op`, recorded on the tape of this thread if there is one; otherwise as an operation of candle's, which takes up to
/// three tensors. They are made contiguous.
///
/// # Errors
/// [`Error::Argument`] for a tensor of another type than f32 or another device than the CPU.
pub(crate) fn apply<O: SliceOp + 'static>(op: O, inputs: &[&Tensor]) -> Result<Tensor> {
    expect_f32(op.name(), inputs)?;
    let inputs = inputs.iter().map(|input| input.contiguous()).collect::<candle_core::Result<Vec<_>>>()?;
    if tape::is_active() {
        return apply_recorded(op, &inputs);
    }
    Ok(match inputs.as_slice() {
        [a] => a.apply_op1(Candle(op))?,
        [a, b] => a.apply_op2(b, Candle(op))?,
        [a, b, c] => a.apply_op3(b, c, Candle(op))?,
        _ => unreachable!("candle's operations have one to three arguments"),
    })
}

fn apply_recorded<O: SliceOp + 'static>(op: O, inputs: &[Tensor]) -> Result<Tensor> {
    let all: Vec<&Tensor> = inputs.iter().collect();
    let (values, dims) = with_cpu_inputs(&all, |inputs| op.forward(inputs))?;
    if !tape::tracks(&all) {
        return Ok(Tensor::from_vec(values, dims, &Device::Cpu)?);
    }
    let out = tape::output(values, &dims, &Device::Cpu)?;
    let edges: Vec<Edge> = inputs.iter().map(Edge::of).collect();
    let shapes: Vec<Shape> = inputs.iter().map(|input| input.shape().clone()).collect();
    let kept: Vec<Tensor> = if op.needs_inputs() { inputs.iter().map(Tensor::detach).collect() } else { Vec::new() };
    let kept_out = op.needs_output().then(|| out.detach());
    tape::record(&[&out], move |gradients, into| {
        let Some(Some(grad)) = gradients.into_iter().next() else { return Ok(()) };
        let mut targets = targets(&edges, into);
        let all: Vec<&Tensor> = kept.iter().chain(&kept_out).chain([&grad]).collect();
        with_cpu_inputs(&all, |all| {
            let (grad, all) = all.split_last().expect("the gradient is there");
            let without: Vec<Input<'_>> = shapes.iter().map(|s| Input { values: &[], dims: s.dims() }).collect();
            let (inputs, out) = if kept.is_empty() { (&without[..], all) } else { all.split_at(shapes.len()) };
            op.backward(inputs, out.first().map_or(&[], |out| out.values), grad.values, &mut targets)
        })??;
        drop((kept, kept_out, grad));
        settle(&edges, shapes, targets, into)
    });
    Ok(out)
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

/// [`with_inputs`] of tensors that have been checked.
///
/// # Errors
/// If one of them is not contiguous f32 on the CPU.
pub(crate) fn with_cpu_inputs<R>(tensors: &[&Tensor], body: impl FnOnce(&[Input<'_>]) -> R) -> candle_core::Result<R> {
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
        let mut targets = inputs.map(|input| if input.track_op() { Target::Own(None) } else { Target::Unwanted });
        with_cpu_inputs(&all, |all| self.0.backward(&all[..N], all[N].values, all[N + 1].values, &mut targets))?
            .map_err(candle_core::Error::wrap)?;
        let mut tensors = [const { None }; N];
        for ((tensor, input), target) in tensors.iter_mut().zip(inputs).zip(targets) {
            if let Target::Own(Some(values)) = target {
                *tensor = Some(Tensor::from_vec(values, input.shape(), input.device())?);
            }
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
