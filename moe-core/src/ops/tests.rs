//! Every operation of [`CpuOps`] against [`CandleOps`], forward and backward, and against central differences.

use super::*;
use crate::testing::{assert_close, check_gradients, random, random_var};
use crate::{
    Capacity, Dispatcher, EinsumDispatcher, ExpertMlps, Experts, Gate, LocalDispatcher, Mlp, MlpWeights, Mode,
    MoeLayer, ResidualMoe, RouteContext, Router, SeededNoise, SharedExpertMoe, Top1Config, Top1Router, Top2Config,
    Top2Router,
};
use candle_core::{DType, Var};

struct Case {
    name: &'static str,
    offsets: &'static [usize],
}

const CASES: [Case; 5] = [
    Case { name: "even", offsets: &[0, 3, 6, 9] },
    Case { name: "one expert takes everything", offsets: &[0, 0, 9, 9] },
    Case { name: "one row", offsets: &[0, 0, 0, 1] },
    Case { name: "no row", offsets: &[0, 0, 0, 0] },
    Case { name: "ragged", offsets: &[0, 1, 1, 17] },
];

#[test]
fn grouped_linear_equals_the_reference() {
    for case in &CASES {
        let rows = case.offsets[3];
        for dtype in [DType::F32, DType::F64] {
            let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-12 };
            let x = random_var(1, &[rows, 5], 1.0, dtype);
            let w = random_var(2, &[3, 7, 5], 1.0, dtype);
            let b = random_var(3, &[3, 7], 1.0, dtype);
            let factors = random(4, &[rows, 7], 1.0, dtype);
            let run = |ops: &dyn MoeOps, bias| {
                let y = ops.grouped_linear(&x, &w, bias, case.offsets).unwrap();
                let grads = (&y * &factors).unwrap().sum_all().unwrap().backward().unwrap();
                (y, grads)
            };
            for bias in [Some(&b as &Tensor), None] {
                let (got, got_grads) = run(&CpuOps, bias);
                let (want, want_grads) = run(&CandleOps, bias);
                assert_close(&got, &want, tolerance, case.name);
                for (name, var) in [("x", &x), ("w", &w), ("b", &b)] {
                    // The reference leaves experts without rows out of the graph; zeros are the same gradient.
                    let zeros = var.zeros_like().unwrap();
                    let Some(got) = got_grads.get(var) else {
                        assert!(name == "b" && bias.is_none(), "{name} has no gradient");
                        continue;
                    };
                    let want = want_grads.get(var).unwrap_or(&zeros);
                    assert_close(got, want, tolerance, &format!("{} d{name}", case.name));
                }
            }
        }
    }
}

#[test]
fn activations_equal_the_reference_and_central_differences() {
    for activation in [Activation::GeluTanh, Activation::SwiGlu] {
        let x = random_var(5, &[3, 8], 1.5, DType::F64);
        assert_close(&activation.apply(&x).unwrap(), &activation.apply_reference(&x).unwrap(), 1e-9, "f64");
        check_gradients(&[("x", &x)], || activation.apply(&x).unwrap().sqr().unwrap().sum_all().unwrap());
        let x = random(6, &[33, 34], 3.0, DType::F32);
        assert_close(&activation.apply(&x).unwrap(), &activation.apply_reference(&x).unwrap(), 1e-6, "f32");
    }
    assert!(Activation::SwiGlu.apply(&random(7, &[2, 3], 1.0, DType::F32)).is_err());
}

#[test]
fn linear_equals_matmul() {
    let x = random_var(8, &[2, 3, 5], 1.0, DType::F64);
    let w = random_var(9, &[4, 5], 1.0, DType::F64);
    let b = random_var(10, &[4], 1.0, DType::F64);
    let want = x.reshape((6, 5)).unwrap().matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
    assert_close(&linear(&x, &w, Some(&b)).unwrap().reshape((6, 4)).unwrap(), &want, 1e-12, "linear");
    check_gradients(&[("x", &x), ("w", &w), ("b", &b)], || {
        linear(&x, &w, Some(&b)).unwrap().sqr().unwrap().sum_all().unwrap()
    });
    check_gradients(&[("x", &x), ("w", &w)], || linear(&x, &w, None).unwrap().sqr().unwrap().sum_all().unwrap());
    assert!(linear(&x, &random(1, &[4, 6], 1.0, DType::F64), None).unwrap_err().to_string().contains("width 5"));
}

fn weights(seed: u64, stack: &[usize], d_model: usize, d_ff: usize, activation: Activation) -> [Var; 4] {
    let shape = |tail: &[usize]| [stack, tail].concat();
    [
        random_var(seed, &shape(&[d_ff * activation.inputs(), d_model]), 0.5, DType::F64),
        random_var(seed + 1, &shape(&[d_ff * activation.inputs()]), 0.5, DType::F64),
        random_var(seed + 2, &shape(&[d_model, d_ff]), 0.5, DType::F64),
        random_var(seed + 3, &shape(&[d_model]), 0.5, DType::F64),
    ]
}

fn mlp_weights(vars: &[Var; 4]) -> MlpWeights {
    let t = |i: usize| vars[i].as_tensor().clone();
    MlpWeights { fc_in: t(0), fc_in_bias: Some(t(1)), fc_out: t(2), fc_out_bias: Some(t(3)) }
}

const EXPERTS: usize = 4;
const D_MODEL: usize = 5;

fn router(gate: &Var, top_k: usize) -> Box<dyn Router> {
    let capacity = Capacity { train_factor: Some(0.75), eval_factor: None, min_capacity: 1 };
    let gate = Gate::new(gate.as_tensor().clone()).unwrap();
    match top_k {
        1 => Box::new(Top1Router::new(gate, Top1Config { capacity, ..Top1Config::default() }).unwrap()),
        _ => Box::new(Top2Router::new(gate, Top2Config { capacity, ..Top2Config::default() }).unwrap()),
    }
}

/// The table form, in candle calls and in custom operations, and the one-hot einsum form: one set of numbers.
#[test]
fn einsum_form_equals_table_form() {
    for activation in [Activation::GeluTanh, Activation::SwiGlu] {
        for (top_k, mode, num_tokens) in
            [(1, Mode::Train, 16), (2, Mode::Train, 16), (2, Mode::Eval, 16), (1, Mode::Eval, 1)]
        {
            let gate = random_var(20, &[EXPERTS, D_MODEL], 1.0, DType::F64);
            let vars = weights(21, &[EXPERTS], D_MODEL, 6, activation);
            let tokens = random_var(30, &[num_tokens, D_MODEL], 1.0, DType::F64);
            let noise = SeededNoise::new(1, 2);
            let context = RouteContext::new(mode, &noise);
            let factors = random(31, &[num_tokens, D_MODEL], 1.0, DType::F64);
            let run = |hidden: Tensor| {
                let grads = (&hidden * &factors).unwrap().sum_all().unwrap().backward().unwrap();
                let grad = |v: &Var| grads.get(v).cloned().unwrap_or_else(|| v.zeros_like().unwrap());
                let grads: Vec<Tensor> = [&gate, &tokens].into_iter().chain(&vars).map(grad).collect();
                (hidden, grads)
            };
            let with = |ops: Arc<dyn MoeOps>| {
                let experts = ExpertMlps::with_ops(mlp_weights(&vars), activation, Arc::clone(&ops)).unwrap();
                let layer = MoeLayer::new(router(&gate, top_k), LocalDispatcher::with_ops(ops), experts).unwrap();
                run(layer.forward(&tokens, &context).unwrap().hidden)
            };
            let einsum = {
                let experts = ExpertMlps::new(mlp_weights(&vars), activation).unwrap();
                let layer = MoeLayer::new(router(&gate, top_k), EinsumDispatcher, experts).unwrap();
                run(layer.forward(&tokens, &context).unwrap().hidden)
            };
            for (name, got) in [("candle", with(Arc::new(CandleOps))), ("cpu", with(Arc::new(CpuOps)))] {
                let what = format!("{name} {activation:?} top-{top_k} {mode:?}");
                assert_close(&got.0, &einsum.0, 1e-11, &what);
                for (i, (got, want)) in got.1.iter().zip(&einsum.1).enumerate() {
                    assert_close(got, want, 1e-10, &format!("{what} gradient {i}"));
                }
            }
        }
    }
}

#[test]
fn finite_differences_of_the_layers() {
    let activation = Activation::GeluTanh;
    let gate = random_var(40, &[EXPERTS, D_MODEL], 1.0, DType::F64);
    let vars = weights(41, &[EXPERTS], D_MODEL, 3, activation);
    let fixed = weights(45, &[], D_MODEL, 3, activation);
    let coefficient = random_var(50, &[2, D_MODEL], 0.5, DType::F64);
    let coefficient_bias = random_var(51, &[2], 0.5, DType::F64);
    let shared_gate = random_var(52, &[1, D_MODEL], 0.5, DType::F64);
    let tokens = random_var(53, &[7, D_MODEL], 1.0, DType::F64);
    let noise = SeededNoise::new(1, 2);
    let context = RouteContext::new(Mode::Train, &noise);
    let moe = || {
        let experts = ExpertMlps::new(mlp_weights(&vars), activation).unwrap();
        MoeLayer::new(router(&gate, 2), LocalDispatcher::default(), experts).unwrap()
    };
    let mlp = || Mlp::new(mlp_weights(&fixed), activation).unwrap();
    let square = |hidden: Tensor| hidden.sqr().unwrap().sum_all().unwrap();
    let names = ["fc_in", "fc_in_bias", "fc_out", "fc_out_bias"];
    let mut all: Vec<(&str, &Var)> = names.into_iter().zip(&vars).collect();
    all.extend([("gate", &gate), ("tokens", &tokens)]);
    check_gradients(&all, || square(moe().forward(&tokens, &context).unwrap().hidden));
    all.extend(names.into_iter().zip(&fixed));
    let shared = || SharedExpertMoe::new(moe(), mlp(), Some(shared_gate.as_tensor().clone())).unwrap();
    all.push(("shared_expert_gate", &shared_gate));
    check_gradients(&all, || square(shared().forward(&tokens, &context).unwrap().hidden));
    all.pop();
    all.extend([("coefficient", &coefficient), ("coefficient_bias", &coefficient_bias)]);
    let residual = || {
        let c = |v: &Var| v.as_tensor().clone();
        ResidualMoe::new(moe(), mlp(), c(&coefficient), c(&coefficient_bias)).unwrap()
    };
    check_gradients(&all, || square(residual().forward(&tokens, &context).unwrap().hidden));
}

/// With no drops and weights that sum to 1, identity experts give back the input.
#[test]
fn identity_experts_return_the_input() {
    #[derive(Debug)]
    struct Identity;
    impl Experts for Identity {
        fn num_experts(&self) -> usize {
            EXPERTS
        }
        fn forward(&self, rows: crate::ExpertRows) -> Result<crate::ExpertRows> {
            Ok(rows)
        }
    }
    let gate = random_var(60, &[EXPERTS, D_MODEL], 1.0, DType::F64);
    let tokens = random(61, &[12, D_MODEL], 1.0, DType::F64);
    let noise = SeededNoise::new(1, 2);
    let layer = MoeLayer::new(router(&gate, 2), LocalDispatcher::default(), Identity).unwrap();
    let output = layer.forward(&tokens, &RouteContext::new(Mode::Eval, &noise)).unwrap();
    assert_close(&output.hidden, &tokens, 1e-12, "identity");
}

#[test]
fn wrong_shapes_are_named() {
    let x = random(1, &[4, 5], 1.0, DType::F32);
    let w = random(2, &[3, 7, 5], 1.0, DType::F32);
    let message = |r: Result<Tensor>| r.unwrap_err().to_string();
    assert!(message(CpuOps.grouped_linear(&x, &w, None, &[0, 1, 2, 3])).contains("offsets"));
    assert!(message(CpuOps.grouped_linear(&x, &w, Some(&x), &[0, 1, 2, 4])).contains("bias"));
    let noise = SeededNoise::new(1, 2);
    let gate = random_var(60, &[EXPERTS, D_MODEL], 1.0, DType::F64);
    let routing = router(&gate, 1)
        .route(&random(61, &[12, D_MODEL], 1.0, DType::F64), &RouteContext::new(Mode::Eval, &noise))
        .unwrap();
    let error = LocalDispatcher::default().dispatch(&x, &routing).unwrap_err().to_string();
    assert!(error.contains("tokens must number 12, got 4"), "{error}");
}
