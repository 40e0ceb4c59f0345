//! What an MoE layer is made of, as plain data: checked when a layer is built from it.

use crate::{
    Activation, DroplessConfig, Error, ParamInit, ParamSpec, Result, SparseMixerConfig, SplitKind, Top1Config,
    Top2Config, TopKConfig,
};

/// A two-layer feed-forward network: a dense layer, one expert, or a fixed branch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlpConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Width between the two maps.
    pub d_ff: usize,
    /// What is applied between them.
    pub activation: Activation,
    /// Whether both maps have a bias.
    pub bias: bool,
    /// Standard deviation of the first map's initial weights.
    pub in_std: f64,
    /// The same of the second map, which ends in the residual stream.
    pub out_std: f64,
}

impl MlpConfig {
    fn inner(&self) -> usize {
        self.d_ff * self.activation.inputs()
    }

    /// `fc_in.weight` `[inputs * d_ff, d_model]`, gate before up.
    pub fn fc_in(&self) -> ParamSpec {
        ParamSpec::new("fc_in.weight", &[self.inner(), self.d_model], ParamInit::Normal(self.in_std)).split(
            SplitKind::Tensor,
            0,
            self.activation.inputs(),
        )
    }

    /// `fc_in.bias`
    pub fn fc_in_bias(&self) -> Option<ParamSpec> {
        let spec = || ParamSpec::new("fc_in.bias", &[self.inner()], ParamInit::Zeros);
        self.bias.then(|| spec().split(SplitKind::Tensor, 0, self.activation.inputs()))
    }

    /// `fc_out.weight` `[d_model, d_ff]`
    pub fn fc_out(&self) -> ParamSpec {
        ParamSpec::new("fc_out.weight", &[self.d_model, self.d_ff], ParamInit::Normal(self.out_std)).split(
            SplitKind::Tensor,
            1,
            1,
        )
    }

    /// `fc_out.bias`
    pub fn fc_out_bias(&self) -> Option<ParamSpec> {
        self.bias.then(|| ParamSpec::new("fc_out.bias", &[self.d_model], ParamInit::Zeros))
    }

    /// All parameters, in the order of the forward pass.
    pub fn params(&self) -> Vec<ParamSpec> {
        [Some(self.fc_in()), self.fc_in_bias(), Some(self.fc_out()), self.fc_out_bias()].into_iter().flatten().collect()
    }
}

/// The policy that sends tokens to experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RouterConfig {
    /// DeepSpeed's top-1.
    Top1(Top1Config),
    /// DeepSpeed's top-2.
    Top2(Top2Config),
    /// DeepSpeed's top-k.
    TopK(TopKConfig),
    /// Today's top-k without drops.
    Dropless {
        /// Its settings.
        config: DroplessConfig,
        /// Whether a bias moves the choice and not the weights (DeepSeek-V3).
        selection_bias: bool,
        /// Whether the gate has a bias, which moves both (gpt-oss).
        bias: bool,
        /// What a token's weights are factors on.
        weighs: Weighs,
    },
    /// Two experts, drawn in training (PhiMoE).
    SparseMixer(SparseMixerConfig),
}

/// What a token's weights are factors on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weighs {
    /// The results of its experts.
    Outputs,
    /// What its expert sees, of which there can be one only (Llama 4).
    Input,
}

impl RouterConfig {
    /// Experts per token.
    pub fn top_k(&self) -> usize {
        match self {
            Self::Top1(_) => 1,
            Self::Top2(_) => 2,
            Self::TopK(config) => config.top_k,
            Self::Dropless { config, .. } => config.top_k,
            Self::SparseMixer(_) => SparseMixerConfig::TOP_K,
        }
    }
}

/// What sees every token beside the routed experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BranchConfig {
    /// Nothing.
    None,
    /// A network mixed with the experts by a learned softmax per token (Residual-MoE).
    Residual(MlpConfig),
    /// A network added to the experts (DeepSeekMoE), scaled by a sigmoid gate if there is one (Qwen2-MoE).
    Shared {
        /// The network; several shared experts are one of their summed width.
        mlp: MlpConfig,
        /// Whether a gate scales it.
        gate: bool,
    },
}

/// An MoE layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeConfig {
    /// Experts over all ranks.
    pub num_experts: usize,
    /// Each of them.
    pub expert: MlpConfig,
    /// Who decides.
    pub router: RouterConfig,
    /// What every token passes besides.
    pub branch: BranchConfig,
    /// Bound of the uniform initial values of gate and mixing coefficients.
    pub gate_bound: f64,
    /// Factor of the load-balance loss in a training loss.
    pub load_balance_coef: f64,
    /// Factor of the router z-loss in a training loss.
    pub router_z_coef: f64,
}

impl MoeConfig {
    /// Refuses what no layer can be.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    pub fn validate(&self) -> Result<()> {
        let MlpConfig { d_model, d_ff, .. } = self.expert;
        let top_k = self.router.top_k();
        for (name, value) in [("num_experts", self.num_experts), ("d_model", d_model), ("d_ff", d_ff)] {
            if value == 0 {
                return Err(Error::Config(format!("{name} must be at least 1, got 0")));
            }
        }
        if top_k == 0 || top_k > self.num_experts {
            return Err(Error::Config(format!(
                "top_k must be between 1 and the {} experts, got {top_k}",
                self.num_experts
            )));
        }
        let branch = match self.branch {
            BranchConfig::None => None,
            BranchConfig::Residual(mlp) | BranchConfig::Shared { mlp, .. } => Some(mlp),
        };
        if let Some(mlp) = branch.filter(|mlp| mlp.d_model != d_model || mlp.d_ff == 0) {
            return Err(Error::Config(format!(
                "the branch beside the experts must have their d_model {d_model} and a d_ff of at least 1, got {} and {}",
                mlp.d_model, mlp.d_ff
            )));
        }
        match self.router {
            RouterConfig::Top1(Top1Config { capacity, .. })
            | RouterConfig::Top2(Top2Config { capacity, .. })
            | RouterConfig::TopK(TopKConfig { capacity, .. }) => capacity.validate(),
            RouterConfig::Dropless { config, weighs, .. } => {
                if weighs == Weighs::Input && config.top_k != 1 {
                    let k = config.top_k;
                    return Err(Error::Config(format!("top_k must be 1 where weights are factors on inputs, got {k}")));
                }
                config.validate(self.num_experts)
            }
            RouterConfig::SparseMixer(config) => config.validate(),
        }
    }

    /// `gate.weight` `[num_experts, d_model]`
    pub fn gate(&self) -> ParamSpec {
        let shape = [self.num_experts, self.expert.d_model];
        ParamSpec::new("gate.weight", &shape, ParamInit::Uniform(self.gate_bound))
    }

    /// `gate.bias` `[num_experts]`
    pub fn gate_bias(&self) -> Option<ParamSpec> {
        let has = matches!(self.router, RouterConfig::Dropless { bias: true, .. });
        has.then(|| ParamSpec::new("gate.bias", &[self.num_experts], ParamInit::Zeros))
    }

    /// `gate.selection_bias` `[num_experts]`
    pub fn selection_bias(&self) -> Option<ParamSpec> {
        let has = matches!(self.router, RouterConfig::Dropless { selection_bias: true, .. });
        has.then(|| ParamSpec::new("gate.selection_bias", &[self.num_experts], ParamInit::Zeros).untrained())
    }

    /// `coefficient.weight` `[2, d_model]` and `coefficient.bias` `[2]` of a residual branch.
    pub fn coefficient(&self) -> [ParamSpec; 2] {
        let init = ParamInit::Uniform(self.gate_bound);
        let weight = ParamSpec::new("coefficient.weight", &[2, self.expert.d_model], init);
        [weight, ParamSpec::new("coefficient.bias", &[2], init)]
    }

    /// `shared_expert_gate.weight` `[1, d_model]`
    pub fn shared_expert_gate(&self) -> ParamSpec {
        let init = ParamInit::Uniform(self.gate_bound);
        ParamSpec::new("shared_expert_gate.weight", &[1, self.expert.d_model], init)
    }

    /// All parameters, in the order of the forward pass; experts are stacked.
    pub fn params(&self) -> Vec<ParamSpec> {
        let experts = self.expert.params().into_iter().map(|spec| spec.stacked(self.num_experts));
        let gate = [self.gate()].into_iter().chain(self.gate_bias()).chain(self.selection_bias());
        let mut params: Vec<_> = gate.chain(experts).collect();
        match self.branch {
            BranchConfig::None => {}
            BranchConfig::Residual(mlp) => {
                params.extend(mlp.params().into_iter().map(|spec| spec.below(RESIDUAL_MLP)));
                params.extend(self.coefficient());
            }
            BranchConfig::Shared { mlp, gate } => {
                params.extend(mlp.params().into_iter().map(|spec| spec.below(SHARED_EXPERT)));
                params.extend(gate.then(|| self.shared_expert_gate()));
            }
        }
        params
    }
}

/// Prefix of the fixed branch of a residual MoE.
pub(crate) const RESIDUAL_MLP: &str = "residual_mlp";
/// Prefix of a shared expert.
pub(crate) const SHARED_EXPERT: &str = "shared_expert";
