//! Costs against numbers worked out by hand, and choices.

use super::*;
use crate::Precision;
use crate::families::Family;
use crate::gpt::GptConfig;
use crate::train::mesh::{ReduceConfig, Zero};
use moe_parallel::{ParallelDims, Placement};

/// A PR-MoE with two layers of 4 experts and one of 8, four heads, three micro-batches of 2 x 16 tokens for each of four ranks.
fn size() -> RunSize {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (100, 16, 32, 4, 128);
    config.num_layers = 6;
    config.moe.as_mut().unwrap().num_experts = vec![4, 4, 8];
    let decoder = config.decoder().unwrap();
    RunSize {
        decoder,
        beside: Vec::new(),
        precision: Precision::Bf16,
        seq_len: 16,
        micro_batch_size: 2,
        micro_batches: 12,
    }
}

fn reduce(zero: Zero) -> ReduceConfig {
    ReduceConfig { zero, bucket_elements: 1000, most_under_way: 2000, overlap: true }
}

fn cost(dims: ParallelDims, ranks_per_node: usize, zero: Zero) -> LayoutCost {
    LayoutCost::new(&size(), dims, ranks_per_node, reduce(zero)).unwrap()
}

/// One expert: 32 x 128 and 128 x 32 with their biases.
const EXPERT: usize = 2 * 32 * 128 + 128 + 32;

fn dense() -> usize {
    size().decoder.params().elem_count() - 16 * EXPERT
}

#[test]
fn memory_follows_the_formula() {
    let all = dense() + 16 * EXPERT;
    // Whole, then over 4 ranks: moments of the n-th part; then gradients too.
    let whole = cost(ParallelDims::SINGLE, 1, Zero::Off).ranks[0].memory;
    assert_eq!((whole.parameters, whole.gradients, whole.moments, whole.messages), (4 * all, 4 * all, 8 * all, 0));
    let part = dense().div_ceil(4) + (8 * EXPERT).div_ceil(4) * 2;
    let dp4 = ParallelDims::new(4, 1, 1, 1);
    for (zero, gradients, moments) in
        [(Zero::Off, all, all), (Zero::Moments, all, part), (Zero::Gradients, part + 2 * 8 * 32 * 128, part)]
    {
        let memory = cost(dp4, 4, zero).ranks[2].memory;
        assert_eq!((memory.gradients, memory.moments), (4 * gradients, 8 * moments), "{zero:?}");
        assert_eq!(memory.parameters, 4 * all);
    }
    // Experts over ranks: a quarter of them, whose moments nobody shares.
    let ep4 = ParallelDims::new(4, 1, 4, 1);
    for rank in cost(ep4, 4, Zero::Moments).ranks {
        assert_eq!(rank.parameters, dense() + 4 * EXPERT);
        assert_eq!(rank.memory.moments, 8 * (dense().div_ceil(4) + 4 * EXPERT));
    }
    let experts = &cost(ep4, 4, Zero::Off).ranks[3].experts;
    assert_eq!(*experts, [(4, 3..4), (8, 6..8)]);
}

/// The ranks' parameters are what the placement gives them.
#[test]
fn parameters_are_those_of_the_placement() {
    let table = size().decoder.params();
    for dims in [ParallelDims::new(2, 2, 4, 1), ParallelDims::new(4, 1, 2, 2), ParallelDims::new(3, 1, 3, 1)] {
        for (rank, cost) in cost(dims, 2, Zero::Off).ranks.iter().enumerate() {
            let placement = Placement::new(dims, rank).unwrap();
            let extents = table.specs().iter().flat_map(|spec| placement.extents(spec));
            assert_eq!(cost.parameters, extents.map(|extent| extent.elements()).sum::<usize>(), "{dims:?} {rank}");
        }
    }
}

#[test]
fn traffic_follows_the_formula() {
    // Data parallel over two nodes of two: a quarter of the sums to each peer, and back.
    let all = dense() + 16 * EXPERT;
    let quarter = 4 * (dense().div_ceil(4) + 2 * (8 * EXPERT).div_ceil(4));
    assert!(4 * all <= 4 * quarter);
    let sent = cost(ParallelDims::new(4, 1, 1, 1), 2, Zero::Moments).ranks[1].traffic;
    assert_eq!(sent.gradients, LevelBytes { intra_node: 2 * quarter, inter_node: 4 * quarter });
    assert_eq!((sent.rows, sent.tensors), Default::default());
    // Gradients divided: sums after each of three passes.
    let sent = cost(ParallelDims::new(4, 1, 1, 1), 2, Zero::Gradients).ranks[1].traffic;
    assert_eq!(sent.gradients, LevelBytes { intra_node: 4 * quarter, inter_node: 8 * quarter });
    // Experts over four: a quarter of the rows of 3 layers to each peer, four ways, three passes.
    let rows = 4 * 3 * 3 * (2 * 16 / 4) * 32 * 4;
    let sent = cost(ParallelDims::new(4, 1, 4, 1), 2, Zero::Off).ranks[1].traffic;
    assert_eq!(sent.rows, LevelBytes { intra_node: rows, inter_node: 2 * rows });
    // Tensor groups of two inside a node: 4 sums in each of 6 layers (the MoE layers have a residual network), six passes.
    let sent = cost(ParallelDims::new(2, 2, 2, 1), 2, Zero::Off).ranks[1].traffic;
    assert_eq!(sent.tensors, LevelBytes { intra_node: 6 * 6 * 4 * 2 * 16 * 32 * 4, inter_node: 0 });
}

#[track_caller]
fn chosen(world: usize, ranks_per_node: usize, request: LayoutRequest) -> (ParallelDims, Zero) {
    let layout = choose(&size(), world, ranks_per_node, &request, reduce(Zero::Off)).unwrap();
    (layout.dims, layout.zero)
}

#[test]
fn what_is_asked_for_is_kept_and_the_rest_chosen() {
    let ep2 = LayoutRequest { ep: Some(2), tp: Some(1), zero: Some(Zero::Gradients), ..LayoutRequest::default() };
    assert_eq!(chosen(4, 4, ep2), (ParallelDims::new(4, 1, 2, 1), Zero::Gradients));
    let (dims, zero) = chosen(4, 2, LayoutRequest::default());
    let of = |layout: &LayoutCost| {
        let traffic = layout.traffic().total();
        (traffic.inter_node, layout.most_work(), traffic.intra_node)
    };
    let best = of(&cost(dims, 2, zero));
    for tp in [1, 2, 4] {
        for ep in [1, 2, 4] {
            let request = LayoutRequest { tp: Some(tp), ep: Some(ep), ..LayoutRequest::default() };
            if let Ok(other) = choose(&size(), 4, 2, &request, reduce(Zero::Off)) {
                assert!(best <= of(&other), "{tp} {ep}");
            }
        }
    }
    // On one node ranks share the work: none does what another does too.
    let (dims, _) = chosen(4, 4, LayoutRequest { ep: Some(1), ..LayoutRequest::default() });
    assert_eq!((dims.dp, dims.tp), (4, 1));
    assert_eq!(chosen(1, 1, LayoutRequest::default()), (ParallelDims::SINGLE, Zero::Off));
}

/// The budget rules out what does not fit; if nothing does, the error says what the smallest would need.
#[test]
fn budgets_are_kept() {
    let whole = LayoutRequest { tp: Some(1), ep: Some(1), ..LayoutRequest::default() };
    let need = |zero| cost(ParallelDims::new(4, 1, 1, 1), 4, zero).most_memory().total();
    let with = |bytes: usize| LayoutRequest { memory_budget: Some(bytes), ..whole };
    assert_eq!(chosen(4, 4, with(need(Zero::Off))).1, Zero::Off);
    assert_eq!(chosen(4, 4, with(need(Zero::Off) - 1)).1, Zero::Moments);
    let error = choose(&size(), 4, 4, &with(1000), reduce(Zero::Off)).unwrap_err().to_string();
    assert!(error.contains("memory budget") && error.contains("needs"), "{error}");
}

#[test]
fn impossible_layouts_are_refused_with_the_nearest() {
    for (request, parts) in [
        (LayoutRequest { dp: Some(3), tp: Some(2), ..LayoutRequest::default() }, &["needs 6 ranks"][..]),
        (LayoutRequest { tp: Some(8), ..LayoutRequest::default() }, &["num_heads 4", "nearest are dp"]),
        (LayoutRequest { ep: Some(3), ..LayoutRequest::default() }, &["ep 3", "nearest are"]),
        (LayoutRequest { expert_slices: Some(3), ..LayoutRequest::default() }, &["expert_slices 3", "nearest are"]),
    ] {
        let error = choose(&size(), 8, 8, &request, reduce(Zero::Off)).unwrap_err().to_string();
        for part in parts {
            assert!(error.contains(part), "{error}");
        }
    }
}
