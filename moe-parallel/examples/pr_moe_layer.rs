//! A PR-MoE layer over four ranks, threads of this process, that hold two of its eight experts each.

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use moe_core::{Activation, BranchConfig, CandleOps, MlpConfig, Mode, MoeConfig};
use moe_core::{RouteContext, RouterConfig, SeededNoise, Top1Config};
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::{Collectives, ExchangeConfig, Mesh, ParallelDims, Result};
use std::sync::Arc;

fn main() -> Result<()> {
    let mlp =
        MlpConfig { d_model: 16, d_ff: 32, activation: Activation::GeluTanh, bias: true, in_std: 0.1, out_std: 0.1 };
    let (router, branch) = (RouterConfig::Top1(Top1Config::default()), BranchConfig::Residual(mlp));
    let config = MoeConfig {
        num_experts: 8,
        expert: mlp,
        router,
        branch,
        gate_bound: 0.3,
        load_balance_coef: 0.01,
        router_z_coef: 0.0,
    };
    let rank = |comm| -> Result<()> {
        let mesh = Mesh::new(comm, ParallelDims::new(4, 1, 4, 1), 2, ExchangeConfig::default())?;
        let weights = mesh.placement().initial(&config.params(), 42, &Device::Cpu)?;
        let vb = VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu);
        let layer = mesh.moe_block(&config, vb, Arc::new(CandleOps), 0)?;
        let tokens = Tensor::randn(0f32, 1.0, (32, 16), &Device::Cpu)?;
        let noise = SeededNoise::new(42, mesh.world().rank() as u64);
        let output = layer.forward(&tokens, &RouteContext::new(Mode::Train, &noise))?;
        println!("rank {}: tokens per expert {:?}", mesh.world().rank(), output.load.tokens_per_expert);
        Ok(())
    };
    ThreadWorld::new(4).run(rank).into_iter().collect()
}
