//! What the layer over ranks refuses, and what it says when a rank is missing.

use candle_core::{Device, Tensor};
use moe_core::{CandleOps, Dispatcher, DroplessConfig, DroplessRouter, Gate, RouteContext, Router};
use moe_parallel::comm::thread::{Clock, FaultPlan, Injection, ThreadWorld};
use moe_parallel::{Collectives, Coordination, ExchangeConfig, Mesh, ParallelDims};
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
        let gate = Gate::new(moe_core::testing::random(3, &[8, 4], 1.0, candle_core::DType::F32))?;
        let router = DroplessRouter::new(gate, None, DroplessConfig::softmax(2, true))?;
        let tokens = moe_core::testing::random(comm.rank() as u64, &[5, 4], 1.0, candle_core::DType::F32);
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
        let gate = Gate::new(Tensor::zeros((3, 4), candle_core::DType::F32, &Device::Cpu).unwrap()).unwrap();
        let router = DroplessRouter::new(gate, None, DroplessConfig::softmax(1, true)).unwrap();
        let tokens = Tensor::ones((2, 4), candle_core::DType::F32, &Device::Cpu).unwrap();
        let routing = router.route(&tokens, &RouteContext::infer()).unwrap();
        let error = dispatcher.dispatch(&tokens, &routing).unwrap_err().to_string();
        assert!(error.contains("spreads 4 experts, the router has 3"), "{error}");
        comm.barrier(moe_parallel::Site::new(moe_parallel::Phase::Start)).unwrap();
    });
}
