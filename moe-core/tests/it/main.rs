//! Whole MoE layers against transformers: outputs and every gradient. `fixtures/make.py` made the files.

mod examples;

use candle_core::{DType, Device, Tensor, Var};
use moe_core::testing::{assert_close, values};
use moe_core::{
    Activation, DroplessConfig, DroplessRouter, ExpertMlps, Gate, GroupScore, LocalDispatcher, Mlp, MlpWeights, Mode,
    MoeLayer, MoeOutput, NoiseSource, RouteContext, ScoreFunction, SeededNoise, SharedExpertMoe, SparseMixerConfig,
    SparseMixerRouter,
};
use std::collections::HashMap;
use std::path::Path;

const TOLERANCE: f64 = 2e-5;

struct Fixture {
    name: &'static str,
    expected: HashMap<String, Tensor>,
    vars: HashMap<String, Var>,
}

impl Fixture {
    fn load(name: &'static str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.safetensors"));
        let expected = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let trained = |n: &str| expected.contains_key(&format!("grad.{n}"));
        let vars = expected
            .iter()
            .filter(|(n, _)| trained(n))
            .map(|(n, t)| (n.clone(), Var::from_tensor(t).unwrap()))
            .collect();
        Self { name, vars, expected }
    }

    fn var(&self, name: &str) -> Tensor {
        self.vars[name].as_tensor().clone()
    }

    fn gate(&self) -> Gate {
        Gate::new(self.var("gate.weight")).unwrap()
    }

    fn layer(&self, router: DroplessRouter) -> MoeLayer<DroplessRouter, LocalDispatcher, ExpertMlps> {
        let weights = MlpWeights {
            fc_in: self.var("experts.gate_up_proj").into(),
            fc_in_bias: None,
            fc_out: self.var("experts.down_proj").into(),
            fc_out_bias: None,
        };
        let experts = ExpertMlps::from_weights(weights, Activation::SwiGlu).unwrap();
        MoeLayer::new(router, LocalDispatcher::default(), experts).unwrap()
    }

    fn shared(&self, prefix: &str) -> Mlp {
        let part = |name: &str| self.var(&format!("{prefix}.{name}.weight"));
        let weights = MlpWeights {
            fc_in: Tensor::cat(&[part("gate_proj"), part("up_proj")], 0).unwrap().into(),
            fc_in_bias: None,
            fc_out: part("down_proj").into(),
            fc_out_bias: None,
        };
        Mlp::from_weights(weights, Activation::SwiGlu).unwrap()
    }

    /// Compares the output and the gradients of `sum(output * factors)`.
    #[track_caller]
    fn check(&self, forward: impl Fn(&Tensor, &RouteContext<'_>) -> moe_core::Result<MoeOutput>) -> MoeOutput {
        let noise = SeededNoise::new(0, 0);
        let output = forward(&self.var("tokens"), &RouteContext::new(Mode::Train, &noise)).unwrap();
        assert_close(&output.hidden, &self.expected["output"], TOLERANCE, self.name);
        let grads = (&output.hidden * &self.expected["factors"]).unwrap().sum_all().unwrap().backward().unwrap();
        for (name, var) in &self.vars {
            let what = format!("{} gradient of {name}", self.name);
            assert_close(grads.get(var).expect(&what), &self.expected[&format!("grad.{name}")], TOLERANCE, &what);
        }
        output
    }
}

#[test]
fn mixtral_layer_equals_transformers() {
    let fixture = Fixture::load("mixtral");
    let layer = fixture.layer(DroplessRouter::new(fixture.gate(), None, DroplessConfig::softmax(2, true)).unwrap());
    let output = fixture.check(|tokens, context| layer.forward(tokens, context));
    // transformers does not divide by top_k.
    let loss = values(&output.losses.load_balance.unwrap())[0] * 2.0;
    let want = values(&fixture.expected["load_balance_loss"])[0];
    assert!((loss - want).abs() < 1e-5, "load-balance loss {loss}, transformers has {want}");
}

#[test]
fn qwen2_moe_layer_equals_transformers() {
    let fixture = Fixture::load("qwen2_moe");
    let routed = fixture.layer(DroplessRouter::new(fixture.gate(), None, DroplessConfig::softmax(3, false)).unwrap());
    let gate = Some(fixture.var("shared_expert_gate.weight").into());
    let layer = SharedExpertMoe::new(routed, fixture.shared("shared_expert"), gate).unwrap();
    fixture.check(|tokens, context| layer.forward(tokens, context));
}

#[test]
fn deepseek_v3_layer_equals_transformers() {
    let fixture = Fixture::load("deepseek_v3");
    let config = DroplessConfig {
        score_function: ScoreFunction::Sigmoid,
        scale: 2.5,
        num_groups: 4,
        top_groups: 2,
        group_score: GroupScore::TopTwoSum,
        ..DroplessConfig::softmax(3, true)
    };
    let bias = fixture.expected["gate.e_score_correction_bias"].to_dtype(DType::F32).unwrap();
    let routed = fixture.layer(DroplessRouter::new(fixture.gate(), Some(bias), config).unwrap());
    let layer = SharedExpertMoe::new(routed, fixture.shared("shared_experts"), None).unwrap();
    fixture.check(|tokens, context| layer.forward(tokens, context));
}

/// The draws of a fixture.
#[derive(Debug)]
struct Recorded {
    gumbel: Vec<f32>,
    uniform: Vec<f32>,
}

impl NoiseSource for Recorded {
    fn uniform(&self, rows: usize, cols: usize) -> Vec<f32> {
        assert_eq!(rows * cols, self.uniform.len());
        self.uniform.clone()
    }
    fn gumbel(&self, rows: usize, cols: usize) -> Vec<f32> {
        assert_eq!(rows * cols, self.gumbel.len());
        self.gumbel.clone()
    }
    fn jitter(&self, _: usize, _: usize, _: f32) -> Vec<f32> {
        unreachable!("a router has no jitter")
    }
}

/// PhiMoE's routing with the same draws: who is chosen, with what weight, and the gradient that it has for the logits.
#[test]
fn sparse_mixer_equals_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/sparse_mixer.safetensors");
    let expected = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
    let plain = |name: &str| expected[name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let draws = Recorded { gumbel: plain("gumbel"), uniform: plain("uniform") };
    let jitter_eps = f64::from(expected["jitter_eps"].to_scalar::<f32>().unwrap());
    let gate = Gate::new(Tensor::zeros((6, 1), DType::F32, &Device::Cpu).unwrap()).unwrap();
    let config = SparseMixerConfig { jitter_eps, input_jitter: 0.0 };
    let router = SparseMixerRouter::new(gate, config).unwrap();
    let mut chosen = Vec::new();
    for (mode, name) in [(Mode::Infer, "eval"), (Mode::Eval, "eval"), (Mode::Train, "train")] {
        let logits = Var::from_tensor(&expected["logits"]).unwrap();
        let routing = router.route_logits(&logits, &RouteContext::new(mode, &draws)).unwrap();
        let ids = expected[&format!("{name}.ids")].flatten_all().unwrap().to_vec1::<u32>().unwrap();
        assert_eq!(routing.expert_ids, ids, "{mode:?}");
        assert_close(&routing.combine_weights, &expected[&format!("{name}.weights")], 1e-5, &format!("{mode:?}"));
        let sum = (&routing.combine_weights * &expected["factors"]).unwrap().sum_all().unwrap();
        let grads = sum.backward().unwrap();
        let what = format!("{mode:?}: gradient");
        assert_close(grads.get(&logits).unwrap(), &expected[&format!("{name}.grad")], 1e-5, &what);
        assert_eq!(routing.losses.load_balance.is_some(), mode != Mode::Infer);
        chosen.push(ids);
    }
    assert!(chosen[1] != chosen[2], "draws change something");
    for bad in [-0.1, 1.0, f64::NAN] {
        let text = SparseMixerConfig { input_jitter: bad, ..config }.validate().unwrap_err().to_string();
        assert!(text.contains("input_jitter_noise"), "{text}");
    }
}
