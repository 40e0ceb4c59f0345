//! Mixture-of-experts layers for candle: routers, dispatch by table, experts, losses, all with gradients.
//!
//! The vocabulary and the reference semantics of the workspace. Does no I/O, has no unsafe code, reads no environment.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use moe_core::{Activation, ExpertMlps, Gate, LocalDispatcher, MlpWeights, Mode, MoeLayer, RouteContext, SeededNoise};
//! use moe_core::{Top1Config, Top1Router};
//!
//! # fn main() -> moe_core::Result<()> {
//! let (experts, d_model, d_ff) = (4, 8, 16);
//! let random = |shape: &[usize]| Tensor::randn(0f32, 0.1, shape, &Device::Cpu);
//! let router = Top1Router::new(Gate::new(random(&[experts, d_model])?)?, Top1Config::default())?;
//! let weights = MlpWeights {
//!     fc_in: random(&[experts, d_ff, d_model])?,
//!     fc_in_bias: None,
//!     fc_out: random(&[experts, d_model, d_ff])?,
//!     fc_out_bias: None,
//! };
//! let experts = ExpertMlps::new(weights, Activation::GeluTanh)?;
//! let layer = MoeLayer::new(router, LocalDispatcher::default(), experts)?;
//!
//! let noise = SeededNoise::new(42, 0);
//! let output = layer.forward(&random(&[32, d_model])?, &RouteContext::new(Mode::Train, &noise))?;
//! assert_eq!(output.hidden.dims(), [32, d_model]);
//! println!("tokens per expert {:?}, imbalance {:.2}", output.load.tokens_per_expert, output.load.imbalance());
//! # Ok(())
//! # }
//! ```

mod dispatch;
mod einsum;
mod error;
mod experts;
mod layer;
mod loss;
pub mod ops;
mod rng;
mod router;
mod routing;
#[cfg(feature = "testing")]
pub mod testing;

pub use dispatch::{DispatchTable, Dispatcher, ExpertRows, LocalDispatcher, LocalReceipt};
pub use einsum::{EinsumDispatcher, EinsumReceipt};
pub use error::{Error, Result};
pub use experts::{ExpertMlps, Experts, Mlp, MlpWeights};
pub use layer::{MoeLayer, MoeOutput, ResidualMoe, SharedExpertMoe};
pub use loss::{load_balance_loss, load_balance_loss_per_sequence, router_z_loss, updated_selection_bias};
pub use ops::{Activation, MoeOps};
pub use rng::CounterRng;
pub use router::{
    DropPolicy, DroplessConfig, DroplessRouter, ExpertChoiceConfig, ExpertChoiceRouter, Gate, GroupScore, HashRouter,
    Mode, NoiseSource, NoisyGate, RouteContext, Router, ScoreFunction, SeededNoise, Top1Config, Top1Router, Top2Config,
    Top2Router, TopKConfig, TopKRouter,
};
pub use routing::{Capacity, DROPPED, ExpertLoad, RouterLosses, Routing, capacity_rows};
