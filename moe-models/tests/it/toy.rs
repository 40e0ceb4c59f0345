//! A bigram model with noise: the smallest thing the trainer can train. Its noise depends on the pass's seed, so a
//! wrong seed after a resume shows in the weights.

use candle_core::{DType, Device, Tensor, Var};
use moe_core::{CounterRng, ExpertLoad};
use moe_models::train::data::{Documents, Packer};
use moe_models::train::model::{LayerLoad, LossOutput, LossParts, Pass, TokenBatch, TrainPass};
use moe_models::train::tokenizer::{to_json, train_bpe};
use moe_models::train::{Corpus, TrainConfig, TrainModel};
use moe_models::{Error, Precision, Result};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

pub(crate) const VOCAB: usize = 270;
pub(crate) const WIDTH: usize = 6;
pub(crate) const MAX_SEQ: usize = 16;

#[derive(Debug)]
pub(crate) struct Toy {
    params: Vec<(String, Var)>,
    /// When raised, `save_config` writes half a file and fails as a full disk would.
    pub(crate) disk_full: AtomicBool,
    /// When raised, losses are not a number.
    pub(crate) broken: AtomicBool,
    /// When raised, the loss is finite, but the gradient of `head` is not.
    pub(crate) steep: AtomicBool,
    /// When raised, `loss` panics.
    pub(crate) panics: AtomicBool,
    /// The training passes so far.
    pub(crate) passes: Mutex<Vec<TrainPass>>,
}

impl Toy {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = CounterRng::new(seed, 1);
        let mut var = |name: &str, shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.normal_f64() as f32 * 0.1).collect();
            (name.to_owned(), Var::from_vec(values, shape, &Device::Cpu).unwrap())
        };
        let params = vec![var("embed", &[VOCAB, WIDTH]), var("head", &[WIDTH, VOCAB]), var("bias", &[VOCAB])];
        Self {
            params,
            disk_full: AtomicBool::new(false),
            broken: AtomicBool::new(false),
            steep: AtomicBool::new(false),
            panics: AtomicBool::new(false),
            passes: Mutex::new(Vec::new()),
        }
    }

    pub(crate) fn load(dir: &Path) -> Self {
        let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
        let toy = Self::new(0);
        toy.params.iter().for_each(|(name, var)| var.set(&tensors[name]).unwrap());
        toy
    }

    pub(crate) fn bits(&self) -> Vec<Vec<u32>> {
        let bits =
            |var: &Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().map(|x| x.to_bits()).collect();
        self.params.iter().map(|(_, var)| bits(var)).collect()
    }
}

impl TrainModel for Toy {
    fn vocab_size(&self) -> usize {
        VOCAB
    }
    fn max_seq_len(&self) -> usize {
        MAX_SEQ
    }
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        let ids = Tensor::from_slice(&batch.input_ids, batch.input_ids.len(), &Device::Cpu)?;
        let targets = Tensor::from_slice(&batch.target_ids, batch.target_ids.len(), &Device::Cpu)?;
        let mut hidden = self.params[0].1.index_select(&ids, 0)?;
        assert!(!self.panics.load(Ordering::Relaxed), "index {} out of bounds", batch.input_ids[0]);
        if let Pass::Train(pass) = pass {
            self.passes.lock().unwrap().push(pass);
            let mut rng = CounterRng::new(pass.seed, 0);
            let noise: Vec<f32> = (0..hidden.elem_count()).map(|_| rng.uniform_f32() * 0.1).collect();
            hidden = (hidden + Tensor::from_vec(noise, (batch.input_ids.len(), WIDTH), &Device::Cpu)?)?;
        }
        let mut logits = hidden.matmul(&self.params[1].1)?;
        if self.steep.load(Ordering::Relaxed) {
            // The root of 0 is 0, its slope infinite.
            let head = self.params[1].1.as_tensor();
            logits = logits.broadcast_add(&head.sub(head)?.sqrt()?.sum_all()?)?;
        }
        let logits = logits.broadcast_add(&self.params[2].1)?;
        let right = logits.gather(&targets.unsqueeze(1)?, 1)?.squeeze(1)?;
        let lm = (logits.log_sum_exp(1)? - right)?.mean_all()?;
        let scale = if self.broken.load(Ordering::Relaxed) { f64::NAN } else { 1.0 };
        let parts = LossParts { lm: f64::from(lm.to_scalar::<f32>()?), ..LossParts::default() };
        let first_half = batch.input_ids.iter().filter(|id| (**id as usize) < VOCAB / 2).count() as u32;
        let total = batch.input_ids.len() as u32;
        let load = ExpertLoad { tokens_per_expert: vec![first_half, total - first_half], dropped: 1 };
        Ok(LossOutput { loss: (lm * scale)?, parts, layers: vec![LayerLoad { layer: 1, load }] })
    }
    fn save_config(&self, dir: &Path, _: DType) -> Result<()> {
        let path = dir.join("config.json");
        if self.disk_full.load(Ordering::Relaxed) {
            std::fs::write(&path, b"{").unwrap();
            return Err(Error::io(path, std::io::Error::from(std::io::ErrorKind::StorageFull)));
        }
        std::fs::write(&path, "{}").map_err(|e| Error::io(path, e))
    }
}

fn documents(name: &str, salt: usize) -> Documents {
    let words = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "left"];
    let text: String = (0..900).map(|i| format!("{} ", words[(i * i + salt * i + i / 7) % words.len()])).collect();
    Documents { name: name.to_owned(), weight: None, texts: vec![text, format!("{name} ends\n")] }
}

/// Two sources of different content, and their tokenizer.
pub(crate) fn corpus(config: &TrainConfig) -> (Corpus, String) {
    let documents = [documents("one", 1), documents("two", 5)];
    let tokenizer = train_bpe(&documents, VOCAB).unwrap();
    let packer = Packer::new(&tokenizer, 0, VOCAB).unwrap();
    let packed = documents.iter().map(|d| packer.pack(d).unwrap()).collect();
    (Corpus::new(packed, Vec::new(), config).unwrap(), to_json(&tokenizer).unwrap())
}

/// Twelve steps of three micro-batches.
pub(crate) fn config() -> TrainConfig {
    let config = TrainConfig {
        seq_length: Some(8),
        micro_batch_size: 2,
        global_batch_size: 6,
        train_tokens: 12 * 48,
        valid_fraction: 0.1,
        lr: 1e-2,
        lr_warmup_tokens: Some(96),
        eval_interval: 5,
        eval_iters: 2,
        precision: Precision::F32,
        save_interval: 4,
        log_interval: 1,
        ..TrainConfig::default()
    };
    config.resolved(MAX_SEQ).unwrap()
}
