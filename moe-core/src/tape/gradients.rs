//! [`Gradients`]: where a backward pass brings gradients to: registered parameters' buffers, or a tensor for everything else.

use super::Edge;
use crate::ops::host;
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Storage, Tensor, TensorId};
use std::collections::HashMap;

/// The place of one registered parameter's gradient.
#[derive(Debug)]
pub struct GradSlice<'a> {
    values: &'a mut [f32],
    stale: &'a mut bool,
}

impl<'a> GradSlice<'a> {
    pub(super) fn new(values: &'a mut [f32], stale: &'a mut bool) -> Self {
        Self { values, stale }
    }

    /// Whether the values are left over and have to be replaced, all of them, rather than added to.
    pub fn is_stale(&self) -> bool {
        *self.stale
    }

    /// The values, to be replaced if they are stale and added to otherwise: the caller promises to do so.
    pub fn sum(&mut self) -> &mut [f32] {
        *self.stale = false;
        self.values
    }

    /// The values, zeroed if they are stale, to be added to here and there.
    pub fn zeroed(&mut self) -> &mut [f32] {
        if std::mem::replace(self.stale, false) {
            self.values.fill(0.0);
        }
        self.values
    }

    /// Adds a whole gradient.
    ///
    /// # Panics
    /// If it has another length.
    pub fn add(&mut self, terms: &[f32]) {
        assert_eq!(self.values.len(), terms.len(), "a gradient has the size of its parameter");
        if std::mem::replace(self.stale, false) {
            return self.values.copy_from_slice(terms);
        }
        host::dispatch(|| self.values.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term));
    }
}

/// Receives the gradients of one backward pass.
#[derive(Debug)]
pub struct Gradients<'a> {
    by_id: &'a HashMap<TensorId, usize>,
    /// `None` while an operation has it.
    slices: Vec<Option<GradSlice<'a>>>,
    /// Of leaves that are not registered.
    others: HashMap<TensorId, Tensor>,
}

impl<'a> Gradients<'a> {
    pub(super) fn new(by_id: &'a HashMap<TensorId, usize>, slices: Vec<Option<GradSlice<'a>>>) -> Self {
        Self { by_id, slices, others: HashMap::new() }
    }

    /// Takes the values of these parameters, as far as they have any, out of the way of new ones.
    pub(super) fn set_aside(&mut self, parameters: impl Iterator<Item = TensorId>) -> Vec<(usize, Vec<f32>)> {
        let mut aside = Vec::new();
        for index in parameters.filter_map(|id| self.by_id.get(&id).copied()) {
            if let Some(slice) = self.slices[index].as_mut().filter(|slice| !slice.is_stale()) {
                aside.push((index, slice.values.to_vec()));
                *slice.stale = true;
            }
        }
        aside
    }

    /// Adds what was taken out of the way to what has arrived since.
    pub(super) fn add_back(&mut self, aside: Vec<(usize, Vec<f32>)>) {
        for (index, values) in aside {
            if let Some(slice) = self.slices[index].as_mut() {
                slice.add(&values);
            }
        }
    }

    fn index(&self, edge: &Edge) -> Option<usize> {
        match edge {
            Edge::Leaf(id, _) => self.by_id.get(id).copied(),
            Edge::Constant | Edge::Segment(_) => None,
        }
    }

    /// The place of a registered parameter, to write a gradient where it is kept; [`Gradients::put_back`] must follow.
    pub fn take(&mut self, parameter: &Edge) -> Option<GradSlice<'a>> {
        let index = self.index(parameter)?;
        self.slices[index].take()
    }

    /// Gives a place back.
    pub fn put_back(&mut self, parameter: &Edge, slice: GradSlice<'a>) {
        if let Some(index) = self.index(parameter) {
            self.slices[index] = Some(slice);
        }
    }

    /// Adds a gradient: to its parameter's buffer, to a leaf's sum, or through candle's graph to those behind it.
    ///
    /// # Errors
    /// If shapes differ, or an operation of candle has no gradient.
    pub fn give(&mut self, to: &Edge, gradient: Tensor) -> Result<()> {
        let fits = |want: &Shape| {
            let got = gradient.shape();
            let error = || format!("a gradient of shape {got:?} was given for a tensor of shape {want:?}");
            if got == want { Ok(()) } else { Err(Error::Input(error())) }
        };
        match to {
            Edge::Constant => Ok(()),
            Edge::Leaf(id, shape) => fits(shape).and_then(|()| self.give_leaf(*id, gradient)),
            Edge::Segment(tensor) => fits(tensor.shape()).and_then(|()| self.give_segment(tensor, gradient)),
        }
    }

    /// Through candle's graph.
    fn give_segment(&mut self, tensor: &Tensor, gradient: Tensor) -> Result<()> {
        // On a device the scalar is computed, so that this crate needs no code for it.
        let scalar = if tensor.device().is_cpu() {
            tensor.apply_op1(Seed(gradient))?
        } else {
            (tensor * gradient.detach())?.sum_all()?
        };
        let behind = scalar.backward()?;
        behind.get_ids().try_for_each(|&id| behind.get_id(id).map_or(Ok(()), |g| self.give_leaf(id, g.clone())))
    }

    fn give_leaf(&mut self, id: TensorId, gradient: Tensor) -> Result<()> {
        if let Some(&index) = self.by_id.get(&id) {
            let slice = self.slices[index].as_mut();
            let slice =
                slice.ok_or_else(|| Error::Input("an operation gives a gradient it has the place of".into()))?;
            return add_tensor(slice, &gradient);
        }
        match self.others.remove(&id) {
            Some(sum) => self.others.insert(id, (sum + gradient)?),
            None => self.others.insert(id, gradient),
        };
        Ok(())
    }

    /// Takes what has arrived for a leaf that is not registered.
    pub fn take_leaf(&mut self, leaf: TensorId) -> Option<Tensor> {
        self.others.remove(&leaf)
    }
}

/// Adds a gradient, read in place where it lies contiguous on the CPU.
fn add_tensor(slice: &mut GradSlice<'_>, gradient: &Tensor) -> Result<()> {
    let (storage, layout) = gradient.storage_and_layout();
    if let (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) {
        slice.add(&values[start..end]);
        return Ok(());
    }
    drop(storage);
    slice.add(&gradient.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?);
    Ok(())
}

/// A scalar whose gradient with respect to its argument is this tensor.
struct Seed(Tensor);

impl CustomOp1 for Seed {
    fn name(&self) -> &'static str {
        "seed"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}
