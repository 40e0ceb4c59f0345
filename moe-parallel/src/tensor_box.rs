//! [`TensorBox`]: a box of elements of a tensor, a range along every dimension; whether boxes tile a whole, and how a box lies in
//! the memory of row-major tensors. Pure: no values but in [`copy_box`].

use std::fmt;
use std::ops::Range;

/// Elements of a tensor that lie in a range along every dimension. Of a scalar, which has none: its one element.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TensorBox {
    /// First index along each dimension.
    pub start: Vec<usize>,
    /// Indices along each dimension.
    pub size: Vec<usize>,
}

impl TensorBox {
    /// All of a tensor.
    pub fn whole(shape: &[usize]) -> Self {
        Self { start: vec![0; shape.len()], size: shape.to_vec() }
    }

    /// Whether all of it lies in a tensor of this shape. Of any numbers: nothing overflows.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let ends = self.start.iter().zip(&self.size).map(|(start, size)| start.checked_add(*size));
        let inside = ends.zip(shape).all(|(end, &len)| end.is_some_and(|end| end <= len));
        inside && self.start.len() == shape.len() && self.size.len() == shape.len()
    }

    /// Number of elements, of a box in a tensor whose elements can be counted ([`checked_volume`]).
    pub fn volume(&self) -> usize {
        self.size.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.size.contains(&0)
    }

    /// The range along a dimension.
    fn range(&self, dim: usize) -> Range<usize> {
        self.start[dim]..self.start[dim] + self.size[dim]
    }

    /// The elements that are in both. Boxes of different numbers of dimensions have none.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        if self.start.len() != other.start.len() {
            return None;
        }
        let mut common = self.clone();
        for dim in 0..self.start.len() {
            let (own, other) = (self.range(dim), other.range(dim));
            let (start, end) = (own.start.max(other.start), own.end.min(other.end));
            (common.start[dim], common.size[dim]) = (start, end.saturating_sub(start));
        }
        (!common.is_empty()).then_some(common)
    }

    /// Whether no element is in both.
    pub fn is_disjoint(&self, other: &Self) -> bool {
        self.intersect(other).is_none()
    }

    /// What is left without the elements of `hole`, in boxes without overlap: two for each dimension at most.
    pub fn without(&self, hole: &Self) -> Vec<Self> {
        let Some(hole) = self.intersect(hole) else { return vec![self.clone()] };
        let (mut left, mut rest) = (Vec::new(), self.clone());
        for dim in 0..self.start.len() {
            let (all, gone) = (rest.range(dim), hole.range(dim));
            for side in [all.start..gone.start, gone.end..all.end] {
                if !side.is_empty() {
                    let mut piece = rest.clone();
                    (piece.start[dim], piece.size[dim]) = (side.start, side.len());
                    left.push(piece);
                }
            }
            (rest.start[dim], rest.size[dim]) = (gone.start, gone.len());
        }
        left
    }

    /// Where its first element lies when indices are counted from `start` on, which is not after its own.
    pub fn start_from(&self, start: &[usize]) -> Vec<usize> {
        self.start.iter().zip(start).map(|(own, start)| own - start).collect()
    }
}

/// `[0..3, 4..8]`
impl fmt::Display for TensorBox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for dim in 0..self.start.len() {
            let Range { start, end } = self.range(dim);
            write!(f, "{}{start}..{end}", if dim > 0 { ", " } else { "" })?;
        }
        f.write_str("]")
    }
}

/// Number of elements of a tensor of this shape, if that can be counted.
pub fn checked_volume(shape: &[usize]) -> Option<usize> {
    shape.iter().try_fold(1usize, |product, &len| product.checked_mul(len))
}

/// Why boxes do not make up a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TilingFault {
    /// In none of them.
    Missing(TensorBox),
    /// In two of them.
    Doubled {
        /// Their indices.
        boxes: [usize; 2],
        /// What both have.
        common: TensorBox,
    },
}

/// Why `boxes`, all of which lie in `whole`, do not hold each of its elements once; `None` if they do.
///
/// `whole` is cut around the box in the middle of those in it, and what is left is looked at in the same way: as many looks as
/// there are boxes, each at those that are near.
pub fn tiling_fault(whole: &TensorBox, boxes: &[TensorBox]) -> Option<TilingFault> {
    let mut all: Vec<usize> = (0..boxes.len()).filter(|&index| !boxes[index].is_empty()).collect();
    all.sort_by_key(|&index| &boxes[index].start);
    let mut open = vec![(whole.clone(), all)];
    while let Some((region, inside)) = open.pop() {
        if region.is_empty() {
            continue;
        }
        let Some(&middle) = inside.get(inside.len() / 2) else { return Some(TilingFault::Missing(region)) };
        let others = || inside.iter().copied().filter(|&other| other != middle);
        for other in others() {
            if let Some(common) = boxes[middle].intersect(&boxes[other]) {
                return Some(TilingFault::Doubled { boxes: [middle.min(other), middle.max(other)], common });
            }
        }
        for piece in region.without(&boxes[middle]) {
            let inside = others().filter(|&other| !boxes[other].is_disjoint(&piece)).collect();
            open.push((piece, inside));
        }
    }
    None
}

/// Where a box begins in a row-major tensor.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Of the tensor.
    pub shape: &'a [usize],
    /// Index of the first element of the box along each dimension.
    pub start: &'a [usize],
}

impl Place<'_> {
    /// From an index to the next one along each dimension.
    fn strides(&self) -> Vec<usize> {
        let mut strides = vec![1; self.shape.len()];
        for dim in (1..self.shape.len()).rev() {
            strides[dim - 1] = strides[dim] * self.shape[dim];
        }
        strides
    }
}

/// Calls `run` with every stretch of elements that lies in one piece in two tensors which both have a box of this size: where it
/// is in the one, and in the other.
///
/// # Panics
/// If numbers of dimensions differ.
pub fn for_each_run(size: &[usize], from: Place<'_>, to: Place<'_>, mut run: impl FnMut(Range<usize>, Range<usize>)) {
    if size.contains(&0) {
        return;
    }
    // Dimensions that both hold in full lie in one piece, with the next one before them.
    let full = |dim: &usize| size[*dim] == from.shape[*dim] && size[*dim] == to.shape[*dim];
    let outer = size.len().saturating_sub(1 + (0..size.len()).rev().take_while(full).count());
    let (rows, len) = (size[..outer].iter().product::<usize>(), size[outer..].iter().product::<usize>());
    let strides = [from.strides(), to.strides()];
    let first =
        |place: Place<'_>, strides: &[usize]| place.start.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>();
    let firsts = [first(from, &strides[0]), first(to, &strides[1])];
    for row in 0..rows {
        let (mut rest, mut at) = (row, firsts);
        for dim in (0..outer).rev() {
            let index = rest % size[dim];
            rest /= size[dim];
            (0..2).for_each(|side| at[side] += index * strides[side][dim]);
        }
        run(at[0]..at[0] + len, at[1]..at[1] + len);
    }
}

/// Copies a box of this size from one row-major tensor to another.
///
/// # Panics
/// If it does not lie in both.
pub fn copy_box<T: Copy>(size: &[usize], from: (&[T], Place<'_>), to: (&mut [T], Place<'_>)) {
    let ((from, from_place), (to, to_place)) = (from, to);
    for_each_run(size, from_place, to_place, |source, target| to[target].copy_from_slice(&from[source]));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn cube(start: &[usize], size: &[usize]) -> TensorBox {
        TensorBox { start: start.to_vec(), size: size.to_vec() }
    }

    /// How often each element of a tensor is in `boxes`, row-major.
    fn counts(shape: &[usize], boxes: &[TensorBox]) -> Vec<u32> {
        let mut counts = vec![0; shape.iter().product()];
        for each in boxes {
            let (own, zero) = (vec![(); each.volume()], vec![0; shape.len()]);
            let place = |shape, start| Place { shape, start };
            for_each_run(&each.size, place(&each.size, &zero), place(shape, &each.start), |from, to| {
                assert_eq!(own[from].len(), to.len());
                counts[to].iter_mut().for_each(|count| *count += 1);
            });
        }
        counts
    }

    #[test]
    fn boxes_fit_or_do_not() {
        for (start, size, shape, fits) in [
            (&[0, 0][..], &[2, 3][..], &[2, 3][..], true),
            (&[1, 0], &[1, 3], &[2, 3], true),
            (&[1, 1], &[1, 3], &[2, 3], false),
            (&[2, 0], &[0, 3], &[2, 3], true),
            (&[0], &[2], &[2, 3], false),
            (&[0, 0], &[2], &[2, 3], false),
            (&[usize::MAX, 0], &[2, 1], &[2, 3], false),
            (&[], &[], &[], true),
        ] {
            assert_eq!(cube(start, size).fits(shape), fits, "{start:?} {size:?} in {shape:?}");
        }
        assert_eq!(checked_volume(&[usize::MAX, 2]), None);
        assert_eq!((checked_volume(&[]), checked_volume(&[3, 0, 5])), (Some(1), Some(0)));
    }

    #[test]
    fn boxes_name_their_ranges() {
        assert_eq!(cube(&[0, 4], &[3, 4]).to_string(), "[0..3, 4..8]");
        assert_eq!(cube(&[], &[]).to_string(), "[]");
    }

    #[test]
    fn scalars_have_one_element() {
        let scalar = TensorBox::whole(&[]);
        assert_eq!((scalar.volume(), scalar.intersect(&scalar)), (1, Some(scalar.clone())));
        assert_eq!(tiling_fault(&scalar, &[]), Some(TilingFault::Missing(scalar.clone())));
        assert_eq!(tiling_fault(&scalar, std::slice::from_ref(&scalar)), None);
        let doubled = tiling_fault(&scalar, &[scalar.clone(), scalar.clone()]);
        assert_eq!(doubled, Some(TilingFault::Doubled { boxes: [0, 1], common: scalar }));
        let (mut to, place) = ([0], Place { shape: &[], start: &[] });
        copy_box(&[], (&[7], place), (&mut to, place));
        assert_eq!(to, [7]);
    }

    #[test]
    fn faults_are_found_where_they_are() {
        let whole = TensorBox::whole(&[4, 6]);
        let columns = [cube(&[0, 0], &[4, 2]), cube(&[0, 2], &[4, 3]), cube(&[0, 5], &[4, 1])];
        assert_eq!(tiling_fault(&whole, &columns), None);
        assert_eq!(tiling_fault(&whole, &[&columns[..], &[cube(&[1, 1], &[0, 3])]].concat()), None, "an empty one");
        assert_eq!(tiling_fault(&whole, &columns[1..]), Some(TilingFault::Missing(columns[0].clone())));
        let again = [&columns[..], &[cube(&[3, 1], &[1, 1])]].concat();
        let common = cube(&[3, 1], &[1, 1]);
        assert_eq!(tiling_fault(&whole, &again), Some(TilingFault::Doubled { boxes: [0, 3], common }));
        assert_eq!(tiling_fault(&TensorBox::whole(&[0, 6]), &[]), None);
    }

    /// Many boxes neither recurse nor take long.
    #[test]
    fn many_boxes_are_looked_at_quickly() {
        let rows: Vec<TensorBox> = (0..20_000).map(|row| cube(&[row, 0], &[1, 3])).collect();
        assert_eq!(tiling_fault(&TensorBox::whole(&[20_000, 3]), &rows), None);
    }

    #[test]
    fn what_lies_in_one_piece_is_one_run() {
        let runs = |size: &[usize], from: Place<'_>, to: Place<'_>| {
            let mut count = 0;
            for_each_run(size, from, to, |_, _| count += 1);
            count
        };
        let place = |shape, start| Place { shape, start };
        let (zero, shape): (&[usize], &[usize]) = (&[0, 0, 0], &[4, 3, 5]);
        assert_eq!(runs(shape, place(shape, zero), place(shape, zero)), 1);
        assert_eq!(runs(&[2, 3, 5], place(shape, &[1, 0, 0]), place(&[2, 3, 5], zero)), 1);
        assert_eq!(runs(&[2, 2, 5], place(shape, zero), place(&[2, 2, 5], zero)), 2);
        assert_eq!(runs(&[2, 2, 4], place(shape, zero), place(&[2, 2, 4], zero)), 4);
        assert_eq!(runs(&[2, 0, 4], place(shape, zero), place(shape, zero)), 0);
    }

    /// A shape of up to four dimensions and boxes in it.
    fn shape_and_boxes(most: usize) -> impl Strategy<Value = (Vec<usize>, Vec<TensorBox>)> {
        prop::collection::vec(0usize..6, 0..5).prop_flat_map(move |shape| {
            let ranges: Vec<_> = shape.iter().map(|&len| (0..=len, 0..=len)).collect();
            let of = |ends: Vec<(usize, usize)>| TensorBox {
                start: ends.iter().map(|&(a, b)| a.min(b)).collect(),
                size: ends.iter().map(|&(a, b)| a.abs_diff(b)).collect(),
            };
            (Just(shape), prop::collection::vec(ranges.prop_map(of), 0..most))
        })
    }

    proptest! {
        /// Against counting every element.
        #[test]
        fn faults_are_those_of_the_counts((shape, boxes) in shape_and_boxes(6)) {
            let counts = counts(&shape, &boxes);
            match tiling_fault(&TensorBox::whole(&shape), &boxes) {
                None => prop_assert!(counts.iter().all(|&count| count == 1)),
                Some(TilingFault::Missing(part)) => {
                    prop_assert!(part.fits(&shape) && !part.is_empty());
                    prop_assert!(boxes.iter().all(|other| other.is_disjoint(&part)));
                }
                Some(TilingFault::Doubled { boxes: [a, b], common }) => {
                    prop_assert!(a < b);
                    prop_assert_eq!(boxes[a].intersect(&boxes[b]), Some(common));
                }
            }
        }

        /// What is cut out and what is left tile the whole, however often it is cut.
        #[test]
        fn cutting_keeps_every_element((shape, holes) in shape_and_boxes(4)) {
            let whole = TensorBox::whole(&shape);
            let mut parts: Vec<TensorBox> = Some(whole.clone()).into_iter().filter(|whole| !whole.is_empty()).collect();
            for hole in &holes {
                let inside: Vec<_> = parts.iter().filter_map(|part| part.intersect(hole)).collect();
                parts = parts.iter().flat_map(|part| part.without(hole)).chain(inside).collect();
                prop_assert!(counts(&shape, &parts).iter().all(|&count| count == 1));
                prop_assert_eq!(tiling_fault(&whole, &parts), None);
            }
        }

        /// A box copied out of a tensor and back into zeros.
        #[test]
        fn a_copied_box_is_in_its_place((shape, boxes) in shape_and_boxes(3)) {
            let whole: Vec<usize> = (1..=shape.iter().product()).collect();
            for part in &boxes {
                let (zero, mut own) = (vec![0; shape.len()], vec![0; part.volume()]);
                let outside = Place { shape: &shape, start: &part.start };
                let inside = Place { shape: &part.size, start: &zero };
                copy_box(&part.size, (&whole, outside), (&mut own, inside));
                prop_assert!(own.is_sorted() && own.iter().all(|&value| value > 0));
                let mut back = vec![0; whole.len()];
                copy_box(&part.size, (&own, inside), (&mut back, outside));
                let held = counts(&shape, std::slice::from_ref(part));
                for ((back, value), held) in back.iter().zip(&whole).zip(held) {
                    prop_assert_eq!(*back, value * held as usize);
                }
            }
        }
    }
}
