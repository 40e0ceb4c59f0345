//! The original code's one-hot einsum form of dispatch and combine: kept as oracle and as baseline of the benches.

use crate::{DROPPED, Dispatcher, Error, ExpertRows, Result, Routing};
use candle_core::{DType, Tensor};

/// Dispatch by a one-hot mask `[tokens, experts, capacity]`: every expert gets exactly `capacity` rows, most of them zero.
///
/// Costs `tokens * experts * capacity * d_model` multiplications each way, nearly all with zero.
///
/// # Source
/// DeepSpeed `MOELayer.forward`: `einsum("sec,sm->ecm")` and `einsum("sec,ecm->sm")`. Differs: the dispatch mask follows
/// the decision, so a weight that underflows to 0 is still dispatched.
#[derive(Debug, Clone, Copy, Default)]
pub struct EinsumDispatcher;

/// The combine mask `[tokens, experts * capacity]` of one dispatch.
#[derive(Debug)]
pub struct EinsumReceipt {
    combine_mask: Tensor,
}

fn one_hot(routing: &Routing, capacity: usize, dtype: DType, like: &Tensor) -> Result<Tensor> {
    let width = routing.num_experts * capacity;
    let mut mask = vec![0f32; routing.num_tokens * routing.top_k * width];
    for (choice, (&expert, &slot)) in routing.expert_ids.iter().zip(&routing.slots).enumerate() {
        if expert != DROPPED {
            mask[choice * width + expert as usize * capacity + slot as usize] = 1.0;
        }
    }
    Ok(Tensor::from_vec(mask, (routing.num_tokens, routing.top_k, width), like.device())?.to_dtype(dtype)?)
}

impl Dispatcher for EinsumDispatcher {
    type Dispatching = (ExpertRows, EinsumReceipt);
    type Receipt = EinsumReceipt;
    type Combining = Tensor;

    fn begin_dispatch(&self, tokens: &Tensor, routing: &Routing) -> Result<Self::Dispatching> {
        if tokens.dim(0)? != routing.num_tokens {
            return Err(Error::Input(format!("tokens must number {}, got {}", routing.num_tokens, tokens.dim(0)?)));
        }
        let used =
            routing.expert_ids.iter().zip(&routing.slots).filter(|(e, _)| **e != DROPPED).map(|(_, s)| *s + 1).max();
        let capacity = routing.capacity.unwrap_or(0).max(used.unwrap_or(0) as usize).max(1);
        let mask = one_hot(routing, capacity, tokens.dtype(), tokens)?;
        let weights = routing.combine_weights.to_dtype(tokens.dtype())?;
        let combine_mask = mask.broadcast_mul(&weights.unsqueeze(2)?)?.sum(1)?;
        let rows = mask.sum(1)?.t()?.matmul(tokens)?;
        let offsets = (0..=routing.num_experts).map(|e| e * capacity).collect();
        Ok((ExpertRows { rows, offsets }, EinsumReceipt { combine_mask }))
    }

    fn finish_dispatch(&self, dispatching: Self::Dispatching) -> Result<(ExpertRows, EinsumReceipt)> {
        Ok(dispatching)
    }

    fn begin_combine(&self, rows: ExpertRows, receipt: EinsumReceipt) -> Result<Tensor> {
        Ok(receipt.combine_mask.matmul(&rows.rows)?)
    }

    fn finish_combine(&self, combining: Tensor) -> Result<Tensor> {
        Ok(combining)
    }
}
