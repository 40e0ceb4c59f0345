//! [`MoeBlock`]: an MoE layer of any kind, built from its configuration.

use crate::config::{RESIDUAL_MLP, SHARED_EXPERT};
use crate::layer::RowInput;
use crate::ops::{MoeOps, Ops};
use crate::{
    BranchConfig, Dispatcher, DroplessRouter, ExpertMlps, Gate, LocalDispatcher, Mlp, MoeConfig, MoeLayer, MoeOutput,
    ParamSpec, ResidualMoe, Result, RouteContext, Router, RouterConfig, SharedExpertMoe, SparseMixerRouter, Top1Router,
    Top2Router, TopKRouter, Weighs, Weight, WeightSource, WeightUse,
};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use std::sync::Arc;

/// The routed part of a [`MoeBlock`].
pub type Routed<D> = MoeLayer<Box<dyn Router>, D, ExpertMlps>;

/// A standard MoE layer, or one with a branch beside its experts.
#[derive(Debug)]
pub enum MoeBlock<D = LocalDispatcher> {
    /// The experts alone.
    Plain(Routed<D>),
    /// Mixed with a fixed network.
    Residual(ResidualMoe<Box<dyn Router>, D, ExpertMlps>),
    /// Added to a shared expert.
    Shared(SharedExpertMoe<Box<dyn Router>, D, ExpertMlps>),
}

impl MoeBlock {
    /// A layer whose parameters lie under `vb`, with all its experts here.
    ///
    /// # Errors
    /// [`crate::Error::Config`] for an impossible configuration; if a parameter is missing or has another shape.
    pub fn new(config: &MoeConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>) -> Result<Self> {
        let dispatcher = LocalDispatcher::new(Arc::clone(&ops) as Arc<dyn MoeOps>);
        Self::with_dispatcher(config, vb, ops, dispatcher)
    }
}

impl<D: Dispatcher> MoeBlock<D> {
    /// A layer whose parameters lie under `vb`, with those of its experts here that `dispatcher` says.
    ///
    /// # Errors
    /// As [`MoeBlock::new`].
    pub fn with_dispatcher(config: &MoeConfig, vb: VarBuilder<'_>, ops: Arc<dyn Ops>, dispatcher: D) -> Result<Self> {
        config.validate()?;
        let held = dispatcher.num_local_experts(config.num_experts);
        let experts = ExpertMlps::new(&config.expert, held, &vb, Arc::clone(&ops) as Arc<dyn MoeOps>)?;
        let routed = MoeLayer::new(router(config, &vb, &ops)?, dispatcher, experts)?.with_input(input(config));
        Ok(match config.branch {
            BranchConfig::None => Self::Plain(routed),
            BranchConfig::Residual(mlp) => {
                let mlp = Mlp::new(&mlp, vb.pp(RESIDUAL_MLP), Arc::clone(&ops))?;
                let [weight, bias] = config.coefficient();
                Self::Residual(ResidualMoe::new(routed, mlp, gate_weight(&weight, &vb, &ops)?, bias.get(&vb)?)?)
            }
            BranchConfig::Shared { mlp, gate } => {
                let mlp = Mlp::new(&mlp, vb.pp(SHARED_EXPERT), Arc::clone(&ops))?;
                let gate = gate.then(|| gate_weight(&config.shared_expert_gate(), &vb, &ops)).transpose()?;
                Self::Shared(SharedExpertMoe::new(routed, mlp, gate)?)
            }
        })
    }

    /// Sends each token through its experts and the branch.
    ///
    /// # Shapes
    /// - `tokens`: `[tokens, d_model]`
    ///
    /// # Errors
    /// If a part refuses the input.
    pub fn forward(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<MoeOutput> {
        match self {
            Self::Plain(moe) => moe.forward(tokens, context),
            Self::Residual(moe) => moe.forward(tokens, context),
            Self::Shared(moe) => moe.forward(tokens, context),
        }
    }

    /// What it multiplies with.
    pub fn weights(&self) -> Vec<&Weight> {
        match self {
            Self::Plain(moe) => moe.weights(),
            Self::Residual(moe) => moe.weights(),
            Self::Shared(moe) => moe.weights(),
        }
    }
}

fn gate_weight(spec: &ParamSpec, vb: &VarBuilder<'_>, ops: &Arc<dyn Ops>) -> Result<Weight> {
    ops.weight(&WeightSource::new(vb, spec), WeightUse::Gate)
}

/// What experts see of a token.
fn input(config: &MoeConfig) -> RowInput {
    match config.router {
        RouterConfig::Dropless { weighs: Weighs::Input, .. } => RowInput::Weighed,
        RouterConfig::SparseMixer(config) if config.input_jitter > 0.0 => {
            RowInput::Jittered(config.input_jitter as f32)
        }
        _ => RowInput::AsItIs,
    }
}

fn router(config: &MoeConfig, vb: &VarBuilder<'_>, ops: &Arc<dyn Ops>) -> Result<Box<dyn Router>> {
    let gate = Gate::with_ops(gate_weight(&config.gate(), vb, ops)?, Arc::clone(ops) as Arc<dyn MoeOps>)?;
    let gate = gate.with_bias(config.gate_bias().map(|spec| spec.get(vb)).transpose()?)?;
    Ok(match config.router {
        RouterConfig::Top1(config) => Box::new(Top1Router::new(gate, config)?),
        RouterConfig::Top2(config) => Box::new(Top2Router::new(gate, config)?),
        RouterConfig::TopK(config) => Box::new(TopKRouter::new(gate, config)?),
        RouterConfig::Dropless { config: policy, .. } => {
            let bias = config.selection_bias().map(|spec| spec.get(vb)).transpose()?;
            Box::new(DroplessRouter::new(gate, bias, policy)?)
        }
        RouterConfig::SparseMixer(config) => Box::new(SparseMixerRouter::new(gate, config)?),
    })
}

#[cfg(test)]
mod tests {
    //! What a block makes of a token beside the usual: weights on inputs, jitter, a gate with a bias.

    use super::*;
    use crate::testing::{assert_close, check_gradients, random, random_var, values};
    use crate::{
        Activation, DroplessConfig, MlpConfig, MlpWeights, Mode, NoiseSource, ScoreFunction, SeededNoise,
        SparseMixerConfig,
    };
    use candle_core::{DType, Device};
    use std::collections::HashMap;

    fn config(router: RouterConfig) -> MoeConfig {
        let activation = Activation::SwiGlu;
        MoeConfig {
            num_experts: 4,
            expert: MlpConfig { d_model: 6, d_ff: 5, activation, bias: false, in_std: 0.5, out_std: 0.5 },
            router,
            branch: BranchConfig::None,
            gate_bound: 0.5,
            load_balance_coef: 0.0,
            router_z_coef: 0.0,
        }
    }

    fn dropless(bias: bool, weighs: Weighs) -> RouterConfig {
        let config = DroplessConfig { score_function: ScoreFunction::Sigmoid, ..DroplessConfig::softmax(1, false) };
        RouterConfig::Dropless { config, selection_bias: false, bias, weighs }
    }

    fn tensors(config: &MoeConfig) -> HashMap<String, Tensor> {
        let tensor = |(seed, spec): (usize, ParamSpec)| (spec.name, random(seed as u64, &spec.shape, 0.7, DType::F64));
        config.params().into_iter().enumerate().map(tensor).collect()
    }

    fn block(config: &MoeConfig, tensors: &HashMap<String, Tensor>) -> MoeBlock {
        let vb = VarBuilder::from_tensors(tensors.clone(), DType::F64, &Device::Cpu);
        MoeBlock::new(config, vb, Arc::new(crate::CandleOps)).unwrap()
    }

    #[test]
    fn a_weight_can_be_a_factor_on_what_the_expert_sees() {
        let config = config(dropless(false, Weighs::Input));
        let tensors = tensors(&config);
        let block = block(&config, &tensors);
        let x = random_var(50, &[9, 6], 1.0, DType::F64);
        let output = block.forward(&x, &RouteContext::infer()).unwrap();
        let logits = values(&x.matmul(&tensors["gate.weight"].t().unwrap()).unwrap());
        let mut used = [false; 4];
        for token in 0..9 {
            let expert = output.routing.expert_ids[token] as usize;
            used[expert] = true;
            let own = |name: &str| tensors[name].get(expert).unwrap();
            let mlp = Mlp::from_weights(
                MlpWeights {
                    fc_in: own("experts.fc_in.weight").into(),
                    fc_in_bias: None,
                    fc_out: own("experts.fc_out.weight").into(),
                    fc_out_bias: None,
                },
                Activation::SwiGlu,
            );
            let score = 1.0 / (1.0 + (-logits[token * 4 + expert]).exp());
            let want = mlp.unwrap().forward(&(x.narrow(0, token, 1).unwrap() * score).unwrap()).unwrap();
            assert_close(&output.hidden.narrow(0, token, 1).unwrap(), &want, 1e-6, &format!("token {token}"));
        }
        assert!(used.iter().filter(|used| **used).count() > 1);
        assert!(values(&output.routing.combine_weights).iter().all(|weight| *weight == 1.0));
        check_gradients(&[("x", &x)], || {
            block.forward(&x, &RouteContext::infer()).unwrap().hidden.sqr().unwrap().sum_all().unwrap()
        });
        // Without tokens all still have gradients.
        let vars: HashMap<&String, candle_core::Var> =
            tensors.iter().map(|(name, tensor)| (name, candle_core::Var::from_tensor(tensor).unwrap())).collect();
        let variables = vars.iter().map(|(name, var)| ((*name).clone(), var.as_tensor().clone())).collect();
        let none = Tensor::zeros((0, 6), DType::F64, &Device::Cpu).unwrap();
        let output = self::block(&config, &variables).forward(&none, &RouteContext::infer()).unwrap();
        let grads = output.hidden.sum_all().unwrap().backward().unwrap();
        assert!(grads.get(&vars[&"gate.weight".to_owned()]).is_some());

        let two = RouterConfig::Dropless {
            config: DroplessConfig::softmax(2, true),
            selection_bias: false,
            bias: false,
            weighs: Weighs::Input,
        };
        let refused = MoeConfig { router: two, ..config }.validate().unwrap_err().to_string();
        assert!(refused.contains("top_k must be 1"), "{refused}");
    }

    #[test]
    fn a_bias_of_the_gate_moves_the_choice() {
        let config = config(dropless(true, Weighs::Outputs));
        let mut tensors = tensors(&config);
        tensors.insert("gate.bias".into(), Tensor::new(&[0f64, 0.0, 50.0, 0.0], &Device::Cpu).unwrap());
        let x = random(50, &[9, 6], 1.0, DType::F64);
        let output = block(&config, &tensors).forward(&x, &RouteContext::infer()).unwrap();
        assert!(output.routing.expert_ids.iter().all(|expert| *expert == 2));
    }

    /// In training the experts and the gate see the tokens times two draws for each element; otherwise the tokens.
    #[test]
    fn jitter_is_seen_by_experts_and_gate() {
        let mixer =
            |input_jitter| config(RouterConfig::SparseMixer(SparseMixerConfig { jitter_eps: 0.2, input_jitter }));
        let (jittered, plain) = (mixer(0.3), mixer(0.0));
        let tensors = tensors(&plain);
        let x = random(50, &[9, 6], 1.0, DType::F64);
        let noise = SeededNoise::new(5, 1);
        let run = |config: &MoeConfig, mode, x: &Tensor| {
            let output = block(config, &tensors).forward(x, &RouteContext::new(mode, &noise)).unwrap();
            (values(&output.hidden), output.routing.expert_ids)
        };
        let draws = noise.jitter(9, 12, 0.3);
        let factors =
            draws.chunks(12).flat_map(|row| (0..6).map(|i| f64::from(row[i] * row[6 + i])).collect::<Vec<_>>());
        let factors = Tensor::from_iter(factors, &Device::Cpu).unwrap().reshape((9, 6)).unwrap();
        let moved = (&x * factors).unwrap();
        assert_eq!(run(&jittered, Mode::Train, &x), run(&plain, Mode::Train, &moved));
        assert_ne!(run(&jittered, Mode::Train, &x).0, run(&plain, Mode::Train, &x).0);
        assert_eq!(run(&jittered, Mode::Infer, &x), run(&plain, Mode::Infer, &x));
    }
}
