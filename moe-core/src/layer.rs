//! [`MoeLayer`]: route, dispatch, experts, combine; and its companions with a fixed branch beside the experts.

use crate::ops::host::expect_shape;
use crate::ops::sigmoid;
use crate::{Dispatcher, Error, ExpertLoad, Experts, Mlp, Result, RouteContext, Router, RouterLosses, Routing, Weight};
use candle_core::Tensor;
use tracing::debug_span;

/// What an MoE layer returns.
#[derive(Debug, Clone)]
pub struct MoeOutput {
    /// `[tokens, d_model]`
    pub hidden: Tensor,
    /// Auxiliary losses, unscaled.
    pub losses: RouterLosses,
    /// Demand and drops.
    pub load: ExpertLoad,
    /// The decision itself.
    pub routing: Routing,
}

impl MoeOutput {
    fn new(hidden: Tensor, routing: Routing) -> Self {
        Self { hidden, losses: routing.losses.clone(), load: routing.load.clone(), routing }
    }
}

/// A mixture-of-experts layer over any router, dispatcher and experts.
#[derive(Debug, Clone)]
pub struct MoeLayer<R, D, E> {
    router: R,
    dispatcher: D,
    experts: E,
    input: RowInput,
}

/// What an expert sees of a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum RowInput {
    /// The token.
    AsItIs,
    /// The token times its weight, which is no factor on the result then; of one expert for each.
    Weighed,
    /// In training the token times two draws around 1 for each element, as does the router.
    Jittered(f32),
}

impl<R: Router, D: Dispatcher, E: Experts> MoeLayer<R, D, E> {
    /// A layer of these parts.
    ///
    /// # Errors
    /// [`Error::Config`] if router and experts disagree on the number of experts.
    pub fn new(router: R, dispatcher: D, experts: E) -> Result<Self> {
        let (all, held) = (router.num_experts(), experts.num_experts());
        let want = dispatcher.num_local_experts(all);
        if want != held {
            return Err(Error::Config(format!(
                "the router chooses among {all} experts, {want} of them here, but {held} are given"
            )));
        }
        Ok(Self { router, dispatcher, experts, input: RowInput::AsItIs })
    }

    /// The same whose experts see something else of a token.
    pub(crate) fn with_input(self, input: RowInput) -> Self {
        Self { input, ..self }
    }

    /// The decision, and what experts see of each token.
    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<(Routing, Tensor)> {
        match self.input {
            RowInput::Jittered(epsilon) if context.is_train() => {
                let (rows, cols) = tokens.dims2()?;
                let draws = context.noise.jitter(rows, 2 * cols, epsilon);
                let factors =
                    draws.chunks_exact((2 * cols).max(1)).flat_map(|row| (0..cols).map(|c| row[c] * row[cols + c]));
                let factors = Tensor::from_iter(factors, tokens.device())?.reshape((rows, cols))?;
                let tokens = (tokens * factors.to_dtype(tokens.dtype())?)?;
                Ok((self.router.route(&tokens, context)?, tokens))
            }
            RowInput::AsItIs | RowInput::Jittered(_) => Ok((self.router.route(tokens, context)?, tokens.clone())),
            RowInput::Weighed => {
                let mut routing = self.router.route(tokens, context)?;
                let weights = &routing.combine_weights;
                let weighed = match tokens.dim(0)? {
                    // candle leaves products of nothing out of the graph, and the gate would have no gradient.
                    0 => (tokens.sum_all()? + weights.sum_all()?.to_dtype(tokens.dtype())?)?
                        .broadcast_as(tokens.shape())?,
                    _ => tokens.broadcast_mul(&weights.to_dtype(tokens.dtype())?)?,
                };
                routing.combine_weights = weights.ones_like()?;
                Ok((routing, weighed))
            }
        }
    }

    /// Sends each token through its experts.
    ///
    /// # Shapes
    /// - `tokens`: `[tokens, d_model]`
    ///
    /// # Errors
    /// If a part refuses the input.
    ///
    /// # Source
    /// Paper section 3 (MoE layer); a token without expert gets zeros.
    pub fn forward(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<MoeOutput> {
        let (routing, tokens) = debug_span!("route").in_scope(|| self.route(tokens, context))?;
        let (rows, receipt) = debug_span!("dispatch").in_scope(|| self.dispatcher.dispatch(&tokens, &routing))?;
        let rows = debug_span!("experts").in_scope(|| self.experts.forward(rows))?;
        context.observe(&routing, &rows)?;
        let hidden = debug_span!("combine").in_scope(|| self.dispatcher.combine(rows, receipt))?;
        Ok(MoeOutput::new(hidden, routing))
    }

    /// [`MoeLayer::forward`] with a branch that sees every token, run while the experts' results travel back.
    ///
    /// # Errors
    /// If a part refuses the input.
    pub fn forward_beside(
        &self,
        tokens: &Tensor,
        context: &RouteContext<'_>,
        branch: impl FnOnce() -> Result<Tensor>,
    ) -> Result<(MoeOutput, Tensor)> {
        let (routing, tokens) = debug_span!("route").in_scope(|| self.route(tokens, context))?;
        let (rows, receipt) = debug_span!("dispatch").in_scope(|| self.dispatcher.dispatch(&tokens, &routing))?;
        let rows = debug_span!("experts").in_scope(|| self.experts.forward(rows))?;
        context.observe(&routing, &rows)?;
        let combining = self.dispatcher.begin_combine(rows, receipt)?;
        let branch = debug_span!("branch").in_scope(branch)?;
        let hidden = debug_span!("combine").in_scope(|| self.dispatcher.finish_combine(combining))?;
        Ok((MoeOutput::new(hidden, routing), branch))
    }

    /// The router.
    pub fn router(&self) -> &R {
        &self.router
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        [self.router.weights(), self.experts.weights()].concat()
    }
}

/// Residual MoE: a fixed network and the routed experts, mixed by a learned softmax per token.
///
/// # Source
/// Paper section 4.1.1 (Residual-MoE); DeepSpeed `MoE.forward` with `use_residual`: the first coefficient is the
/// experts', the second the fixed branch's. The paper writes a plain sum; the released code, and we, learn the mix.
#[derive(Debug, Clone)]
pub struct ResidualMoe<R, D, E> {
    moe: MoeLayer<R, D, E>,
    residual_mlp: Mlp,
    coefficient: Weight,
    coefficient_bias: Tensor,
}

impl<R: Router, D: Dispatcher, E: Experts> ResidualMoe<R, D, E> {
    /// A layer mixing `moe` and `residual_mlp` by `coefficient` `[2, d_model]` and `coefficient_bias` `[2]`.
    ///
    /// # Errors
    /// [`Error::Input`] if a coefficient has another shape.
    pub fn new(
        moe: MoeLayer<R, D, E>,
        residual_mlp: Mlp,
        coefficient: Weight,
        coefficient_bias: Tensor,
    ) -> Result<Self> {
        expect_rows("coefficient", &coefficient, 2)?;
        expect_shape("coefficient_bias", &coefficient_bias, &[2])?;
        Ok(Self { moe, residual_mlp, coefficient, coefficient_bias })
    }

    /// Sends each token through its experts and the fixed branch.
    ///
    /// # Shapes
    /// - `tokens`: `[tokens, d_model]`
    ///
    /// # Errors
    /// If a part refuses the input.
    pub fn forward(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<MoeOutput> {
        let (routed, fixed) = self.moe.forward_beside(tokens, context, || self.residual_mlp.forward(tokens))?;
        let logits = self.residual_mlp.ops().gate(tokens, &self.coefficient, Some(&self.coefficient_bias))?;
        let hidden = self.residual_mlp.ops().mix(&routed.hidden, &fixed, &logits)?;
        Ok(MoeOutput { hidden, ..routed })
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        [self.moe.weights(), self.residual_mlp.weights(), vec![&self.coefficient]].concat()
    }
}

/// Routed experts plus a network that sees every token, optionally scaled by a sigmoid gate.
///
/// # Source
/// DeepSeekMoE (2401.06066) without gate; Qwen2-MoE with gate.
#[derive(Debug, Clone)]
pub struct SharedExpertMoe<R, D, E> {
    moe: MoeLayer<R, D, E>,
    shared_expert: Mlp,
    shared_expert_gate: Option<Weight>,
}

impl<R: Router, D: Dispatcher, E: Experts> SharedExpertMoe<R, D, E> {
    /// A layer adding `shared_expert`, scaled by `sigmoid(tokens gate^T)` where a gate `[1, d_model]` is given.
    ///
    /// # Errors
    /// [`Error::Input`] if the gate has another shape.
    pub fn new(moe: MoeLayer<R, D, E>, shared_expert: Mlp, shared_expert_gate: Option<Weight>) -> Result<Self> {
        if let Some(gate) = &shared_expert_gate {
            expect_rows("shared_expert_gate", gate, 1)?;
        }
        Ok(Self { moe, shared_expert, shared_expert_gate })
    }

    /// Sends each token through its experts and the shared one.
    ///
    /// # Shapes
    /// - `tokens`: `[tokens, d_model]`
    ///
    /// # Errors
    /// If a part refuses the input.
    pub fn forward(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<MoeOutput> {
        let (routed, mut shared) = self.moe.forward_beside(tokens, context, || self.shared_expert.forward(tokens))?;
        if let Some(gate) = &self.shared_expert_gate {
            let open = sigmoid(&self.shared_expert.ops().gate(tokens, gate, None)?)?;
            shared = shared.broadcast_mul(&open)?;
        }
        Ok(MoeOutput { hidden: (&routed.hidden + shared)?, ..routed })
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        let gate = self.shared_expert_gate.iter().collect();
        [self.moe.weights(), self.shared_expert.weights(), gate].concat()
    }
}

fn expect_rows(name: &str, weight: &Weight, rows: usize) -> Result<()> {
    match weight.dims() {
        [got, _] if *got == rows => Ok(()),
        dims => Err(Error::Input(format!("{name} must have shape [{rows}, d_model], got {dims:?}"))),
    }
}
