//! A GGUF file: refused with its name, or a model whose every tensor can be read, and a tokenizer, a template and defaults.
#![no_main]

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use moe_models::{Family, ModelSource, QuantFormat, Result};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Mutex;

/// Elements of a parameter that are worth reading.
const MOST: usize = 1 << 20;

/// Tokenizers that have been made: most mutations leave them as they are, and their patterns take longer to compile than all else.
static SEEN: Mutex<Option<HashSet<Vec<u8>>>> = Mutex::new(None);

fn is_new(tokenizer_json: &Option<Vec<u8>>) -> bool {
    let Some(json) = tokenizer_json else { return true };
    let mut seen = SEEN.lock().unwrap();
    let seen = seen.get_or_insert_default();
    if seen.len() > 4096 {
        seen.clear();
    }
    seen.insert(json.clone())
}

fn open(bytes: &[u8]) -> Result<()> {
    let source = ModelSource::from_gguf_bytes(Path::new("it.gguf"), bytes.to_vec())?;
    for name in ["tokenizer_config.json", "generation_config.json"] {
        source.content(name)?;
    }
    // A tokenizer may be none; the model is one still.
    let tokenizer = match source.content("tokenizer.json") {
        Ok(json) if is_new(&json) => source.tokenizer().map(|tokenizer| {
            let ids = tokenizer.encode("It's 12345  naïve\n漢字", true);
            ids.iter().for_each(|encoding| drop(tokenizer.decode(encoding.get_ids(), true)));
        }),
        Ok(_) => Ok(()),
        Err(error) => Err(error),
    };
    let (family, _) = source.family::<Box<dyn Family>>()?;
    let (table, checkpoint) = (family.decoder()?.params(), source.checkpoint(&family)?);
    checkpoint.check(&table)?;
    let kept = source.checkpoint(&family)?.with_integers(QuantFormat::INT4);
    for spec in table.specs().iter().filter(|spec| spec.elem_count() <= MOST) {
        assert_eq!(checkpoint.tensor(spec, &Device::Cpu)?.dims(), spec.shape);
        // Scales may be infinite, which is refused.
        let _ = kept.tensor(spec, &Device::Cpu);
    }
    tokenizer
}

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = open(bytes) {
        assert!(error.to_string().contains("it.gguf"), "{error}");
    }
});
