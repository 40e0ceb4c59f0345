//! Every route against a plain gathering of everything, and what it sends against the paper's formulas.

use super::*;
use crate::comm::thread::ThreadWorld;
use crate::comm::{Collectives, Phase, Site};
use proptest::prelude::*;
use std::sync::Arc;

const SITE: Site = Site::layer(Phase::Forward, 0);

/// `counts[sender][receiver][chunk]`
type AllCounts = Vec<Vec<Vec<usize>>>;

/// Two values per row that name sender, receiver, chunk and place.
fn rows(sender: usize, receiver: usize, chunk: usize, count: usize) -> Vec<f32> {
    (0..count).flat_map(|i| [(sender * 100 + receiver) as f32, (chunk * 1000 + i) as f32]).collect()
}

fn input(all: &AllCounts, rank: usize) -> Vec<f32> {
    let of = |(receiver, chunks): (usize, &Vec<usize>)| {
        chunks.iter().enumerate().flat_map(|(c, &n)| rows(rank, receiver, c, n)).collect::<Vec<_>>()
    };
    all[rank].iter().enumerate().flat_map(of).collect()
}

/// What must come out: by chunk, then by sender.
fn output(all: &AllCounts, rank: usize) -> Vec<f32> {
    let chunks = all[0][rank].len();
    let of = |c: usize| (0..all.len()).flat_map(move |s| rows(s, rank, c, all[s][rank][c])).collect::<Vec<_>>();
    (0..chunks).flat_map(of).collect()
}

/// Runs every route there and back on threads; plans made of exchanged counts are those made of all counts.
fn check(all: &AllCounts, nodes: &Nodes) {
    ThreadWorld::new(all.len()).run(|comm| {
        let rank = comm.rank();
        for route in [Route::Flat, Route::Hierarchical] {
            let exchange = Arc::new(AllToAll::new(Arc::clone(&comm), nodes.clone(), route).unwrap());
            let counts = exchange.exchange_counts(SITE, all[rank].clone()).unwrap();
            let plan = Arc::new(exchange.plan(&counts));
            assert_eq!(*plan, Plan::new(rank, nodes, &Counts::of(all, rank, route, nodes)), "{route:?}");
            let before = exchange.sent();
            let there = exchange.run(&plan, Direction::There, SITE, &input(all, rank), 2).unwrap();
            assert_eq!(there, output(all, rank), "{route:?} {all:?}");
            let sent = exchange.sent();
            let traffic = plan.traffic(rank, nodes);
            let messages = traffic.intra_node_messages + traffic.inter_node_messages;
            let counted = sent.intra_node_messages + sent.inter_node_messages;
            assert_eq!(counted - before.intra_node_messages - before.inter_node_messages, messages as u64);
            let bytes = sent.inter_node_bytes - before.inter_node_bytes;
            assert_eq!(bytes, (traffic.inter_node_rows * 8) as u64, "counted bytes are those of the plan");
            let back = exchange.run(&plan, Direction::Back, SITE, &there, 2).unwrap();
            assert_eq!(back, input(all, rank), "{route:?} back");
            assert!(exchange.run(&plan, Direction::There, SITE, &[0f32; 1], 2).is_err() || plan.rows == 0);
        }
    });
}

/// Exchanges whose route depends on the number of rows have the plans of the route that it comes to, on every rank.
fn check_by_size(all: &AllCounts, nodes: &Nodes) {
    let rows: usize = all.iter().flatten().flatten().sum();
    ThreadWorld::new(all.len()).run(|comm| {
        let rank = comm.rank();
        for (few, small) in [(rows, Route::Hierarchical), (rows.saturating_sub(1), Route::Flat)] {
            let exchange = Arc::new(AllToAll::new(Arc::clone(&comm), nodes.clone(), RouteChoice::BySize).unwrap());
            exchange.set_route_times(RouteTimes { few: few as u64, timings: Vec::new() });
            let route = if rows > 0 && nodes.has_levels() { small } else { Route::Flat };
            let counts = exchange.exchange_counts(SITE, all[rank].clone()).unwrap();
            if rows > 0 {
                assert_eq!(counts.route, route, "{few} of {rows}");
                assert_eq!(exchange.plan(&counts), Plan::new(rank, nodes, &Counts::of(all, rank, route, nodes)));
            }
            let plan = Arc::new(exchange.plan(&counts));
            let there = exchange.run(&plan, Direction::There, SITE, &input(all, rank), 2).unwrap();
            assert_eq!(there, output(all, rank), "{all:?}");
            assert_eq!(exchange.run(&plan, Direction::Back, SITE, &there, 2).unwrap(), input(all, rank));
        }
    });
}

fn filled(chunks: &[usize], count: impl Fn(usize, usize, usize) -> usize) -> AllCounts {
    let size = chunks.len();
    let to = |s: usize, r: usize| (0..chunks[r]).map(|c| count(s, r, c)).collect();
    (0..size).map(|s| (0..size).map(|r| to(s, r)).collect()).collect()
}

#[test]
fn equal_parts_on_nodes_of_one_size() {
    for (nodes, per_node) in [(1, 1), (1, 4), (4, 1), (2, 2), (2, 4), (4, 2)] {
        let size = nodes * per_node;
        let members: Vec<usize> = (0..size).collect();
        let (all, nodes) = (filled(&vec![1; size], |_, _, _| 3), Nodes::uniform(&members, per_node));
        check(&all, &nodes);
        check_by_size(&all, &nodes);
    }
}

/// Ranks that send nothing, chunks nobody sends to, and a rank that takes everything.
#[test]
fn skewed_parts() {
    let nodes = Nodes::uniform(&[0, 1, 2, 3, 4, 5], 2);
    check(&filled(&[1; 6], |_, _, _| 0), &nodes);
    check(&filled(&[2; 6], |_, r, _| if r == 4 { 7 } else { 0 }), &nodes);
    check(&filled(&[2; 6], |s, _, c| if s == 3 { 0 } else { s + c }), &nodes);
    let mixed = filled(&[3, 0, 1, 2, 0, 5], |s, r, c| (s * 7 + r * 3 + c) % 4);
    check(&mixed, &nodes);
    check_by_size(&mixed, &nodes);
    check_by_size(&filled(&[1; 6], |_, _, _| 0), &nodes);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Nodes of any sizes, ranks in any order on them, any counts.
    #[test]
    fn any_counts_on_any_nodes(
        of in prop::collection::vec(0usize..3, 1..7),
        chunks in prop::collection::vec(0usize..4, 6),
        seed in any::<u32>(),
    ) {
        let chunks = &chunks[..of.len()];
        let count = |s: usize, r: usize, c: usize| (seed as usize >> ((s * 5 + r * 3 + c) % 29)) % 4;
        let (all, nodes) = (filled(chunks, count), Nodes::new(&of));
        check(&all, &nodes);
        check_by_size(&all, &nodes);
    }
}

#[test]
fn routes_are_timed_by_all_ranks_alike() {
    let nodes = Nodes::uniform(&[0, 1, 2, 3], 2);
    let times = ThreadWorld::new(4).run(|comm| {
        let exchange = Arc::new(AllToAll::new(comm, nodes.clone(), RouteChoice::BySize).unwrap());
        exchange.measure(SITE, 8).unwrap();
        exchange.route_times().expect("there is a choice").clone()
    });
    assert!(times.iter().all(|other| *other == times[0]), "{times:?}");
    let RouteTimes { few, timings } = &times[0];
    assert!(timings.len() > 1 && timings.windows(2).all(|pair| pair[0].rows < pair[1].rows), "{timings:?}");
    let wins = timings.iter().take_while(|timing| timing.hierarchical < timing.flat).last();
    assert_eq!(*few, wins.map_or(0, |timing| timing.rows));
    for choice in [Route::Flat.into(), Route::Hierarchical.into()] {
        let choice: RouteChoice = choice;
        ThreadWorld::new(4).run(|comm| {
            let exchange = Arc::new(AllToAll::new(comm, nodes.clone(), choice).unwrap());
            exchange.measure(SITE, 8).unwrap();
            assert_eq!(exchange.route_times(), None);
        });
    }
}

/// Paper section 5.3: from O(p) to O(G + p/G) messages of a rank, with twice the rows at most.
#[test]
fn messages_are_those_of_the_papers_formulas() {
    for (size, per_node) in [(8, 2), (16, 8), (64, 8), (128, 8), (256, 16), (64, 1), (64, 64)] {
        let members: Vec<usize> = (0..size).collect();
        let nodes = Nodes::uniform(&members, per_node);
        let chunks = vec![1; size];
        let of = |rank: usize, route| {
            Plan::new(rank, &nodes, &Counts::equal(5, &chunks, rank, route, &nodes)).traffic(rank, &nodes)
        };
        for rank in [0, size / 3, size - 1] {
            let flat = of(rank, Route::Flat);
            assert_eq!(flat.intra_node_messages + flat.inter_node_messages, size - 1);
            assert_eq!(flat.inter_node_messages, size - per_node);
            let two = of(rank, Route::Hierarchical);
            assert_eq!(two.intra_node_messages, per_node - 1);
            assert_eq!(two.inter_node_messages, size / per_node - 1);
            assert_eq!(two.inter_node_rows, 5 * (size - per_node), "no more rows leave the node");
            assert_eq!(two.intra_node_rows, 5 * (per_node - 1) * (size / per_node));
        }
    }
}
