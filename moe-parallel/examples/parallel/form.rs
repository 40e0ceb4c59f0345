//! [`Form`]: the ways to exchange rows over many ranks that the benches compare, and what each sends, from its plan alone.
//!
//! What is compared is the way back from the experts, after which each of the `L` ranks of a tensor group has what all
//! experts made of the tokens that the group shares. Without coordination every rank fetches all of it; with coordination
//! only from the ranks of its own tensor index, and the group gathers the rest among itself.

use anyhow::{Result, ensure};
use moe_parallel::all_to_all::{Counts, Nodes, Plan, Route, Traffic, Transfer};
use std::ops::AddAssign;

/// Where ranks stand: nodes and tensor groups are of consecutive ranks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) ranks: usize,
    /// `G`
    pub(crate) ranks_per_node: usize,
    /// `L`
    pub(crate) tensor_ranks: usize,
}

impl Layout {
    /// Refuses what is impossible.
    pub(crate) fn check(self) -> Result<()> {
        let Self { ranks, ranks_per_node, tensor_ranks } = self;
        let some = ranks > 0 && ranks_per_node > 0 && tensor_ranks > 0;
        ensure!(some, "ranks, --ranks-per-node and --tensor-ranks must be at least 1");
        ensure!(ranks.is_multiple_of(tensor_ranks), "--tensor-ranks {tensor_ranks} must divide the {ranks} ranks");
        ensure!(
            ranks_per_node.is_multiple_of(tensor_ranks) || ranks <= ranks_per_node,
            "--tensor-ranks {tensor_ranks} must divide the {ranks_per_node} ranks of a node"
        );
        Ok(())
    }

    /// The ranks that see the same tokens as `rank`.
    pub(crate) fn tensor_group(self, rank: usize) -> Vec<usize> {
        let first = rank / self.tensor_ranks * self.tensor_ranks;
        (first..first + self.tensor_ranks).collect()
    }
}

/// One way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Form {
    /// Every rank with every rank.
    Flat,
    /// Inside the nodes, then between them.
    Hierarchical,
    /// Among ranks of one tensor index, then all tensor ranks gather.
    Coordinated,
    /// Among ranks of one tensor index inside the nodes, then between them, then all tensor ranks gather.
    Both,
}

impl Form {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Hierarchical => "hierarchical",
            Self::Coordinated => "coordinated",
            Self::Both => "both",
        }
    }

    pub(crate) fn route(self) -> Route {
        match self {
            Self::Flat | Self::Coordinated => Route::Flat,
            Self::Hierarchical | Self::Both => Route::Hierarchical,
        }
    }

    pub(crate) fn is_coordinated(self) -> bool {
        matches!(self, Self::Coordinated | Self::Both)
    }

    /// The ranks that `rank` exchanges rows with, itself among them.
    pub(crate) fn members(self, layout: Layout, rank: usize) -> Vec<usize> {
        if !self.is_coordinated() {
            return (0..layout.ranks).collect();
        }
        (rank % layout.tensor_ranks..layout.ranks).step_by(layout.tensor_ranks).collect()
    }
}

/// Messages and rows one rank sends to others, by level.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sent {
    pub(crate) intra_node: Level,
    pub(crate) inter_node: Level,
}

/// Messages and the rows in them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Level {
    pub(crate) messages: usize,
    pub(crate) rows: usize,
}

impl AddAssign for Sent {
    fn add_assign(&mut self, other: Self) {
        for (level, more) in [(&mut self.intra_node, other.intra_node), (&mut self.inter_node, other.inter_node)] {
            level.messages += more.messages;
            level.rows += more.rows;
        }
    }
}

impl From<Traffic> for Sent {
    fn from(traffic: Traffic) -> Self {
        Self {
            intra_node: Level { messages: traffic.intra_node_messages, rows: traffic.intra_node_rows },
            inter_node: Level { messages: traffic.inter_node_messages, rows: traffic.inter_node_rows },
        }
    }
}

/// What `rank` sends on the way back when every pair of ranks exchanges `rows`.
pub(crate) fn sent(form: Form, layout: Layout, rank: usize, rows: usize) -> Sent {
    let members = form.members(layout, rank);
    let place = members.iter().position(|&member| member == rank).unwrap_or(0);
    let nodes = Nodes::uniform(&members, layout.ranks_per_node);
    let counts = Counts::equal(rows, &vec![1; members.len()], place, form.route(), &nodes);
    let plan = Plan::new(place, &nodes, &counts);
    // On the way back a rank sends what it receives on the way there.
    let mut sent = Sent::default();
    for transfer in plan.steps.iter().flat_map(|step| &step.receives).filter(|transfer| transfer.peer != place) {
        sent += message(nodes.together(place, transfer.peer), Transfer::rows(transfer));
    }
    if form.is_coordinated() {
        let node_of = |rank: usize| rank / layout.ranks_per_node;
        for peer in layout.tensor_group(rank).into_iter().filter(|&peer| peer != rank) {
            sent += message(node_of(peer) == node_of(rank), rows * members.len());
        }
    }
    sent
}

fn message(inside: bool, rows: usize) -> Sent {
    let level = Level { messages: 1, rows };
    if inside { Sent { intra_node: level, ..Sent::default() } } else { Sent { inter_node: level, ..Sent::default() } }
}
