//! [`Extent`]: which elements of a whole tensor a rank's part of a parameter holds, and where they lie in it. Pure arithmetic: no
//! values, nothing is exchanged.
//!
//! ```text
//! rows of the whole     q0 q1 q2 | k0 k1 k2 | v0 v1 v2
//! rank 0 of 2           q0 q1      k0 k1      v0 v1        ranges 0..2, 3..5, 6..8 along dimension 0
//! rank 1 of 2                 q2         k2         v2     ranges 2..3, 5..6, 8..9
//! ```
//!
//! Two layouts of ranks agree on nothing but whole tensors, so what passes from one to the other is told in boxes of those.

use crate::placement::Placement;
use crate::tensor_box::TensorBox;
use moe_core::ParamSpec;
use std::ops::Range;

/// The part of a tensor that a rank holds: all indices that are in a range of every dimension, row-major.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Of the whole tensor; experts have names of their own ([`ParamSpec::expert_name`]).
    pub name: String,
    /// Of the whole tensor.
    pub shape: Vec<usize>,
    /// For each dimension the ranges that are held: ascending, none empty, none the continuation of another.
    pub dims: Vec<Vec<Range<usize>>>,
}

/// A box of a whole tensor that lies in a part of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// In the whole tensor.
    pub whole: TensorBox,
    /// Where it begins in the part.
    pub local: Vec<usize>,
}

impl Extent {
    /// All of a tensor.
    pub fn whole(name: impl Into<String>, shape: &[usize]) -> Self {
        let dims = shape.iter().map(|&len| joined(Some(0..len))).collect();
        Self { name: name.into(), shape: shape.to_vec(), dims }
    }

    /// The shape of the part.
    pub fn local_shape(&self) -> Vec<usize> {
        self.dims.iter().map(|ranges| ranges.iter().map(Range::len).sum()).collect()
    }

    /// Elements of the part.
    pub fn elements(&self) -> usize {
        self.local_shape().iter().product()
    }

    /// Whether it is all of the tensor.
    pub fn is_whole(&self) -> bool {
        self.local_shape() == self.shape
    }

    /// A name that ranks have in common if they hold the same part, and only then: the tensor's where it is whole, else with its
    /// ranges, `qkv.weight[0..2+3..5+6..8,:]`.
    pub fn key(&self) -> String {
        if self.is_whole() {
            return self.name.clone();
        }
        let along = |(ranges, &len): (&Vec<Range<usize>>, &usize)| match ranges.as_slice() {
            [range] if *range == (0..len) => ":".to_owned(),
            ranges => ranges.iter().map(|range| format!("{range:?}")).collect::<Vec<_>>().join("+"),
        };
        let dims: Vec<String> = self.dims.iter().zip(&self.shape).map(along).collect();
        format!("{}[{}]", self.name, dims.join(","))
    }

    /// What elements `flat` of the part are, in boxes without overlap: those that a run of rows makes (a part of a row, whole
    /// rows, a part of a row; of rows of rows each part is cut again), cut where ranges end.
    ///
    /// # Panics
    /// If the part has fewer elements.
    pub fn boxes(&self, flat: Range<usize>) -> Vec<Piece> {
        let shape = self.local_shape();
        let elements: usize = shape.iter().product();
        assert!(flat.end <= elements, "elements {flat:?} of a part that has {elements}");
        run_boxes(&shape, flat).iter().flat_map(|local| self.pieces(local)).collect()
    }

    /// A box of the part, cut where ranges end.
    fn pieces(&self, local: &TensorBox) -> Vec<Piece> {
        let nothing = || TensorBox { start: Vec::new(), size: Vec::new() };
        let mut pieces = vec![Piece { whole: nothing(), local: Vec::new() }];
        for (ranges, (&start, &size)) in self.dims.iter().zip(local.start.iter().zip(&local.size)) {
            let stretches = stretches(ranges, start..start + size);
            let longer = |piece: &Piece, (global, local): &(Range<usize>, usize)| {
                let mut piece = piece.clone();
                piece.whole.start.push(global.start);
                piece.whole.size.push(global.len());
                piece.local.push(*local);
                piece
            };
            pieces = pieces.iter().flat_map(|piece| stretches.iter().map(|stretch| longer(piece, stretch))).collect();
        }
        pieces
    }
}

impl Placement {
    /// What this rank holds of a parameter, in the order of its elements: one extent, or one for each expert of a stack that is
    /// held here.
    pub fn extents(&self, spec: &ParamSpec) -> Vec<Extent> {
        let Extent { name, shape, mut dims } = Extent::whole(&spec.name, &spec.shape);
        for split in &spec.splits {
            dims[split.dim] = joined(self.ranges(spec, split));
        }
        if spec.expert_name(0).is_none() {
            return vec![Extent { name, shape, dims }];
        }
        let experts = dims.remove(0).into_iter().flatten();
        let of = |name| Extent { name, shape: shape[1..].to_vec(), dims: dims.clone() };
        experts.filter_map(|expert| spec.expert_name(expert)).map(of).collect()
    }
}

/// Ascending ranges without those that are empty or continue another.
fn joined(ranges: impl IntoIterator<Item = Range<usize>>) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        match all.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => all.push(range),
        }
    }
    all
}

/// The boxes that a run of elements of a row-major tensor makes: `2 d - 1` at most of `d` dimensions.
fn run_boxes(shape: &[usize], flat: Range<usize>) -> Vec<TensorBox> {
    if flat.is_empty() {
        return Vec::new();
    }
    let Some((_, inner)) = shape.split_first() else { return vec![TensorBox::whole(&[])] };
    let row: usize = inner.iter().product();
    let in_row = |index: usize, flat: Range<usize>| {
        let boxes = run_boxes(inner, flat.start - index * row..flat.end - index * row);
        boxes.into_iter().map(move |inner| below(index, 1, inner))
    };
    // Whole rows, if they begin before they end.
    let (first, end) = (flat.start.div_ceil(row), flat.end / row);
    if first > end {
        return in_row(end, flat).collect();
    }
    let mut boxes = Vec::new();
    if flat.start < first * row {
        boxes.extend(in_row(first - 1, flat.start..first * row));
    }
    if first < end {
        boxes.push(below(first, end - first, TensorBox::whole(inner)));
    }
    if end * row < flat.end {
        boxes.extend(in_row(end, end * row..flat.end));
    }
    boxes
}

/// A box of rows, in `count` of them from `first` on.
fn below(first: usize, count: usize, mut inner: TensorBox) -> TensorBox {
    inner.start.insert(0, first);
    inner.size.insert(0, count);
    inner
}

/// The indices `local` of a dimension of the part: stretches of the whole's indices, each with where it begins in the part.
fn stretches(ranges: &[Range<usize>], local: Range<usize>) -> Vec<(Range<usize>, usize)> {
    let (mut stretches, mut before) = (Vec::new(), 0);
    for range in ranges {
        let (start, end) = (local.start.max(before), local.end.min(before + range.len()));
        if start < end {
            stretches.push((range.start + start - before..range.start + end - before, start));
        }
        before += range.len();
    }
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dims::{ExpertOrder, ParallelDims};
    use crate::tensor_box::{Place, for_each_run, tiling_fault};
    use candle_core::{Device, Tensor};
    use moe_core::{ParamInit, SplitKind};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, HashMap};

    /// The index in the whole tensor of each element of the part, from boxes of `flat` ranges of it.
    fn indices(extent: &Extent, flats: impl IntoIterator<Item = Range<usize>>) -> Vec<Option<usize>> {
        let (mut indices, shape) = (vec![None; extent.elements()], extent.local_shape());
        for flat in flats {
            for piece in extent.boxes(flat.clone()) {
                let whole = Place { shape: &extent.shape, start: &piece.whole.start };
                let local = Place { shape: &shape, start: &piece.local };
                for_each_run(&piece.whole.size, whole, local, |from, to| {
                    assert!(flat.start <= to.start && to.end <= flat.end, "boxes stay in the range");
                    for (from, to) in from.zip(to) {
                        assert!(indices[to].replace(from).is_none(), "element {to} is in two boxes");
                    }
                });
            }
        }
        indices
    }

    fn all(extent: &Extent) -> Vec<usize> {
        indices(extent, Some(0..extent.elements())).into_iter().map(Option::unwrap).collect()
    }

    fn specs() -> Vec<ParamSpec> {
        let spec = |name: &str, shape: &[usize]| ParamSpec::new(name, shape, ParamInit::Zeros);
        let [fc_in, fc_out] = [(0, 2), (1, 1)].map(|(dim, parts)| {
            move |experts: usize| {
                let spec = spec("fc.weight", &[10, 7]).split(SplitKind::Tensor, dim, parts);
                spec.stacked(experts).below("layers.1.mlp")
            }
        });
        vec![
            spec("norm.weight", &[5]),
            spec("scale", &[]),
            spec("embed.weight", &[37, 3]).split(SplitKind::Tensor, 0, 1),
            spec("qkv.weight", &[27, 5]).split(SplitKind::Tensor, 0, 3),
            spec("qkv.bias", &[27]).split(SplitKind::Tensor, 0, 3),
            spec("out.weight", &[5, 9]).split(SplitKind::Tensor, 1, 1),
            fc_in(4),
            fc_in(8),
            fc_out(5),
            spec("fc.bias", &[3]).stacked(8).below("a"),
        ]
    }

    /// All layouts of up to `most` ranks, with each of their ranks.
    fn layouts(most: usize) -> Vec<Vec<Placement>> {
        let orders = [ExpertOrder::Consecutive, ExpertOrder::WithinTensor, ExpertOrder::DataFirst];
        let mut layouts = Vec::new();
        for world in 1..=most {
            for code in 0..world * world * world * orders.len() {
                let (tp, ep, slices) = (code % world + 1, code / world % world + 1, code / world / world % world + 1);
                let order = orders[code / world / world / world];
                let dims = ParallelDims::new(world / tp, tp, ep, slices).with_expert_order(order);
                let ranks = (0..world).map(|rank| Placement::new(dims, rank)).collect::<Result<Vec<_>, _>>();
                layouts.extend(ranks.ok().filter(|_| world % tp == 0));
            }
        }
        assert!(layouts.len() > 60, "{}", layouts.len());
        layouts
    }

    /// Of every layout, each rank's extents name the very elements that it is given of the whole; together they hold every element,
    /// each as often as there are copies; and ranks have a key in common exactly if they hold the same.
    #[test]
    fn extents_are_what_ranks_hold() {
        for ranks in layouts(8) {
            for spec in specs() {
                let count = spec.elem_count();
                let iota = Tensor::arange(0u32, count as u32, &Device::Cpu).unwrap();
                let iota = iota.reshape(spec.shape.as_slice()).unwrap();
                let units = Placement::WHOLE.extents(&spec);
                let first: HashMap<String, usize> =
                    units.iter().map(|u| u.name.clone()).zip((0..).step_by(count / units.len())).collect();
                let (mut held, mut keys) = (vec![0; count], BTreeMap::<String, Vec<usize>>::new());
                for rank in &ranks {
                    let local = rank.local(&spec, iota.clone()).unwrap();
                    let want: Vec<u32> = local.flatten_all().unwrap().to_vec1().unwrap();
                    let extents = rank.extents(&spec);
                    let mut got = Vec::new();
                    for extent in &extents {
                        let own: Vec<usize> = all(extent).iter().map(|index| first[&extent.name] + index).collect();
                        own.iter().for_each(|&index| held[index] += 1);
                        let same = keys.entry(extent.key()).or_insert_with(|| own.clone());
                        assert_eq!(*same, own, "{rank:?}: {}", extent.key());
                        got.extend(own.iter().map(|&index| index as u32));
                    }
                    assert_eq!(got, want, "{rank:?}: {}", spec.name);
                    let stacked = extents.iter().map(Extent::local_shape).collect::<Vec<_>>();
                    match spec.is_stacked() {
                        false => assert_eq!(stacked, [rank.local_shape(&spec)]),
                        true => {
                            assert_eq!(stacked, vec![rank.local_shape(&spec)[1..].to_vec(); rank.local_shape(&spec)[0]])
                        }
                    }
                }
                let mut parts: Vec<&Vec<usize>> = keys.values().filter(|part| !part.is_empty()).collect();
                let distinct = parts.len();
                parts.sort();
                parts.dedup();
                assert_eq!(parts.len(), distinct, "one part under two keys: {:?}", keys.keys());
                // Copies are parts that several ranks hold: every element of a unit is held equally often.
                for unit in &units {
                    let own = &held[first[&unit.name]..][..unit.elements()];
                    assert!(own[0] > 0 && own.iter().all(|count| count == &own[0]), "{ranks:?}: {}", unit.name);
                }
                let whole: usize = keys.values().map(Vec::len).sum();
                assert_eq!(whole, count, "{ranks:?}: the parts of {} tile it", spec.name);
            }
        }
    }

    #[test]
    fn keys_name_ranges() {
        let of = |spec: &ParamSpec, dims, rank| Placement::new(dims, rank).unwrap().extents(spec);
        let qkv = &specs()[3];
        assert_eq!(Placement::WHOLE.extents(qkv)[0].key(), "qkv.weight");
        assert_eq!(Placement::WHOLE.extents(qkv), [Extent::whole("qkv.weight", &[27, 5])]);
        let two = ParallelDims::new(1, 2, 2, 1);
        assert_eq!(of(qkv, two, 0)[0].key(), "qkv.weight[0..5+9..14+18..23,:]");
        assert_eq!(of(qkv, two, 1)[0].key(), "qkv.weight[5..9+14..18+23..27,:]");
        assert_eq!(of(&specs()[5], two, 1)[0].key(), "out.weight[:,5..9]");
        let experts = of(&specs()[6], ParallelDims::new(2, 1, 2, 1), 1);
        let keys: Vec<String> = experts.iter().map(Extent::key).collect();
        assert_eq!(keys, ["layers.1.mlp.experts.2.fc.weight", "layers.1.mlp.experts.3.fc.weight"]);
        assert!(experts.iter().all(Extent::is_whole));
    }

    /// More ranks than there are rows: some hold nothing, and say so.
    #[test]
    fn parts_may_be_empty() {
        let spec = ParamSpec::new("w", &[2, 3], ParamInit::Zeros).split(SplitKind::Tensor, 0, 1);
        let dims = ParallelDims::new(1, 3, 3, 1);
        let last = &Placement::new(dims, 2).unwrap().extents(&spec)[0];
        assert_eq!((last.local_shape(), last.elements(), last.key()), (vec![0, 3], 0, "w[,:]".to_owned()));
        assert_eq!(last.boxes(0..0), []);
    }

    #[test]
    fn a_run_of_a_matrix_is_three_boxes_at_most() {
        let matrix = Extent::whole("w", &[4, 5]);
        let starts = |flat| matrix.boxes(flat).into_iter().map(|piece| piece.whole.to_string()).collect::<Vec<_>>();
        assert_eq!(starts(0..20), ["[0..4, 0..5]"]);
        assert_eq!(starts(3..18), ["[0..1, 3..5]", "[1..3, 0..5]", "[3..4, 0..3]"]);
        assert_eq!(starts(6..9), ["[1..2, 1..4]"]);
        assert_eq!(starts(4..6), ["[0..1, 4..5]", "[1..2, 0..1]"]);
        assert_eq!(starts(5..5), [""; 0]);
    }

    #[test]
    #[should_panic(expected = "that has 20")]
    fn a_run_past_the_end_is_refused() {
        Extent::whole("w", &[4, 5]).boxes(3..21);
    }

    /// Parts of up to four dimensions, of up to three ranges each.
    fn extent() -> impl Strategy<Value = Extent> {
        let dim = prop::collection::vec((0usize..3, 0usize..4), 0..4).prop_map(|gaps| {
            let (mut ranges, mut end) = (Vec::new(), 0);
            for (gap, len) in gaps {
                ranges.push(end + gap..end + gap + len);
                end += gap + len;
            }
            (joined(ranges), end + 1)
        });
        prop::collection::vec(dim, 0..5).prop_map(|dims| {
            let (dims, shape) = dims.into_iter().unzip();
            Extent { name: "t".into(), shape, dims }
        })
    }

    proptest! {
        /// However the elements of a part are cut into runs, their boxes hold each once, the same as those of one run, and do not
        /// overlap in the whole.
        #[test]
        fn boxes_cover_a_part_once(extent in extent(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6)) {
            let count = extent.elements();
            let mut ends: Vec<usize> = cuts.iter().map(|cut| cut.index(count + 1)).chain([0, count]).collect();
            ends.sort_unstable();
            let flats: Vec<Range<usize>> = ends.windows(2).map(|pair| pair[0]..pair[1]).collect();
            let got: Option<Vec<usize>> = indices(&extent, flats.clone()).into_iter().collect();
            let got = got.expect("every element is in a box");
            prop_assert!(got.is_sorted_by(|a, b| a < b), "row-major in the whole too");
            prop_assert_eq!(&got, &all(&extent));
            let boxes: Vec<_> = flats.into_iter().flat_map(|flat| extent.boxes(flat)).map(|piece| piece.whole).collect();
            let ranges: usize = extent.dims.iter().map(|ranges| ranges.len().max(1)).product();
            prop_assert!(boxes.len() <= ranges * (2 * extent.shape.len().max(1) - 1) * (cuts.len() + 1));
            if extent.is_whole() {
                prop_assert_eq!(tiling_fault(&TensorBox::whole(&extent.shape), &boxes), None);
            }
        }
    }
}
