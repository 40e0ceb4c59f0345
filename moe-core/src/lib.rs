//! Mixture-of-experts layers for candle: routers, dispatch by table, experts, losses, all with gradients.
//!
//! The vocabulary and the reference semantics of the workspace. Does no I/O, has no unsafe code, reads no environment.

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
pub use config::{BranchConfig, MlpConfig, MoeConfig, RouterConfig, Weighs};
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
    SeededNoise, SparseMixerConfig, SparseMixerRouter, Top1Config, Top1Router, Top2Config, Top2Router, TopKConfig,
    TopKRouter,
};
pub use routing::{Capacity, DROPPED, ExpertLoad, RouterLosses, Routing, capacity_rows};
pub use weight::{PackedWeight, StoredIntegers, StoredRows, Weight, WeightSource, WeightUse};

/// The tensor library, in the version whose types are in these layers' signatures.
pub use {candle_core, candle_nn};

/// The example of the README, which runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
