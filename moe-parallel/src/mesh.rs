//! [`Mesh`]: a rank's place in a layout, with a communicator for every group it is in. Everything that is built over ranks is
//! built from it.

use crate::all_to_all::{AllToAll, Nodes, Route, RouteChoice, RouteTimes};
use crate::comm::{Collectives, Communicator, Phase, Site};
use crate::dims::{ExpertDims, ExpertOrder, ParallelDims};
use crate::expert::{AllToAllDispatcher, Coordinated, Coordination, ExpertExchange, RankDispatcher};
use crate::placement::Placement;
use crate::tensor::RankOps;
use crate::{Error, Result};
use candle_nn::VarBuilder;
use moe_core::{LocalDispatcher, MoeBlock, MoeConfig, MoeOps, Ops, ParamSpec};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// How rows travel to experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ExchangeConfig {
    /// The way between nodes.
    pub route: RouteChoice,
    /// What tensor groups do about having the same tokens.
    pub coordination: Coordination,
}

impl Default for ExchangeConfig {
    fn default() -> Self {
        Self { route: Route::Flat.into(), coordination: Coordination::None }
    }
}

/// A rank of a layout and its communicators.
#[derive(Debug)]
pub struct Mesh {
    placement: Placement,
    ranks_per_node: usize,
    exchange: ExchangeConfig,
    world: Arc<dyn Communicator>,
    tensor: Arc<dyn Communicator>,
    data: Arc<dyn Communicator>,
    /// By the number of ranks that share a layer's experts, which says all.
    experts: Mutex<HashMap<usize, Arc<ExpertGroups>>>,
}

/// The communicators of one way to spread experts.
#[derive(Debug)]
struct ExpertGroups {
    dims: ExpertDims,
    all_to_all: Arc<AllToAll>,
    ep_ranks: Vec<usize>,
    copies: usize,
    coordinated: Option<Coordinated>,
    slices: Option<Arc<dyn Communicator>>,
    /// Ranks that hold the same parameters of experts and must add up their gradients.
    replicas: Arc<dyn Communicator>,
}

const SITE: Site = Site::new(Phase::Start);

/// The communicator of the group that `members` gives for every rank.
fn grouped(world: &Arc<dyn Communicator>, members: &[usize]) -> Result<Arc<dyn Communicator>> {
    let first = members.first().copied().unwrap_or(0);
    let place = members.iter().position(|&m| m == world.rank()).unwrap_or(0);
    world.split(SITE, first as u64, place as u64)
}

impl Mesh {
    /// The place of this rank. Called by all ranks of `world`, which are `ranks_per_node` to a node.
    ///
    /// # Errors
    /// [`Error::Layout`] for a layout these ranks cannot have; [`Error::Fault`].
    pub fn new(
        world: Arc<dyn Communicator>,
        dims: ParallelDims,
        ranks_per_node: usize,
        exchange: ExchangeConfig,
    ) -> Result<Self> {
        dims.validate(world.size())?;
        if ranks_per_node == 0 {
            return Err(Error::Layout("ranks_per_node must be at least 1, got 0".into()));
        }
        let (order, coordination) = (dims.expert_order, exchange.coordination);
        let fits = match coordination {
            Coordination::None => true,
            Coordination::ByDestination => order == ExpertOrder::Consecutive,
            Coordination::ByTokens => order == ExpertOrder::WithinTensor,
        };
        if dims.tp > 1 && !fits {
            return Err(Error::Layout(format!(
                "coordination {coordination:?} does not go with expert groups in the order {order:?}: by destination needs \
                 consecutive ranks, by tokens needs groups within a tensor index"
            )));
        }
        let rank = world.rank();
        let tensor = grouped(&world, &dims.tensor_group(rank))?;
        let data = grouped(&world, &dims.data_group(rank))?;
        let placement = Placement::new(dims, rank)?;
        Ok(Self { placement, ranks_per_node, exchange, world, tensor, data, experts: Mutex::default() })
    }

    /// Where this rank stands.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// How rows travel to experts.
    pub fn exchange(&self) -> ExchangeConfig {
        self.exchange
    }

    /// Consecutive ranks on a node.
    pub fn ranks_per_node(&self) -> usize {
        self.ranks_per_node
    }

    /// All ranks.
    pub fn world(&self) -> &Arc<dyn Communicator> {
        &self.world
    }

    /// The ranks that share each dense matrix, and have the same tokens.
    pub fn tensor(&self) -> &Arc<dyn Communicator> {
        &self.tensor
    }

    /// The ranks that hold the same parts of dense matrices, and have different tokens.
    pub fn data(&self) -> &Arc<dyn Communicator> {
        &self.data
    }

    /// The groups of layers with `num_experts`. All ranks call this for the same layers in the same order.
    fn groups(&self, num_experts: usize) -> Result<Arc<ExpertGroups>> {
        let dims = self.placement.dims().experts(num_experts);
        let mut known = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(groups) = known.get(&dims.ep) {
            return Ok(Arc::clone(groups));
        }
        let groups = Arc::new(self.make_groups(dims)?);
        known.insert(dims.ep, Arc::clone(&groups));
        Ok(groups)
    }

    fn make_groups(&self, dims: ExpertDims) -> Result<ExpertGroups> {
        let (rank, tp) = (self.world.rank(), self.placement.dims().tp);
        let tp_rank = |rank: usize| self.placement.dims().dense(rank).tp_rank;
        let whole = dims.expert_group(rank);
        let consecutive = dims.order == ExpertOrder::Consecutive && tp > 1;
        // A layer with fewer experts than tensor indices has its groups within one: nothing to send by destination there.
        // And experts that are whole on every rank need no rows at all.
        let coordination = match self.exchange.coordination {
            Coordination::ByDestination if dims.order == ExpertOrder::WithinTensor => Coordination::None,
            _ if dims.ep == 1 && dims.slices == 1 => Coordination::None,
            other => other,
        };
        let by_destination = coordination == Coordination::ByDestination && consecutive;
        let peer = |r: &usize| !by_destination || tp_rank(*r) == tp_rank(rank);
        let members: Vec<usize> = whole.iter().copied().filter(peer).collect();
        let ep_ranks = members.iter().map(|&member| dims.coordinates(member).ep_rank).collect();
        let nodes = Nodes::uniform(&members, self.ranks_per_node);
        let all_to_all = AllToAll::new(grouped(&self.world, &members)?, nodes, self.exchange.route)?;
        let coordinated = (coordination != Coordination::None && tp > 1)
            .then(|| Coordinated { comm: Arc::clone(&self.tensor), coordination });
        let slices = grouped(&self.world, &dims.slice_group(rank))?;
        let mut replicas = dims.replica_group(rank);
        if coordination == Coordination::ByTokens {
            // Each tensor index has seen a part of the rows.
            replicas = replicas.iter().flat_map(|&r| self.placement.dims().tensor_group(r)).collect();
        }
        Ok(ExpertGroups {
            dims,
            all_to_all: Arc::new(all_to_all),
            ep_ranks,
            copies: if consecutive && !by_destination { tp } else { 1 },
            coordinated,
            slices: (dims.slices > 1).then_some(slices),
            replicas: grouped(&self.world, &replicas)?,
        })
    }

    /// The dispatcher of an MoE layer. All ranks call this for the same layers in the same order.
    ///
    /// # Errors
    /// [`Error::Fault`].
    pub fn dispatcher(&self, num_experts: usize, layer: u32, ops: Arc<dyn MoeOps>) -> Result<RankDispatcher> {
        let groups = self.groups(num_experts)?;
        if groups.dims.ep == 1 && groups.slices.is_none() {
            return Ok(RankDispatcher::Local(LocalDispatcher::new(ops)));
        }
        let exchange = ExpertExchange {
            num_experts,
            ep: groups.dims.ep,
            ep_rank: groups.dims.coordinates(self.world.rank()).ep_rank,
            all_to_all: Arc::clone(&groups.all_to_all),
            ep_ranks: groups.ep_ranks.clone(),
            copies: groups.copies,
            coordinated: groups.coordinated.clone(),
            slices: groups.slices.clone(),
        };
        Ok(RankDispatcher::AllToAll(AllToAllDispatcher::new(Arc::new(exchange), ops, layer)?))
    }

    /// The operations of layer number `layer` (`None` before the first and after the last) on this rank.
    ///
    /// # Errors
    /// [`Error::Fault`].
    pub fn ops(&self, inner: Arc<dyn Ops>, num_experts: Option<usize>, layer: Option<u32>) -> Result<Arc<dyn Ops>> {
        let slices = num_experts.map(|experts| self.groups(experts)).transpose()?.and_then(|g| g.slices.clone());
        let site = Site { phase: Phase::Forward, layer };
        Ok(Arc::new(RankOps::new(inner, Arc::clone(&self.tensor), slices, site)))
    }

    /// This rank's part of an MoE layer: `config` is the whole one's, `vb` gives this rank's parts of the parameters. All ranks
    /// call this for the same layers in the same order.
    ///
    /// # Errors
    /// As [`MoeBlock::with_dispatcher`]; [`Error::Layout`] if the layer cannot be split so; [`Error::Fault`].
    pub fn moe_block(
        &self,
        config: &MoeConfig,
        vb: VarBuilder<'_>,
        ops: Arc<dyn Ops>,
        layer: u32,
    ) -> Result<MoeBlock<RankDispatcher>> {
        let dispatcher = self.dispatcher(config.num_experts, layer, Arc::clone(&ops) as Arc<dyn MoeOps>)?;
        let ops = self.ops(ops, Some(config.num_experts), Some(layer))?;
        Ok(MoeBlock::with_dispatcher(&self.placement.moe(config)?, vb, ops, dispatcher)?)
    }

    /// The ranks over which the gradient of a parameter is added up: those that hold the same part of it and have seen other
    /// rows.
    ///
    /// # Errors
    /// [`Error::Fault`] where a layer with so many experts has not been built yet.
    pub fn gradient_group(&self, spec: &ParamSpec) -> Result<Arc<dyn Communicator>> {
        if spec.is_stacked() {
            return Ok(Arc::clone(&self.groups(spec.shape[0])?.replicas));
        }
        Ok(Arc::clone(&self.data))
    }

    /// Times exchanges of rows of `width` values by both routes where the route depends on their size, and has later ones take the
    /// faster one: for the layers built so far. Called by all ranks.
    ///
    /// # Errors
    /// [`Error::Fault`].
    pub fn measure_routes(&self, width: usize) -> Result<()> {
        self.all_to_alls().iter().try_for_each(|(_, all_to_all)| all_to_all.measure(SITE, width))
    }

    /// What was measured, by the number of ranks that share experts.
    pub fn route_times(&self) -> Vec<(usize, RouteTimes)> {
        let times = |(ep, all): (usize, Arc<AllToAll>)| Some((ep, all.route_times()?.clone()));
        self.all_to_alls().into_iter().filter_map(times).collect()
    }

    /// Those of the layers built so far, in one order on all ranks.
    fn all_to_alls(&self) -> Vec<(usize, Arc<AllToAll>)> {
        let known = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = known.iter().map(|(&ep, groups)| (ep, Arc::clone(&groups.all_to_all))).collect();
        all.sort_by_key(|(ep, _)| *ep);
        all
    }

    /// What all-to-alls have sent so far, over all layers.
    pub fn sent(&self) -> crate::all_to_all::SentBytes {
        let groups = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        groups.values().fold(Default::default(), |sum, group| sum + group.all_to_all.sent())
    }
}
