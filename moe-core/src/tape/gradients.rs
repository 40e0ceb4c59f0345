//! [`Gradients`]: where a backward pass brings gradients to: registered parameters' buffers, or a tensor for everything else.

use super::Edge;
use super::buffers::{After, CompleteGrads, GradBuffers, Slot, Watcher};
use crate::ops::host;
use crate::{Error, Result};
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Storage, Tensor, TensorId};
use std::collections::HashMap;
use std::fmt;

/// The place of one registered parameter's gradient, while an operation has it.
#[derive(Debug)]
pub struct GradSlice {
    values: Vec<f32>,
    stale: bool,
}

impl GradSlice {
    /// Whether the values are left over and have to be replaced, all of them, rather than added to.
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// The values, to be replaced if they are stale and added to otherwise: the caller promises to do so.
    pub fn sum(&mut self) -> &mut [f32] {
        self.stale = false;
        &mut self.values
    }

    /// The values, zeroed if they are stale, to be added to here and there.
    pub fn zeroed(&mut self) -> &mut [f32] {
        if std::mem::replace(&mut self.stale, false) {
            self.values.fill(0.0);
        }
        &mut self.values
    }

    /// Adds a whole gradient.
    ///
    /// # Panics
    /// If it has another length.
    pub fn add(&mut self, terms: &[f32]) {
        assert_eq!(self.values.len(), terms.len(), "a gradient has the size of its parameter");
        if std::mem::replace(&mut self.stale, false) {
            return self.values.copy_from_slice(terms);
        }
        host::dispatch(|| self.values.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term));
    }
}

/// Who is told of complete gradients, and how far that has come.
pub(super) struct Watch<'a> {
    groups: &'a [Vec<usize>],
    watcher: &'a mut dyn Watcher,
    /// Parameters of each group that are not complete.
    waiting: Vec<usize>,
    /// The first group that was not told of.
    next: usize,
}

impl<'a> Watch<'a> {
    pub(super) fn new(groups: &'a [Vec<usize>], watcher: &'a mut dyn Watcher) -> Self {
        Self { groups, watcher, waiting: groups.iter().map(Vec::len).collect(), next: 0 }
    }
}

/// Receives the gradients of one backward pass.
pub struct Gradients<'a> {
    buffers: &'a mut GradBuffers,
    /// Of each registered parameter.
    arrived: Vec<usize>,
    /// An operation has the values, or they are complete.
    closed: Vec<bool>,
    /// Of leaves that are not registered.
    others: HashMap<TensorId, Tensor>,
    watch: Option<Watch<'a>>,
}

impl fmt::Debug for Gradients<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gradients").field("parameters", &self.arrived.len()).finish_non_exhaustive()
    }
}

/// Values that new ones are kept apart from; `None` where there were none.
pub(super) type Aside = Vec<(usize, Option<Vec<f32>>)>;

impl<'a> Gradients<'a> {
    pub(super) fn new(buffers: &'a mut GradBuffers, watch: Option<Watch<'a>>) -> Self {
        let count = buffers.slots.len();
        Self { buffers, arrived: vec![0; count], closed: vec![false; count], others: HashMap::new(), watch }
    }

    /// Takes the values of these parameters, as far as they have any, out of the way of new ones.
    pub(super) fn set_aside(&mut self, parameters: impl Iterator<Item = TensorId>) -> Aside {
        let mut aside: Aside = parameters.filter_map(|id| Some((*self.buffers.by_id.get(&id)?, None))).collect();
        aside.sort_by_key(|(index, _)| *index);
        for (index, values) in &mut aside {
            let slot = &mut self.buffers.slots[*index];
            if !std::mem::replace(&mut slot.stale, true) {
                *values = Some(std::mem::take(&mut slot.values));
            }
        }
        aside
    }

    /// Adds what has arrived since to what was taken out of its way.
    ///
    /// # Errors
    /// What is told of a complete gradient returns.
    pub(super) fn add_back(&mut self, aside: Aside) -> Result<()> {
        for (index, before) in aside {
            let slot = &mut self.buffers.slots[index];
            if let Some(values) = before {
                let pass = std::mem::replace(&mut slot.values, values);
                let mut sum = GradSlice { values: std::mem::take(&mut slot.values), stale: false };
                if !std::mem::replace(&mut slot.stale, false) {
                    sum.add(&pass);
                }
                slot.values = sum.values;
            }
            self.arrive(index)?;
        }
        Ok(())
    }

    fn index(&self, edge: &Edge) -> Option<usize> {
        match edge {
            Edge::Leaf(id, _) => self.buffers.by_id.get(id).copied(),
            Edge::Constant | Edge::Segment(_) => None,
        }
    }

    /// The place of a registered parameter, to write a gradient where it is kept; [`Gradients::put_back`] must follow.
    pub fn take(&mut self, parameter: &Edge) -> Option<GradSlice> {
        let index = self.index(parameter).filter(|&index| !self.closed[index])?;
        Some(self.open(index))
    }

    fn open(&mut self, index: usize) -> GradSlice {
        let slot = &mut self.buffers.slots[index];
        slot.allocate();
        self.closed[index] = true;
        GradSlice { values: std::mem::take(&mut slot.values), stale: slot.stale }
    }

    /// Gives a place back.
    ///
    /// # Errors
    /// What is told of a complete gradient returns.
    pub fn put_back(&mut self, parameter: &Edge, slice: GradSlice) -> Result<()> {
        self.index(parameter).map_or(Ok(()), |index| self.close(index, slice))
    }

    fn close(&mut self, index: usize, GradSlice { values, stale }: GradSlice) -> Result<()> {
        let slot = &mut self.buffers.slots[index];
        (slot.values, slot.stale) = (values, stale);
        self.closed[index] = false;
        self.arrive(index)
    }

    /// Something has come for a parameter.
    fn arrive(&mut self, index: usize) -> Result<()> {
        self.arrived[index] += 1;
        let Some(watch) = &mut self.watch else { return Ok(()) };
        let slots = &mut self.buffers.slots;
        if self.arrived[index] == slots[index].arrivals {
            if let Some(group) = watch.groups.iter().position(|group| group.contains(&index)) {
                self.closed[index] = true;
                watch.waiting[group] -= 1;
            }
            while watch.waiting.get(watch.next) == Some(&0) {
                watch.tell(slots)?;
            }
        }
        watch.watcher.arrived(&mut CompleteGrads { slots, groups: &watch.groups[..watch.next] })
    }

    /// Ends the pass: tells of the groups that were not told of yet.
    ///
    /// # Errors
    /// What is told returns.
    pub fn finish(self) -> Result<()> {
        for (slot, arrived) in self.buffers.slots.iter_mut().zip(self.arrived) {
            slot.arrivals = slot.arrivals.max(arrived);
        }
        let Some(mut watch) = self.watch else { return Ok(()) };
        while watch.next < watch.groups.len() {
            watch.tell(&mut self.buffers.slots)?;
        }
        Ok(())
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
        if let Some(&index) = self.buffers.by_id.get(&id) {
            if self.closed[index] {
                return Err(Error::Input(format!(
                    "a gradient came for parameter {index} while an operation has its place, or after it was complete: \
                     passes of a run must be made of the same operations"
                )));
            }
            let mut slice = self.open(index);
            add_tensor(&mut slice, &gradient)?;
            return self.close(index, slice);
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

impl Watch<'_> {
    /// Of the next group.
    fn tell(&mut self, slots: &mut [Slot]) -> Result<()> {
        let number = self.next;
        self.next += 1;
        let (group, groups) = (&self.groups[number], &self.groups[..self.next]);
        group.iter().for_each(|&index| slots[index].settle());
        if self.watcher.complete(number, &mut CompleteGrads { slots, groups })? == After::Release {
            group.iter().for_each(|&index| slots[index].release());
        }
        Ok(())
    }
}

/// Adds a gradient, read in place where it lies contiguous on the CPU.
fn add_tensor(slice: &mut GradSlice, gradient: &Tensor) -> Result<()> {
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
