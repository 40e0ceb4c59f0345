//! The reference operations and the layers built on them, against central differences; the table form against the
//! original's one-hot form.

use super::*;
use crate::testing::{assert_close, check_gradients, random, random_var};
use crate::{
    Capacity, Dispatcher, EinsumDispatcher, ExpertMlps, Experts, Gate, LocalDispatcher, Mlp, MlpWeights, Mode,
    MoeLayer, ResidualMoe, RouteContext, Router, SeededNoise, SharedExpertMoe, Top1Config, Top1Router, Top2Config,
    Top2Router,
};
use candle_core::{DType, Tensor, Var};
use std::sync::Arc;

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

fn grouped(x: &Tensor, w: &Tensor, b: Option<&Tensor>, offsets: &[usize]) -> Result<Tensor> {
    CandleOps.grouped_linear(x, &w.clone().into(), b, offsets)
}

#[test]
fn grouped_linear_has_the_gradients_of_central_differences() {
    for case in &CASES {
        let rows = case.offsets[3];
        let x = random_var(1, &[rows, 5], 1.0, DType::F64);
        let w = random_var(2, &[3, 7, 5], 1.0, DType::F64);
        let b = random_var(3, &[3, 7], 1.0, DType::F64);
        for bias in [Some(&b as &Tensor), None] {
            let y = grouped(&x, &w, bias, case.offsets).unwrap();
            assert_eq!(y.dims(), [rows, 7], "{}", case.name);
            let vars: &[(&str, &Var)] = if rows == 0 { &[("x", &x)] } else { &[("x", &x), ("w", &w)] };
            check_gradients(vars, || grouped(&x, &w, bias, case.offsets).unwrap().sqr().unwrap().sum_all().unwrap());
        }
    }
}

#[test]
fn activations_have_the_gradients_of_central_differences() {
    for (activation, scale) in
        [(Activation::GeluTanh, 1.5), (Activation::SwiGlu, 1.5), (Activation::SwiGluBounded, 6.0)]
    {
        let x = random_var(5, &[3, 8], scale, DType::F64);
        check_gradients(&[("x", &x)], || activation.apply(&x).unwrap().sqr().unwrap().sum_all().unwrap());
    }
    assert!(Activation::SwiGlu.apply(&random(7, &[2, 3], 1.0, DType::F32)).is_err());
}

#[test]
fn linear_has_the_gradients_of_central_differences() {
    let x = random_var(8, &[2, 3, 5], 1.0, DType::F64);
    let w = random_var(9, &[4, 5], 1.0, DType::F64);
    let b = random_var(10, &[4], 1.0, DType::F64);
    let linear = |bias| CandleOps.linear(&x, &w.as_tensor().clone().into(), bias);
    check_gradients(&[("x", &x), ("w", &w), ("b", &b)], || {
        linear(Some(b.as_tensor())).unwrap().sqr().unwrap().sum_all().unwrap()
    });
    check_gradients(&[("x", &x), ("w", &w)], || linear(None).unwrap().sqr().unwrap().sum_all().unwrap());
    let wrong = CandleOps.linear(&x, &random(1, &[4, 6], 1.0, DType::F64).into(), None);
    assert!(wrong.unwrap_err().to_string().contains("width 5"));
}

/// A rank without tokens, and experts without rows: the results are empty, and everything before them still gets a gradient.
#[test]
fn no_rows_take_part_in_the_graph() {
    let tokens = random_var(70, &[3, D_MODEL], 1.0, DType::F64);
    let none = tokens.narrow(0, 0, 0).unwrap();
    for top_k in [1, 2] {
        let gate = random_var(71, &[EXPERTS, D_MODEL], 1.0, DType::F64);
        let vars = weights(72, &[EXPERTS], D_MODEL, 3, Activation::GeluTanh);
        let experts = ExpertMlps::from_weights(mlp_weights(&vars), Activation::GeluTanh).unwrap();
        let layer = MoeLayer::new(router(&gate, top_k), LocalDispatcher::default(), experts).unwrap();
        for mode in [Mode::Train, Mode::Eval, Mode::Infer] {
            let output = layer.forward(&none, &RouteContext::new(mode, &SeededNoise::new(1, 2))).unwrap();
            assert_eq!(output.hidden.dims(), [0, D_MODEL]);
            let mut loss = output.hidden.sum_all().unwrap();
            for part in [output.losses.load_balance, output.losses.router_z].into_iter().flatten() {
                loss = (loss + part).unwrap();
            }
            assert_eq!(loss.to_scalar::<f64>().unwrap(), 0.0);
            let grads = loss.backward().unwrap();
            assert!(grads.get(&tokens).is_some(), "top-{top_k} {mode:?}: the tokens have no gradient");
        }
    }
    // All choices dropped: rows vanish between permute and unpermute.
    let table = Arc::new(crate::DispatchTable::from_expert_ids(3, 1, EXPERTS, &[crate::DROPPED; 3]));
    let rows = CandleOps.permute(&tokens, &table).unwrap();
    let rows = grouped(&rows, &random(73, &[EXPERTS, 6, D_MODEL], 1.0, DType::F64), None, &[0; EXPERTS + 1]).unwrap();
    let back = CandleOps.unpermute(&rows, &random(74, &[3, 1], 1.0, DType::F64), &table).unwrap();
    assert_eq!(back.dims(), [3, 6]);
    let grads = back.sum_all().unwrap().backward().unwrap();
    assert_eq!(grads.get(&tokens).unwrap().dims(), [3, D_MODEL]);
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
    MlpWeights { fc_in: t(0).into(), fc_in_bias: Some(t(1)), fc_out: t(2).into(), fc_out_bias: Some(t(3)) }
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

/// The table form and the one-hot einsum form: one set of numbers.
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
            let table = {
                let experts = ExpertMlps::from_weights(mlp_weights(&vars), activation).unwrap();
                let layer = MoeLayer::new(router(&gate, top_k), LocalDispatcher::default(), experts).unwrap();
                run(layer.forward(&tokens, &context).unwrap().hidden)
            };
            let einsum = {
                let experts = ExpertMlps::from_weights(mlp_weights(&vars), activation).unwrap();
                let layer = MoeLayer::new(router(&gate, top_k), EinsumDispatcher, experts).unwrap();
                run(layer.forward(&tokens, &context).unwrap().hidden)
            };
            let what = format!("{activation:?} top-{top_k} {mode:?}");
            assert_close(&table.0, &einsum.0, 1e-11, &what);
            for (i, (got, want)) in table.1.iter().zip(&einsum.1).enumerate() {
                assert_close(got, want, 1e-10, &format!("{what} gradient {i}"));
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
        let experts = ExpertMlps::from_weights(mlp_weights(&vars), activation).unwrap();
        MoeLayer::new(router(&gate, 2), LocalDispatcher::default(), experts).unwrap()
    };
    let mlp = || Mlp::from_weights(mlp_weights(&fixed), activation).unwrap();
    let square = |hidden: Tensor| hidden.sqr().unwrap().sum_all().unwrap();
    let names = ["fc_in", "fc_in_bias", "fc_out", "fc_out_bias"];
    let mut all: Vec<(&str, &Var)> = names.into_iter().zip(&vars).collect();
    all.extend([("gate", &gate), ("tokens", &tokens)]);
    check_gradients(&all, || square(moe().forward(&tokens, &context).unwrap().hidden));
    all.extend(names.into_iter().zip(&fixed));
    let shared = || SharedExpertMoe::new(moe(), mlp(), Some(shared_gate.as_tensor().clone().into())).unwrap();
    all.push(("shared_expert_gate", &shared_gate));
    check_gradients(&all, || square(shared().forward(&tokens, &context).unwrap().hidden));
    all.pop();
    all.extend([("coefficient", &coefficient), ("coefficient_bias", &coefficient_bias)]);
    let residual = || {
        let c = |v: &Var| v.as_tensor().clone();
        ResidualMoe::new(moe(), mlp(), c(&coefficient).into(), c(&coefficient_bias)).unwrap()
    };
    check_gradients(&all, || square(residual().forward(&tokens, &context).unwrap().hidden));
}

/// Every policy takes a batch without tokens.
#[test]
fn every_router_accepts_no_tokens() {
    use crate::{
        DropPolicy, DroplessConfig, DroplessRouter, ExpertChoiceConfig, ExpertChoiceRouter, HashRouter, ScoreFunction,
        TopKConfig, TopKRouter,
    };
    let gate = || Gate::new(random(75, &[EXPERTS, D_MODEL], 1.0, DType::F32)).unwrap();
    let capacity = Capacity::DEEPSPEED;
    let top_k = TopKConfig { top_k: 3, capacity, drop_policy: DropPolicy::Probs, jitter: true };
    let sigmoid = DroplessConfig { score_function: ScoreFunction::Sigmoid, ..DroplessConfig::softmax(2, true) };
    let choice = ExpertChoiceConfig { capacity_factor: 2.0 };
    let routers: Vec<Box<dyn Router>> = vec![
        Box::new(Top1Router::new(gate(), Top1Config::default()).unwrap()),
        Box::new(Top2Router::new(gate(), Top2Config::default()).unwrap()),
        Box::new(TopKRouter::new(gate(), top_k).unwrap()),
        Box::new(DroplessRouter::new(gate(), None, DroplessConfig::softmax(2, true)).unwrap()),
        Box::new(DroplessRouter::new(gate(), Some(random(76, &[EXPERTS], 1.0, DType::F32)), sigmoid).unwrap()),
        Box::new(ExpertChoiceRouter::new(gate(), choice).unwrap()),
        Box::new(HashRouter::new(EXPERTS, 1).unwrap()),
    ];
    let none = random(77, &[0, D_MODEL], 1.0, DType::F32);
    for router in routers {
        for mode in [Mode::Train, Mode::Eval, Mode::Infer] {
            let noise = SeededNoise::new(1, 2);
            let context = RouteContext { token_ids: Some(&[]), ..RouteContext::new(mode, &noise) };
            let routing = router.route(&none, &context).unwrap_or_else(|e| panic!("{router:?} {mode:?}: {e}"));
            assert_eq!((routing.num_tokens, routing.load.routes()), (0, 0), "{router:?}");
            let rows = LocalDispatcher::default().dispatch(&none, &routing).unwrap().0;
            assert_eq!(rows.rows.dims(), [0, D_MODEL], "{router:?}");
        }
    }
}

/// A dispatcher that holds the first half of the experts, as one of two ranks would: fewer experts than the router chooses
/// among, and tokens whose experts are elsewhere.
#[derive(Debug)]
struct FirstHalf(LocalDispatcher);

impl Dispatcher for FirstHalf {
    type Dispatching = <LocalDispatcher as Dispatcher>::Dispatching;
    type Receipt = <LocalDispatcher as Dispatcher>::Receipt;
    type Combining = Tensor;

    fn num_local_experts(&self, num_experts: usize) -> usize {
        num_experts / 2
    }
    fn begin_dispatch(&self, tokens: &Tensor, routing: &crate::Routing) -> Result<Self::Dispatching> {
        let here = self.num_local_experts(routing.num_experts);
        let mut local = crate::Routing { num_experts: here, ..routing.clone() };
        for id in local.expert_ids.iter_mut().filter(|id| **id as usize >= here) {
            *id = crate::DROPPED;
        }
        self.0.begin_dispatch(tokens, &local)
    }
    fn finish_dispatch(&self, dispatching: Self::Dispatching) -> Result<(crate::ExpertRows, Self::Receipt)> {
        self.0.finish_dispatch(dispatching)
    }
    fn begin_combine(&self, rows: crate::ExpertRows, receipt: Self::Receipt) -> Result<Tensor> {
        self.0.begin_combine(rows, receipt)
    }
    fn finish_combine(&self, combining: Tensor) -> Result<Tensor> {
        self.0.finish_combine(combining)
    }
}

#[test]
fn experts_held_may_be_fewer_than_those_routed_to() {
    let gate = random_var(80, &[EXPERTS, D_MODEL], 1.0, DType::F64);
    let vars = weights(81, &[EXPERTS], D_MODEL, 3, Activation::GeluTanh);
    let tokens = random(82, &[9, D_MODEL], 1.0, DType::F64);
    let half = |t: &Var| t.narrow(0, 0, EXPERTS / 2).unwrap();
    let [fc_in, fc_in_bias, fc_out, fc_out_bias] = vars.each_ref().map(half);
    let first = MlpWeights {
        fc_in: fc_in.into(),
        fc_in_bias: Some(fc_in_bias),
        fc_out: fc_out.into(),
        fc_out_bias: Some(fc_out_bias),
    };
    let context = RouteContext::infer();
    let experts = |weights| ExpertMlps::from_weights(weights, Activation::GeluTanh).unwrap();
    let here = |weights| MoeLayer::new(router(&gate, 1), FirstHalf(LocalDispatcher::default()), experts(weights));
    let got = here(first).unwrap().forward(&tokens, &context).unwrap();
    let whole = MoeLayer::new(router(&gate, 1), LocalDispatcher::default(), experts(mlp_weights(&vars))).unwrap();
    let want = whole.forward(&tokens, &context).unwrap();
    for (token, &expert) in want.routing.expert_ids.iter().enumerate() {
        let row = |t: &Tensor| crate::testing::values(&t.get(token).unwrap());
        let wanted = if (expert as usize) < EXPERTS / 2 { row(&want.hidden) } else { vec![0.0; D_MODEL] };
        assert_eq!(row(&got.hidden), wanted, "token {token} of expert {expert}");
    }
    let message = here(mlp_weights(&vars)).unwrap_err().to_string();
    assert!(message.contains("4 experts, 2 of them here, but 4 are given"), "{message}");
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
    assert!(message(grouped(&x, &w, None, &[0, 1, 2, 3])).contains("offsets"));
    assert!(message(grouped(&x, &w, Some(&x), &[0, 1, 2, 4])).contains("bias"));
    let noise = SeededNoise::new(1, 2);
    let gate = random_var(60, &[EXPERTS, D_MODEL], 1.0, DType::F64);
    let routing = router(&gate, 1)
        .route(&random(61, &[12, D_MODEL], 1.0, DType::F64), &RouteContext::new(Mode::Eval, &noise))
        .unwrap();
    let error = LocalDispatcher::default().dispatch(&x, &routing).unwrap_err().to_string();
    assert!(error.contains("tokens must number 12, got 4"), "{error}");
}
