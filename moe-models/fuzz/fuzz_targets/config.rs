//! A `config.json` of any family: refused with the file's name, or a decoder that is checked, can be written back, and is then the same.
#![no_main]

use candle_core::DType;
use libfuzzer_sys::fuzz_target;
use moe_models::{Family, ReadFamily};
use std::path::Path;

fuzz_target!(|json: &[u8]| {
    let path = Path::new("config.json");
    match <Box<dyn Family>>::read(json, path) {
        Err(error) => assert!(error.to_string().contains("config.json")),
        Ok(family) => {
            let decoder = family.decoder().expect("checked when it was read");
            decoder.validate().expect("checked when it was read");
            let written = family.to_json(DType::F32).expect("JSON");
            let again = <Box<dyn Family>>::read(written.as_bytes(), path).expect("what was read is written");
            assert_eq!(again.decoder().expect("checked"), decoder);
        }
    }
});
