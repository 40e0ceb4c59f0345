//! An MoE feed-forward inside a plain candle model, trained with candle's own optimizer: learns which of 4 rules each input
//! follows.
//!
//! `cargo run --release -p moe-core --example guest_layer`

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{AdamW, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use moe_core::{
    Activation, BranchConfig, CandleOps, DroplessConfig, MlpConfig, Mode, MoeBlock, MoeConfig, MoeOutput, RouteContext,
    RouterConfig, SeededNoise, Weighs,
};
use std::sync::Arc;

const D_MODEL: usize = 16;

struct Classifier {
    inner: Linear,
    experts: MoeBlock,
    out: Linear,
}

impl Classifier {
    fn new(vb: VarBuilder<'_>) -> Result<Self> {
        let expert = MlpConfig {
            d_model: D_MODEL,
            d_ff: 32,
            activation: Activation::SwiGlu,
            bias: false,
            in_std: 0.2,
            out_std: 0.2,
        };
        let config = MoeConfig {
            num_experts: 8,
            expert,
            router: RouterConfig::Dropless {
                config: DroplessConfig::softmax(2, true),
                selection_bias: false,
                bias: false,
                weighs: Weighs::Outputs,
            },
            branch: BranchConfig::None,
            gate_bound: 0.25,
            load_balance_coef: 0.01,
            router_z_coef: 0.0,
        };
        Ok(Self {
            inner: candle_nn::linear(4, D_MODEL, vb.pp("inner"))?,
            experts: MoeBlock::new(&config, vb.pp("moe"), Arc::new(CandleOps)).map_err(candle_core::Error::wrap)?,
            out: candle_nn::linear(D_MODEL, 4, vb.pp("out"))?,
        })
    }

    fn forward(&self, x: &Tensor, step: u64) -> Result<(Tensor, MoeOutput)> {
        let noise = SeededNoise::new(1, step);
        let hidden = self.inner.forward(x)?;
        let moe = self.experts.forward(&hidden, &RouteContext::new(Mode::Train, &noise));
        let moe = moe.map_err(candle_core::Error::wrap)?;
        Ok((self.out.forward(&(hidden + &moe.hidden)?)?, moe))
    }
}

/// Points in four dimensions; their class is the number of the dimension that is furthest from zero.
fn points(step: u64) -> Result<(Tensor, Tensor)> {
    let mut rng = moe_core::CounterRng::new(7, step);
    let values: Vec<f32> = (0..256 * 4).map(|_| rng.normal_f64() as f32).collect();
    let x = Tensor::from_vec(values, (256, 4), &Device::Cpu)?;
    let classes = x.abs()?.argmax(D::Minus1)?;
    Ok((x, classes))
}

pub(crate) fn main() -> Result<()> {
    let variables = VarMap::new();
    let model = Classifier::new(VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    let mut optimizer = AdamW::new(variables.all_vars(), ParamsAdamW { lr: 3e-3, ..ParamsAdamW::default() })?;
    let mut last = f32::INFINITY;
    for step in 0..200 {
        let (x, classes) = points(step)?;
        let (logits, moe) = model.forward(&x, step)?;
        let mut loss = candle_nn::loss::cross_entropy(&logits, &classes)?;
        last = loss.to_scalar()?;
        if let Some(balance) = &moe.losses.load_balance {
            loss = (loss + (balance * 0.01)?)?;
        }
        optimizer.backward_step(&loss)?;
        if step % 50 == 0 {
            println!("step {step}: loss {last:.3}, tokens per expert {:?}", moe.load.tokens_per_expert);
        }
    }
    println!("last loss {last:.3}");
    if last > 0.6 {
        candle_core::bail!("the loss should fall from 1.39 to below 0.6, it is {last}");
    }
    Ok(())
}
