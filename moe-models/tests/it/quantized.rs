//! Folders of integers: written, read with the bits of a model that is quantized while it is loaded, near to the floats, and refused
//! where they are damaged. `fixtures/quantized/make.py` made files with the `compressed-tensors` library.

use crate::golden::{fixtures, logits, read};
use candle_core::{DType, Device};
use moe_core::testing::values;
use moe_core::{CounterRng, WeightUse};
use moe_kernels::quantized::IntegerMatrix;
use moe_models::gpt::{Gpt, GptConfig, TokenBatch};
use moe_models::hf::quantization::{MatrixToQuantize, nearest, save};
use moe_models::{Decoder, Family, Model, PackedForms, Pass, Precision, QuantFormat};
use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize_to_file};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

type Any = Model<Box<dyn Family>>;

const FORMATS: [QuantFormat; 3] = [QuantFormat::Int8, QuantFormat::INT4, QuantFormat::Int4 { group_size: 64 }];

fn forms(format: QuantFormat, precision: Precision) -> PackedForms {
    PackedForms::from(precision).with_products(format)
}

fn tiny_gpt() -> Gpt {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (61, 80, 24, 2, 40);
    config.init_std = 0.2;
    Gpt::new(config, 3, &Device::Cpu).unwrap()
}

/// A folder of each family, as floats: sharded f32, and one file of bf16.
fn folders(root: &Path) -> [PathBuf; 2] {
    let gpt = root.join("gpt");
    std::fs::create_dir(&gpt).unwrap();
    tiny_gpt().save(&gpt, DType::BF16).unwrap();
    std::fs::write(gpt.join("tokenizer.json"), "{}").unwrap();
    [gpt, fixtures().join("qwen3_moe")]
}

fn ids() -> Vec<u32> {
    let mut rng = CounterRng::new(5, 0);
    (0..40).map(|_| rng.below(61)).collect()
}

fn quantized(from: &Path, root: &TempDir, format: QuantFormat) -> PathBuf {
    let to = root.path().join(format!("{}-{format}", from.file_name().unwrap().to_string_lossy()));
    save(from, &to, format, nearest).unwrap();
    to
}

#[test]
fn a_quantized_folder_has_the_bits_of_one_quantized_while_loading() {
    let root = tempfile::tempdir().unwrap();
    for from in folders(root.path()) {
        for format in FORMATS {
            let to = quantized(&from, &root, format);
            for precision in [Precision::F32, Precision::Bf16] {
                let stored = Decoder::load(&to, precision).unwrap();
                let loaded = Decoder::load(&from, forms(format, precision)).unwrap();
                let bits = values(&logits(&loaded, &ids()));
                assert_eq!(values(&logits(&stored, &ids())), bits, "{from:?} {format} {precision:?}");
                let asked = Decoder::load(&to, forms(format, precision)).unwrap();
                assert_eq!(values(&logits(&asked, &ids())), bits, "asking for what there is changes nothing");
                assert_ne!(values(&logits(&Decoder::load(&from, precision).unwrap(), &ids())), bits);
            }
            let text = Decoder::load(&to, forms(QuantFormat::Int4 { group_size: 96 }, Precision::F32)).unwrap_err();
            assert!(text.to_string().contains(&format!("quantized already, in {format}, not in int4 in groups of 96")));
            let again = save(&to, &root.path().join("again"), format, nearest).unwrap_err().to_string();
            assert!(again.contains("quantized already") && !root.path().join("again").exists(), "{again}");
        }
    }
}

/// The embedding of the first model is its output layer, of the second not.
#[test]
fn an_output_layer_is_quantized_where_that_is_asked_also_of_a_quantized_folder() {
    let root = tempfile::tempdir().unwrap();
    for from in folders(root.path()) {
        let want = values(&logits(Any::load(&from, &Device::Cpu).unwrap().decoder(), &ids()));
        for format in FORMATS {
            let to = quantized(&from, &root, format);
            for output in FORMATS {
                let forms = forms(format, Precision::F32);
                let plain = Decoder::load(&from, forms).unwrap();
                let loaded = Decoder::load(&from, forms.with_output(output)).unwrap();
                let stored = Decoder::load(&to, PackedForms::from(Precision::F32).with_output(output)).unwrap();
                let bits = values(&logits(&loaded, &ids()));
                assert_eq!(values(&logits(&stored, &ids())), bits, "{from:?} {format} {output}");
                assert_ne!(values(&logits(&plain, &ids())), bits, "{from:?} {format} {output}");
                let [before, after] = [&plain, &loaded]
                    .map(|decoder| decoder.weights().iter().map(|weight| weight.bytes()).sum::<usize>());
                assert!(after < before, "{from:?} {format} {output}: {before} to {after} bytes");
            }
        }
        let forms = PackedForms::from(Precision::F32).with_output(QuantFormat::Int8);
        let alone = differences(&values(&logits(&Decoder::load(&from, forms).unwrap(), &ids())), &want);
        let most = alone[alone.len() - 1];
        println!("{from:?}: the output layer alone in 8 bits: all tokens within {most:.4}");
        assert!(most > 0.0 && most < 0.02, "{from:?}: {most}");
    }
}

/// Of each token the root of the mean squared difference of its logits, over that of the logits themselves.
fn differences(got: &[f64], want: &[f64]) -> Vec<f64> {
    let tokens = ids().len();
    let size = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let rows = got.chunks(got.len() / tokens).zip(want.chunks(want.len() / tokens));
    let mut all: Vec<f64> = rows
        .map(|(got, want)| size(&mut got.iter().zip(want).map(|(g, w)| g - w)) / size(&mut want.iter().copied()))
        .collect();
    all.sort_by(f64::total_cmp);
    all
}

/// Half of the tokens are nearer than a bound. The last ones are not, where random weights leave experts so close to each other that
/// rounding chooses others.
#[test]
fn logits_are_near_to_those_of_the_floats() {
    let root = tempfile::tempdir().unwrap();
    for from in folders(root.path()) {
        let want = values(&logits(Any::load(&from, &Device::Cpu).unwrap().decoder(), &ids()));
        for (format, bound) in [(QuantFormat::Int8, 0.04), (QuantFormat::INT4, 0.4)] {
            let to = quantized(&from, &root, format);
            let integers = values(&logits(&Decoder::load(&to, Precision::F32).unwrap(), &ids()));
            let weights = values(&logits(Any::load_dequantized(&to, &Device::Cpu).unwrap().decoder(), &ids()));
            for (what, got) in [("weights and inputs", integers), ("weights alone", weights)] {
                let all = differences(&got, &want);
                let (half, last) = (all[all.len() / 2], all[all.len() - 1]);
                println!("{from:?} {format}, {what}: half of the tokens within {half:.4}, all within {last:.4}");
                assert!(half > 0.0 && half < bound && last < 20.0 * bound, "{format}, {what}: {half}, {last}");
            }
        }
    }
}

#[test]
fn training_refuses_integers_and_takes_the_values_they_stand_for() {
    let root = tempfile::tempdir().unwrap();
    for from in folders(root.path()) {
        let to = quantized(&from, &root, QuantFormat::INT4);
        let text = Any::load(&to, &Device::Cpu).unwrap_err().to_string();
        assert!(text.contains("config.json") && text.contains("quantized (int4 in groups of 32)"), "{text}");
        assert!(text.contains("load_dequantized"), "{text}");
        let (model, plain) =
            (Any::load_dequantized(&to, &Device::Cpu).unwrap(), Any::load(&from, &Device::Cpu).unwrap());
        for (spec, ((name, got), (_, want))) in
            model.table().specs().iter().zip(model.params().iter().zip(plain.params()))
        {
            let (got, want) = (values(got), values(want));
            let is_product =
                ["_proj.weight", "fc_in.weight", "fc_out.weight"].iter().any(|end| spec.name.ends_with(end));
            assert_eq!(got != want, is_product, "{name}");
        }
    }
}

#[test]
fn files_beside_the_weights_come_along_and_other_readers_know_what_is_plain() {
    let root = tempfile::tempdir().unwrap();
    let [gpt, qwen] = folders(root.path());
    let to = quantized(&gpt, &root, QuantFormat::Int8);
    assert_eq!(std::fs::read(to.join("tokenizer.json")).unwrap(), b"{}");
    assert!(to.join("generation_config.json").exists());
    let config = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap()
    };
    let mut fields = config(&to);
    let quantization = fields.as_object_mut().unwrap().shift_remove("quantization_config").unwrap();
    assert_eq!(fields, config(&gpt), "nothing else is changed");
    let ignore: Vec<&str> = quantization["ignore"].as_array().unwrap().iter().flat_map(|v| v.as_str()).collect();
    for module in ["model.layers.1.mlp.gate", "model.layers.1.mlp.coefficient", "lm_head"] {
        assert!(ignore.contains(&module), "{module} in {ignore:?}");
    }
    let to = quantized(&qwen, &root, QuantFormat::INT4);
    let ignore = &config(&to)["quantization_config"]["ignore"];
    assert_eq!(*ignore, serde_json::json!(["model.layers.0.mlp.gate", "model.layers.2.mlp.gate", "lm_head"]));
    let bytes = std::fs::read(to.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let packed = file.tensor("model.layers.0.mlp.experts.5.gate_proj.weight_packed").unwrap();
    assert_eq!((packed.dtype(), packed.shape()), (Dtype::I32, &[20, 4][..]));
    let scale = file.tensor("model.layers.0.mlp.experts.5.down_proj.weight_scale").unwrap();
    assert_eq!((scale.dtype(), scale.shape()), (Dtype::BF16, &[32, 1][..]));
    for (name, tensor) in file.tensors() {
        let at = tensor.data().as_ptr() as usize - bytes.as_ptr() as usize;
        assert!(at.is_multiple_of(tensor.dtype().bitsize() / 8), "{name} lies at {at}");
    }
    let text = save(&qwen, &to, QuantFormat::INT4, nearest).unwrap_err().to_string();
    assert!(text.contains("exists and is not an empty folder"), "{text}");
}

/// A quantizer of one's own is asked for every matrix once, and what it gives is what is loaded.
#[test]
fn a_quantizer_gives_the_integers() {
    let root = tempfile::tempdir().unwrap();
    let [_, from] = folders(root.path());
    let to = root.path().join("own");
    let mut asked = BTreeMap::new();
    save(&from, &to, QuantFormat::Int8, |matrix: &MatrixToQuantize<'_>| {
        assert_eq!(matrix.values.len(), matrix.shape[0] * matrix.shape[1]);
        asked.insert(matrix.name.to_owned(), (matrix.parameter.to_owned(), matrix.first_row));
        let [out, inner] = matrix.shape;
        Ok(IntegerMatrix::new(QuantFormat::Int8, matrix.shape, vec![-128; out * inner], vec![0.5; out])?)
    })
    .unwrap();
    assert_eq!(asked.len(), 3 * 4 + 3 + 2 * 6 * 3);
    let parameter = "model.layers.2.mlp.experts.3.fc_in.weight".to_owned();
    assert_eq!(asked["model.layers.2.mlp.experts.3.up_proj.weight"], (parameter, 20));
    let model = Any::load_dequantized(&to, &Device::Cpu).unwrap();
    let (_, weight) = model.params().iter().find(|(name, _)| name == "model.layers.2.self_attn.q_proj.weight").unwrap();
    assert!(values(weight).iter().all(|&v| v == -64.0));
    let refused = root.path().join("refused");
    let text = save(&from, &refused, QuantFormat::Int8, |matrix| {
        Ok(IntegerMatrix::nearest(QuantFormat::INT4, matrix.values, matrix.shape)?)
    });
    let text = text.unwrap_err().to_string();
    assert!(text.contains("q_proj.weight must be") && text.contains("int4") && !refused.exists(), "{text}");
}

/// The tensors of a folder.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(dir: &Path) -> Tensors {
    let mut all = Tensors::new();
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    for path in files.filter(|path| path.extension().is_some_and(|ext| ext == "safetensors")) {
        let bytes = std::fs::read(path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let parts = |t: &TensorView<'_>| (t.dtype(), t.shape().to_vec(), t.data().to_vec());
        all.extend(file.tensors().iter().map(|(name, tensor)| (name.clone(), parts(tensor))));
    }
    all
}

fn write(dir: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// An expert of zeros gets finite scales, and contributes its biases alone.
#[test]
fn an_expert_of_zeros_stays_one() {
    let root = tempfile::tempdir().unwrap();
    let [from, _] = folders(root.path());
    let mut changed = tensors(&from);
    let expert = "model.layers.1.mlp.experts.2.fc_in.weight";
    changed.get_mut(expert).unwrap().2.fill(0);
    write(&from, &changed);
    for format in FORMATS {
        let to = quantized(&from, &root, format);
        let (_, _, scales) = &tensors(&to)[&format!("{expert}_scale")];
        assert!(scales.chunks(2).all(|s| half::bf16::from_le_bytes([s[0], s[1]]).is_finite()), "{format}");
        let got = values(&logits(&Decoder::load(&to, Precision::F32).unwrap(), &ids()));
        assert!(got.iter().all(|v| v.is_finite()), "{format}");
        let model = Any::load_dequantized(&to, &Device::Cpu).unwrap();
        let (_, stack) = model.params().iter().find(|(n, _)| n == "model.layers.1.mlp.experts.fc_in.weight").unwrap();
        assert!(values(&stack.get(2).unwrap()).iter().all(|&v| v == 0.0));
    }
}

/// What the files hold decides, tensor by tensor: gates of integers beside ups of floats, which are one matrix here.
#[test]
fn a_matrix_may_be_of_integers_in_part() {
    let root = tempfile::tempdir().unwrap();
    let [_, from] = folders(root.path());
    let to = quantized(&from, &root, QuantFormat::INT4);
    let mut mixed = tensors(&to);
    mixed.retain(|name, _| !name.contains("up_proj"));
    mixed.extend(tensors(&from).into_iter().filter(|(name, _)| name.contains("up_proj")));
    write(&to, &mixed);
    let want = values(&logits(Any::load_dequantized(&to, &Device::Cpu).unwrap().decoder(), &ids()));
    let all = differences(&values(&logits(&Decoder::load(&to, Precision::F32).unwrap(), &ids())), &want);
    assert!(all[all.len() / 2] < 0.04, "{all:?}");
}

#[test]
fn damaged_folders_are_refused_by_the_name_of_the_tensor() {
    let root = tempfile::tempdir().unwrap();
    let [from, _] = folders(root.path());
    const NAME: &str = "model.layers.1.mlp.experts.1.fc_out.weight";
    type Damage = fn(&mut Tensors, &str);
    let missing: Damage = |all, name| drop(all.remove(name).unwrap());
    let shorter: Damage = |all, name| {
        let (dtype, shape, data) = all.get_mut(name).unwrap();
        shape[0] -= 1;
        data.truncate(shape.iter().product::<usize>() * dtype.bitsize() / 8);
    };
    let of_bytes: Damage = |all, name| {
        let (dtype, shape, data) = all.get_mut(name).unwrap();
        (*dtype, *shape) = (Dtype::U8, shape.clone());
        data.truncate(shape.iter().product());
    };
    let infinite: Damage = |all, name| all.get_mut(name).unwrap().2[..2].copy_from_slice(&[0x80, 0x7f]);
    let another: Damage = |all, name| all.get_mut(name).unwrap().2[0] += 1;
    let unknown: Damage = |all, name| {
        let copy = all[name].clone();
        all.insert("model.layers.1.mlp.gate.weight_shift".into(), copy);
    };
    let wide: Damage = |all, name| {
        let (dtype, _, data) = all.get_mut(name).unwrap();
        *dtype = Dtype::F32;
        *data = vec![0x3f; data.len() * 2];
    };
    let int8: [(&str, Damage, &str); 7] = [
        ("_scale", missing, "weight_scale is missing"),
        ("_scale", shorter, "weight_scale must have shape [24, 1], got [23, 1]"),
        ("_scale", of_bytes, "weight_scale must be f32, bf16 or f16, got U8"),
        ("_scale", infinite, "weight_scale must have finite values, got inf"),
        ("", missing, "weight is missing"),
        ("", shorter, "weight must have shape [24, 40], got [23, 40]"),
        ("", of_bytes, "weight must be I8, got U8"),
    ];
    let int4: [(&str, Damage, &str); 9] = [
        ("_scale", missing, "weight_scale is missing"),
        ("_scale", shorter, "weight_scale must have shape [24, 2], got [23, 2]"),
        ("_scale", wide, "weight_scale must have finite values of bf16, got 0.747"),
        ("_packed", missing, "weight_packed is missing"),
        ("_packed", shorter, "weight_packed must have shape [24, 5], got [23, 5]"),
        ("_packed", of_bytes, "weight_packed must be I32, got U8"),
        ("_shape", missing, "weight_shape is missing"),
        ("_shape", another, "weight_shape must be [24, 40], got [25, 40]"),
        ("_scale", unknown, "weight_shift does not belong to the configured model"),
    ];
    for (format, cases) in [(QuantFormat::Int8, &int8[..]), (QuantFormat::INT4, &int4[..])] {
        let to = quantized(&from, &root, format);
        let good = tensors(&to);
        for (part, damage, reason) in cases {
            let mut all = good.clone();
            damage(&mut all, &format!("{NAME}{part}"));
            write(&to, &all);
            let text = Decoder::load(&to, Precision::F32).unwrap_err().to_string();
            assert!(text.contains(reason) && text.contains("model.safetensors"), "{format} {part}: {text}");
            assert!(text.contains("experts.1.fc_out") || text.contains("gate.weight_shift"), "{text}");
        }
        write(&to, &good);
        Decoder::load(&to, Precision::F32).unwrap();
        // Without its configuration the folder is one of floats, which these are not.
        std::fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
        let text = Decoder::load(&to, Precision::F32).unwrap_err().to_string();
        assert!(text.contains("_proj.weight"), "{text}");
    }
}

/// Files of the `compressed-tensors` library: its integers are ours, and so are the values that it unpacks.
#[test]
fn files_of_the_compressed_tensors_library_are_read_exactly() {
    for (folder, format) in [("int4", QuantFormat::INT4), ("int8", QuantFormat::Int8)] {
        let dir = fixtures().join("quantized").join(folder);
        let expected = read(&format!("quantized/{folder}/expected/expected.safetensors"));
        let model = Any::load_dequantized(&dir, &Device::Cpu).unwrap();
        let params: HashMap<&str, _> = model.params().iter().map(|(name, var)| (name.as_str(), var)).collect();
        let keys = params["model.layers.0.self_attn.k_proj.weight"];
        assert_eq!(values(keys), values(&expected["model.layers.0.self_attn.k_proj.weight"]), "{folder}");
        let down = params["model.layers.0.mlp.experts.fc_out.weight"].get(1).unwrap();
        assert_eq!(values(&down), values(&expected["model.layers.0.mlp.experts.1.down_proj.weight"]), "{folder}");
        let least = match format {
            QuantFormat::Int8 => tensors(&dir)["model.layers.0.self_attn.q_proj.weight"].2.contains(&0x80),
            QuantFormat::Int4 { .. } => {
                let packed = &tensors(&dir)["model.layers.0.self_attn.q_proj.weight_packed"].2;
                packed.iter().any(|byte| byte & 15 == 0)
            }
        };
        assert!(least, "the fixture has the least integer of {format}");
        // The packed form multiplies with the same values: only its inputs are rounded besides.
        let (want, got) =
            (values(&logits(model.decoder(), &[3, 1, 4, 1, 5])), Decoder::load(&dir, Precision::F32).unwrap());
        let got = values(&logits(&got, &[3, 1, 4, 1, 5]));
        let size = want.iter().fold(0f64, |most, v| most.max(v.abs()));
        let worst = got.iter().zip(&want).fold(0f64, |most, (g, w)| most.max((g - w).abs())) / size;
        assert!(worst > 0.0 && worst < 0.05, "{folder}: {worst}");
    }
}

/// Writes the model that moe-serve carries, whose matrices are integers of 4 bits in groups of 32, as the floats that these stand for.
fn write_carried_as_floats(carried: &Path, dir: &Path) {
    let bytes = std::fs::read(carried.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let scales = |name: &str| -> Vec<f32> {
        let view = file.tensor(name).unwrap();
        let values = view.data().chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
        assert_eq!(view.dtype(), Dtype::BF16);
        values.map(|bits| f32::from_bits(u32::from(bits) << 16)).collect()
    };
    let mut floats: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, view) in file.tensors() {
        if let Some(module) = name.strip_suffix(".weight_packed") {
            let (rows, columns) = (view.shape()[0], view.shape()[1] * 8);
            let scales = scales(&format!("{module}.weight_scale"));
            // A byte holds two integers, the first one in its low half, each with 8 added.
            let integers = view.data().iter().flat_map(|byte| [byte & 15, byte >> 4]).map(|half| f32::from(half) - 8.0);
            let value = |(i, integer): (usize, f32)| integer * scales[i / 32];
            let values: Vec<u8> = integers.enumerate().map(value).flat_map(f32::to_le_bytes).collect();
            floats.insert(format!("{module}.weight"), (Dtype::F32, vec![rows, columns], values));
        } else if !name.ends_with(".weight_scale") && !name.ends_with(".weight_shape") {
            floats.insert(name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()));
        }
    }
    let views =
        floats.iter().map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()));
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(carried.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().remove("quantization_config").expect("quantized");
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// The model that moe-serve carries, on text it has not been trained on: this project's own pages.
#[test]
fn quantized_models_read_text_nearly_as_well() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let carried = root.join("moe-serve/model");
    let floats = tempfile::tempdir().unwrap();
    let folder = floats.path().to_owned();
    write_carried_as_floats(&carried, &folder);
    let text = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let tokenizer = tokenizers::Tokenizer::from_file(carried.join("tokenizer.json")).unwrap();
    let ids = tokenizer.encode(text.as_str(), false).unwrap().get_ids().to_vec();
    let (seq_len, batch) = (256, 8);
    let bytes = tokenizer.decode(&ids[1..=seq_len * batch], false).unwrap().len() as f64;
    let tokens = TokenBatch {
        input_ids: ids[..seq_len * batch].to_vec(),
        target_ids: ids[1..=seq_len * batch].to_vec(),
        batch,
        seq_len,
    };
    let bits_per_byte_of = |folder: &Path, forms: PackedForms| {
        let loss = Decoder::load(folder, forms).unwrap().loss(&tokens, Pass::Eval).unwrap();
        loss.parts.lm * (seq_len * batch) as f64 / std::f64::consts::LN_2 / bytes
    };
    let bits_per_byte = |forms: PackedForms| bits_per_byte_of(&folder, forms);
    let plain = bits_per_byte(Precision::F32.into());
    let stored = bits_per_byte_of(&carried, Precision::F32.into());
    println!("f32: {plain:.6} bits per byte, its integers {stored:.6}");
    // Products of integers round what they are multiplied with, too.
    assert!((stored / plain - 1.0).abs() < 0.005 && stored != plain, "{stored} for {plain}");
    let plain = bits_per_byte(Precision::Bf16.into());
    println!("bf16: {plain:.4} bits per byte");
    for (format, bound) in [
        (QuantFormat::Int8, 0.01),
        (QuantFormat::Int4 { group_size: 64 }, 0.05),
        (QuantFormat::Int4 { group_size: 128 }, 0.06),
    ] {
        let got = bits_per_byte(forms(format, Precision::Bf16));
        println!("{format}: {got:.4} bits per byte, {:+.2} %", (got / plain - 1.0) * 100.0);
        assert!((got / plain - 1.0).abs() < bound && got != plain, "{format}: {got} for {plain}");
    }
    let all = forms(QuantFormat::Int8, Precision::Bf16).with(WeightUse::Table, QuantFormat::Int8).unwrap();
    let got = bits_per_byte(all);
    println!("int8, the output layer too: {got:.4} bits per byte");
    assert!((got / plain - 1.0).abs() < 0.01 && got != plain, "{got} for {plain}");
}
