//! One operation against the three it is made of, bit for bit.

use super::*;
use crate::ops::KernelOps;
use candle_core::{DType, Device, Var};
use moe_core::ops::{Ops, experts_stepwise, mlp_stepwise};
use moe_core::tape::{GradBuffers, Tape};
use moe_core::testing::random_var;

/// Gradients of two passes of `loss` with respect to all of `vars`, as bits.
fn gradients(vars: &[&Var], loss: impl Fn() -> moe_core::Result<Tensor>) -> Vec<Vec<u32>> {
    let names: Vec<String> = (0..vars.len()).map(|i| format!("p{i}")).collect();
    let params = names.iter().zip(vars).map(|(name, var)| (name.as_str(), *var));
    let mut buffers = GradBuffers::new(params).unwrap();
    buffers.begin();
    for _ in 0..2 {
        let (loss, tape) = Tape::record(&loss);
        tape.backward_of(&loss.unwrap(), &mut buffers.gradients()).unwrap();
    }
    buffers.finish();
    buffers.all().into_iter().map(|g| g.iter().map(|v| v.to_bits()).collect()).collect()
}

/// `experts` experts, or one network alone.
fn vars(activation: Activation, experts: Option<usize>, [d_model, d_ff]: [usize; 2]) -> [Var; 4] {
    let shape = |tail: &[usize]| experts.into_iter().chain(tail.iter().copied()).collect::<Vec<_>>();
    let width = d_ff * activation.inputs();
    let var = |seed, tail: &[usize]| random_var(seed, &shape(tail), 0.4, DType::F32);
    [var(1, &[width, d_model]), var(2, &[width]), var(3, &[d_model, d_ff]), var(4, &[d_model])]
}

fn weights([fc_in, fc_in_bias, fc_out, fc_out_bias]: &[Var; 4], biases: bool) -> MlpWeights {
    let bias = |var: &Var| biases.then(|| var.as_tensor().clone());
    MlpWeights {
        fc_in: fc_in.as_tensor().clone().into(),
        fc_in_bias: bias(fc_in_bias),
        fc_out: fc_out.as_tensor().clone().into(),
        fc_out_bias: bias(fc_out_bias),
    }
}

#[test]
fn experts_have_the_bits_of_the_steps() {
    // Idle experts, and batches of each expert.
    let offsets: [(&[usize], usize); 4] =
        [(&[0, 5, 5, 37], 3), (&[0, 0, 40, 41], 3), (&[0, 3, 9, 9, 12, 12, 30], 3), (&[0, 0, 0, 0], 3)];
    for activation in [Activation::GeluTanh, Activation::SwiGlu] {
        for (offsets, experts) in offsets {
            let rows = random_var(9, &[offsets[offsets.len() - 1], 17], 1.0, DType::F32);
            let vars = vars(activation, Some(experts), [17, 43]);
            for (precision, biases) in [(Precision::F32, true), (Precision::Bf16, true), (Precision::Bf16, false)] {
                let (ops, weights) = (KernelOps::new(precision), weights(&vars, biases));
                let all: Vec<&Var> = [&rows].into_iter().chain(&vars).collect();
                let squares = |y: Tensor| -> moe_core::Result<Tensor> { Ok(y.sqr()?.sum_all()?) };
                let got = gradients(&all, || squares(super::experts(&rows, &weights, activation, offsets, precision)?));
                let want = gradients(&all, || squares(experts_stepwise(&ops, &rows, &weights, activation, offsets)?));
                assert_eq!(got, want, "{activation:?} {offsets:?} {precision:?} biases {biases}");
            }
        }
    }
}

#[test]
fn one_network_has_the_bits_of_the_steps() {
    for activation in [Activation::GeluTanh, Activation::SwiGlu] {
        let x = random_var(9, &[2, 19, 24], 1.0, DType::F32);
        let vars = vars(activation, None, [24, 40]);
        let (ops, weights) = (KernelOps::new(Precision::Bf16), weights(&vars, true));
        let all: Vec<&Var> = [&x].into_iter().chain(&vars).collect();
        let got = gradients(&all, || Ok(ops.mlp(&x, &weights, activation)?.sqr()?.sum_all()?));
        let want = gradients(&all, || Ok(mlp_stepwise(&ops, &x, &weights, activation)?.sqr()?.sum_all()?));
        assert_eq!(got, want, "{activation:?}");
    }
}

/// Parameters that are no variables cost no gradient.
#[test]
fn frozen_weights_get_no_gradient() {
    let activation = Activation::GeluTanh;
    let x = random_var(9, &[6, 8], 1.0, DType::F32);
    let vars = vars(activation, None, [8, 12]);
    let frozen = vars.each_ref().map(|var| Var::from_tensor(&var.detach()).unwrap());
    let mut weights = weights(&frozen, true);
    let want = gradients(&[&x], || Ok(KernelOps::default().mlp(&x, &weights, activation)?.sum_all()?));
    weights.fc_in = frozen[0].detach().into();
    weights.fc_out = frozen[2].detach().into();
    weights.fc_in_bias = Some(frozen[1].detach());
    weights.fc_out_bias = Some(frozen[3].detach());
    let got = gradients(&[&x], || Ok(KernelOps::default().mlp(&x, &weights, activation)?.sum_all()?));
    assert_eq!(got, want);
}

#[test]
fn shapes_are_named() {
    let activation = Activation::GeluTanh;
    let (vars, rows) = (vars(activation, Some(3), [8, 12]), random_var(9, &[6, 8], 1.0, DType::F32));
    let message = |weights: &MlpWeights, offsets: &[usize]| {
        super::experts(&rows, weights, activation, offsets, Precision::F32).unwrap_err().to_string()
    };
    assert!(message(&weights(&vars, true), &[0, 1, 2]).contains("offsets"));
    let mut other = weights(&vars, true);
    other.fc_out_bias = Some(Tensor::zeros((3, 9), DType::F32, &Device::Cpu).unwrap());
    assert!(message(&other, &[0, 1, 2, 6]).contains("fc_out_bias"));
}
