//! [`MeshRanks`]: the ranks of a run over a [`Mesh`]: data parallel, expert parallel, tensor parallel, with moments and gradients
//! divided or not (ZeRO).

mod buckets;
mod division;

use super::division::Division;
use super::model::grad_group;
use super::optimizer::Units;
use super::ranks::{DividedParam, Passes, Ranks, Traffic};
use super::timeline::{Timeline, Track};
use crate::params::ParamTable;
use crate::{Error, Result};
use division::MeshDivision;
use moe_core::ParamSpec;
use moe_parallel::dims::part;
use moe_parallel::{Collectives, Communicator, ExchangeConfig, Mesh, ParallelDims, Phase, Placement, Site};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub(crate) const UPDATE: Site = Site::new(Phase::Update);

/// What of a run's state is divided over the ranks that hold the same parameters.
///
/// # Source
/// ZeRO (Rajbhandari et al. 2020, 1910.02054), over dense and expert parameters alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum Zero {
    /// Nothing.
    #[default]
    Off,
    /// Moments, and with them the work of the update.
    Moments,
    /// Gradients too, which are then added up over the ranks after every micro-batch.
    Gradients,
}

impl From<Zero> for u8 {
    fn from(zero: Zero) -> Self {
        zero as Self
    }
}

impl TryFrom<u8> for Zero {
    type Error = String;
    fn try_from(stage: u8) -> std::result::Result<Self, String> {
        let stages = [Self::Off, Self::Moments, Self::Gradients];
        let known = stages.get(usize::from(stage)).copied();
        known.ok_or_else(|| format!("zero must be 0, 1 or 2, got {stage}; parameters themselves are not divided"))
    }
}

/// How gradients are added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReduceConfig {
    /// What is divided.
    pub zero: Zero,
    /// Gradients that travel together, about so many elements.
    pub bucket_elements: usize,
    /// Most elements of buckets under way at a time, each way, but for one bucket that alone has more: their messages are in memory
    /// beside the gradients.
    pub most_under_way: usize,
    /// Whether they travel while the backward pass still runs.
    pub overlap: bool,
}

impl Default for ReduceConfig {
    /// 4 Mi elements, two such buckets under way, overlapped.
    fn default() -> Self {
        Self { zero: Zero::Off, bucket_elements: 4 << 20, most_under_way: 8 << 20, overlap: true }
    }
}

/// The ranks that hold the same parameters of a group.
#[derive(Debug, Clone)]
struct GroupRanks {
    /// As [`super::TrainModel::grad_group`]; all groups if `None`.
    name: Option<String>,
    /// Gradients are added up over this one,
    sums: Arc<dyn Communicator>,
    /// and sums and parameters brought to all over this one, in an order of its own.
    values: Arc<dyn Communicator>,
}

impl GroupRanks {
    fn new(name: Option<String>, ranks: &dyn Communicator) -> Result<Self> {
        let again = || ranks.split(Site::new(Phase::Start), 0, ranks.rank() as u64);
        Ok(Self { name, sums: again()?, values: again()? })
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The ranks of a run, seen from one of them.
#[derive(Debug)]
pub struct MeshRanks {
    mesh: Arc<Mesh>,
    groups: Vec<GroupRanks>,
    config: ReduceConfig,
    /// Whether passes exchange rows or parts of products.
    meeting: bool,
    /// Of each parameter, the elements of the rank that holds most of it: so all ranks make the same buckets.
    sizes: HashMap<String, usize>,
    sent: Arc<Sent>,
}

/// Gradients and parameters sent, and how long they were waited for.
#[derive(Debug, Default)]
struct Sent {
    bytes: [AtomicU64; 2],
    /// Time in which any were under way, and in which this rank waited for them, nanoseconds.
    busy: AtomicU64,
    waited: AtomicU64,
    timeline: Option<Arc<Timeline>>,
}

impl Sent {
    /// `counts[member]` f32 values to each other member of a group.
    fn count(&self, comm: &dyn Communicator, ranks_per_node: usize, counts: impl Fn(usize) -> usize) {
        let node = |member: usize| comm.group().members()[member] / ranks_per_node;
        for member in (0..comm.size()).filter(|&member| member != comm.rank()) {
            let level = usize::from(node(member) != node(comm.rank()));
            self.bytes[level].fetch_add((counts(member) * size_of::<f32>()) as u64, Ordering::Relaxed);
        }
    }

    /// Counts the time that `work` takes.
    fn waiting<T>(&self, work: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let result = work();
        self.waited.fetch_add(nanoseconds(begun.elapsed()), Ordering::Relaxed);
        self.note(Track::Work, "wait for gradients", begun, Instant::now());
        result
    }

    fn was_busy(&self, time: Duration) {
        self.busy.fetch_add(nanoseconds(time), Ordering::Relaxed);
    }

    fn note(&self, track: Track, what: &str, begin: Instant, end: Instant) {
        if let Some(timeline) = &self.timeline {
            timeline.add(track, what, begin, end);
        }
    }

    /// Bytes by level, and the seconds of `busy` and `waited`.
    fn read(&self) -> ([u64; 2], [f64; 2]) {
        let seconds = |time: &AtomicU64| Duration::from_nanos(time.load(Ordering::Relaxed)).as_secs_f64();
        let bytes = self.bytes.each_ref().map(|bytes| bytes.load(Ordering::Relaxed));
        (bytes, [seconds(&self.busy), seconds(&self.waited)])
    }
}

impl MeshRanks {
    /// Of a model with the parameters of `table`, which was built over `mesh`. Called by all ranks.
    ///
    /// # Errors
    /// [`Error::Parallel`] if a rank is missing.
    pub fn new(mesh: &Arc<Mesh>, table: &ParamTable, config: ReduceConfig) -> Result<Self> {
        let mut groups: Vec<GroupRanks> = Vec::new();
        let dims = mesh.placement().dims();
        let mut meeting = dims.tp > 1;
        for spec in table.specs() {
            let name = grad_group(spec);
            if spec.is_stacked() {
                let experts = dims.experts(spec.shape[0]);
                meeting |= experts.ep > 1 || experts.slices > 1;
            }
            if groups.iter().any(|group| group.name.as_ref() == Some(&name)) {
                continue;
            }
            groups.push(GroupRanks::new(Some(name), &*mesh.gradient_group(spec)?)?);
        }
        let placements = (0..dims.world_size()).map(|rank| Placement::new(dims, rank));
        let placements = placements.collect::<moe_parallel::Result<Vec<_>>>()?;
        let held = |spec: &ParamSpec, at: &Placement| at.local_shape(spec).iter().product::<usize>();
        let most = |spec: &ParamSpec| placements.iter().map(|at| held(spec, at)).max().unwrap_or(0);
        let sizes = table.specs().iter().map(|spec| (spec.name.clone(), most(spec))).collect();
        Ok(Self { mesh: Arc::clone(mesh), groups, config, meeting, sizes, sent: Arc::default() })
    }

    /// Of whole models of any kind, each with micro-batches of its own. Called by all ranks.
    ///
    /// # Errors
    /// [`Error::Parallel`] if a rank is missing.
    pub fn data_parallel(world: Arc<dyn Communicator>, config: ReduceConfig) -> Result<Self> {
        let dims = ParallelDims::new(world.size(), 1, 1, 1);
        let nodes = world.size();
        let mesh = Arc::new(Mesh::new(world, dims, nodes, ExchangeConfig::default())?);
        let groups = vec![GroupRanks::new(None, &**mesh.data())?];
        Ok(Self { mesh, groups, config, meeting: false, sizes: HashMap::new(), sent: Arc::default() })
    }

    /// The same, whose steps are drawn in a timeline.
    #[must_use]
    pub fn with_timeline(self, timeline: Arc<Timeline>) -> Self {
        Self { sent: Arc::new(Sent { timeline: Some(timeline), ..Sent::default() }), ..self }
    }

    /// The mesh.
    pub fn mesh(&self) -> &Arc<Mesh> {
        &self.mesh
    }
}

impl Ranks for MeshRanks {
    fn rank(&self) -> usize {
        self.mesh.world().rank()
    }

    fn placement(&self) -> Placement {
        self.mesh.placement()
    }

    fn share(&self, count: usize) -> Range<usize> {
        let placement = self.mesh.placement();
        let dims = placement.dims();
        part(count, dims.dense(placement.rank()).dp_rank, dims.dp)
    }

    fn exchange(&self, phase: Phase, own: Vec<u64>) -> Result<Vec<Vec<u64>>> {
        exchange(&**self.mesh.world(), Site::new(phase), &own)
    }

    fn passes(&self, count: usize) -> Passes {
        let most = count.div_ceil(self.mesh.placement().dims().dp);
        // Ranks wait for each other in their passes or between them: each has as many as every other.
        let in_step = self.meeting || self.config.zero == Zero::Gradients;
        Passes { rounds: if in_step { most } else { self.share(count).len() }, meeting: self.meeting }
    }

    fn traffic(&self) -> Option<Traffic> {
        if self.mesh.world().size() == 1 {
            return None;
        }
        let rows = self.mesh.sent();
        let seconds = [rows.intra_node_wait, rows.inter_node_wait].map(|wait| wait.as_secs_f64());
        let (gradient_bytes, [gradient_seconds, gradient_wait_seconds]) = self.sent.read();
        Some(Traffic {
            all_to_all_bytes: [rows.intra_node_bytes, rows.inter_node_bytes],
            all_to_all_seconds: seconds,
            gradient_bytes,
            gradient_seconds,
            gradient_wait_seconds,
        })
    }

    fn fail(&self, why: &Error) {
        if self.mesh.world().size() > 1 && why.fault().is_none() {
            self.mesh.world().give_up(Site::new(Phase::Forward), why.to_string());
        }
    }

    fn division(&self, units: Units, params: &[DividedParam]) -> Result<Box<dyn Division>> {
        Ok(Box::new(MeshDivision::new(self, units, params)?))
    }
}

/// The messages of all ranks of `comm`, in rank order.
fn exchange(comm: &dyn Communicator, site: Site, own: &[u64]) -> Result<Vec<Vec<u64>>> {
    let counts = comm.all_gather(site, &[own.len() as u64])?;
    let counts: Vec<usize> = counts.into_iter().map(|count| count as usize).collect();
    Ok(comm.start_all_gather_v(site, own, &counts)?.wait_parts()?)
}
