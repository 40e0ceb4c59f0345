//! [`Stamp`]: which operation a message belongs to, so that ranks which do different things find out.

use std::fmt;

/// Where in a run an operation stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// Before the first step.
    Start,
    /// Forward pass.
    Forward,
    /// Backward pass.
    Backward,
    /// Gradients, optimizer, parameters.
    Update,
    /// A checkpoint.
    Save,
    /// What a server's ranks do next.
    Serve,
}

impl Phase {
    const ALL: [Self; 6] = [Self::Start, Self::Forward, Self::Backward, Self::Update, Self::Save, Self::Serve];

    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Forward => "forward pass",
            Self::Backward => "backward pass",
            Self::Update => "update",
            Self::Save => "save",
            Self::Serve => "serving",
        }
    }
}

/// The place an operation is called from: errors name it, and ranks in different places find out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Site {
    /// Part of the run.
    pub phase: Phase,
    /// Layer, if it belongs to one.
    pub layer: Option<u32>,
}

impl Site {
    /// Outside any layer.
    pub const fn new(phase: Phase) -> Self {
        Self { phase, layer: None }
    }

    /// In a layer.
    pub const fn layer(phase: Phase, layer: u32) -> Self {
        Self { phase, layer: Some(layer) }
    }

    /// The same layer in the backward pass.
    #[must_use]
    pub const fn backward(self) -> Self {
        Self { phase: Phase::Backward, layer: self.layer }
    }
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "{}, layer {layer}", self.phase.name()),
            None => f.write_str(self.phase.name()),
        }
    }
}

/// The collective a message is part of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A part for each member.
    AllToAll,
    /// Every member's part to all.
    AllGather,
    /// Sums or maxima, each member its part.
    ReduceScatter,
    /// Sums or maxima to all.
    AllReduce,
    /// One member's values to all.
    Broadcast,
    /// Nothing but the meeting.
    Barrier,
    /// A new group.
    Split,
    /// A step of a hierarchical all-to-all inside a node.
    IntraNode,
    /// A step of a hierarchical all-to-all between nodes.
    InterNode,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::AllToAll,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllReduce,
        Self::Broadcast,
        Self::Barrier,
        Self::Split,
        Self::IntraNode,
        Self::InterNode,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::AllToAll => "all-to-all",
            Self::AllGather => "all-gather",
            Self::ReduceScatter => "reduce-scatter",
            Self::AllReduce => "all-reduce",
            Self::Broadcast => "broadcast",
            Self::Barrier => "barrier",
            Self::Split => "split",
            Self::IntraNode => "intra-node all-to-all",
            Self::InterNode => "inter-node all-to-all",
        }
    }
}

/// One operation of one group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    /// The group.
    pub context: u64,
    /// Operations of the group before this one.
    pub sequence: u64,
    /// What it is.
    pub kind: Kind,
    /// Where it was called.
    pub site: Site,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ({}, operation {} of group {:04x})",
            self.kind.name(),
            self.site,
            self.sequence,
            self.context as u16
        )
    }
}

impl Stamp {
    /// Size of [`Stamp::to_bytes`].
    pub const BYTES: usize = 24;
    const NO_LAYER: u32 = u32::MAX;

    /// For the header of a message.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.context.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.site.layer.unwrap_or(Self::NO_LAYER).to_le_bytes());
        bytes[20] = Kind::ALL.iter().position(|&k| k == self.kind).unwrap_or(0) as u8;
        bytes[21] = Phase::ALL.iter().position(|&p| p == self.site.phase).unwrap_or(0) as u8;
        bytes
    }

    /// The stamp of a header; `None` if these bytes are none.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.get(..Self::BYTES)?.try_into().ok()?;
        let word = |at: usize| bytes[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let layer = bytes[16..20].try_into().map(u32::from_le_bytes).ok()?;
        Some(Self {
            context: word(0)?,
            sequence: word(8)?,
            kind: *Kind::ALL.get(usize::from(bytes[20]))?,
            site: Site {
                phase: *Phase::ALL.get(usize::from(bytes[21]))?,
                layer: (layer != Self::NO_LAYER).then_some(layer),
            },
        })
    }
}
