//! Replicas that are ranks: rank 0 plans for all of them, the others do what they are told until it says that they may go.
//!
//! Sequences are divided over the data-parallel replicas, each of which keeps the pages of its own; experts are spread over all
//! ranks, so that every rank takes part in every pass, without tokens if it has none. Rank 0 knows which pages are free
//! everywhere, and sends each step as numbers.
//!
//! # Source
//! DeepSpeed-MoE, section 3.2 (arXiv 2201.05596): data parallelism for dense layers, expert parallelism for experts.

use super::plain_draw::{PlainDraw, PlainDrawn};
use super::replicas::{ReplicaOutput, ReplicaStep, Replicas, pool_config};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_core::ops::host::to_f32_vec;
use moe_models::{CausalLm, KvPool, LayerExperts, PagedStep, Pages, PoolConfig, StepOutput};
use moe_parallel::comm::{Communicator, Phase, Site};
use moe_parallel::{Collectives, Mesh};
use std::sync::Arc;
use std::time::Duration;

const SITE: Site = Site::new(Phase::Serve);

/// What rank 0 says first: a word, and how many words follow.
const HEAD: usize = 2;
/// So many words travel with the head: one message instead of two for a small step.
const INLINE: usize = 1022;

/// What rank 0 tells the others to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    /// Say that they are still there, as it is.
    Wait = 0,
    /// Run a step.
    Step = 1,
    /// Leave.
    Leave = 2,
}

/// One rank of a served model.
struct Rank {
    mesh: Arc<Mesh>,
    lm: Arc<dyn CausalLm>,
    pool: KvPool,
    /// `(layer, num_experts, top_k)`, in layer order.
    experts: Vec<(usize, usize, usize)>,
}

impl Rank {
    /// Called by all ranks of `mesh`.
    fn new(mesh: Arc<Mesh>, lm: Arc<dyn CausalLm>, kv_cache_bytes: usize, max_sequences: usize) -> Result<Self> {
        // Rank 0 decides how many pages a replica has: it hands them out.
        let own = pool_config(lm.as_ref(), kv_cache_bytes, max_sequences)?;
        let mut sizes = [own.num_pages as u64, own.page_size as u64];
        mesh.world().broadcast(SITE, &mut sizes, 0)?;
        let pool = lm.new_pool(PoolConfig { num_pages: sizes[0] as usize, page_size: sizes[1] as usize })?;
        let mut rank = Self { mesh, lm, pool, experts: Vec::new() };
        // A pass without tokens says which layers have experts, and how many a token gets.
        let output = rank.pass(&PagedStep::default())?;
        rank.experts = output.experts.iter().map(|e| (e.layer, e.num_experts, e.top_k)).collect();
        Ok(rank)
    }

    fn world(&self) -> &Arc<dyn Communicator> {
        self.mesh.world()
    }

    /// Which replica's sequences a rank has.
    fn replica_of(&self, rank: usize) -> usize {
        self.mesh.placement().dims().dense(rank).dp_rank
    }

    /// Whether a rank answers for its replica.
    fn answers(&self, rank: usize) -> bool {
        self.mesh.placement().dims().dense(rank).tp_rank == 0
    }

    fn pass(&self, step: &PagedStep) -> Result<StepOutput> {
        self.pool.copy_pages(step)?;
        Ok(self.lm.run(step, &self.pool)?)
    }

    /// Words of what a step gives.
    fn words_of(&self, ReplicaStep { step, draws }: &ReplicaStep) -> usize {
        let choices: usize = self.experts.iter().map(|&(_, _, top_k)| 2 * top_k * step.token_ids().len()).sum();
        let words = |draw: &Option<PlainDraw>| if draw.is_some() { PlainDrawn::WORDS } else { self.lm.vocab_size() };
        draws.iter().map(words).sum::<usize>() + choices
    }

    /// Runs this rank's step and brings what the replicas gave to rank 0.
    fn run(&self, steps: &[ReplicaStep]) -> Result<Vec<Vec<u32>>> {
        let rank = self.world().rank();
        let own = &steps[self.replica_of(rank)];
        let output = self.pass(&own.step)?;
        let words = if rank == 0 || !self.answers(rank) { Vec::new() } else { self.encode(&output, &own.draws)? };
        let size = self.world().size();
        let mut send = vec![0; size];
        send[0] = words.len();
        let from = |peer: usize| match rank == 0 && peer != 0 && self.answers(peer) {
            true => self.words_of(&steps[self.replica_of(peer)]),
            false => 0,
        };
        let receive: Vec<usize> = (0..size).map(from).collect();
        let mut parts = self.world().start_all_to_all_v(SITE, &words, &send, &receive)?.wait_parts()?;
        if rank == 0 {
            parts[0] = self.encode(&output, &own.draws)?;
        }
        Ok(parts)
    }

    /// What is drawn from each row of logits, or the row; then ids and weights of each layer's choices.
    fn encode(&self, output: &StepOutput, draws: &[Option<PlainDraw>]) -> Result<Vec<u32>> {
        let logits = to_f32_vec(&output.logits)?;
        let mut words = Vec::new();
        for (row, draw) in logits.chunks_exact(self.lm.vocab_size()).zip(draws) {
            match draw {
                Some(draw) => words.extend(PlainDrawn::of(&draw.draw(row)).to_words()),
                None => words.extend(row.iter().map(|logit| logit.to_bits())),
            }
        }
        for layer in &output.experts {
            words.extend(&layer.expert_ids);
            words.extend(layer.weights.iter().map(|weight| weight.to_bits()));
        }
        Ok(words)
    }

    /// What a replica gave, from its words, of which there are as many as the step says.
    fn decode(&self, ReplicaStep { step, draws }: &ReplicaStep, words: &[u32]) -> Result<ReplicaOutput> {
        let vocab_size = self.lm.vocab_size();
        let (mut logits, mut drawn, mut rest) = (Vec::new(), Vec::with_capacity(draws.len()), words);
        for draw in draws {
            if draw.is_some() {
                let (&pair, more) = rest.split_first_chunk().ok_or_else(broken)?;
                drawn.push(Some(PlainDrawn::from_words(pair).ok_or_else(broken)?));
                rest = more;
            } else {
                let (row, more) = rest.split_at_checked(vocab_size).ok_or_else(broken)?;
                logits.extend(row.iter().map(|&word| f32::from_bits(word)));
                drawn.push(None);
                rest = more;
            }
        }
        let rows = drawn.iter().filter(|drawn| drawn.is_none()).count();
        let logits = Tensor::from_vec(logits, (rows, vocab_size), &Device::Cpu)?;
        let mut experts = Vec::new();
        for &(layer, num_experts, top_k) in &self.experts {
            let count = step.token_ids().len() * top_k;
            let (ids, more) = rest.split_at_checked(count).ok_or_else(broken)?;
            let (weights, more) = more.split_at_checked(count).ok_or_else(broken)?;
            rest = more;
            let weights = weights.iter().map(|&word| f32::from_bits(word)).collect();
            experts.push(LayerExperts { layer, num_experts, top_k, expert_ids: ids.to_vec(), weights });
        }
        Ok(ReplicaOutput { logits, drawn, experts })
    }
}

fn broken() -> Error {
    moe_models::Error::Argument("what another rank said is no step, or no answer to one".into()).into()
}

/// The steps of all replicas, one after the other.
fn encode_steps(steps: &[ReplicaStep]) -> Vec<u32> {
    let mut words = Vec::new();
    for ReplicaStep { step, draws } in steps {
        let tokens = step.to_words();
        words.push(tokens.len() as u32);
        words.extend(tokens);
        words.push(draws.len() as u32);
        for draw in draws {
            words.push(u32::from(draw.is_some()));
            draw.iter().for_each(|draw| draw.to_words(&mut words));
        }
    }
    words
}

fn decode_steps(mut words: &[u32], pages: PoolConfig) -> Result<Vec<ReplicaStep>> {
    let next = |words: &mut &[u32]| {
        let (&word, rest) = words.split_first().ok_or_else(broken)?;
        *words = rest;
        Result::Ok(word)
    };
    let mut steps = Vec::new();
    while !words.is_empty() {
        let len = next(&mut words)? as usize;
        let (step, rest) = words.split_at_checked(len).ok_or_else(broken)?;
        words = rest;
        let step = PagedStep::from_words(step, pages)?;
        let mut draws = Vec::new();
        for _ in 0..next(&mut words)? {
            draws.push(match next(&mut words)? {
                0 => None,
                _ => Some(PlainDraw::from_words(&mut words).ok_or_else(broken)?),
            });
        }
        steps.push(ReplicaStep { step, draws });
    }
    Ok(steps)
}

/// The replicas of a model over ranks, seen from rank 0. Dropping it lets the other ranks go.
pub struct RankReplicas {
    rank: Rank,
    pages: Vec<Pages>,
    idle_limit: Duration,
    failed: bool,
}

impl RankReplicas {
    /// Called on rank 0 while the others call [`follow`]. `timeout` is the deadline of an exchange: others that hear nothing for as long
    /// take this one for dead, so it says now and then that it is there.
    ///
    /// # Errors
    /// If a rank fails, or there is no memory for the pages.
    pub fn new(
        mesh: Arc<Mesh>,
        lm: Arc<dyn CausalLm>,
        kv_cache_bytes: usize,
        max_sequences: usize,
        timeout: Duration,
    ) -> Result<Self> {
        let rank = Rank::new(mesh, lm, kv_cache_bytes, max_sequences)?;
        let replicas = rank.mesh.placement().dims().dp;
        let pages = (0..replicas).map(|_| Pages::new(rank.pool.config())).collect::<moe_models::Result<_>>()?;
        Ok(Self { rank, pages, idle_limit: timeout / 4, failed: false })
    }

    fn tell(&self, order: Order, words: &[u32]) -> Result<()> {
        let mut head = vec![0; HEAD + INLINE];
        (head[0], head[1]) = (order as u32, words.len() as u32);
        let inline = words.len().min(INLINE);
        head[HEAD..HEAD + inline].copy_from_slice(&words[..inline]);
        self.rank.world().broadcast(SITE, &mut head, 0)?;
        if words.len() > INLINE {
            self.rank.world().broadcast(SITE, &mut words[INLINE..].to_vec(), 0)?;
        }
        Ok(())
    }

    fn try_run(&self, steps: &[ReplicaStep]) -> Result<Vec<ReplicaOutput>> {
        self.tell(Order::Step, &encode_steps(steps))?;
        let parts = self.rank.run(steps)?;
        let mut outputs = vec![None; steps.len()];
        for (peer, words) in parts.iter().enumerate() {
            if self.rank.answers(peer) {
                let replica = self.rank.replica_of(peer);
                outputs[replica] = Some(self.rank.decode(&steps[replica], words)?);
            }
        }
        Ok(outputs.into_iter().flatten().collect())
    }

    /// An error of one rank is the end of all: the others wait for it in the middle of a pass.
    fn fail_all<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            self.failed = true;
            give_up(self.rank.world(), error)
        })
    }
}

impl Replicas for RankReplicas {
    fn pages(&self) -> Vec<Pages> {
        self.pages.clone()
    }

    fn run(&mut self, steps: &[ReplicaStep]) -> Result<Vec<ReplicaOutput>> {
        let result = self.try_run(steps);
        self.fail_all(result)
    }

    fn draws(&self) -> bool {
        true
    }

    fn idle_limit(&self) -> Option<Duration> {
        Some(self.idle_limit)
    }

    fn idle(&mut self) -> Result<()> {
        // All answer, so that the death of one is heard of without a request.
        let result = self.tell(Order::Wait, &[]).and_then(|()| Ok(self.rank.world().barrier(SITE)?));
        self.fail_all(result)
    }

    fn has_failed(&self) -> bool {
        self.failed
    }
}

impl Drop for RankReplicas {
    fn drop(&mut self) {
        if !self.failed
            && let Err(error) = self.tell(Order::Leave, &[])
        {
            tracing::warn!(%error, "the other ranks were not told to leave");
        }
    }
}

/// Ends the exchanges of all ranks for an error of this one, if nothing has ended them yet; what all are told.
fn give_up(world: &Arc<dyn Communicator>, error: Error) -> Error {
    match world.fault() {
        Some(fault) => moe_models::Error::from(moe_parallel::Error::Fault(fault)).into(),
        None => moe_models::Error::from(world.give_up(SITE, error.to_string())).into(),
    }
}

/// What every rank but 0 does: runs its part of each step that rank 0 plans, until it is told to leave.
///
/// # Errors
/// If another rank has failed or does not answer in time, or this one fails.
pub fn follow(mesh: Arc<Mesh>, lm: Arc<dyn CausalLm>, kv_cache_bytes: usize, max_sequences: usize) -> Result<()> {
    let rank = Rank::new(mesh, lm, kv_cache_bytes, max_sequences)?;
    follow_orders(&rank).map_err(|error| give_up(rank.world(), error))
}

fn follow_orders(rank: &Rank) -> Result<()> {
    loop {
        let mut head = vec![0; HEAD + INLINE];
        rank.world().broadcast(SITE, &mut head, 0)?;
        let (order, len) = (head[0], head[1] as usize);
        let mut words = head.split_off(HEAD);
        words.truncate(len);
        if len > INLINE {
            let mut more = vec![0; len - INLINE];
            rank.world().broadcast(SITE, &mut more, 0)?;
            words.extend(more);
        }
        if order == Order::Leave as u32 {
            return Ok(());
        }
        if order == Order::Step as u32 {
            rank.run(&decode_steps(&words, rank.pool.config())?)?;
        } else {
            rank.world().barrier(SITE)?;
        }
    }
}
