//! [`Plan`]: who sends which rows to whom, in which steps; made of counts alone, so that it can be counted, printed and tested
//! without a rank.
//!
//! Every pair of ranks exchanges a number of *chunks*, as many as the receiver has: rows for each expert of a rank, say.
//! Rows go in ordered by (receiver, chunk) and come out ordered by (chunk, sender), whatever the route.

use crate::comm::Kind;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;

/// Which node each member of a group is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nodes {
    /// The node of each member, numbered by first members.
    of: Vec<usize>,
    /// The place of each member on its node.
    places: Vec<usize>,
    /// The members of each node, in rank order.
    members: Vec<Vec<usize>>,
}

impl Nodes {
    /// The node of each member, by any numbers.
    pub fn new(of: &[usize]) -> Self {
        let mut numbers = HashMap::new();
        let (mut nodes, mut places, mut members) = (Vec::new(), Vec::new(), Vec::<Vec<usize>>::new());
        for (rank, name) in of.iter().enumerate() {
            let node = *numbers.entry(name).or_insert(members.len());
            if node == members.len() {
                members.push(Vec::new());
            }
            nodes.push(node);
            places.push(members[node].len());
            members[node].push(rank);
        }
        Self { of: nodes, places, members }
    }

    /// Members of a world whose nodes have `ranks_per_node` consecutive ranks each.
    ///
    /// # Panics
    /// If `ranks_per_node` is 0.
    pub fn uniform(members: &[usize], ranks_per_node: usize) -> Self {
        Self::new(&members.iter().map(|m| m / ranks_per_node).collect::<Vec<_>>())
    }

    /// Members.
    pub fn size(&self) -> usize {
        self.of.len()
    }

    /// Whether two members share a node.
    pub fn together(&self, a: usize, b: usize) -> bool {
        self.of[a] == self.of[b]
    }

    /// Whether a hierarchical route is another than the flat one: several nodes, one of them with several members.
    pub fn has_levels(&self) -> bool {
        self.members.len() > 1 && self.members.iter().any(|members| members.len() > 1)
    }

    /// The members on the node of `rank`, in rank order.
    pub fn node_of(&self, rank: usize) -> &[usize] {
        &self.members[self.of[rank]]
    }

    /// On a hierarchical route: the ranks whose rows member `place` of a node of `members` ranks carries on.
    pub(super) fn carried(&self, place: usize, members: usize) -> impl Iterator<Item = usize> {
        (0..self.size()).filter(move |&receiver| self.places[receiver] % members == place)
    }

    /// [`Nodes::carried`] by `rank`.
    pub(super) fn carried_by(&self, rank: usize) -> impl Iterator<Item = usize> {
        self.carried(self.places[rank], self.node_of(rank).len())
    }
}

/// The way rows take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// Straight from every rank to every rank: `p - 1` messages of a rank.
    Flat,
    /// Inside the node to the member that stands where the receiver stands in its node, then between nodes to the receiver:
    /// `G - 1 + p / G - 1` messages of a rank on nodes of `G` ranks, and rows that leave their node travel twice.
    ///
    /// # Source
    /// Paper section 5.3, hierarchical all-to-all.
    Hierarchical,
}

/// Which route the exchanges of a group take. No row depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RouteChoice {
    /// This one.
    Fixed(Route),
    /// The hierarchical one as long as few rows travel, else the flat one: how many are few is measured
    /// ([`crate::Mesh::measure_routes`]), and until then none are. Each exchange of counts tells every rank how many travel in all.
    BySize,
}

impl fmt::Display for RouteChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fixed(Route::Flat) => "flat",
            Self::Fixed(Route::Hierarchical) => "hierarchical",
            Self::BySize => "by size",
        })
    }
}

impl From<Route> for RouteChoice {
    fn from(route: Route) -> Self {
        Self::Fixed(route)
    }
}

/// Rows per chunk, as far as one rank must know them, and the way that they take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// The same for all ranks.
    pub route: Route,
    /// To each rank, for each of its chunks.
    pub sends: Vec<Vec<usize>>,
    /// From each rank, for each chunk of this rank.
    pub receives: Vec<Vec<usize>>,
    /// What members of this rank's node send, `[member of the node][receiver][chunk]`; those receivers alone are read whose
    /// rows pass this rank. Empty on a flat route.
    pub passing: Vec<Vec<Vec<usize>>>,
}

impl Counts {
    /// Those of rank `rank` when everything is known: `all[sender][receiver][chunk]`.
    pub fn of(all: &[Vec<Vec<usize>>], rank: usize, route: Route, nodes: &Nodes) -> Self {
        let passing = match route {
            Route::Flat => Vec::new(),
            Route::Hierarchical => nodes.node_of(rank).iter().map(|&member| all[member].clone()).collect(),
        };
        let receives = all.iter().map(|sender| sender[rank].clone()).collect();
        Self { route, sends: all[rank].clone(), receives, passing }
    }

    /// The same number of rows in every chunk; `chunks` are those of each rank.
    pub fn equal(rows: usize, chunks: &[usize], rank: usize, route: Route, nodes: &Nodes) -> Self {
        let row: Vec<Vec<usize>> = chunks.iter().map(|&chunks| vec![rows; chunks]).collect();
        let passing = match route {
            Route::Flat => Vec::new(),
            Route::Hierarchical => vec![row.clone(); nodes.node_of(rank).len()],
        };
        Self { route, receives: vec![row[rank].clone(); row.len()], sends: row, passing }
    }
}

/// Rows that go to one peer or come from it: pieces of a buffer, in the order they have in the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    /// The other rank; this one for rows that stay.
    pub peer: usize,
    /// Where in the buffer.
    pub pieces: Vec<Range<usize>>,
}

impl Transfer {
    fn new(peer: usize, pieces: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut joined: Vec<Range<usize>> = Vec::new();
        for piece in pieces.into_iter().filter(|piece| !piece.is_empty()) {
            match joined.last_mut() {
                Some(last) if last.end == piece.start => last.end = piece.end,
                _ => joined.push(piece),
            }
        }
        Self { peer, pieces: joined }
    }

    /// Rows in all.
    pub fn rows(&self) -> usize {
        self.pieces.iter().map(ExactSizeIterator::len).sum()
    }
}

/// One exchange: rows of one buffer go out, the next buffer is made of rows that come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// For stamps.
    pub kind: Kind,
    /// Out of the old buffer; nothing is sent to a peer that is not listed.
    pub sends: Vec<Transfer>,
    /// Into the new buffer.
    pub receives: Vec<Transfer>,
    /// Rows of the new buffer.
    pub rows: usize,
}

/// Everything one rank does in an all-to-all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Rows that go in.
    pub rows: usize,
    /// In order.
    pub steps: Vec<Step>,
}

/// Messages and rows between this rank and others, by level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Messages sent inside the node.
    pub intra_node_messages: usize,
    /// Rows in them.
    pub intra_node_rows: usize,
    /// Messages sent to other nodes.
    pub inter_node_messages: usize,
    /// Rows in them.
    pub inter_node_rows: usize,
}

impl std::ops::AddAssign for Traffic {
    fn add_assign(&mut self, other: Self) {
        self.intra_node_messages += other.intra_node_messages;
        self.intra_node_rows += other.intra_node_rows;
        self.inter_node_messages += other.inter_node_messages;
        self.inter_node_rows += other.inter_node_rows;
    }
}

/// Exclusive prefix sums, with the total last.
fn offsets(counts: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut all = vec![0];
    for count in counts {
        all.push(all[all.len() - 1] + count);
    }
    all
}

impl Plan {
    /// The plan of rank `rank`.
    pub fn new(rank: usize, nodes: &Nodes, counts: &Counts) -> Self {
        match counts.route {
            Route::Flat => Self::flat(rank, counts),
            Route::Hierarchical => Self::hierarchical(rank, nodes, counts),
        }
    }

    /// Rows that come out.
    pub fn output_rows(&self) -> usize {
        self.steps.last().map_or(self.rows, |step| step.rows)
    }

    /// Where each sender's part of each chunk ends up: `[chunk * senders + sender]`, with the total last.
    pub fn output_offsets(counts: &Counts) -> Vec<usize> {
        let chunks = counts.receives.first().map_or(0, Vec::len);
        offsets((0..chunks).flat_map(|chunk| counts.receives.iter().map(move |from| from[chunk])))
    }

    /// What is sent to each rank, as ranges of the input.
    fn inputs(counts: &Counts) -> Vec<Range<usize>> {
        offsets(counts.sends.iter().map(|chunks| chunks.iter().sum())).windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    /// Where the rows of one sender end up, chunk by chunk.
    fn outputs(sender: usize, senders: usize, offsets: &[usize]) -> impl Iterator<Item = Range<usize>> {
        let chunks = (offsets.len() - 1) / senders;
        (0..chunks).map(move |chunk| {
            let at = chunk * senders + sender;
            offsets[at]..offsets[at + 1]
        })
    }

    fn flat(rank: usize, counts: &Counts) -> Self {
        let size = counts.sends.len();
        let (inputs, outputs) = (Self::inputs(counts), Self::output_offsets(counts));
        let sends = in_turn(rank, size).map(|peer| Transfer::new(peer, std::iter::once(inputs[peer].clone())));
        let receives = in_turn(rank, size).map(|peer| Transfer::new(peer, Self::outputs(peer, size, &outputs)));
        let rows = outputs[outputs.len() - 1];
        Self { rows: inputs.last().map_or(0, |r| r.end), steps: vec![Step::new(Kind::AllToAll, sends, receives, rows)] }
    }

    /// Rank `(n, h)`, member `h` of node `n`, carries the rows of its whole node to the ranks that have `h` modulo the size of
    /// its node: with nodes of one size, to member `h` of every node.
    ///
    /// ```text
    /// input     by receiver (n', g')
    /// buffer    by receiver (n', h) on this rank's rail, and by sender (n, h') in it
    /// output    by chunk, and by sender (n', h')
    /// ```
    fn hierarchical(rank: usize, nodes: &Nodes, counts: &Counts) -> Self {
        let size = counts.sends.len();
        let (own_node, index) = (nodes.node_of(rank), nodes.places[rank]);
        let members = own_node.len();

        // 1. Inside the node, to whoever carries on.
        let inputs = Self::inputs(counts);
        let sends = in_turn(index, members).map(|member| {
            let pieces = nodes.carried(member, members).map(|receiver| inputs[receiver].clone());
            Transfer::new(own_node[member], pieces)
        });
        let carried: Vec<usize> = nodes.carried_by(rank).collect();
        let passing = |member: usize, receiver: usize| counts.passing[member][receiver].iter().sum::<usize>();
        let buffer = offsets(
            carried
                .iter()
                .flat_map(|&receiver| (0..members).map(move |member| (member, receiver)))
                .map(|(member, receiver)| passing(member, receiver)),
        );
        let from_member = |member: usize| {
            let piece = |at: usize| buffer[at * members + member]..buffer[at * members + member + 1];
            (0..carried.len()).map(piece).collect::<Vec<_>>()
        };
        let receives = in_turn(index, members).map(|member| Transfer::new(own_node[member], from_member(member)));
        let intra = Step::new(Kind::IntraNode, sends, receives, buffer[buffer.len() - 1]);

        // 2. Between nodes, to the receiver.
        let first = carried.iter().position(|&receiver| receiver == rank).unwrap_or(0);
        let sends = in_turn(first, carried.len())
            .map(|at| Transfer::new(carried[at], std::iter::once(buffer[at * members]..buffer[(at + 1) * members])));
        let outputs = Self::output_offsets(counts);
        let receives = in_turn(nodes.of[rank], nodes.members.len()).map(|node| {
            let node = &nodes.members[node];
            let pieces = node.iter().flat_map(|&sender| Self::outputs(sender, size, &outputs));
            Transfer::new(node[index % node.len()], pieces)
        });
        let rows = outputs[outputs.len() - 1];
        let inter = Step::new(Kind::InterNode, sends, receives, rows);
        Self { rows: inputs.last().map_or(0, |r| r.end), steps: vec![intra, inter] }
    }

    /// What this plan sends.
    pub fn traffic(&self, rank: usize, nodes: &Nodes) -> Traffic {
        let mut traffic = Traffic::default();
        for transfer in self.steps.iter().flat_map(|step| &step.sends).filter(|transfer| transfer.peer != rank) {
            let rows = transfer.rows();
            traffic += if nodes.together(rank, transfer.peer) {
                Traffic { intra_node_messages: 1, intra_node_rows: rows, ..Traffic::default() }
            } else {
                Traffic { inter_node_messages: 1, inter_node_rows: rows, ..Traffic::default() }
            };
        }
        traffic
    }
}

impl Step {
    /// Transfers without rows are left out: both sides know the counts.
    fn new(
        kind: Kind,
        sends: impl Iterator<Item = Transfer>,
        receives: impl Iterator<Item = Transfer>,
        rows: usize,
    ) -> Self {
        let some = |transfer: &Transfer| !transfer.pieces.is_empty();
        Self { kind, sends: sends.filter(some).collect(), receives: receives.filter(some).collect(), rows }
    }
}

/// `0..size` from `first` on: every rank begins with itself, so that not all of them send to the same one first.
fn in_turn(first: usize, size: usize) -> impl Iterator<Item = usize> {
    (0..size).map(move |step| (first + step) % size)
}
