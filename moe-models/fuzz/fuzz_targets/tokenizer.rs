//! A `tokenizer.json`: refused with its name, or a tokenizer that cuts a text and puts it together.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_models::train::tokenizer::{check_fits, parse, required_vocab_size};
use std::path::Path;

fuzz_target!(|json: &[u8]| match parse(json, Path::new("tokenizer.json")) {
    Err(error) => assert!(error.to_string().contains("tokenizer.json")),
    Ok(tokenizer) => {
        let size = required_vocab_size(&tokenizer);
        check_fits(&tokenizer, size).expect("as large as is required");
        if let Ok(encoding) = tokenizer.encode("It's 12345  naïve\n漢字 <|endoftext|>", true) {
            let _ = tokenizer.decode(encoding.get_ids(), true);
        }
    }
});
