//! [`ObservedOps`]: a backend's operations that show what each matrix is multiplied with. Changes no value.

use super::{
    AttentionShape, Choices, DecoderOps, Distillation, DistilledLoss, Dropout, HeadDropout, KvShape, LossOps, MoeOps,
    PagedKv, PagedSequence, Positions, RotaryLayout, RotaryTable, SoftTargets, StudentOutput, VocabularyPart,
    WeightOps, parts_per_expert, whole_experts,
};
use crate::{Activation, DispatchTable, DroplessConfig, Ops, PackedWeight, Result, Weight, WeightSource, WeightUse};
use candle_core::{Device, Tensor};
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

/// Sees the inputs of the matrices that are multiplied with and nothing else ([`WeightUse::Product`]).
pub trait ProductObserver: Debug + Send + Sync {
    /// `inputs` `[.., in]` are about to be multiplied with the matrix of this whole name, an expert's own of a stack. Matrices with
    /// the same inputs are shown the same tensor; one without rows is not shown.
    ///
    /// # Errors
    /// The pass ends with them.
    fn observe(&self, matrix: &str, inputs: &Tensor) -> Result<()>;
}

/// The operations of a backend, observed. Feed-forward networks run one operation after the other, so that what lies between
/// their two matrices is seen.
#[derive(Debug)]
pub struct ObservedOps {
    inner: Arc<dyn Ops>,
    observer: Arc<dyn ProductObserver>,
}

/// A weight in the backend's own form, with the names of its matrices.
#[derive(Debug)]
struct NamedWeight {
    inner: Weight,
    names: Vec<String>,
}

impl PackedWeight for NamedWeight {
    fn dims(&self) -> &[usize] {
        self.inner.dims()
    }
    fn bytes(&self) -> usize {
        self.inner.bytes()
    }
    fn form(&self) -> String {
        self.inner.form()
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// What was wrapped when it was fetched.
fn named(weight: &Weight) -> Option<&NamedWeight> {
    match weight {
        Weight::Packed(packed) => packed.as_any().downcast_ref(),
        Weight::Tensor(_) => None,
    }
}

impl ObservedOps {
    /// The operations `inner`, shown to `observer`.
    pub fn new(inner: Arc<dyn Ops>, observer: Arc<dyn ProductObserver>) -> Self {
        Self { inner, observer }
    }
}

impl WeightOps for ObservedOps {
    fn weight(&self, source: &WeightSource<'_>, purpose: WeightUse) -> Result<Weight> {
        let inner = self.inner.weight(source, purpose)?;
        if purpose != WeightUse::Product {
            return Ok(inner);
        }
        let names = (0..source.num_matrices()).map(|index| source.matrix_name(index)).collect();
        Ok(Weight::Packed(Arc::new(NamedWeight { inner, names })))
    }
}

impl Ops for ObservedOps {}

impl MoeOps for ObservedOps {
    fn gate(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
        self.inner.gate(x, weight, bias)
    }

    fn choose(
        &self,
        tokens: &Tensor,
        weight: &Weight,
        selection_bias: Option<&Tensor>,
        config: &DroplessConfig,
    ) -> Result<Option<Choices>> {
        self.inner.choose(tokens, weight, selection_bias, config)
    }

    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        self.inner.permute(tokens, table)
    }

    fn unpermute(&self, rows: &Tensor, combine_weights: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor> {
        self.inner.unpermute(rows, combine_weights, table)
    }

    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> Result<Tensor> {
        let Some(NamedWeight { inner, names }) = named(weight) else {
            return self.inner.grouped_linear(rows, weight, bias, offsets);
        };
        let product = self.inner.grouped_linear(rows, inner, bias, offsets)?;
        // The offsets have been checked by now.
        let whole = whole_experts(offsets, parts_per_expert(offsets, names.len()).unwrap_or(1));
        for (name, pair) in names.iter().zip(whole.windows(2)).filter(|(_, pair)| pair[1] > pair[0]) {
            self.observer.observe(name, &rows.narrow(0, pair[0], pair[1] - pair[0])?)?;
        }
        Ok(product)
    }

    fn activation(&self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        self.inner.activation(activation, x)
    }

    fn mix(&self, a: &Tensor, b: &Tensor, logits: &Tensor) -> Result<Tensor> {
        self.inner.mix(a, b, logits)
    }
}

impl DecoderOps for ObservedOps {
    fn linear(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor> {
        let Some(NamedWeight { inner, names }) = named(weight) else { return self.inner.linear(x, weight, bias) };
        let product = self.inner.linear(x, inner, bias)?;
        if x.elem_count() > 0 {
            names.iter().try_for_each(|name| self.observer.observe(name, x))?;
        }
        Ok(product)
    }

    fn add(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.inner.add(a, b)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
        self.inner.layer_norm(x, weight, bias, epsilon)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
        self.inner.rms_norm(x, weight, epsilon)
    }

    fn add_norm(
        &self,
        x: &Tensor,
        delta: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<[Tensor; 2]> {
        self.inner.add_norm(x, delta, weight, bias, epsilon)
    }

    fn for_heads(&self, parameter: &Tensor) -> Result<Tensor> {
        self.inner.for_heads(parameter)
    }

    fn rotary(
        &self,
        x: &Tensor,
        table: &RotaryTable,
        layout: RotaryLayout,
        positions: Positions<'_>,
    ) -> Result<Tensor> {
        self.inner.rotary(x, table, layout, positions)
    }

    fn attention(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        values: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
    ) -> Result<Tensor> {
        self.inner.attention(queries, keys, values, shape, seq_len)
    }

    fn attention_with_sinks(
        &self,
        qkv: [&Tensor; 3],
        sinks: &Tensor,
        shape: AttentionShape,
        seq_len: usize,
        dropout: Option<HeadDropout>,
    ) -> Result<Tensor> {
        self.inner.attention_with_sinks(qkv, sinks, shape, seq_len, dropout)
    }

    fn attention_fused(&self, qkv: &Tensor, num_heads: usize, seq_len: usize) -> Result<Tensor> {
        self.inner.attention_fused(qkv, num_heads, seq_len)
    }

    fn attention_dropped(
        &self,
        qkv: [&Tensor; 3],
        shape: AttentionShape,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> Result<Tensor> {
        self.inner.attention_dropped(qkv, shape, seq_len, dropout)
    }

    fn attention_fused_dropped(
        &self,
        qkv: &Tensor,
        num_heads: usize,
        seq_len: usize,
        dropout: HeadDropout,
    ) -> Result<Tensor> {
        self.inner.attention_fused_dropped(qkv, num_heads, seq_len, dropout)
    }

    fn dropout(&self, x: &Tensor, dropout: Dropout) -> Result<Tensor> {
        self.inner.dropout(x, dropout)
    }

    fn new_pages(&self, num_blocks: usize, block_size: usize, shape: KvShape, device: &Device) -> Result<[Tensor; 2]> {
        self.inner.new_pages(num_blocks, block_size, shape, device)
    }

    fn write_pages(&self, pool: PagedKv<'_>, keys: &Tensor, values: &Tensor, slots: &[u32]) -> Result<()> {
        self.inner.write_pages(pool, keys, values, slots)
    }

    fn paged_attention(
        &self,
        queries: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> Result<Tensor> {
        self.inner.paged_attention(queries, pool, sequences, shape)
    }

    fn paged_attention_with_sinks(
        &self,
        queries: &Tensor,
        sinks: &Tensor,
        pool: PagedKv<'_>,
        sequences: &[PagedSequence<'_>],
        shape: AttentionShape,
    ) -> Result<Tensor> {
        self.inner.paged_attention_with_sinks(queries, sinks, pool, sequences, shape)
    }

    fn chain(&self, work: usize, body: &mut dyn FnMut()) {
        self.inner.chain(work, body);
    }

    fn lanes(&self) -> usize {
        self.inner.lanes()
    }

    fn side_by_side(&self, count: usize, work: &(dyn Fn(usize) + Sync)) {
        self.inner.side_by_side(count, work);
    }

    fn embedding(&self, table: &Weight, ids: &[u32]) -> Result<Tensor> {
        self.inner.embedding(table, ids)
    }
}

impl LossOps for ObservedOps {
    fn linear_cross_entropy(&self, hidden: &Tensor, weight: &Weight, targets: &[u32]) -> Result<Tensor> {
        self.inner.linear_cross_entropy(hidden, weight, targets)
    }

    fn linear_cross_entropy_part(
        &self,
        hidden: &Tensor,
        weight: &Weight,
        targets: &[u32],
        part: &VocabularyPart,
    ) -> Result<Tensor> {
        self.inner.linear_cross_entropy_part(hidden, weight, targets, part)
    }

    fn linear_distillation(
        &self,
        student: StudentOutput<'_>,
        soft: SoftTargets<'_>,
        how: Distillation,
    ) -> Result<DistilledLoss> {
        self.inner.linear_distillation(student, soft, how)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{random, values};
    use crate::{BranchConfig, CandleOps, MlpConfig, MoeBlock, MoeConfig, ParamInit, RouteContext, RouterConfig};
    use candle_core::DType;
    use candle_nn::VarBuilder;
    use std::collections::{BTreeMap, HashMap};
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct Seen(Mutex<BTreeMap<String, Vec<Vec<f64>>>>);

    impl ProductObserver for Seen {
        fn observe(&self, matrix: &str, inputs: &Tensor) -> Result<()> {
            let width = inputs.dims()[inputs.rank() - 1];
            let rows = values(inputs).chunks(width).map(<[f64]>::to_vec).collect::<Vec<_>>();
            self.0.lock().unwrap().entry(matrix.to_owned()).or_default().extend(rows);
            Ok(())
        }
    }

    /// A layer with experts and a fixed branch: the output stays, and every matrix sees its own rows.
    #[test]
    fn each_matrix_is_shown_what_it_is_multiplied_with() {
        let mlp =
            MlpConfig { d_model: 6, d_ff: 10, activation: Activation::GeluTanh, bias: true, in_std: 0.4, out_std: 0.4 };
        let config = MoeConfig {
            num_experts: 3,
            expert: mlp,
            router: RouterConfig::Top1(Default::default()),
            branch: BranchConfig::Residual(mlp),
            gate_bound: 0.5,
            load_balance_coef: 0.0,
            router_z_coef: 0.0,
        };
        let tensors: HashMap<String, Tensor> = config
            .params()
            .iter()
            .enumerate()
            .map(|(seed, spec)| {
                let scale = if matches!(spec.init, ParamInit::Zeros) { 0.1 } else { 0.5 };
                (format!("mlp.{}", spec.name), random(seed as u64, &spec.shape, scale, DType::F64))
            })
            .collect();
        let vb = VarBuilder::from_tensors(tensors.clone(), DType::F64, &Device::Cpu);
        let seen = Arc::new(Seen::default());
        let observed = ObservedOps::new(Arc::new(CandleOps), Arc::clone(&seen) as Arc<dyn ProductObserver>);
        let tokens = random(90, &[12, 6], 1.0, DType::F64);
        let run = |ops: Arc<dyn Ops>| {
            let block = MoeBlock::new(&config, vb.pp("mlp"), ops).unwrap();
            block.forward(&tokens, &RouteContext::infer()).unwrap()
        };
        let (plain, output) = (run(Arc::new(CandleOps)), run(Arc::new(observed)));
        assert_eq!(values(&output.hidden), values(&plain.hidden));

        let seen = seen.0.lock().unwrap();
        let of = |name: &str| seen.get(name).cloned().unwrap_or_default();
        let rows = |expert: u32| -> Vec<Vec<f64>> {
            let ids = output.routing.expert_ids.iter().enumerate().filter(|(_, id)| **id == expert);
            ids.map(|(token, _)| values(&tokens.get(token).unwrap())).collect()
        };
        assert!((0..3).filter(|&expert| !rows(expert).is_empty()).count() > 1);
        for expert in 0..3 {
            assert_eq!(of(&format!("mlp.experts.{expert}.fc_in.weight")), rows(expert), "expert {expert}");
            assert_eq!(of(&format!("mlp.experts.{expert}.fc_out.weight")).len(), rows(expert).len());
        }
        let all: Vec<Vec<f64>> = (0..12).map(|token| values(&tokens.get(token).unwrap())).collect();
        assert_eq!(of("mlp.residual_mlp.fc_in.weight"), all);
        // After the nonlinearity.
        let ops = CandleOps;
        let get = |name: &str| tensors[&format!("mlp.residual_mlp.{name}")].clone();
        let hidden = ops.linear(&tokens, &get("fc_in.weight").into(), Some(&get("fc_in.bias"))).unwrap();
        let want = values(&ops.activation(Activation::GeluTanh, &hidden).unwrap());
        assert_eq!(of("mlp.residual_mlp.fc_out.weight").concat(), want);
        assert_eq!(seen.keys().filter(|name| !name.contains("experts.")).count(), 2, "gates are not shown");
    }
}
