//! The file of a dense model that DeepSpeed saved: refused with its name, or imported.
#![no_main]

use libfuzzer_sys::fuzz_target;
use moe_models::deepspeed::{Import, gpt2_tokenizer, import};
use std::path::Path;
use std::sync::LazyLock;
use tokenizers::Tokenizer;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/deepspeed/tokenizer");
    gpt2_tokenizer(&fixtures.join("vocab.json"), &fixtures.join("merges.txt")).unwrap()
});

fuzz_target!(|bytes: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mp_rank_00_model_states.pt"), bytes).unwrap();
    let arguments = Default::default();
    let what = Import { from: dir.path(), tag: None, arguments: &arguments, dtype: None, tokenizer: &TOKENIZER };
    if let Err(error) = import(&what, &dir.path().join("out")) {
        let text = error.to_string();
        assert!(text.contains("_model_states.pt") || text.contains("vocabulary"), "{text}");
    }
});
