//! GGUF files, as llama.cpp and its converter write them: one file with a model's tensors, its configuration and its tokenizer.
//!
//! A file is another source of what a Hugging Face folder holds, not another way to a model. Its metadata becomes the `config.json`
//! that the same model has in a folder (`architecture/`), which the family reads as ever; its tensors are given by the names of
//! parameters (`tensors.rs`), mapped, one at a time, experts too; its tokenizer becomes a `tokenizer.json` (`tokenizer/`). What a
//! file says beyond that is refused by name.
//!
//! Forms: F32, F16, BF16 as they are; Q8_0, Q4_0, Q4_1, Q4_K, Q6_K and MXFP4 as the values they stand for, which are rounded to what
//! the model is asked for, once. Q4_0 is the form of [`moe_kernels::QuantFormat::INT4`], but for scales of f16 in the place of bf16:
//! where matrices are asked for so, its integers are kept, and only the scales are rounded. All others are quantized again.

mod architecture;
mod file;
mod form;
mod header;
mod model;
mod tensors;
#[cfg(test)]
mod tests;
mod tokenizer;
mod value;

pub(crate) use model::GgufModel;

/// Factors on rotary frequencies, a tensor that is no parameter.
const ROPE_FREQS: &str = "rope_freqs.weight";
