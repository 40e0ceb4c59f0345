//! [`Decoder`]: the blocks in order. One pass over whole sequences with its graph, for training; one over a ragged batch and
//! pages of keys and values, for inference. Both run the same blocks.

use crate::batch::{LayerLoad, LossOutput, LossParts, Pass, TokenBatch};
use crate::blocks::{Attention, Embedding, Norm, OutputHead, Rotaries};
use crate::cache::{CacheLayout, KvPool, PagedStep, PoolConfig};
use crate::causal_lm::{CausalLm, LayerExperts, StepOutput};
use crate::config::{DecoderConfig, LayerConfig, Multipliers};
use crate::dropout::{DropoutConfig, Place};
use crate::layer::{Layer, LayerPass, Recompute, Stream};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use moe_core::ops::check_sequences;
use moe_core::{
    ExpertObserver, LocalDispatcher, Mode, MoeOps, MoeOutput, NoiseSource, Ops, PositionedNoise, RouteContext,
    RouterConfig, Weight,
};
use moe_parallel::{Mesh, RankDispatcher};
use std::sync::{Arc, OnceLock};
use tracing::{Span, debug_span};

/// How tokens are routed outside training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EvalRouting {
    /// Nothing is drawn and nothing dropped: a token's experts depend on that token alone.
    #[default]
    TokenByToken,
    /// As the original does in evaluation: its evaluation capacity, and the second expert of top-2 drawn with noise that is
    /// a function of the sequence's seed, the position and the layer.
    Original,
}

/// What a decoder is built over: a backend, alone or on a rank of a mesh.
#[derive(Clone, Copy)]
pub(crate) struct Backend<'a> {
    ops: &'a Arc<dyn Ops>,
    mesh: Option<&'a Mesh>,
}

impl<'a> Backend<'a> {
    /// These operations on one rank.
    pub(crate) fn alone(ops: &'a Arc<dyn Ops>) -> Self {
        Self { ops, mesh: None }
    }
}

impl Backend<'_> {
    /// Refuses what ranks do not divide outside the layers.
    fn check(&self, config: &DecoderConfig) -> Result<()> {
        config.check_tensor_ranks(self.mesh.map_or(1, |mesh| mesh.placement().tensor().1))
    }

    /// The operations before the first layer and after the last.
    fn ops(&self) -> Result<Arc<dyn Ops>> {
        match self.mesh {
            Some(mesh) => Ok(mesh.ops(Arc::clone(self.ops), None, None)?),
            None => Ok(Arc::clone(self.ops)),
        }
    }

    /// What a rank holds of a layer, and the layer's operations.
    pub(crate) fn layer(&self, index: usize, config: &LayerConfig) -> Result<(LayerConfig, Arc<dyn Ops>)> {
        let Some(mesh) = self.mesh else { return Ok((*config, Arc::clone(self.ops))) };
        let experts = config.feed_forward.moe().map(|moe| moe.num_experts);
        let local = config.on_rank(&mesh.placement()).map_err(|e| Error::Config(format!("layer {index}: {e}")))?;
        Ok((local, mesh.ops(Arc::clone(self.ops), experts, Some(index as u32))?))
    }

    pub(crate) fn dispatcher(&self, index: usize, num_experts: usize) -> Result<RankDispatcher> {
        let ops = Arc::clone(self.ops) as Arc<dyn MoeOps>;
        match self.mesh {
            Some(mesh) => Ok(mesh.dispatcher(num_experts, index as u32, ops)?),
            None => Ok(RankDispatcher::Local(LocalDispatcher::new(ops))),
        }
    }
}

/// The output of one MoE layer, with the layer's index.
type LayerOutput = (usize, MoeOutput);

fn scalar(t: &Tensor) -> Result<f64> {
    Ok(t.to_dtype(DType::F64)?.to_scalar()?)
}

/// What the first layer reads is made of: tokens, and positions where they are learned.
#[derive(Debug)]
pub(crate) struct Embeddings {
    tokens: Embedding,
    positions: Option<Embedding>,
    /// Factor on those of tokens.
    multiplier: f64,
}

impl Embeddings {
    /// Those of a decoder whose layers lie under `model`.
    pub(crate) fn new(config: &DecoderConfig, model: &VarBuilder<'_>, ops: &Arc<dyn Ops>) -> Result<Self> {
        let embed = |name: &str, spec| Embedding::new(&spec, model.pp(name), Arc::clone(ops));
        let tokens = embed("embed_tokens", config.embed_tokens())?;
        let positions = || embed("embed_positions", config.table(config.max_seq_len));
        let positions = config.learned_positions.then(positions).transpose()?;
        Ok(Self { tokens, positions, multiplier: config.multipliers.embedding })
    }

    fn embed(&self, ids: &[u32], positions: impl Iterator<Item = u32>) -> Result<Stream> {
        let positions = self.positions.as_ref().map(|table| table.forward(&positions.collect::<Vec<_>>()));
        let x = Multipliers::apply(self.multiplier, self.tokens.forward(ids)?)?;
        Ok(Stream { x, added: positions.transpose()? })
    }

    /// Whole sequences of `seq_len` tokens, one after the other, for a decoder of `config`.
    ///
    /// # Errors
    /// If the ids do not fit the model.
    pub(crate) fn sequences(&self, config: &DecoderConfig, ids: &[u32], seq_len: usize) -> Result<Stream> {
        check_sequences(ids.len(), seq_len)?;
        check_ids(config, ids, seq_len)?;
        self.embed(ids, (0..ids.len()).map(|i| (i % seq_len) as u32))
    }
}

fn check_ids(config: &DecoderConfig, ids: &[u32], len: usize) -> Result<()> {
    if let Some(id) = ids.iter().find(|&&id| id as usize >= config.vocab_size) {
        let vocab = config.vocab_size;
        return Err(Error::Argument(format!("token id {id} is outside the vocabulary of {vocab}")));
    }
    if len > config.max_seq_len {
        let max = config.max_seq_len;
        return Err(Error::Argument(format!("{len} tokens exceed the model's longest sequence of {max}")));
    }
    Ok(())
}

/// A decoder-only language model over one set of weights.
#[derive(Debug)]
pub struct Decoder {
    config: DecoderConfig,
    embeddings: Embeddings,
    layers: Vec<Arc<Layer>>,
    norm: Norm,
    head: OutputHead,
    eval_routing: EvalRouting,
    recompute: Recompute,
    dropout: DropoutConfig,
    ops: Arc<dyn Ops>,
    /// Whether its weights fit a cache that cores share, on one rank.
    is_small: bool,
    device: Device,
}

/// Bytes of weights that cores which share a cache can each read as fast as one of them.
const SMALL: usize = 32 << 20;

impl Decoder {
    /// A decoder whose parameters lie under `vb`, kept in the form that `ops` keeps weights in.
    ///
    /// # Errors
    /// [`Error::Config`] for an impossible configuration; if a parameter is missing or has another shape.
    pub fn new(config: DecoderConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        Self::build(config, vb, Backend::alone(&ops))
    }

    /// One rank's part of a decoder: `config` is the whole one's, `vb` gives that rank's parts. Called by all ranks of `mesh`;
    /// passes are too, and ranks of one tensor group run the same tokens.
    ///
    /// # Errors
    /// As [`Decoder::new`]; [`Error::Config`] if the layers cannot be split so; [`Error::Parallel`] if a rank fails.
    pub fn over(config: DecoderConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>, mesh: &Mesh) -> Result<Self> {
        Self::build(config, vb, Backend { ops: &ops, mesh: Some(mesh) })
    }

    fn build(config: DecoderConfig, vb: VarBuilder<'_>, backend: Backend<'_>) -> Result<Self> {
        config.validate()?;
        backend.check(&config)?;
        let ops = backend.ops()?;
        let model = vb.pp("model");
        let embeddings = Embeddings::new(&config, &model, &ops)?;
        let mut rotaries = Rotaries::new(config.max_seq_len);
        let layer = |(index, layer): (usize, &LayerConfig)| {
            let layer = Layer::new(index, layer, model.pp("layers").pp(index), backend, &mut rotaries)?;
            Ok(Arc::new(layer.with_residual(config.multipliers.residual)))
        };
        let layers = config.layers.iter().enumerate().map(layer).collect::<Result<Vec<_>>>()?;
        let head = match config.lm_head() {
            Some(spec) => OutputHead::new(&spec, config.lm_head_bias().as_ref(), &vb.pp("lm_head"), Arc::clone(&ops))?,
            None => OutputHead::tied(embeddings.tokens.table(), Arc::clone(&ops)),
        };
        let norm = Norm::new(&config.norm, model.pp("norm"), Arc::clone(&ops))?;
        if let Some(mesh) = backend.mesh {
            mesh.measure_routes(config.d_model)?;
        }
        let (eval_routing, recompute) = Default::default();
        let dropout = DropoutConfig { attention: config.attention_dropout, ..DropoutConfig::default() };
        dropout.validate()?;
        let device = vb.device().clone();
        let is_small = false;
        let new =
            Self { config, embeddings, layers, norm, head, eval_routing, recompute, dropout, ops, is_small, device };
        let bytes: usize = new.weights().iter().map(|weight| weight.bytes()).sum();
        Ok(Self { is_small: backend.mesh.is_none() && bytes <= SMALL, ..new })
    }

    /// The same with another choice of what training passes compute again.
    #[must_use]
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Self { recompute, ..self }
    }

    /// The same whose training passes drop so much.
    ///
    /// # Errors
    /// [`Error::Config`] for a probability outside `[0, 1)`.
    pub fn with_dropout(self, dropout: DropoutConfig) -> Result<Self> {
        dropout.validate()?;
        Ok(Self { dropout, ..self })
    }

    /// The same with another routing outside training.
    #[must_use]
    pub fn with_eval_routing(self, eval_routing: EvalRouting) -> Self {
        Self { eval_routing, ..self }
    }

    /// What training passes compute again.
    pub fn recompute(&self) -> Recompute {
        self.recompute
    }

    /// What training passes drop.
    pub fn dropout(&self) -> DropoutConfig {
        self.dropout
    }

    /// What it is made of.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What it multiplies with and looks up, each once: norms and biases aside.
    pub fn weights(&self) -> Vec<&Weight> {
        let Embeddings { tokens, positions, .. } = &self.embeddings;
        let tables = [tokens].into_iter().chain(positions).map(Embedding::table);
        let head = (!self.config.tie_embeddings).then(|| self.head.weight());
        tables.chain(self.layers.iter().flat_map(|layer| layer.weights())).chain(head).collect()
    }

    /// The output layer, for losses of one's own over [`Decoder::hidden`].
    pub fn head(&self) -> &OutputHead {
        &self.head
    }

    /// What the output layer sees of whole sequences, `[batch * seq_len, d_model]`, with its graph in a training pass; and the
    /// output of each MoE layer.
    ///
    /// # Errors
    /// If the ids do not fit the model.
    pub fn hidden(&self, ids: &[u32], seq_len: usize, pass: Pass) -> Result<(Tensor, Vec<LayerOutput>)> {
        let mut stream = self.embeddings.sequences(&self.config, ids, seq_len)?;
        let mut outputs = Vec::new();
        let (mode, seed) = match (pass, self.eval_routing) {
            (Pass::Train(pass), _) => (Mode::Train, pass.seed),
            (Pass::Eval, EvalRouting::TokenByToken) => (Mode::Infer, 0),
            (Pass::Eval, EvalRouting::Original) => (Mode::Eval, 0),
        };
        let dropout = if mode == Mode::Train { self.dropout } else { DropoutConfig::default() };
        if let Some(of_embedding) = dropout.at(Place::Embedding, 0, seed)? {
            let x = self.ops.dropout(&stream.sum(&*self.ops)?, of_embedding)?;
            stream = Stream { x, added: None };
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let pass = LayerPass { mode, seed, layer: index, seq_len, recompute: self.recompute, dropout };
            let (next, output) = layer.forward_sequences(stream, pass)?;
            stream = next;
            outputs.extend(output.map(|output| (index, output)));
        }
        let [_, normed] = stream.normed(&self.norm)?;
        Ok((Multipliers::apply(self.config.multipliers.output, normed)?, outputs))
    }

    /// Runs whole sequences token by token as in [`Pass::Eval`], and shows what the experts of each layer make of their rows to the
    /// observer that `observer` gives for the layer.
    ///
    /// # Errors
    /// If the ids do not fit the model; those of the observers.
    pub fn observe<O: ExpertObserver>(&self, ids: &[u32], seq_len: usize, observer: impl Fn(usize) -> O) -> Result<()> {
        let mut stream = self.embeddings.sequences(&self.config, ids, seq_len)?;
        for (index, layer) in self.layers.iter().enumerate() {
            stream = layer.observed_sequences(stream, LayerPass::infer(index, seq_len), &observer(index))?;
        }
        Ok(())
    }

    /// The training loss of a batch.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sizes do not fit or an id is outside the vocabulary.
    ///
    /// # Source
    /// Megatron-DeepSpeed `pretrain_gpt.py`: LM loss plus coefficient times the sum over layers of the load-balance loss.
    pub fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        self.loss_by(batch, pass, |hidden| {
            let loss = self.head.loss(hidden, &batch.target_ids)?;
            Ok((loss.clone(), LossParts { lm: scalar(&loss)?, ..LossParts::default() }))
        })
    }

    /// The training loss of a batch whose part beside the routers' is `of_hidden`: a scalar with its graph from
    /// [`Decoder::hidden`], and what it is made of.
    ///
    /// # Errors
    /// As [`Decoder::loss`]; those of `of_hidden`.
    pub fn loss_by(
        &self,
        batch: &TokenBatch,
        pass: Pass,
        of_hidden: impl FnOnce(&Tensor) -> Result<(Tensor, LossParts)>,
    ) -> Result<LossOutput> {
        batch.check()?;
        let (hidden, outputs) = self.hidden(&batch.input_ids, batch.seq_len, pass)?;
        let (mut loss, mut parts) = of_hidden(&hidden)?;
        for (layer, output) in &outputs {
            let Some(moe) = self.config.layers[*layer].feed_forward.moe() else { continue };
            let losses = &output.losses;
            for (part, coef, sum) in [
                (&losses.load_balance, moe.load_balance_coef, &mut parts.load_balance),
                (&losses.router_z, moe.router_z_coef, &mut parts.router_z),
            ] {
                if let (Some(part), true) = (part, coef > 0.0) {
                    let scaled = (part.to_dtype(loss.dtype())? * coef)?;
                    *sum += scalar(&scaled)?;
                    loss = (loss + scaled)?;
                }
            }
        }
        let layers = outputs.into_iter().map(|(layer, output)| LayerLoad { layer, load: output.load }).collect();
        Ok(LossOutput { loss, parts, layers })
    }

    /// Refuses what an inference pass cannot do token by token.
    fn check_routing(&self) -> Result<()> {
        if self.eval_routing == EvalRouting::TokenByToken {
            return Ok(());
        }
        for (index, layer) in self.config.layers.iter().enumerate() {
            let capacity = layer.feed_forward.moe().and_then(|moe| match moe.router {
                RouterConfig::Top1(router) => router.capacity.eval_factor,
                RouterConfig::Top2(router) => router.capacity.eval_factor,
                RouterConfig::TopK(router) => router.capacity.eval_factor,
                RouterConfig::Dropless { .. } | RouterConfig::SparseMixer(_) => None,
            });
            if let Some(factor) = capacity {
                return Err(Error::Argument(format!(
                    "layer {index} drops tokens past an eval_capacity_factor of {factor}, so that they depend on their batch; \
                     decode with the token-by-token routing, or set the factor to null in config.json"
                )));
            }
        }
        Ok(())
    }

    fn check_step(&self, step: &PagedStep, pool: &KvPool) -> Result<()> {
        if *pool.layout() != self.cache_layout() {
            let (got, want) = (pool.layout().layers.len(), self.layers.len());
            return Err(Error::Argument(format!(
                "the pool was made for another model, of {got} layers (this one has {want}); make it with new_pool"
            )));
        }
        let longest = step.positions.iter().max().map_or(0, |&last| last as usize + 1);
        check_ids(&self.config, step.token_ids(), longest)?;
        self.check_routing()
    }

    /// A checked step.
    fn run_step(&self, step: &PagedStep, pool: &KvPool) -> Result<StepOutput> {
        let embed = || self.embeddings.embed(step.token_ids(), step.positions.iter().copied());
        let mut stream = debug_span!("embed").in_scope(embed)?;
        let mut experts = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            let noise = PositionedNoise::new(&step.draws, index as u64);
            let context = match self.eval_routing {
                EvalRouting::TokenByToken => RouteContext::infer(),
                EvalRouting::Original => RouteContext::new(Mode::Eval, &noise as &dyn NoiseSource),
            };
            let _layer = debug_span!("layer", index).entered();
            let attend = |attention: &Attention, x: &Tensor| attention.forward_paged(x, step, pool.layer(index));
            let (next, output) = layer.forward(stream, &context, attend)?;
            stream = next;
            experts.extend(output.map(|output| layer_experts(index, &output)).transpose()?);
        }
        let hidden = stream.sum(&*self.ops)?;
        let logits = match step.logit_rows() {
            rows if rows.is_empty() => Tensor::zeros((0, self.config.vocab_size), DType::F32, &self.device)?,
            rows => {
                let all = rows.len() == hidden.dim(0)?;
                let wanted = if all { hidden } else { hidden.index_select(&Tensor::new(rows, hidden.device())?, 0)? };
                let normed = self.norm.forward(&wanted)?;
                let normed = Multipliers::apply(self.config.multipliers.output, normed)?;
                debug_span!("logits").in_scope(|| self.head.logits(&normed))?
            }
        };
        Ok(StepOutput { logits, experts })
    }

    /// The parts of a checked step, side by side.
    fn run_parts(&self, parts: &[PagedStep], pool: &KvPool, pass: &Span) -> Result<StepOutput> {
        let outputs: Vec<OnceLock<Result<StepOutput>>> = parts.iter().map(|_| OnceLock::new()).collect();
        self.ops.side_by_side(parts.len(), &|index| {
            outputs[index].get_or_init(|| pass.in_scope(|| self.run_step(&parts[index], pool)));
        });
        let outputs = outputs.into_iter().map(|output| output.into_inner().unwrap_or_else(ran_no_pass));
        joined(outputs.collect::<Result<_>>()?)
    }
}

impl CausalLm for Decoder {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn max_seq_len(&self) -> usize {
        self.config.max_seq_len
    }

    fn num_layers(&self) -> usize {
        self.config.layers.len()
    }

    fn moe_layers(&self) -> Vec<(usize, usize)> {
        self.config.moe_layers()
    }

    fn cache_layout(&self) -> CacheLayout {
        CacheLayout { layers: self.layers.iter().map(|layer| layer.attention.kv_shape()).collect() }
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn new_pool(&self, config: PoolConfig) -> Result<KvPool> {
        KvPool::new(self.cache_layout(), config, &*self.ops, &self.device)
    }

    fn draws(&self) -> bool {
        self.eval_routing == EvalRouting::Original
    }

    fn run(&self, step: &PagedStep, pool: &KvPool) -> Result<StepOutput> {
        self.check_step(step, pool)?;
        let tokens = step.token_ids().len();
        let pass = debug_span!("pass", sequences = step.num_sequences(), tokens);
        let mut output = None;
        self.ops.chain(tokens * self.config.products_per_token(), &mut || {
            let parts = if self.is_small { step.split(self.ops.lanes(), pool.config().page_size) } else { None };
            output = Some(match parts {
                Some(parts) => self.run_parts(&parts, pool, &pass),
                None => pass.in_scope(|| self.run_step(step, pool)),
            });
        });
        output.unwrap_or_else(ran_no_pass)
    }
}

fn ran_no_pass<T>() -> Result<T> {
    Err(Error::Argument("the backend ran no pass".into()))
}

/// The output of a step of which the parts have these.
fn joined(parts: Vec<StepOutput>) -> Result<StepOutput> {
    let logits = Tensor::cat(&parts.iter().map(|part| &part.logits).collect::<Vec<_>>(), 0)?;
    let mut experts: Vec<LayerExperts> = Vec::new();
    for part in parts {
        if experts.is_empty() {
            experts = part.experts;
            continue;
        }
        for (all, part) in experts.iter_mut().zip(part.experts) {
            all.expert_ids.extend(part.expert_ids);
            all.weights.extend(part.weights);
        }
    }
    Ok(StepOutput { logits, experts })
}

/// What a caller learns of a layer's routing.
fn layer_experts(layer: usize, output: &MoeOutput) -> Result<LayerExperts> {
    let routing = &output.routing;
    Ok(LayerExperts {
        layer,
        num_experts: routing.num_experts,
        top_k: routing.top_k,
        expert_ids: routing.expert_ids.clone(),
        weights: moe_core::ops::host::to_f32_vec(&routing.combine_weights)?,
    })
}
