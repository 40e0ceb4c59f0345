//! Files that nobody's training wrote: each is refused with a reason, none is trusted.

use super::arguments::{Arguments, QkvOrder};
use super::pickle::{Pickle, Value};
use super::source::{Form, Part, Source};
use super::torch_file::TorchFile;
use crate::Result;
use crate::fields::Fields;
use crate::hf::Bytes;
use candle_core::DType;
use serde_json::json;
use std::io::{Cursor, Write};
use std::sync::Arc;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// The bytes of a pickle, opcode after opcode.
#[derive(Clone)]
struct Opcodes(Vec<u8>);

impl Opcodes {
    fn new() -> Self {
        Self(vec![0x80, 2])
    }

    fn raw(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend(bytes.as_ref());
        self
    }

    fn text(self, text: &str) -> Self {
        self.raw([b'X']).raw((text.len() as u32).to_le_bytes()).raw(text)
    }

    /// A tuple of sizes.
    fn sizes(self, sizes: &[i64]) -> Self {
        sizes.iter().fold(self.raw("("), |it, size| it.raw([0x8a, 8]).raw(size.to_le_bytes())).raw("t")
    }

    /// A tensor of the storage `data/0`.
    fn tensor(self, class: &str, offset: i64, shape: &[i64], stride: &[i64]) -> Self {
        let it = self.raw("ctorch._utils\n_rebuild_tensor_v2\n((").text("storage").raw(format!("ctorch\n{class}\n"));
        let it = it.text("0").text("cpu").raw("K\x00tQ").raw([0x8a, 8]).raw(offset.to_le_bytes());
        it.sizes(shape).sizes(stride).raw(b"\x89}tR")
    }

    fn end(self) -> Vec<u8> {
        self.raw(".").0
    }
}

fn archive(entries: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in entries {
        zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap().into_inner()
}

fn open(bytes: Vec<u8>) -> Result<TorchFile> {
    TorchFile::of("it.pt".into(), Bytes::Held(bytes.into()))
}

/// A file of this pickle and of a storage of 24 bytes.
fn file(pickle: Opcodes) -> Result<TorchFile> {
    let storage: Vec<u8> = (1..=6).flat_map(|i| (i as f32).to_le_bytes()).collect();
    open(archive(&[("a/data.pkl", &pickle.end()), ("a/data/0", &storage)], CompressionMethod::Stored))
}

#[track_caller]
fn refused<T: std::fmt::Debug>(got: std::result::Result<T, impl ToString>, part: &str) {
    let text = got.unwrap_err().to_string();
    assert!(text.contains(part), "{text:?} should say {part:?}");
}

#[test]
fn tensors_are_read_from_their_storage() {
    let dict = Opcodes::new().raw("}(").text("a").tensor("FloatStorage", 2, &[2, 2], &[2, 1]).text("below").raw("}");
    let dict = dict.text("b").tensor("BFloat16Storage", 11, &[], &[]).raw("su");
    let file = file(dict).unwrap();
    let tensors = file.tensors(file.pickle().root()).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), ["a", "below.b"]);
    let a = file.floats(&tensors["a"]).unwrap();
    assert_eq!(a.to_vec2::<f32>().unwrap(), [[3.0, 4.0], [5.0, 6.0]]);
    // The upper half of the bits of 6.
    assert_eq!(file.floats(&tensors["below.b"]).unwrap().to_scalar::<f32>().unwrap(), 6.0);
    assert_eq!(tensors["below.b"].dtype, DType::BF16);
}

#[test]
fn tensors_that_cannot_be_are_refused() {
    let tensors = |pickle: Opcodes| {
        let file = file(Opcodes::new().raw("}").text("it").raw(&pickle.0[2..]).raw("s")).unwrap();
        file.tensors(file.pickle().root()).map(|_| ())
    };
    let tensor =
        |class, offset, shape: &[i64], stride: &[i64]| tensors(Opcodes::new().tensor(class, offset, shape, stride));
    tensor("FloatStorage", 0, &[3, 2], &[2, 1]).unwrap();
    refused(tensor("FloatStorage", 1, &[3, 2], &[2, 1]), "it: the shape [3, 2] is more than the 24 bytes");
    refused(tensor("FloatStorage", -1, &[2], &[1]), "is more than the 24 bytes");
    refused(tensor("FloatStorage", i64::MAX, &[2], &[1]), "is more than the 24 bytes");
    refused(tensor("FloatStorage", 0, &[i64::MAX / 4], &[1]), "is more than the 24 bytes");
    refused(tensor("FloatStorage", 0, &[1 << 40, 1 << 40], &[1 << 40, 1]), "no file can hold");
    refused(tensor("FloatStorage", 0, &[-3], &[1]), "is not a tuple of some sizes");
    refused(tensor("FloatStorage", 0, &[1; 9], &[1; 9]), "is not a tuple of some sizes");
    refused(tensor("FloatStorage", 0, &[2, 3], &[1, 2]), "save it contiguous");
    refused(tensor("LongStorage", 0, &[1], &[1]), "float32, bfloat16 or float16, got a LongStorage");
    refused(tensors(Opcodes::new().raw("K\x01")), "it: it is no tensor");
    refused(
        tensors(Opcodes::new().raw("cos\nsystem\n").text("true").raw(b"\x85R")),
        "os.system, which is not implemented",
    );
    refused(tensors(Opcodes::new().raw("ctorch._utils\n_rebuild_tensor_v2\n)R")), "is not implemented");
    // A dict that is in itself.
    refused(tensors(Opcodes::new().raw("}q\x00").text("again").raw("h\x00s")), "is there twice");
}

#[test]
fn pickles_that_are_damaged_are_refused() {
    let read = |opcodes: Opcodes| Pickle::read(&opcodes.end());
    let new = Opcodes::new;
    refused(read(new()), "nothing is left on its stack");
    refused(Pickle::read(&new().0), "ends too early");
    refused(read(new().raw([b'X', 255, 255, 255, 255])), "ends too early");
    refused(read(new().raw([b'X', 1, 0, 0, 0, 0xff])), "not UTF-8");
    refused(read(new().raw("h\x07")), "stored under 7");
    refused(read(new().raw("u")), "no mark");
    refused(read(new().raw("K\x01(0")), "nothing is left");
    refused(read(new().raw(")(K\x01u")), "no value");
    refused(read(new().raw(")K\x01a")), "no list");
    refused(read(new().raw("cos")), "has no end");
    refused(read(new().raw([b'c']).raw([b'a'; 4096])), "has no end");
    refused(read(new().raw("I1\n")), "opcode 0x49");
    refused(read(Opcodes(vec![0x80, 4]).raw("N")), "protocol 4");
    refused(Pickle::read(&vec![0; (64 << 20) + 1]), "at most");

    // Integers of any length; negative ones.
    let wide = read(new().raw([0x8a, 9]).raw([1; 9])).unwrap();
    assert_eq!(wide.get(wide.root()), &Value::Wide);
    for (bytes, want) in [(&[][..], 0), (&[0xff], -1), (&[0xff, 0], 255), (&[0, 0, 0, 0, 1], 1 << 32)] {
        let pickle = read(new().raw([0x8a, bytes.len() as u8]).raw(bytes)).unwrap();
        assert_eq!(pickle.get(pickle.root()), &Value::Int(want));
    }
}

/// Lists of the same list, forty deep: a reader that copies would need 2^40 of them.
#[test]
fn what_is_named_again_is_not_copied() {
    let doubled = (0..40u8).fold(Opcodes::new().raw("]q\x00"), |it, i| it.raw([b'h', i, b'h', i, 0x86, b'q', i + 1]));
    assert!(Pickle::read(&doubled.end()).is_ok());
    let deep = (0..100_000).fold(Opcodes::new().raw(")"), |it, _| it.raw([0x85]));
    assert!(Pickle::read(&deep.end()).is_ok());
}

#[test]
fn archives_that_are_damaged_are_refused() {
    let pickle = Opcodes::new().raw("}").end();
    let stored = CompressionMethod::Stored;
    let one = |name| archive(&[(name, &pickle[..])], stored);
    assert!(open(one("a/data.pkl")).is_ok());
    refused(open(one("data.pkl")), "lies in no folder");
    refused(open(one("a/other")), "has no data.pkl");
    refused(open(archive(&[("a/data.pkl", &pickle), ("b/data.pkl", &pickle)], stored)), "two entries are called");
    let big = [("a/data.pkl", &pickle[..]), ("a/byteorder", &b"big"[..])];
    refused(open(archive(&big, stored)), "big-endian");
    // The method of compression, in the archive's list and before the entry.
    let mut bytes = one("a/data.pkl");
    let list = bytes.windows(4).position(|at| at == b"PK\x01\x02").unwrap();
    (bytes[list + 10], bytes[8]) = (8, 8);
    refused(open(bytes), "is compressed");
}

/// A file of one weight of two values.
fn weight(name: &str, values: [f32; 2]) -> Arc<TorchFile> {
    let pickle = Opcodes::new().raw("}").text("it").tensor("FloatStorage", 0, &[2], &[1]).raw("s").end();
    let storage = values.map(f32::to_le_bytes).concat();
    let bytes = archive(&[("a/data.pkl", &pickle), ("a/data/0", &storage)], CompressionMethod::Stored);
    Arc::new(TorchFile::of(name.into(), Bytes::Held(bytes.into())).unwrap())
}

/// What every slice has alike may differ by rounding, and then is their mean.
#[test]
fn copies_are_of_one_run() {
    let one_of = |others: &[[f32; 2]]| {
        let part = |(index, values): (usize, &[f32; 2])| {
            let file = weight(&format!("{index}.pt"), *values);
            let tensor = file.tensors(file.pickle().root()).unwrap().remove("it").unwrap();
            Part { file, tensor }
        };
        let parts = others.iter().enumerate().map(part).collect();
        let source = Source { name: "it".into(), parts, form: Form::Whole };
        source.check(&[2]).and_then(|()| Ok(source.values(&[2])?.to_vec1::<f32>()?))
    };
    assert_eq!(one_of(&[[1.0, 0.1]; 3]).unwrap(), [1.0, 0.1]);
    assert_eq!(one_of(&[[1.0, 0.5], [1.0, 0.505]]).unwrap(), [1.0, 0.5025]);
    refused(one_of(&[[1.0, 0.5], [1.0, 0.52]]), "1.pt: it differs by");
    refused(one_of(&[[1.0, 0.5], [1.0, f32::NAN]]), "1.pt: it differs by");
}

/// Every byte of a file that DeepSpeed wrote, changed in several ways: refused with the file's name, or read.
#[test]
fn any_byte_may_be_wrong() {
    let fixture = "tests/fixtures/deepspeed/pr_moe/global_step3/layer_0_expert_0_mp_rank_00_model_states.pt";
    let whole = std::fs::read(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture)).unwrap();
    let (mut read, mut refused) = (0, 0);
    for at in 0..whole.len() {
        for change in [1u8, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] ^= change;
            let tensors = open(bytes).and_then(|file| {
                let tensors = file.tensors(file.pickle().root()).map_err(|reason| file.error(reason))?;
                tensors.values().try_for_each(|tensor| file.floats(tensor).map(|_| ()))
            });
            match tensors {
                Ok(()) => read += 1,
                Err(error) => {
                    assert!(error.to_string().starts_with("it.pt: "), "{error}");
                    refused += 1;
                }
            }
        }
    }
    println!("{read} were read, {refused} refused");
    assert!(read > 0 && refused > 1000);
}

#[test]
fn arguments_that_are_not_implemented_are_refused_by_name() {
    let known = json!({ "num_attention_heads": 4, "hidden_size": 32, "checkpoint_version": 3.0 });
    let read = |changes: serde_json::Value| {
        let mut all = known.clone();
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        Arguments::of(Fields::of(&all, "args").unwrap())
    };
    let plain = read(json!({})).unwrap();
    assert_eq!((plain.qkv, plain.top_k, plain.drop_tokens), (QkvOrder::HeadPartColumn, None, true));
    for (changes, name) in [
        (json!({ "swiglu": true }), "args.swiglu"),
        (json!({ "squared_relu": true }), "args.squared_relu"),
        (json!({ "bias_gelu_fusion": false }), "args.bias_gelu_fusion"),
        (json!({ "normalization": "rmsnorm" }), "args.normalization"),
        (json!({ "apply_layernorm_1p": true }), "args.apply_layernorm_1p"),
        (json!({ "add_bias_linear": false }), "args.add_bias_linear"),
        (json!({ "add_position_embedding": false }), "args.add_position_embedding"),
        (json!({ "use_rotary_position_embeddings": true }), "args.use_rotary_position_embeddings"),
        (json!({ "untie_embeddings_and_output_weights": true }), "args.untie_embeddings_and_output_weights"),
        (json!({ "num_key_value_heads": 2 }), "args.num_key_value_heads"),
        (json!({ "kv_channels": 16 }), "args.kv_channels"),
        (json!({ "num_experts_switch": 4 }), "args.num_experts_switch"),
        (json!({ "pipeline_model_parallel_size": 2 }), "args.pipeline_model_parallel_size"),
        (json!({ "num_attention_heads": 0 }), "args.num_attention_heads"),
        (json!({ "num_attention_heads": null }), "--num-attention-heads"),
        (json!({ "checkpoint_version": null }), "--checkpoint-version"),
        (json!({ "checkpoint_version": 1.5 }), "checkpoint_version 1.5"),
        (json!({ "topk": "two" }), "args.topk"),
        (json!({ "num_experts": 4 }), "args.num_experts"),
    ] {
        refused(read(changes), name);
    }
    assert_eq!(read(json!({ "bias_gelu_fusion": false, "openai_gelu": true })).unwrap(), plain, "the same form");
    let early = read(json!({ "checkpoint_version": 0, "moe_token_dropping": false })).unwrap();
    assert_eq!((early.qkv, early.drop_tokens), (QkvOrder::PartHeadColumn, false));
}

/// Two bytes for what takes far more in memory.
#[test]
fn a_pickle_of_too_many_values_is_refused() {
    let many = |count: usize| Opcodes::new().raw(b"N0".repeat(count)).raw("N").end();
    Pickle::read(&many(1 << 20)).unwrap();
    refused(Pickle::read(&many(2 << 20)), "more than 4194304 values");
    // Named again and again: nothing new is made, but each is kept.
    let named = Opcodes::new().raw("Nq\0").raw(b"h\0".repeat(5 << 20)).end();
    refused(Pickle::read(&named), "more than 4194304 values");
}
