//! Folders whose matrices are integers, the `compressed-tensors` way, so that others read them too: `quantization_config` in
//! `config.json` ([`QuantizationConfig`]), and in the place of a tensor `X.weight` those of its integers, scales and shape (`stored.rs`).
//!
//! What is quantized are the matrices that are multiplied with and nothing else. Embeddings, the output layer, norms, gates, mixing
//! coefficients and biases stay as they are. In a folder that is read, what the files hold decides, tensor by tensor.
//!
//! # Source
//! `compressed-tensors` 0.20: formats `pack-quantized` (4 bits) and `int-quantized` (8 bits), symmetric.

mod config;
mod save;
mod stored;
#[cfg(test)]
mod tests;

pub use config::QuantizationConfig;
pub(crate) use config::read_config;
pub(crate) use save::refuse_quantized;
pub use save::{MatrixToQuantize, nearest, save};
pub(crate) use stored::StoredMatrix;

use super::names::NameTable;
use super::write::FileTensor;
use crate::fields::Checked;
use moe_core::ParamSpec;
use moe_kernels::quantized::QuantFormat;

/// Ends of the names of linear maps: those of attention, and the two of a feed-forward network, an expert or not.
const PRODUCTS: [&str; 4] = ["_proj.weight", "kv_a_proj_with_mqa.weight", "fc_in.weight", "fc_out.weight"];

/// Whether a parameter is a matrix that is multiplied with and nothing else: what [`moe_core::WeightUse::Product`] is asked for.
fn is_product(spec: &ParamSpec) -> bool {
    PRODUCTS.iter().any(|end| spec.name.ends_with(end))
}

/// Refuses families whose experts lie in files as stacks: the format has integers of single matrices only.
pub(super) fn refuse_stacks(names: NameTable) -> Checked<()> {
    match names.has_stacks() {
        false => Ok(()),
        true => Err("the experts of this family lie in files as one tensor of all of them, for which the format of integers has no \
                     form; serve it with --quantize, which rounds matrices while they are loaded"
            .into()),
    }
}

/// The integers of a tensor of the files, if it is one that is quantized.
pub(super) fn as_integers(tensor: &FileTensor<'_>, format: QuantFormat) -> Option<StoredMatrix> {
    match tensor.header.shape.as_slice() {
        &[out, inner] if is_product(tensor.spec) => {
            Some(StoredMatrix { name: tensor.header.name.clone(), format, shape: [out, inner] })
        }
        _ => None,
    }
}
