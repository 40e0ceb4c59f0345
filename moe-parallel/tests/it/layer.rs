//! What the layer over ranks refuses, and what it says when a rank is missing.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use moe_core::{
    Activation, BranchConfig, CandleOps, Dispatcher, DroplessConfig, DroplessRouter, ExpertMlps, Gate, MlpConfig,
    MlpWeights, Mode, MoeConfig, MoeLayer, RouteContext, Router, RouterConfig, SeededNoise, Top1Config,
};
use moe_parallel::all_to_all::Route;
use moe_parallel::comm::thread::{Clock, FaultPlan, Injection, ThreadWorld};
use moe_parallel::{Collectives, Communicator, Coordination, ExchangeConfig, Mesh, ParallelDims, Phase, Site};
use std::sync::Arc;
use std::time::Duration;

/// A rank that stops answering inside a layer: every other rank's pass ends in an error that names it, the phase and the layer,
/// and that is still there behind the layer's own error type.
#[test]
fn a_fault_comes_through_the_layer() {
    let plan = FaultPlan::none().with(1, 12, Injection::Stop);
    let world = ThreadWorld::new(4).with_clock(Clock::Virtual).with_timeout(Duration::from_secs(30)).with_faults(plan);
    let errors = world.run(|comm| {
        let mesh = Mesh::new(Arc::clone(&comm), ParallelDims::new(4, 1, 4, 1), 2, ExchangeConfig::default())?;
        let dispatcher = mesh.dispatcher(8, 7, Arc::new(CandleOps))?;
        let gate = Gate::new(moe_core::testing::random(3, &[8, 4], 1.0, DType::F32))?;
        let router = DroplessRouter::new(gate, None, DroplessConfig::softmax(2, true))?;
        let tokens = moe_core::testing::random(comm.rank() as u64, &[5, 4], 1.0, DType::F32);
        for _ in 0..9 {
            let routing = router.route(&tokens, &RouteContext::infer())?;
            let (rows, receipt) = dispatcher.dispatch(&tokens, &routing)?;
            dispatcher.combine(rows, receipt)?;
        }
        Ok::<(), moe_parallel::Error>(())
    });
    for (rank, error) in errors.iter().enumerate().filter(|(rank, _)| *rank != 1) {
        let error = error.as_ref().unwrap_err();
        let fault = error.fault().unwrap_or_else(|| panic!("rank {rank}: {error}"));
        assert_eq!(fault.ranks(), [1], "{fault}");
        assert!(fault.to_string().contains("forward pass, layer 7"), "{fault}");
        assert_eq!(error.to_string().lines().next(), Some(fault.to_string().as_str()), "the error says the fault");
    }
}

/// 400 plans in a step of a residual layer, forward and backward: whatever goes wrong, in whatever part of the pass, every
/// survivor returns the one fault, through the layer or through the tensor library's backward pass.
#[test]
fn any_fault_in_a_pass_comes_through_the_layer() {
    const TIMEOUT: Duration = Duration::from_secs(10);
    let mlp =
        MlpConfig { d_model: 4, d_ff: 6, activation: Activation::GeluTanh, bias: true, in_std: 0.3, out_std: 0.3 };
    let config = MoeConfig {
        num_experts: 6,
        expert: mlp,
        router: RouterConfig::Top1(Top1Config::default()),
        branch: BranchConfig::Residual(mlp),
        gate_bound: 0.5,
        load_balance_coef: 0.0,
        router_z_coef: 0.0,
    };
    let pass = |comm: &Arc<dyn Communicator>, dims, exchange| -> moe_parallel::Result<()> {
        let mesh = Mesh::new(Arc::clone(comm), dims, 2, exchange)?;
        let vars = mesh.placement().initial(&config.params(), 3, &Device::Cpu)?;
        let vars = vars.into_iter().map(|(name, value)| Ok((name, Var::from_tensor(&value)?.as_tensor().clone())));
        let vb = VarBuilder::from_tensors(vars.collect::<moe_parallel::Result<_>>()?, DType::F32, &Device::Cpu);
        let block = mesh.moe_block(&config, vb, Arc::new(CandleOps), 1)?;
        let d = dims.dense(comm.rank()).dp_rank as u64;
        let tokens = Var::from_tensor(&moe_core::testing::random(d, &[5, 4], 1.0, DType::F32))?;
        let noise = SeededNoise::new(d, 0);
        let output = block.forward(tokens.as_tensor(), &RouteContext::new(Mode::Train, &noise))?;
        output.hidden.sqr()?.sum_all()?.backward()?;
        comm.barrier(Site::new(Phase::Update))
    };
    let pairs = (ParallelDims::new(2, 2, 4, 1), Coordination::ByDestination);
    let (mut failed, mut phases) = (0, std::collections::BTreeSet::new());
    for seed in 0..400 {
        let (dims, coordination) =
            if seed % 2 == 0 { pairs } else { (ParallelDims::new(4, 1, 4, 1), Coordination::None) };
        let route = if seed % 4 < 2 { Route::Flat } else { Route::Hierarchical };
        let plan = FaultPlan::seeded(seed, 4, 18, TIMEOUT);
        let (victim, ..) = plan.injections()[0];
        let world = ThreadWorld::new(4).with_clock(Clock::Virtual).with_timeout(TIMEOUT).with_faults(plan.clone());
        let errors = world.run(|comm| pass(&comm, dims, ExchangeConfig { route: route.into(), coordination }));
        let faults: Vec<_> = errors
            .iter()
            .enumerate()
            .filter(|(rank, _)| *rank != victim)
            .map(|(_, e)| e.as_ref().err().map(|e| e.fault().unwrap_or_else(|| panic!("seed {seed}: {e}"))))
            .collect();
        assert!(faults.iter().all(|f| *f == faults[0]), "seed {seed}: {plan:?} {faults:?}");
        failed += usize::from(faults[0].is_some());
        phases.extend(faults[0].map(|f| (f.stamp.site.phase, f.stamp.site.layer)));
    }
    assert!(failed > 200, "{failed}");
    let layer = |phase| phases.contains(&(phase, Some(1)));
    assert!(layer(Phase::Forward) && layer(Phase::Backward), "{phases:?}");
}

/// The branch beside the experts runs while their results travel: all of them are on their way when it begins.
#[test]
fn the_branch_runs_while_results_travel() {
    ThreadWorld::new(4).run(|comm| {
        let mesh = Mesh::new(Arc::clone(&comm), ParallelDims::new(4, 1, 4, 1), 2, ExchangeConfig::default()).unwrap();
        let dispatcher = mesh.dispatcher(4, 0, Arc::new(CandleOps)).unwrap();
        let gate = Gate::new(moe_core::testing::random(3, &[4, 4], 1.0, DType::F32)).unwrap();
        let router = DroplessRouter::new(gate, None, DroplessConfig::softmax(2, true)).unwrap();
        let weights = MlpWeights {
            fc_in: moe_core::testing::random(4, &[1, 6, 4], 1.0, DType::F32).into(),
            fc_in_bias: None,
            fc_out: moe_core::testing::random(5, &[1, 4, 6], 1.0, DType::F32).into(),
            fc_out_bias: None,
        };
        let experts = ExpertMlps::from_weights(weights, Activation::GeluTanh).unwrap();
        let layer = MoeLayer::new(router, dispatcher, experts).unwrap();
        let tokens = moe_core::testing::random(comm.rank() as u64, &[40, 4], 1.0, DType::F32);
        let beside = || Ok(Tensor::new(mesh.sent().inter_node_messages as u32, &Device::Cpu)?);
        let (_, sent) = layer.forward_beside(&tokens, &RouteContext::infer(), beside).unwrap();
        // Counts, rows and results to each of the two ranks of the other node.
        assert_eq!(sent.to_scalar::<u32>().unwrap(), 6);
        assert_eq!(mesh.sent().inter_node_messages, 6);
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    ThreadWorld::new(2).run(|comm| {
        let by_tokens = ExchangeConfig { coordination: Coordination::ByTokens, ..ExchangeConfig::default() };
        let mesh = |dims, per_node, exchange| Mesh::new(Arc::clone(&comm), dims, per_node, exchange);
        for (error, part) in [
            (mesh(ParallelDims::new(1, 2, 2, 1), 1, by_tokens).unwrap_err(), "by tokens needs groups within"),
            (mesh(ParallelDims::new(2, 1, 2, 1), 0, by_tokens).unwrap_err(), "ranks_per_node"),
            (mesh(ParallelDims::new(3, 1, 1, 1), 1, by_tokens).unwrap_err(), "but there are 2"),
        ] {
            assert!(error.to_string().contains(part), "{error}");
        }
        let mesh = mesh(ParallelDims::new(2, 1, 2, 1), 1, ExchangeConfig::default()).unwrap();
        let dispatcher = mesh.dispatcher(4, 0, Arc::new(CandleOps)).unwrap();
        let gate = Gate::new(Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap()).unwrap();
        let router = DroplessRouter::new(gate, None, DroplessConfig::softmax(1, true)).unwrap();
        let tokens = Tensor::ones((2, 4), DType::F32, &Device::Cpu).unwrap();
        let routing = router.route(&tokens, &RouteContext::infer()).unwrap();
        let error = dispatcher.dispatch(&tokens, &routing).unwrap_err().to_string();
        assert!(error.contains("spreads 4 experts, the router has 3"), "{error}");
        comm.barrier(Site::new(Phase::Start)).unwrap();
    });
}
