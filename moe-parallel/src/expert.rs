//! [`AllToAllDispatcher`]: `moe-core`'s [`Dispatcher`] over ranks, each of which holds some of the experts.
//!
//! Rows travel ragged: ranks tell each other their counts first, there is no padding, and a rank without tokens or an expert
//! without rows is an ordinary case. An expert's rows stand in the order of the ranks they come from, as batches of their own,
//! so that gradients of its weights are summed as one rank would that ran those ranks' tokens one after the other.

use crate::all_to_all::{AllToAll, Direction, Moving, Plan};
use crate::comm::{Collectives, Communicator, Element, Phase, Site};
use crate::dims::{part, part_of};
use crate::exchanged::{by_dtype, exchanged, with_values};
use crate::share::{RowShare, put_together, take_own};
use crate::{Error, Result};
use candle_core::{DType, Tensor, WithDType};
use half::bf16;
use moe_core::{DispatchTable, Dispatcher, ExpertRows, LocalDispatcher, LocalReceipt, MoeOps, Routing};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// What the ranks of a tensor group, which all have the same tokens, do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Coordination {
    /// Nothing: each sends all its rows.
    #[default]
    None,
    /// Each sends the rows whose experts are on ranks with its own tensor index, to these alone; the results are put together
    /// in the group. For expert groups over consecutive ranks.
    ///
    /// # Source
    /// Paper section 5.3, parallelism-coordinated communication; split by the rank that hosts an expert.
    ByDestination,
    /// Each sends a part of every expert's rows. For expert groups within a tensor index.
    ///
    /// # Source
    /// DeepSpeed `drop_tokens` and `gather_tokens`.
    ByTokens,
}

/// The tensor group, and how it shares the rows.
#[derive(Debug, Clone)]
pub struct Coordinated {
    /// The tensor group.
    pub comm: Arc<dyn Communicator>,
    /// How.
    pub coordination: Coordination,
}

/// Where a layer's experts are, and over what their rows travel.
#[derive(Debug, Clone)]
pub struct ExpertExchange {
    /// Experts of the layer over all ranks.
    pub num_experts: usize,
    /// Ranks they are spread over.
    pub ep: usize,
    /// Which of these this is.
    pub ep_rank: usize,
    /// The ranks rows are sent to and come from.
    pub all_to_all: Arc<AllToAll>,
    /// Which share of the experts each of those ranks holds.
    pub ep_ranks: Vec<usize>,
    /// Ranks of a tensor group among those, which send the same rows each: 1 unless the group spans tensor indices and nothing
    /// is coordinated.
    pub copies: usize,
    /// Where the tensor group shares the rows.
    pub coordinated: Option<Coordinated>,
    /// The ranks that share each expert of this rank, if it is sliced.
    pub slices: Option<Arc<dyn Communicator>>,
}

impl ExpertExchange {
    /// The experts of this rank.
    pub fn local_experts(&self) -> Range<usize> {
        part(self.num_experts, self.ep_rank, self.ep)
    }

    fn experts_of(&self, ep_rank: usize) -> Range<usize> {
        part(self.num_experts, ep_rank, self.ep)
    }

    /// How the tensor group shares rows that lie as `offsets` says, by expert.
    fn share(&self, offsets: &[usize]) -> Option<(RowShare, &Arc<dyn Communicator>)> {
        let coordinated = self.coordinated.as_ref().filter(|c| c.coordination != Coordination::None)?;
        let size = coordinated.comm.size();
        let rows_of = |member: usize| {
            let of_expert = |expert: usize| {
                let rows = offsets[expert]..offsets[expert + 1];
                match coordinated.coordination {
                    Coordination::ByTokens => {
                        let part = part(rows.len(), member, size);
                        rows.start + part.start..rows.start + part.end
                    }
                    _ if part_of(self.num_experts, expert, self.ep) % size == member => rows,
                    _ => rows.start..rows.start,
                }
            };
            (0..self.num_experts).map(of_expert).collect()
        };
        Some((RowShare::new((0..size).map(rows_of).collect()), &coordinated.comm))
    }

    /// Rows of each expert of each peer, of the rows this rank sends.
    fn sends(&self, offsets: &[usize], share: Option<&RowShare>) -> Vec<Vec<usize>> {
        let rows = |expert: usize| match (share, &self.coordinated) {
            (Some(share), Some(coordinated)) => share.part(coordinated.comm.rank())[expert].len(),
            _ => offsets[expert + 1] - offsets[expert],
        };
        self.ep_ranks.iter().map(|&peer| self.experts_of(peer).map(rows).collect()).collect()
    }
}

/// Sends rows to the ranks that hold their experts.
#[derive(Debug, Clone)]
pub struct AllToAllDispatcher {
    exchange: Arc<ExpertExchange>,
    ops: Arc<dyn MoeOps>,
    site: Site,
}

/// Rows under way, of the tensor's own type.
enum Travelling {
    F32(Moving<f32>),
    F64(Moving<f64>),
    Bf16(Moving<bf16>),
}

impl fmt::Debug for Travelling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Travelling")
    }
}

impl Travelling {
    fn start(journey: &Journey, rows: &Tensor) -> Result<Self> {
        Ok(match rows.dtype() {
            DType::F32 => Self::F32(journey.start(rows)?),
            DType::F64 => Self::F64(journey.start(rows)?),
            DType::BF16 => Self::Bf16(journey.start(rows)?),
            other => return Err(Error::Argument(format!("rows of f32, f64 and bf16 travel, got {other:?}"))),
        })
    }

    /// What arrived, as the result of sending `sent`.
    fn finish(self, journey: &Journey, sent: &Tensor) -> Result<Tensor> {
        match self {
            Self::F32(moving) => journey.finish(moving, sent),
            Self::F64(moving) => journey.finish(moving, sent),
            Self::Bf16(moving) => journey.finish(moving, sent),
        }
    }
}

/// One way of a plan.
#[derive(Debug, Clone)]
struct Journey {
    all: Arc<AllToAll>,
    plan: Arc<Plan>,
    direction: Direction,
    site: Site,
}

impl Journey {
    fn start<T: Element + WithDType>(&self, rows: &Tensor) -> Result<Moving<T>> {
        let width = rows.dim(1)?;
        with_values(rows, |values| self.all.start(&self.plan, self.direction, self.site, values, width))
    }

    fn finish<T: Element + WithDType>(&self, moving: Moving<T>, sent: &Tensor) -> Result<Tensor> {
        let back = Self { direction: self.direction.reversed(), site: self.site.backward(), ..self.clone() };
        let arrived = (moving.finish()?, (self.rows(), sent.dim(1)?));
        exchanged("all_to_all", sent, arrived, move |grad| {
            let shape = (back.rows(), grad.dim(1)?);
            Ok(Tensor::from_vec(back.start::<T>(grad)?.finish()?, shape, grad.device())?)
        })
    }

    /// Rows that arrive.
    fn rows(&self) -> usize {
        match self.direction {
            Direction::There => self.plan.output_rows(),
            Direction::Back => self.plan.rows,
        }
    }
}

/// Rows on their way to the experts.
#[derive(Debug)]
pub struct Dispatching {
    travelling: Travelling,
    sent: Tensor,
    receipt: AllToAllReceipt,
    /// Of the rows that arrive, by expert and sender.
    offsets: Vec<usize>,
}

/// What is needed to send the results back.
#[derive(Debug)]
pub struct AllToAllReceipt {
    table: Arc<DispatchTable>,
    combine_weights: Tensor,
    plan: Arc<Plan>,
    share: Option<Arc<RowShare>>,
    /// Among the slices of the experts here, once the rows have arrived.
    slices: Option<Arc<RowShare>>,
}

/// Results on their way back.
#[derive(Debug)]
pub struct Combining {
    travelling: Travelling,
    sent: Tensor,
    receipt: AllToAllReceipt,
}

impl AllToAllDispatcher {
    /// For layer number `layer`, whose experts are where `exchange` says.
    ///
    /// # Errors
    /// [`Error::Argument`] if the shares of the experts are not those of the ranks that rows travel to.
    pub fn new(exchange: Arc<ExpertExchange>, ops: Arc<dyn MoeOps>, layer: u32) -> Result<Self> {
        let ExpertExchange { num_experts, ep, ep_rank, .. } = *exchange;
        let (shares, ranks) = (&exchange.ep_ranks, exchange.all_to_all.comm().size());
        if shares.len() != ranks || shares.iter().chain([&ep_rank]).any(|&share| share >= ep) || ep > num_experts {
            return Err(Error::Argument(format!(
                "ep_ranks must be given for {ranks} ranks, they and ep_rank be below ep {ep}, and that be at most the \
                 {num_experts} experts, got {shares:?} and {ep_rank}"
            )));
        }
        Ok(Self { exchange, ops, site: Site::layer(Phase::Forward, layer) })
    }

    /// Where the experts are.
    pub fn exchange(&self) -> &ExpertExchange {
        &self.exchange
    }

    fn journey(&self, plan: &Arc<Plan>, direction: Direction) -> Journey {
        Journey { all: Arc::clone(&self.exchange.all_to_all), plan: Arc::clone(plan), direction, site: self.site }
    }

    fn begin(&self, tokens: &Tensor, routing: &Routing) -> Result<Dispatching> {
        let exchange = &*self.exchange;
        if routing.num_experts != exchange.num_experts {
            let (want, got) = (exchange.num_experts, routing.num_experts);
            return Err(Error::Argument(format!("this dispatcher spreads {want} experts, the router has {got}")));
        }
        // 1. Rows by expert; of those a tensor group shares, this rank's part.
        let table = Arc::new(DispatchTable::new(routing));
        let mut rows = self.ops.permute(tokens, &table)?.contiguous()?;
        let share = exchange.share(&table.expert_offsets);
        let sends = exchange.sends(&table.expert_offsets, share.as_ref().map(|(share, _)| share));
        let share = share.map(|(share, comm)| (Arc::new(share), comm));
        if let Some((share, comm)) = &share {
            rows = take_own(share, comm, self.site, &rows)?;
        }

        // 2. Who sends how many; then the rows.
        let counts = exchange.all_to_all.exchange_counts(self.site, sends)?;
        let plan = Arc::new(exchange.all_to_all.plan(&counts));
        let offsets = Plan::output_offsets(&counts);
        let travelling = Travelling::start(&self.journey(&plan, Direction::There), &rows)?;
        let receipt = AllToAllReceipt {
            table,
            combine_weights: routing.combine_weights.clone(),
            plan,
            share: share.map(|(share, _)| share),
            slices: None,
        };
        Ok(Dispatching { travelling, sent: rows, receipt, offsets })
    }

    fn arrive(&self, dispatching: Dispatching) -> Result<(ExpertRows, AllToAllReceipt)> {
        let Dispatching { travelling, sent, mut receipt, mut offsets } = dispatching;
        let journey = self.journey(&receipt.plan, Direction::There);
        let mut rows = scaled_gradient(travelling.finish(&journey, &sent)?, self.exchange.copies as f64)?;
        if let Some(comm) = &self.exchange.slices {
            let (share, all_offsets) = self.slice_share(&**comm, &offsets)?;
            let share = Arc::new(share);
            rows = put_together(&share, comm, self.site, &rows)?;
            (receipt.slices, offsets) = (Some(share), all_offsets);
        }
        Ok((ExpertRows { rows, offsets }, receipt))
    }

    /// The rows of all slices of an expert side by side, slice after slice.
    fn slice_share(&self, comm: &dyn Communicator, offsets: &[usize]) -> Result<(RowShare, Vec<usize>)> {
        let own: Vec<u64> = offsets.windows(2).map(|pair| (pair[1] - pair[0]) as u64).collect();
        let all = comm.all_gather(self.site, &own)?;
        let (experts, slices) = (self.exchange.local_experts().len(), comm.size());
        let senders = own.len() / experts;
        let (mut parts, mut all_offsets) = (vec![Vec::new(); slices], vec![0]);
        let mut end = 0;
        for expert in 0..experts {
            for (slice, part) in parts.iter_mut().enumerate() {
                for count in &all[slice * own.len() + expert * senders..][..senders] {
                    part.push(end..end + *count as usize);
                    end += *count as usize;
                    all_offsets.push(end);
                }
            }
        }
        Ok((RowShare::new(parts), all_offsets))
    }

    fn send_back(&self, rows: &Tensor, receipt: AllToAllReceipt) -> Result<Combining> {
        let mut rows = rows.contiguous()?;
        if let (Some(share), Some(comm)) = (&receipt.slices, &self.exchange.slices) {
            rows = take_own(share, comm, self.site, &rows)?;
        }
        let rows = scaled_gradient(rows, 1.0 / self.exchange.copies as f64)?;
        let travelling = Travelling::start(&self.journey(&receipt.plan, Direction::Back), &rows)?;
        Ok(Combining { travelling, sent: rows, receipt })
    }

    fn come_back(&self, combining: Combining) -> Result<Tensor> {
        let Combining { travelling, sent, receipt } = combining;
        let mut rows = travelling.finish(&self.journey(&receipt.plan, Direction::Back), &sent)?;
        if let (Some(share), Some(coordinated)) = (&receipt.share, &self.exchange.coordinated) {
            rows = put_together(share, &coordinated.comm, self.site, &rows)?;
        }
        let weights = receipt.combine_weights.to_dtype(rows.dtype())?;
        Ok(self.ops.unpermute(&rows, &weights, &receipt.table)?)
    }
}

/// The same rows; their gradient is multiplied on its way. Where every rank of a tensor group sends the same rows, an expert
/// sees them so many times: its weights must learn from them once, and each sender's gradient be whole.
fn scaled_gradient(rows: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 {
        return Ok(rows);
    }
    by_dtype!(rows.dtype(), T => {
        let same = with_values::<T, _>(&rows, |values| Ok(values.to_vec()))?;
        exchanged("scaled_gradient", &rows, (same, rows.shape()), move |grad| Ok((grad * factor)?))
    })
}

impl Dispatcher for AllToAllDispatcher {
    type Dispatching = Dispatching;
    type Receipt = AllToAllReceipt;
    type Combining = Combining;

    fn num_local_experts(&self, num_experts: usize) -> usize {
        part(num_experts, self.exchange.ep_rank, self.exchange.ep).len()
    }

    fn begin_dispatch(&self, tokens: &Tensor, routing: &Routing) -> moe_core::Result<Dispatching> {
        Ok(self.begin(tokens, routing)?)
    }

    fn finish_dispatch(&self, dispatching: Dispatching) -> moe_core::Result<(ExpertRows, AllToAllReceipt)> {
        Ok(self.arrive(dispatching)?)
    }

    fn begin_combine(&self, rows: ExpertRows, receipt: AllToAllReceipt) -> moe_core::Result<Combining> {
        Ok(self.send_back(&rows.rows, receipt)?)
    }

    fn finish_combine(&self, combining: Combining) -> moe_core::Result<Tensor> {
        Ok(self.come_back(combining)?)
    }
}

/// All experts here, or some of them: one type for layers that may be either.
#[derive(Debug, Clone)]
pub enum RankDispatcher {
    /// All here.
    Local(LocalDispatcher),
    /// Spread over ranks.
    AllToAll(AllToAllDispatcher),
}

/// One of two forms of a value, by dispatcher.
#[derive(Debug)]
pub enum ByDispatcher<L, A> {
    /// Of the local one.
    Local(L),
    /// Of the one over ranks.
    AllToAll(A),
}

/// A value that another dispatcher made.
fn other() -> moe_core::Error {
    moe_core::Error::Input("a dispatch must be finished by the dispatcher that began it".into())
}

impl Dispatcher for RankDispatcher {
    type Dispatching = ByDispatcher<(ExpertRows, LocalReceipt), Dispatching>;
    type Receipt = ByDispatcher<LocalReceipt, AllToAllReceipt>;
    type Combining = ByDispatcher<Tensor, Combining>;

    fn num_local_experts(&self, num_experts: usize) -> usize {
        match self {
            Self::Local(local) => local.num_local_experts(num_experts),
            Self::AllToAll(ranks) => ranks.num_local_experts(num_experts),
        }
    }

    fn begin_dispatch(&self, tokens: &Tensor, routing: &Routing) -> moe_core::Result<Self::Dispatching> {
        Ok(match self {
            Self::Local(local) => ByDispatcher::Local(local.begin_dispatch(tokens, routing)?),
            Self::AllToAll(ranks) => ByDispatcher::AllToAll(ranks.begin_dispatch(tokens, routing)?),
        })
    }

    fn finish_dispatch(&self, dispatching: Self::Dispatching) -> moe_core::Result<(ExpertRows, Self::Receipt)> {
        match (self, dispatching) {
            (Self::Local(local), ByDispatcher::Local(dispatching)) => {
                let (rows, receipt) = local.finish_dispatch(dispatching)?;
                Ok((rows, ByDispatcher::Local(receipt)))
            }
            (Self::AllToAll(ranks), ByDispatcher::AllToAll(dispatching)) => {
                let (rows, receipt) = ranks.finish_dispatch(dispatching)?;
                Ok((rows, ByDispatcher::AllToAll(receipt)))
            }
            _ => Err(other()),
        }
    }

    fn begin_combine(&self, rows: ExpertRows, receipt: Self::Receipt) -> moe_core::Result<Self::Combining> {
        match (self, receipt) {
            (Self::Local(local), ByDispatcher::Local(receipt)) => {
                Ok(ByDispatcher::Local(local.begin_combine(rows, receipt)?))
            }
            (Self::AllToAll(ranks), ByDispatcher::AllToAll(receipt)) => {
                Ok(ByDispatcher::AllToAll(ranks.begin_combine(rows, receipt)?))
            }
            _ => Err(other()),
        }
    }

    fn finish_combine(&self, combining: Self::Combining) -> moe_core::Result<Tensor> {
        match (self, combining) {
            (Self::Local(local), ByDispatcher::Local(combining)) => local.finish_combine(combining),
            (Self::AllToAll(ranks), ByDispatcher::AllToAll(combining)) => ranks.finish_combine(combining),
            _ => Err(other()),
        }
    }
}
