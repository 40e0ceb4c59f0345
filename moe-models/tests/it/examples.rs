//! The examples run and do what they say.

use crate::golden::fixtures;
use candle_core::{DType, Device};
use moe_models::{Family, Model};

#[path = "../../examples/ask.rs"]
mod ask;
#[path = "../../examples/resave.rs"]
#[allow(dead_code, reason = "its main reads arguments")]
mod resave;

#[test]
fn a_model_folder_is_loaded_and_asked() {
    ask::main().unwrap();
}

#[test]
fn a_model_folder_is_saved_again() {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("made");
    resave::resave(&fixtures().join("gpt_oss/mxfp4"), &to, DType::BF16).unwrap();
    Model::<Box<dyn Family>>::load(&to, &Device::Cpu).unwrap();
    assert!(resave::resave(&to.join("nothing"), &to, DType::BF16).is_err());
}
