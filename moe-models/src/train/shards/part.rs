//! [`write_part`]: one rank's files of a save.

use super::index::{Entry, Kind, Save};
use super::report::PartReport;
use super::write::{Planned, Source, write_file};
use crate::hf::{Layout, NameTable, StackPlace, WeightForm};
use crate::{Error, Result};
use moe_core::ParamSpec;
use moe_parallel::{Extent, TensorBox};
use std::ops::Range;
use std::path::Path;

/// A rank that writes its part of a save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SavingRank {
    /// The save.
    pub save: Save,
    /// Its number.
    pub rank: usize,
    /// Of how many.
    pub ranks: usize,
}

impl SavingRank {
    fn file(&self, stem: &str) -> String {
        match self.ranks {
            1 => format!("{stem}.safetensors"),
            ranks => format!("{stem}-{:05}-of-{ranks:05}.safetensors", self.rank + 1),
        }
    }
}

/// The values of a parameter on one rank.
#[derive(Debug, Clone, Copy)]
pub struct WeightsPart<'a> {
    /// The parameter.
    pub spec: &'a ParamSpec,
    /// What they are of the whole, in the order of the elements ([`moe_parallel::Placement::extents`]).
    pub extents: &'a [Extent],
    /// All that is held here, row-major.
    pub values: &'a [f32],
    /// Elements that this rank writes, ascending; each extent whole or not at all ([`super::WritePlan::ranges`]).
    pub writes: &'a [Range<usize>],
}

/// The moments of a parameter on one rank.
#[derive(Debug, Clone, Copy)]
pub struct MomentsPart<'a> {
    /// As of its values.
    pub extents: &'a [Extent],
    /// Elements whose moments are held here, ascending.
    pub owned: &'a [Range<usize>],
    /// Of these elements, range by range.
    pub exp_avg: &'a [f32],
    /// As well.
    pub exp_avg_sq: &'a [f32],
    /// Elements whose moments this rank writes, ascending: those owned, less what another rank writes of them.
    pub writes: &'a [Range<usize>],
}

/// Writes one rank's files into the folder `dir` and flushes them to the disk, tensor by tensor from where the values lie. A rank
/// that writes no weights has no file of them, and the same of moments. `names` are the family's.
///
/// # Errors
/// [`Error::Argument`] naming the parameter for values that are not as many as its elements, ranges that are not ascending,
/// outside of it, not owned, or cut a weight that is to be written whole; [`Error::Io`] if a file cannot be written.
pub fn write_part(
    dir: &Path,
    by: SavingRank,
    names: NameTable,
    weights: &[WeightsPart<'_>],
    moments: &[MomentsPart<'_>],
) -> Result<PartReport> {
    if by.rank >= by.ranks {
        let SavingRank { rank, ranks, .. } = by;
        return Err(Error::Argument(format!("there is no rank {rank} of {ranks}")));
    }
    let [weights_file, moments_file] = ["model", "optimizer"].map(|stem| by.file(stem));
    let (mut planned_weights, mut planned_moments) = (Vec::new(), Vec::new());
    let mut form = WeightForm::Whole;
    for weights in weights {
        if weights.plan(names, &weights_file, &mut planned_weights)? == WeightForm::Parts {
            form = WeightForm::Parts;
        }
    }
    for moments in moments {
        moments.plan(&moments_file, &mut planned_moments)?;
    }
    let mut report = PartReport::new(by, form);
    for (name, mut tensors) in [(weights_file, planned_weights), (moments_file, planned_moments)] {
        if !tensors.is_empty() {
            report.files.push(write_file(dir, &name, by.save, &mut tensors)?);
            report.entries.extend(tensors.into_iter().map(|tensor| tensor.entry));
        }
    }
    Ok(report)
}

impl<'a> WeightsPart<'a> {
    fn plan(&self, names: NameTable, file: &str, planned: &mut Vec<Planned<'a>>) -> Result<WeightForm> {
        let Self { spec, extents, values, writes } = *self;
        let elements = elements(extents);
        if values.len() != elements {
            return refuse(extents, &format!("has {elements} elements here, but {} values are given", values.len()));
        }
        check_ranges(extents, "writes", writes)?;
        let stack = names.stack(&spec.name);
        if let Some((tensor, layout)) = &stack
            && is_whole_stack(spec, extents)
            && writes == std::slice::from_ref(&(0..elements))
        {
            plan_stack(extents, values, (tensor, *layout), file, planned);
            return Ok(WeightForm::Whole);
        }
        let mut form = WeightForm::Whole;
        for (extent, own) in units(extents) {
            let writes: Vec<_> = overlaps(writes, &own).collect();
            if writes.is_empty() {
                continue;
            }
            if writes != [own.clone()] {
                return refuse(extents, &format!("is written whole or not at all: {writes:?} cuts elements {own:?}"));
            }
            let values = &values[own];
            // An expert of a stack that this rank has only some of is no tensor that its family publishes.
            if extent.is_whole() && stack.is_none() {
                plan_whole(extent, values, names, file, planned)?;
            } else {
                form = WeightForm::Parts;
                plan_boxes(Kind::Weight, extent, 0..values.len(), values, file, planned);
            }
        }
        Ok(form)
    }
}

/// Whether these are all experts of a stack, each whole.
pub(super) fn is_whole_stack(spec: &ParamSpec, extents: &[Extent]) -> bool {
    spec.is_stacked() && extents.len() == spec.shape[0] && extents.iter().all(Extent::is_whole)
}

/// All experts as one tensor, as their family publishes it.
fn plan_stack<'a>(
    extents: &[Extent],
    values: &'a [f32],
    (tensor, layout): (&str, Layout),
    file: &str,
    planned: &mut Vec<Planned<'a>>,
) {
    for (index, (extent, own)) in units(extents).enumerate() {
        let (kind, start, shape) = (Kind::Weight, vec![0; extent.shape.len()], extent.shape.clone());
        let entry = Entry {
            kind,
            name: extent.name.clone(),
            start: start.clone(),
            size: shape.clone(),
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            place: Some(StackPlace { index, layout }),
        };
        planned.push(Planned { entry, source: Source { values: &values[own], first: 0, shape, start } });
    }
}

/// A weight under its names in published files.
fn plan_whole<'a>(
    extent: &Extent,
    values: &'a [f32],
    names: NameTable,
    file: &str,
    planned: &mut Vec<Planned<'a>>,
) -> Result<()> {
    let mut start = vec![0; extent.shape.len()];
    for (tensor, size) in names.tensors(&extent.name, &extent.shape)? {
        let source = Source { values, first: 0, shape: extent.shape.clone(), start: start.clone() };
        let next = start.first().zip(size.first()).map(|(row, rows)| row + rows);
        let (kind, name, file) = (Kind::Weight, extent.name.clone(), file.to_owned());
        planned.push(Planned {
            entry: Entry { kind, name, start: start.clone(), size, file, tensor, place: None },
            source,
        });
        start.iter_mut().zip(next).for_each(|(row, next)| *row = next);
    }
    Ok(())
}

/// Elements `flat` of a part, in boxes of the whole; `values` are theirs.
fn plan_boxes<'a>(
    kind: Kind,
    extent: &Extent,
    flat: Range<usize>,
    values: &'a [f32],
    file: &str,
    planned: &mut Vec<Planned<'a>>,
) {
    let (shape, first, whole) = (extent.local_shape(), flat.start, TensorBox::whole(&extent.shape));
    for piece in extent.boxes(flat) {
        let own = if kind == Kind::Weight { extent.name.clone() } else { format!("{kind}.{}", extent.name) };
        let tensor = if piece.whole == whole { own } else { format!("{own}{}", piece.whole) };
        let TensorBox { start, size } = piece.whole;
        let source = Source { values, first, shape: shape.clone(), start: piece.local };
        let (name, file) = (extent.name.clone(), file.to_owned());
        planned.push(Planned { entry: Entry { kind, name, start, size, file, tensor, place: None }, source });
    }
}

impl<'a> MomentsPart<'a> {
    fn plan(&self, file: &str, planned: &mut Vec<Planned<'a>>) -> Result<()> {
        let Self { extents, owned, exp_avg, exp_avg_sq, writes } = *self;
        check_ranges(extents, "owned", owned)?;
        check_ranges(extents, "writes", writes)?;
        let (want, got) = (count(owned), [exp_avg.len(), exp_avg_sq.len()]);
        if got != [want; 2] {
            return refuse(extents, &format!("has {want} owned elements, but {got:?} moments are given"));
        }
        let (mut packed, mut found) = (0, 0);
        for own in owned {
            for (extent, unit) in units(extents) {
                for range in overlaps(writes, own).flat_map(|range| overlaps(&[range], &unit).collect::<Vec<_>>()) {
                    let at = packed + range.start - own.start..packed + range.end - own.start;
                    let flat = range.start - unit.start..range.end - unit.start;
                    for (kind, values) in [(Kind::ExpAvg, exp_avg), (Kind::ExpAvgSq, exp_avg_sq)] {
                        plan_boxes(kind, extent, flat.clone(), &values[at.clone()], file, planned);
                    }
                    found += range.len();
                }
            }
            packed += own.len();
        }
        match found == count(writes) {
            true => Ok(()),
            false => refuse(extents, &format!("writes {writes:?}, which is not all in what is owned, {owned:?}")),
        }
    }
}

/// Each extent with its elements among those of the parameter.
pub(super) fn units(extents: &[Extent]) -> impl Iterator<Item = (&Extent, Range<usize>)> {
    extents.iter().scan(0, |end, extent| {
        let start = *end;
        *end += extent.elements();
        Some((extent, start..*end))
    })
}

/// Elements of a parameter.
pub(super) fn elements(extents: &[Extent]) -> usize {
    extents.iter().map(Extent::elements).sum()
}

/// Elements of ranges.
pub(super) fn count(ranges: &[Range<usize>]) -> usize {
    ranges.iter().map(Range::len).sum()
}

/// What ranges have of the elements `of`.
pub(super) fn overlaps(ranges: &[Range<usize>], of: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    ranges.iter().map(|range| range.start.max(of.start)..range.end.min(of.end)).filter(|range| !range.is_empty())
}

/// Refuses ranges that are not ascending elements of a parameter.
pub(super) fn check_ranges(extents: &[Extent], what: &str, ranges: &[Range<usize>]) -> Result<()> {
    let (elements, mut end) = (elements(extents), 0);
    for range in ranges {
        if range.start < end || range.end < range.start || range.end > elements {
            return refuse(
                extents,
                &format!("has {elements} elements; {what} {ranges:?} are no ascending ranges of them"),
            );
        }
        end = range.end;
    }
    Ok(())
}

fn refuse<T>(extents: &[Extent], reason: &str) -> Result<T> {
    let name = extents.first().map_or("a parameter without extents", |extent| extent.name.as_str());
    Err(Error::Argument(format!("{name}: {reason}")))
}
