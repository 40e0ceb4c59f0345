//! The loss over a split vocabulary in memory that does not grow with tokens times vocabulary. A binary of its own, with one test:
//! it counts what the whole process allocates.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use moe_core::ops::LossOps;
use moe_core::testing::random;
use moe_core::{ParamInit, ParamSpec, SplitKind, WeightOps, WeightSource, WeightUse};
use moe_kernels::{KernelOps, Precision};
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::dims::part;
use moe_parallel::{Phase, RankOps, Site};
use peak_alloc::PeakAlloc;
use std::collections::HashMap;
use std::sync::Arc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const RANKS: usize = 2;
const VOCAB: usize = 3001;
const WIDTH: usize = 8;

/// The most that losses and gradients of so many tokens hold at once, on all ranks.
fn peak(tokens: usize) -> usize {
    let hidden = random(1, &[tokens, WIDTH], 1.0, DType::F32);
    let targets: Vec<u32> = (0..tokens).map(|t| (t * 7 % VOCAB) as u32).collect();
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let losses = ThreadWorld::new(RANKS).run(|comm| {
        let rows = part(VOCAB, comm.group().rank(), RANKS).len();
        let weight = Var::from_tensor(&random(2, &[rows, WIDTH], 1.0, DType::F32)).unwrap();
        let tensors = HashMap::from([("w".to_owned(), weight.as_tensor().clone())]);
        let vb = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
        let spec = ParamSpec::new("w", &[VOCAB, WIDTH], ParamInit::Zeros).split(SplitKind::Tensor, 0, 1);
        let ops = RankOps::new(Arc::new(KernelOps::new(Precision::F32)), comm, None, Site::new(Phase::Forward));
        let part = ops.weight(&WeightSource::new(&vb, &spec), WeightUse::Output).unwrap();
        let input = Var::from_tensor(&hidden).unwrap();
        let loss: Tensor = ops.linear_cross_entropy(&input, &part, &targets).unwrap();
        let grads = loss.backward().unwrap();
        assert!(grads.get(&weight).is_some() && grads.get(&input).is_some());
        loss.to_scalar::<f32>().unwrap()
    });
    assert!(losses[0].is_finite() && losses.iter().all(|loss| loss.to_bits() == losses[0].to_bits()), "{losses:?}");
    ALLOCATOR.peak_usage() - before
}

#[test]
fn logits_of_a_split_vocabulary_are_never_whole() {
    peak(64); // Threads and what they keep.
    let (few, many) = (2_000, 12_000);
    let grown = peak(many).saturating_sub(peak(few));
    // Hidden, its copies and gradients, and messages grow with the tokens. A rank's logits would add 6 KB a token.
    let per_token = grown / (many - few);
    assert!(per_token < 1_500, "{per_token} bytes more of each token");
}
