//! Every operation against PyTorch: outputs and all gradients, on every instruction set of this machine.
//! `fixtures/make.py` made the files, in f64.

mod examples;
mod forms;

use candle_core::{Device, Tensor, Var};
use moe_core::Activation;
use moe_core::ops::{Distillation, SoftTargets, StudentOutput};
use moe_core::testing::{assert_close, values};
use moe_kernels::attention::{AttentionShape, causal_attention, grouped_query_attention};
use moe_kernels::distillation::linear_distillation;
use moe_kernels::rotary::{Positions, RotaryLayout, RotaryTable, rotary};
use moe_kernels::{
    Isa, Precision, Result, activation, cross_entropy, embedding, grouped_linear, layer_norm, rms_norm, select,
};
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// What an error may be, relative to 1 plus the value: f32 sums of some tens of products.
const F32: (Precision, f64) = (Precision::F32, 1e-5);
/// The same where products read bf16, of 8 bits each.
const BF16: (Precision, f64) = (Precision::Bf16, 2e-2);

/// One operation's inputs, output and gradients.
struct Fixture {
    name: &'static str,
    expected: HashMap<String, Tensor>,
    vars: HashMap<String, Var>,
}

impl Fixture {
    fn load(name: &'static str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.safetensors"));
        let expected = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        let vars = expected
            .iter()
            .filter(|(n, _)| expected.contains_key(&format!("grad.{n}")))
            .map(|(n, t)| (n.clone(), Var::from_tensor(t).unwrap()))
            .collect();
        Self { name, vars, expected }
    }

    fn var(&self, name: &str) -> &Tensor {
        self.vars[name].as_tensor()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.expected[name].flatten_all().unwrap().to_vec1::<u32>().unwrap()
    }

    /// Compares the output and the gradients of `sum(output * factors)`, on every instruction set; these must agree to
    /// the last bit where products of this precision do.
    #[track_caller]
    fn check(&self, (precision, tolerance): (Precision, f64), run: impl Fn() -> Result<Tensor>) {
        // The set is the process's: one test at a time.
        static TURN: Mutex<()> = Mutex::new(());
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut first: Option<Vec<Vec<f64>>> = None;
        for isa in Isa::available() {
            select::force(isa).unwrap();
            let output = run().unwrap();
            let grads = (&output * &self.expected["factors"]).unwrap().sum_all().unwrap().backward().unwrap();
            let mut bits = vec![values(&output)];
            let what = format!("{} on {isa}", self.name);
            assert_close(&output, &self.expected["output"], tolerance, &what);
            for (name, expected) in self.expected.iter().filter(|(name, _)| name.starts_with("grad.")) {
                let what = format!("{what}, {name}");
                let got = grads.get(&self.vars[&name["grad.".len()..]]).expect(&what);
                assert_close(got, expected, tolerance, &what);
                bits.push(values(got));
            }
            if !isa.has_common_bits(precision) {
                continue;
            }
            assert!(first.get_or_insert_with(|| bits.clone()) == &bits, "{what}: other bits than on the first set");
        }
        select::force(Isa::fastest()).unwrap();
    }

    /// [`Self::check`] in both precisions.
    #[track_caller]
    fn check_products(&self, run: impl Fn(Precision) -> Result<Tensor>) {
        for terms in [F32, BF16] {
            self.check(terms, || run(terms.0));
        }
    }
}

#[test]
fn linear_equals_pytorch() {
    let of = Fixture::load("linear");
    of.check_products(|precision| {
        grouped_linear::linear(of.var("input"), of.var("weight"), Some(of.var("bias")), precision)
    });
}

#[test]
fn grouped_linear_equals_pytorch() {
    let of = Fixture::load("grouped_linear");
    let offsets: Vec<usize> = of.ids("offsets").into_iter().map(|offset| offset as usize).collect();
    of.check_products(|precision| {
        grouped_linear::grouped_linear(of.var("x"), of.var("weight"), Some(of.var("bias")), &offsets, precision)
    });
}

#[test]
fn activations_equal_pytorch() {
    for (name, which) in [("gelu_tanh", Activation::GeluTanh), ("swiglu", Activation::SwiGlu)] {
        let of = Fixture::load(name);
        of.check(F32, || activation::activation(which, of.var("x")));
    }
}

#[test]
fn embedding_equals_pytorch() {
    let of = Fixture::load("embedding");
    let ids = of.ids("ids");
    of.check(F32, || {
        let rows = embedding::embedding(of.var("weight"), &ids)?;
        Ok(rows.reshape(of.expected["output"].shape())?)
    });
}

#[test]
fn norms_equal_pytorch() {
    let of = Fixture::load("layer_norm");
    of.check(F32, || layer_norm::layer_norm(of.var("x"), of.var("weight"), of.var("bias"), 1e-5));
    let of = Fixture::load("rms_norm");
    of.check(F32, || rms_norm::rms_norm(of.var("x"), of.var("weight"), 1e-6));
}

#[test]
fn attention_equals_pytorch() {
    for (name, num_heads, num_kv_heads) in [("causal_attention", 2, 2), ("grouped_query_attention", 6, 2)] {
        let of = Fixture::load(name);
        let shape = AttentionShape::new(num_heads, num_kv_heads);
        let [q, k, v] = ["q", "k", "v"].map(|name| of.var(name));
        let seq_len = q.dim(1).unwrap();
        of.check_products(|precision| grouped_query_attention(q, k, v, shape, seq_len, precision));
    }
    let of = Fixture::load("causal_attention");
    of.check_products(|precision| {
        let qkv = Tensor::cat(&[of.var("q"), of.var("k"), of.var("v")], 2)?;
        causal_attention(&qkv, 2, qkv.dim(1)?, precision)
    });
}

#[test]
fn rotary_equals_transformers() {
    for (name, rotary_dim, layout) in [
        ("rotary_halves", 18, RotaryLayout::Halves),
        ("rotary_partial", 10, RotaryLayout::Halves),
        ("rotary_interleaved", 10, RotaryLayout::Interleaved),
    ] {
        let of = Fixture::load(name);
        let (table, positions) = (RotaryTable::new(18, rotary_dim, 10_000.0, 2000).unwrap(), of.ids("positions"));
        of.check(F32, || rotary(of.var("x"), &table, layout, Positions::Each(&positions)));
    }
}

#[test]
fn cross_entropy_equals_pytorch() {
    let of = Fixture::load("linear_cross_entropy");
    let targets = of.ids("targets");
    of.check_products(|precision| {
        cross_entropy::linear_cross_entropy(of.var("hidden"), of.var("weight"), &targets, precision)
    });
}

#[test]
fn distillation_equals_pytorch() {
    let of = Fixture::load("linear_distillation");
    let (targets, weight) = (of.ids("targets"), of.var("weight").clone().into());
    let [hidden, of_teacher] = ["teacher_hidden", "teacher_weight"].map(|name| of.expected[name].clone());
    let of_teacher = of_teacher.into();
    let how = Distillation { weight: 0.7, temperature: 2.0 };
    of.check_products(|precision| {
        let student = StudentOutput { hidden: of.var("hidden"), weight: &weight, targets: &targets, part: None };
        let soft = SoftTargets::Layer { hidden: &hidden, weight: &of_teacher };
        Ok(linear_distillation(student, soft, how, precision)?.loss)
    });
}
