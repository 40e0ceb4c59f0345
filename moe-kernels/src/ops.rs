//! [`KernelOps`]: these kernels as a backend of `moe-core`'s layers.

use crate::custom::with_inputs;
use crate::expert_mlp::{BorrowedMlp, experts};
use crate::gate::BorrowedGate;
use crate::packed::{PackedMatrices, only_float};
use crate::quantized;
use crate::stack::PackedStack;
use crate::{
    KeptWeights, PackedForms, Precision, Result, activation, add_norm, attention, cross_entropy, distillation, dropout,
    embedding, grouped_linear, layer_norm, mlp, parallel, permute, rms_norm, rotary, select, sums,
};
use candle_core::{Device, Tensor};
use moe_core::ops::{
    AttentionShape, Choices, DecoderOps, Distillation, DistilledLoss, Dropout, HeadDropout, KvShape, LossOps, MoeOps,
    PagedKv, PagedSequence, Positions, RotaryLayout, RotaryTable, SoftTargets, StudentOutput, VocabularyPart,
    WeightOps, check_targets, experts_stepwise, host, mlp_stepwise, whole_experts,
};
use moe_core::tape;
use moe_core::{Activation, DispatchTable, DroplessConfig, MlpWeights, Ops, Weight, WeightSource, WeightUse};
use std::sync::Arc;

/// The kernels, for f32 tensors on the CPU; others are refused, [`moe_core::CandleOps`] takes them.
#[derive(Debug, Clone, Default)]
pub struct KernelOps {
    precision: Precision,
    /// For inference alone.
    packs: Option<PackedForms>,
    /// Weights that are packed already.
    kept: Option<Arc<dyn KeptWeights>>,
}

/// Multiply-adds of a chain from which on it is worth waking threads for. On two EPYC cores (2026-11-24) one token of 3 million
/// takes 0.19 ms on one thread and 0.27 with its largest product on two; at 12 million they break even.
const LEAST_CHAIN: usize = 12 << 20;

impl KernelOps {
    /// Operations whose matrix products have this precision; router logits, sums, softmax and norms are f32 always.
    pub fn new(precision: Precision) -> Self {
        Self { precision, packs: None, kept: None }
    }

    /// The same for inference: weights are packed as they are fetched, in one precision or each use in a form of its own, and
    /// have no gradient.
    pub fn packing(forms: impl Into<PackedForms>) -> Self {
        let forms = forms.into();
        Self { precision: forms.precision(), packs: Some(forms), kept: None }
    }

    /// The same, with weights that are not packed again: those that an earlier start has kept.
    #[must_use]
    pub fn with_kept(self, kept: Arc<dyn KeptWeights>) -> Self {
        Self { kept: Some(kept), ..self }
    }

    /// The precision of the products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// `x W^T + b` in a precision of its own.
    fn linear_in(&self, precision: Precision, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
        let Some(packed) = PackedMatrices::of(weight)? else {
            return grouped_linear::linear(x, weight.tensor()?, bias, precision);
        };
        let rows = x.elem_count() / x.dims().last().copied().unwrap_or(1).max(1);
        grouped_linear::grouped_linear_packed(x, &packed.matrices(), bias, &[0, rows])
    }

    /// The experts in one chain of kernels, if all their weights are packed.
    fn experts_packed(
        &self,
        rows: &Tensor,
        weights: &MlpWeights,
        activation: Activation,
        offsets: &[usize],
    ) -> Result<Option<Tensor>> {
        let (Some(fc_in), Some(fc_out)) = (PackedMatrices::of(&weights.fc_in)?, PackedMatrices::of(&weights.fc_out)?)
        else {
            return Ok(None);
        };
        let (fc_in, fc_out) = (fc_in.matrices(), fc_out.matrices());
        let ((num_rows, width), inner) = (rows.dims2()?, fc_in.shape().map_or(0, |[_, inner]| inner));
        let parts = grouped_linear::check(offsets, num_rows, fc_in.len(), [width, inner])?;
        let offsets = &whole_experts(offsets, parts);
        let biases = [&weights.fc_in_bias, &weights.fc_out_bias];
        let inputs: Vec<&Tensor> = [rows].into_iter().chain(biases.into_iter().flatten()).collect();
        let y = with_inputs("experts", &inputs, |inputs| {
            let mut biases = inputs[1..].iter().map(|bias| bias.values);
            let fc_in_bias = weights.fc_in_bias.as_ref().and_then(|_| biases.next());
            let mlp = BorrowedMlp { fc_in: &fc_in, fc_in_bias, fc_out: &fc_out, fc_out_bias: biases.next() };
            experts(select::current(), inputs[0].values, mlp, activation, offsets)
        })?;
        Ok(Some(Tensor::from_vec(y, rows.shape(), rows.device())?))
    }

    fn choose_packed(
        &self,
        tokens: &Tensor,
        weight: &Weight,
        selection_bias: Option<&Tensor>,
        config: &DroplessConfig,
    ) -> Result<Option<Choices>> {
        let Some(packed) = PackedMatrices::of(weight)? else { return Ok(None) };
        let matrices = packed.matrices();
        let weight = only_float(&matrices)?;
        let [experts, width] = weight.shape();
        config.validate(experts)?;
        host::expect_shape("tokens", tokens, &[tokens.dims2()?.0, width])?;
        selection_bias.map_or(Ok(()), |bias| host::expect_shape("selection_bias", bias, &[experts]))?;
        let inputs: Vec<&Tensor> = [tokens].into_iter().chain(selection_bias).collect();
        let gated = with_inputs("choose", &inputs, |inputs| {
            let gate = BorrowedGate {
                isa: select::current(),
                weight,
                selection_bias: inputs.get(1).map(|bias| bias.values),
                config,
                capacity: None,
            };
            gate.forward(inputs[0].values)
        })??;
        Ok(Some(Choices { expert_ids: gated.expert_ids, combine_weights: gated.combine_weights, load: gated.load }))
    }
}

impl WeightOps for KernelOps {
    fn weight(&self, source: &WeightSource<'_>, purpose: WeightUse) -> moe_core::Result<Weight> {
        let Some(forms) = &self.packs else { return Ok(Weight::Tensor(source.whole()?)) };
        if let Some(kept) = self.kept.as_ref().and_then(|kept| kept.find(&source.name(), source.dims())) {
            return Ok(Weight::Packed(Arc::new(kept)));
        }
        Ok(Weight::Packed(Arc::new(PackedMatrices::fetch(source, purpose, select::current(), forms)?)))
    }
}

impl MoeOps for KernelOps {
    fn gate(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> moe_core::Result<Tensor> {
        Ok(self.linear_in(Precision::F32, x, weight, bias)?)
    }

    fn choose(
        &self,
        tokens: &Tensor,
        weight: &Weight,
        selection_bias: Option<&Tensor>,
        config: &DroplessConfig,
    ) -> moe_core::Result<Option<Choices>> {
        Ok(self.choose_packed(tokens, weight, selection_bias, config)?)
    }

    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> moe_core::Result<Tensor> {
        Ok(permute::permute(tokens, table)?)
    }

    fn unpermute(
        &self,
        rows: &Tensor,
        combine_weights: &Tensor,
        table: &Arc<DispatchTable>,
    ) -> moe_core::Result<Tensor> {
        Ok(permute::unpermute(rows, combine_weights, table)?)
    }

    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> moe_core::Result<Tensor> {
        Ok(match PackedMatrices::of(weight)? {
            Some(packed) => grouped_linear::grouped_linear_packed(rows, &packed.matrices(), bias, offsets)?,
            None => grouped_linear::grouped_linear(rows, weight.tensor()?, bias, offsets, self.precision)?,
        })
    }

    fn activation(&self, activation: Activation, x: &Tensor) -> moe_core::Result<Tensor> {
        Ok(activation::activation(activation, x)?)
    }

    fn mix(&self, a: &Tensor, b: &Tensor, logits: &Tensor) -> moe_core::Result<Tensor> {
        Ok(sums::mix(a, b, logits)?)
    }

    fn experts(
        &self,
        rows: &Tensor,
        weights: &MlpWeights,
        activation: Activation,
        offsets: &[usize],
    ) -> moe_core::Result<Tensor> {
        match self.experts_packed(rows, weights, activation, offsets)? {
            Some(rows) => Ok(rows),
            None if tape::is_active() => Ok(mlp::experts(rows, weights, activation, offsets, self.precision)?),
            None => experts_stepwise(self, rows, weights, activation, offsets),
        }
    }
}

impl DecoderOps for KernelOps {
    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> moe_core::Result<Tensor> {
        Ok(self.linear_in(self.precision, x, weight, bias)?)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> moe_core::Result<Tensor> {
        Ok(sums::add(a, b)?)
    }

    fn add_norm(
        &self,
        x: &Tensor,
        delta: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> moe_core::Result<[Tensor; 2]> {
        Ok(add_norm::add_norm(x, delta, weight, bias, epsilon)?)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> moe_core::Result<Tensor> {
        Ok(layer_norm::layer_norm(x, weight, bias, epsilon)?)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f64) -> moe_core::Result<Tensor> {
        Ok(rms_norm::rms_norm(x, weight, epsilon)?)
    }

    fn rotary(
        &self,
        x: &Tensor,
        table: &RotaryTable,
        layout: RotaryLayout,
        positions: Positions<'_>,
    ) -> moe_core::Result<Tensor> {
        Ok(rotary::rotary(x, table, layout, positions)?)
    }

    fn attention(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
    ) -> moe_core::Result<Tensor> {
        Ok(attention::grouped_query_attention(queries, keys, values, shape, seq_len, self.precision)?)
    }

    fn attention_with_sinks(
        &self,
        qkv: [&Tensor; 3],
        sinks: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
        dropout: Option<HeadDropout>,
    ) -> moe_core::Result<Tensor> {
        let precision = self.precision;
        Ok(attention::grouped_query_attention_with_sinks(qkv, sinks, shape, seq_len, dropout, precision)?)
    }

    fn attention_fused(&self, qkv: &Tensor, num_heads: usize, seq_len: usize) -> moe_core::Result<Tensor> {
        Ok(attention::causal_attention(qkv, num_heads, seq_len, self.precision)?)
    }

    fn attention_dropped(
        &self,
        qkv: [&Tensor; 3],
        shape: AttentionShape,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> moe_core::Result<Tensor> {
        Ok(attention::grouped_query_attention_dropped(qkv, shape, seq_len, dropout, self.precision)?)
    }

    fn attention_fused_dropped(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> moe_core::Result<Tensor> {
        Ok(attention::causal_attention_dropped(qkv, num_heads, seq_len, dropout, self.precision)?)
    }

    fn dropout(&self, x: &Tensor, dropout: Dropout) -> moe_core::Result<Tensor> {
        Ok(dropout::dropout(x, dropout)?)
    }

    fn new_pages(
        &self,
        num_blocks: usize,
        block_size: usize,
        shape: KvShape,
        device: &Device,
    ) -> moe_core::Result<[Tensor; 2]> {
        Ok(attention::new_pages(num_blocks, block_size, shape, self.precision, device)?)
    }

    fn write_pages(&self, pool: PagedKv<'_>, keys: &Tensor, values: &Tensor, slots: &[u32]) -> moe_core::Result<()> {
        Ok(attention::write_pages(pool, keys, values, slots, self.precision)?)
    }

    fn paged_attention(
        &self,
        queries: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> moe_core::Result<Tensor> {
        Ok(attention::paged_attention(queries, pool, sequences, shape, self.precision)?)
    }

    fn paged_attention_with_sinks(
        &self,
        queries: &Tensor,
        sinks: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> moe_core::Result<Tensor> {
        Ok(attention::paged_attention_with_sinks(queries, sinks, pool, sequences, shape, self.precision)?)
    }

    fn chain(&self, work: usize, body: &mut dyn FnMut()) {
        if work >= LEAST_CHAIN { parallel::together(body) } else { parallel::serially(body) }
    }

    fn lanes(&self) -> usize {
        parallel::threads()
    }

    fn side_by_side(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        parallel::for_each(count, |index| parallel::serially(|| work(index)));
    }

    fn embedding(&self, table: &Weight, ids: &[u32]) -> moe_core::Result<Tensor> {
        let Some(packed) = PackedMatrices::of(table)? else {
            return Ok(embedding::embedding(table.tensor()?, ids)?);
        };
        let rows = packed.rows(ids)?;
        Ok(Tensor::from_vec(rows, (ids.len(), table.dims()[1]), &candle_core::Device::Cpu)?)
    }
}

impl Ops for KernelOps {
    fn mlp(&self, x: &Tensor, weights: &MlpWeights, activation: Activation) -> moe_core::Result<Tensor> {
        match (&weights.fc_in, &weights.fc_out) {
            (Weight::Tensor(fc_in), Weight::Tensor(fc_out)) if tape::is_active() => {
                Ok(mlp::dense(x, [fc_in, fc_out], weights, activation, self.precision)?)
            }
            _ => mlp_stepwise(self, x, weights, activation),
        }
    }
}

impl LossOps for KernelOps {
    fn linear_cross_entropy(&self, hidden: &Tensor, weight: &Weight, targets: &[u32]) -> moe_core::Result<Tensor> {
        let Some(packed) = PackedMatrices::of(weight)? else {
            return Ok(cross_entropy::linear_cross_entropy(hidden, weight.tensor()?, targets, self.precision)?);
        };
        let matrices = packed.matrices();
        let PackedStack::Quantized(_, all) = &*matrices else {
            return Ok(cross_entropy::linear_cross_entropy_packed(hidden, only_float(&matrices)?, targets)?);
        };
        check_targets(hidden.dims(), weight.dims(), targets)?;
        let loss = with_inputs("linear_cross_entropy", &[hidden], |inputs| {
            quantized::linear_cross_entropy(select::current(), inputs[0].values, &all[0], targets)
        })?;
        Ok(Tensor::new(loss, hidden.device())?)
    }

    fn linear_cross_entropy_part(
        &self,
        hidden: &Tensor,
        weight: &Weight,
        targets: &[u32],
        part: &VocabularyPart,
    ) -> moe_core::Result<Tensor> {
        use cross_entropy::{linear_cross_entropy_part, linear_cross_entropy_part_packed};
        Ok(match PackedMatrices::of(weight)? {
            Some(packed) => linear_cross_entropy_part_packed(hidden, only_float(&packed.matrices())?, targets, part)?,
            None => linear_cross_entropy_part(hidden, weight.tensor()?, targets, part, self.precision)?,
        })
    }

    fn linear_distillation(
        &self,
        student: StudentOutput<'_>,
        soft: SoftTargets<'_>,
        how: Distillation,
    ) -> moe_core::Result<DistilledLoss> {
        Ok(distillation::linear_distillation(student, soft, how, self.precision)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Device};
    use candle_nn::VarBuilder;
    use moe_core::testing::{random, values};
    use moe_core::{MoeBlock, MoeConfig, ParamInit, ParamSpec, RouteContext, Weighs};
    use std::collections::HashMap;

    fn source(name: &str, tensor: &Tensor) -> VarBuilder<'static> {
        VarBuilder::from_tensors(HashMap::from([(name.to_owned(), tensor.clone())]), DType::F32, &Device::Cpu)
    }

    fn kept(ops: &KernelOps, tensor: &Tensor, purpose: WeightUse) -> Weight {
        let mut spec = ParamSpec::new("w", &tensor.dims()[tensor.rank() - 2..], ParamInit::Zeros);
        if tensor.rank() == 3 {
            spec = spec.stacked(tensor.dims()[0]);
        }
        let vb = source(&spec.name, tensor);
        ops.weight(&WeightSource::new(&vb, &spec), purpose).unwrap()
    }

    #[test]
    fn packed_weights_give_the_bits_of_plain_ones() {
        let (x, w) = (random(1, &[7, 21], 1.0, DType::F32), random(2, &[3, 40, 21], 1.0, DType::F32));
        let (b, gate) = (random(3, &[3, 40], 1.0, DType::F32), random(4, &[5, 21], 1.0, DType::F32));
        for precision in [Precision::F32, Precision::Bf16] {
            let run = |ops: KernelOps| {
                let [experts, linear] = [&w, &gate].map(|w| kept(&ops, w, WeightUse::Product));
                let table = kept(&ops, &gate, WeightUse::Table);
                let gate = kept(&ops, &gate, WeightUse::Gate);
                let three = x.reshape((1, 7, 21)).unwrap();
                [
                    ops.grouped_linear(&x, &experts, Some(&b), &[0, 2, 2, 7]).unwrap(),
                    ops.linear(&three, &linear, None).unwrap(),
                    ops.gate(&x, &gate, None).unwrap(),
                    ops.embedding(&table, &[4, 0, 4]).unwrap(),
                    ops.linear_cross_entropy(&x, &table, &[0, 1, 2, u32::MAX, 4, 0, 1]).unwrap(),
                ]
                .map(|t| (t.dims().to_vec(), values(&t)))
            };
            assert_eq!(run(KernelOps::packing(precision)), run(KernelOps::new(precision)), "{precision:?}");
            let ops = KernelOps::packing(precision);
            let experts = kept(&ops, &w, WeightUse::Product);
            assert!(ops.grouped_linear(&x, &experts, Some(&b), &[0, 2, 7]).is_err());
            let linear = kept(&ops, &gate, WeightUse::Product);
            assert!(ops.linear(&random(5, &[2, 20], 1.0, DType::F32), &linear, None).is_err());
            assert!(moe_core::CandleOps.linear(&x, &linear, None).unwrap_err().to_string().contains("packed"));
        }
    }

    #[test]
    fn a_rewritten_weight_gives_the_new_results() {
        let ops = KernelOps::packing(Precision::Bf16);
        let x = random(1, &[4, 21], 1.0, DType::F32);
        let (old, new) = (random(2, &[2, 40, 21], 1.0, DType::F32), random(3, &[2, 40, 21], 1.0, DType::F32));
        let weight = kept(&ops, &old, WeightUse::Product);
        let packed = PackedMatrices::of(&weight).unwrap().unwrap();
        for expert in 0..2 {
            let values = moe_core::ops::host::to_f32_vec(&new.get(expert).unwrap()).unwrap();
            packed.rewrite(expert, select::current(), &values).unwrap();
        }
        let run = |weight: &Weight| values(&ops.grouped_linear(&x, weight, None, &[0, 1, 4]).unwrap());
        assert_eq!(run(&weight), run(&kept(&ops, &new, WeightUse::Product)));
        assert!(packed.rewrite(2, select::current(), &[0.0; 840]).unwrap_err().to_string().contains("matrix 2"));
        assert!(packed.rewrite(0, select::current(), &[0.0; 3]).is_err());
    }

    /// The fused gate and the chain of experts inside a layer: the bits of the plain operations, and memory of one form only.
    #[test]
    fn a_packed_layer_gives_the_bits_of_a_plain_one() {
        use moe_core::{BranchConfig, MlpConfig, RouterConfig, Top1Config, Top2Config};
        for activation in [Activation::GeluTanh, Activation::SwiGlu] {
            let expert = MlpConfig { d_model: 24, d_ff: 40, activation, bias: true, in_std: 0.3, out_std: 0.3 };
            for (router, branch) in [
                (RouterConfig::Top1(Top1Config::default()), BranchConfig::Residual(expert)),
                (RouterConfig::Top2(Top2Config::default()), BranchConfig::None),
                (
                    RouterConfig::Dropless {
                        config: DroplessConfig::softmax(3, true),
                        selection_bias: true,
                        bias: false,
                        weighs: Weighs::Outputs,
                    },
                    BranchConfig::Shared { mlp: expert, gate: true },
                ),
            ] {
                let (load_balance_coef, router_z_coef, gate_bound) = (0.0, 0.0, 0.5);
                let config =
                    MoeConfig { num_experts: 5, expert, router, branch, gate_bound, load_balance_coef, router_z_coef };
                let tensors: HashMap<String, Tensor> = config
                    .params()
                    .iter()
                    .map(|spec| (spec.name.clone(), spec.initial(7, &Device::Cpu).unwrap()))
                    .collect();
                let x = random(1, &[50, 24], 1.0, DType::F32);
                for precision in [Precision::F32, Precision::Bf16] {
                    let run = |ops: KernelOps| {
                        let vb = VarBuilder::from_tensors(tensors.clone(), DType::F32, &Device::Cpu);
                        let layer = MoeBlock::new(&config, vb, Arc::new(ops)).unwrap();
                        let output = layer.forward(&x, &RouteContext::infer()).unwrap();
                        (values(&output.hidden), output.routing.expert_ids, output.load)
                    };
                    assert_eq!(run(KernelOps::packing(precision)), run(KernelOps::new(precision)), "{router:?}");
                }
            }
        }
    }
}
