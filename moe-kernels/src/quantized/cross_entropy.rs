//! The loss of a quantized output layer, without gradients: logits exist for one block of tokens at a time.

use super::{QuantGroup, QuantizedWeights, quantized_gemm};
use crate::Isa;
use crate::buffer::with_scratch_f32;
use crate::parallel::{self, SharedMut};
use moe_core::ops::IGNORED;

/// Tokens whose logits exist at a time.
const BLOCK: usize = 128;

/// Mean over the counted targets of `-log softmax(hidden weight^T)[target]`, in nats; 0 if none counts.
///
/// # Shapes
/// `hidden` `[tokens, d_model]`, `weight` `[vocab_size, d_model]`, `targets` `[tokens]`, inside the vocabulary or [`IGNORED`]
pub(crate) fn linear_cross_entropy(isa: Isa, hidden: &[f32], weight: &QuantizedWeights, targets: &[u32]) -> f32 {
    let [vocab, width] = weight.shape();
    let mut losses = vec![0.0f64; targets.len()];
    with_scratch_f32(BLOCK.min(targets.len()) * vocab, |scratch| {
        for (block, (targets, losses)) in targets.chunks(BLOCK).zip(losses.chunks_mut(BLOCK)).enumerate() {
            let (logits, rows) = (&mut scratch[..targets.len() * vocab], &hidden[block * BLOCK * width..]);
            let group = QuantGroup { rows: &rows[..targets.len() * width], weights: weight, bias: None, out_offset: 0 };
            quantized_gemm(isa, &[group], logits);
            let (logits, losses) = (&*logits, SharedMut::new(losses));
            parallel::for_each_if(logits.len(), 1 << 14, targets.len(), |row| {
                // SAFETY: each task writes the loss of its own row.
                let loss = unsafe { losses.slice(row, 1) };
                loss[0] = row_loss(&logits[row * vocab..][..vocab], targets[row]);
            });
        }
    });
    let counted = targets.iter().filter(|&&target| target != IGNORED).count().max(1);
    (losses.iter().sum::<f64>() / counted as f64) as f32
}

fn row_loss(logits: &[f32], target: u32) -> f64 {
    if target == IGNORED {
        return 0.0;
    }
    let most = logits.iter().fold(f32::NEG_INFINITY, |most, &logit| most.max(logit));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - most).exp()).sum();
    sum.ln() + f64::from(most) - f64::from(logits[target as usize])
}
