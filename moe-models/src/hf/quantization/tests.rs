//! `quantization_config` there and back, what of it is refused, and the bytes of a matrix.

use super::save::save_sharded;
use super::*;
use crate::{Decoder, Family, Precision};
use moe_kernels::quantized::{IntegerMatrix, QuantFormat};
use serde_json::{Value, json};
use std::path::Path;

const FORMATS: [QuantFormat; 3] = [QuantFormat::Int8, QuantFormat::INT4, QuantFormat::Int4 { group_size: 128 }];

#[test]
fn configurations_come_back_as_they_were() {
    for format in FORMATS {
        let config = QuantizationConfig::new(format, vec!["lm_head".into(), "model.layers.1.mlp.gate".into()]);
        assert_eq!(QuantizationConfig::from_json(&config.to_json()).unwrap(), config);
    }
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized");
    for (folder, format) in [("int4", QuantFormat::INT4), ("int8", QuantFormat::Int8)] {
        let path = fixtures.join(folder).join("config.json");
        let json = std::fs::read(&path).unwrap();
        let (family, config) = read_config::<Box<dyn Family>>(&json, &path).unwrap();
        let ignore = vec!["lm_head".to_owned(), "re:.*mlp.gate$".to_owned()];
        assert_eq!(config, Some(QuantizationConfig { format, ignore }), "of the library");
        assert_eq!(family.decoder().unwrap().d_model, 64);
        // What the library says of its own configuration and of ours: all that we write, it has.
        let theirs: Value = serde_json::from_slice(&json).unwrap();
        let ours = config.unwrap().to_json();
        for field in ["quant_method", "format", "quantization_status", "ignore"] {
            assert_eq!(ours[field], theirs["quantization_config"][field], "{field}");
        }
        let [ours, theirs] = [&ours, &theirs["quantization_config"]].map(|c| c["config_groups"]["group_0"].clone());
        assert_eq!((&ours["weights"], &ours["targets"]), (&theirs["weights"], &theirs["targets"]));
        assert_eq!(ours["input_activations"], theirs["input_activations"]);
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    let group = "/config_groups/group_0";
    let int4 = QuantizationConfig::new(QuantFormat::INT4, vec![]).to_json();
    let int8 = QuantizationConfig::new(QuantFormat::Int8, vec![]).to_json();
    let cases = [
        (&int4, "", "quant_method", json!("gptq"), "quantization_config.quant_method must be \"compressed-tensors\""),
        (&int4, "", "format", json!("marlin-24"), "format must be \"pack-quantized\" or \"int-quantized\""),
        (&int4, "", "quantization_status", json!("frozen"), "quantization_status must be null or \"compressed\""),
        (&int4, "", "kv_cache_scheme", json!({"num_bits": 8}), "quantization_config.kv_cache_scheme must be"),
        (&int4, "", "sparsity_config", json!({"format": "dense"}), "sparsity_config"),
        (&int4, "", "transform_config", json!({"x": 1}), "transform_config"),
        (&int4, "", "surprise", json!(1), "quantization_config.surprise is not implemented"),
        (&int4, "", "ignore", json!("lm_head"), "quantization_config.ignore"),
        (&int4, "", "config_groups", json!({}), "config_groups must have one group, got 0"),
        (&int4, "", "config_groups", json!({"a": {}, "b": {}}), "config_groups must have one group, got 2"),
        (&int4, group, "format", json!("int-quantized"), "group_0.format must be null or \"pack-quantized\""),
        (&int4, group, "output_activations", json!({"num_bits": 8}), "group_0.output_activations"),
        (&int4, group, "weights", Value::Null, "group_0.weights must be an object"),
        (&int4, "/config_groups/group_0/weights", "num_bits", json!(3), "group_0.weights.num_bits must be 4, got 3"),
        (&int4, "/config_groups/group_0/weights", "symmetric", json!(false), "weights.symmetric must be true"),
        (&int4, "/config_groups/group_0/weights", "type", json!("float"), "weights.type must be \"int\""),
        (&int4, "/config_groups/group_0/weights", "actorder", json!("group"), "weights.actorder must be"),
        (&int4, "/config_groups/group_0/weights", "block_structure", json!([128, 128]), "weights.block_structure"),
        (&int4, "/config_groups/group_0/weights", "dynamic", json!(true), "weights.dynamic must be false"),
        (&int4, "/config_groups/group_0/weights", "strategy", json!("channel"), "weights.strategy must be \"group\""),
        (
            &int4,
            "/config_groups/group_0/weights",
            "group_size",
            json!(48),
            "weights.group_size must be a multiple of 32",
        ),
        (&int4, "/config_groups/group_0/weights", "unknown", json!(0), "weights.unknown is not implemented"),
        (&int8, "/config_groups/group_0/weights", "num_bits", json!(4), "weights.num_bits must be 8, got 4"),
        (&int8, "/config_groups/group_0/weights", "group_size", json!(128), "weights.group_size must be null"),
        (
            &int8,
            "/config_groups/group_0/input_activations",
            "dynamic",
            json!(false),
            "input_activations.dynamic must be true",
        ),
        (&int8, "/config_groups/group_0/input_activations", "strategy", json!("tensor"), "input_activations.strategy"),
        (
            &int8,
            "/config_groups/group_0/input_activations",
            "num_bits",
            json!(4),
            "input_activations.num_bits must be 8",
        ),
    ];
    for (config, at, field, value, part) in cases {
        let mut json = config.clone();
        json.pointer_mut(at).unwrap()[field] = value.clone();
        let text = QuantizationConfig::from_json(&json).expect_err(field);
        assert!(text.contains(part), "{field} = {value}: {text:?} should name {part:?}");
    }
    for (field, value) in
        [("actorder", json!("weight")), ("observer", json!("mse")), ("scale_dtype", json!("bfloat16"))]
    {
        let mut json = int4.clone();
        json.pointer_mut("/config_groups/group_0/weights").unwrap()[field] = value;
        assert_eq!(QuantizationConfig::from_json(&json).unwrap().format, QuantFormat::INT4, "{field}");
    }
    let path = Path::new("it/config.json");
    let refused = read_config::<Box<dyn Family>>(br#"{"model_type": "moe_gpt", "quantization_config": 3}"#, path);
    let text = refused.map(|_| ()).unwrap_err().to_string();
    assert!(text.contains("it/config.json") && text.contains("quantization_config must be an object, got 3"), "{text}");
}

#[test]
fn bytes_are_those_of_the_integers() {
    for format in FORMATS {
        for shape in [[1, 1], [3, 8], [5, 17], [4, 130]] {
            let [out, inner] = shape;
            let values: Vec<f32> = (0..out * inner).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
            let matrix = IntegerMatrix::nearest(format, &values, shape).unwrap();
            let stored = StoredMatrix { name: "a.weight".into(), format, shape };
            let (headers, content) = (stored.tensors(), stored.content(&matrix).unwrap());
            assert_eq!(headers.len(), content.len());
            for (header, bytes) in headers.iter().zip(&content) {
                assert_eq!(header.bytes(), bytes.len(), "{}", header.name);
            }
            assert_eq!(stored.integers(&content[0]), matrix.integers(), "{format} {shape:?}");
            let other = StoredMatrix { shape: [out + 1, inner], ..stored };
            assert!(other.content(&matrix).unwrap_err().contains("must be"));
        }
    }
    let matrix = IntegerMatrix::new(QuantFormat::Int8, [1, 1], vec![3], vec![0.1]).unwrap();
    let stored = StoredMatrix { name: "a.weight".into(), format: QuantFormat::Int8, shape: [1, 1] };
    assert!(stored.content(&matrix).unwrap_err().contains("no value of bf16"));
}

/// Shards hold the bytes of one file, each matrix whole in one of them.
#[test]
fn shards_hold_what_one_file_holds() {
    let root = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/qwen3_moe");
    let [one, many] = ["one", "many"].map(|name| root.path().join(name));
    save(&from, &one, QuantFormat::INT4, nearest).unwrap();
    save_sharded(&from, &many, QuantFormat::INT4, 10_000, nearest).unwrap();
    let tensors = |dir: &Path| {
        let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let mut all = std::collections::BTreeMap::new();
        for (index, path) in files.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).enumerate() {
            let bytes = std::fs::read(path).unwrap();
            for (name, tensor) in safetensors::SafeTensors::deserialize(&bytes).unwrap().tensors() {
                all.insert(name, (index, tensor.data().to_vec()));
            }
        }
        all
    };
    let (one, all) = (tensors(&one), tensors(&many));
    assert!(all.values().map(|(index, _)| index).max() > Some(&2));
    let content = |all: &std::collections::BTreeMap<String, (usize, Vec<u8>)>| -> Vec<(String, Vec<u8>)> {
        all.iter().map(|(name, (_, bytes))| (name.clone(), bytes.clone())).collect()
    };
    assert_eq!(content(&one), content(&all));
    for (name, (index, _)) in all.iter().filter(|(name, _)| name.ends_with("_packed")) {
        assert_eq!(all[&name.replace("_packed", "_scale")].0, *index, "{name}");
    }
    Decoder::load(&many, Precision::F32).unwrap();
}
