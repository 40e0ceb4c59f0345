//! Mixture-of-experts layers for candle: routers, dispatch by table, experts, losses, all with gradients.
//!
//! The vocabulary and the reference semantics of the workspace. Does no I/O, has no unsafe code, reads no environment.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{VarBuilder, VarMap};
//! use moe_core::{Activation, BranchConfig, CandleOps, MlpConfig, Mode, MoeBlock, MoeConfig};
//! use moe_core::{RouteContext, RouterConfig, SeededNoise, Top1Config};
//! use std::sync::Arc;
//!
//! # fn main() -> moe_core::Result<()> {
//! let expert =
//!     MlpConfig { d_model: 8, d_ff: 16, activation: Activation::GeluTanh, bias: true, in_std: 0.1, out_std: 0.1 };
//! let config = MoeConfig {
//!     num_experts: 4,
//!     expert,
//!     router: RouterConfig::Top1(Top1Config::default()),
//!     branch: BranchConfig::Residual(expert),
//!     gate_bound: 0.3,
//!     load_balance_coef: 0.01,
//!     router_z_coef: 0.0,
//! };
//! let variables = VarMap::new();
//! let vb = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
//! let layer = MoeBlock::new(&config, vb.pp("moe"), Arc::new(CandleOps))?;
//!
//! let tokens = Tensor::randn(0f32, 1.0, (32, 8), &Device::Cpu)?;
//! let noise = SeededNoise::new(42, 0);
//! let output = layer.forward(&tokens, &RouteContext::new(Mode::Train, &noise))?;
//! assert_eq!(output.hidden.dims(), [32, 8]);
//! println!("tokens per expert {:?}, imbalance {:.2}", output.load.tokens_per_expert, output.load.imbalance());
//! # Ok(())
//! # }
//! ```

mod block;
mod config;
mod dispatch;
mod einsum;
mod error;
mod experts;
mod layer;
mod loss;
pub mod ops;
mod params;
mod rng;
mod router;
mod routing;
pub mod tape;
#[cfg(feature = "testing")]
pub mod testing;
mod weight;

pub use block::{MoeBlock, Routed};
pub use config::{BranchConfig, MlpConfig, MoeConfig, RouterConfig};
pub use dispatch::{DispatchTable, Dispatcher, ExpertRows, LocalDispatcher, LocalReceipt};
pub use einsum::{EinsumDispatcher, EinsumReceipt};
pub use error::{Error, Result};
pub use experts::{ExpertMlps, Experts, Mlp, MlpWeights};
pub use layer::{MoeLayer, MoeOutput, ResidualMoe, SharedExpertMoe};
pub use loss::{load_balance_loss, load_balance_loss_per_sequence, router_z_loss, updated_selection_bias};
pub use ops::{Activation, CandleOps, DecoderOps, LossOps, MoeOps, Ops, WeightOps};
pub use params::{ParamInit, ParamSpec, Split, SplitKind};
pub use rng::CounterRng;
pub use router::{
    DropPolicy, DroplessConfig, DroplessRouter, ExpertChoiceConfig, ExpertChoiceRouter, ExpertObserver, Gate,
    GroupScore, HashRouter, Mode, NoiseSource, NoisyGate, PositionedNoise, RouteContext, Router, ScoreFunction,
    SeededNoise, Top1Config, Top1Router, Top2Config, Top2Router, TopKConfig, TopKRouter,
};
pub use routing::{Capacity, DROPPED, ExpertLoad, RouterLosses, Routing, capacity_rows};
pub use weight::{PackedWeight, StoredIntegers, StoredRows, Weight, WeightSource, WeightUse};
