//! [`TrainConfig`]: every setting of a run besides the model, as plain data. Read from TOML or JSON, checked once.

use super::optimizer::AdamWConfig;
use super::schedule::LrSchedule;
use crate::{DropoutConfig, Error, Precision, Recompute, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The share of sources that carry no weight of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Blend {
    /// Every source counts 1; a weight given with a source replaces it.
    #[default]
    Equal,
    /// In proportion to each source's tokens; no source may carry a weight.
    Tokens,
}

/// The settings of a training run.
///
/// `None` means "derive from the others"; [`TrainConfig::resolved`] fills these in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Training sources, `PATH` or `PATH=WEIGHT`; empty means the embedded excerpt.
    pub data: Vec<String>,
    /// Validation sources; empty means the tail of each training source.
    pub valid: Vec<String>,
    /// Folder for the tokens of `data` and `valid`; `None`: where the program that trains keeps them. See
    /// [`super::data::DataCache`].
    pub data_cache: Option<String>,
    /// Share of sources without a weight.
    pub blend: Blend,
    /// Tail of each training source held out when `valid` is empty; 0 turns validation off.
    pub valid_fraction: f64,
    /// Tokens per sequence; `None`: as long as the model allows.
    pub seq_length: Option<usize>,
    /// Training tokens, rounded up to whole steps.
    pub train_tokens: u64,
    /// Sequences per forward and backward pass.
    pub micro_batch_size: usize,
    /// Sequences per optimizer step; a multiple of `micro_batch_size`.
    pub global_batch_size: usize,
    /// What the matrix products read: bf16 (the default) or f32. Weights, sums and everything else are f32. The model must
    /// have been built with it, as by [`crate::Model::with_precision`]; [`super::Trainer`] refuses another one.
    pub precision: Precision,
    /// What a step computes again in its backward pass instead of keeping it: `none`, `block` or `moe`. Does not change any
    /// result. The model must follow it, as by [`crate::Model::with_recompute`]; [`super::Trainer`] refuses another one.
    pub recompute: Recompute,
    /// Probability with which attention probabilities are dropped in training; `None`: what a program that trains finds in the
    /// model's configuration, else 0. The model must follow it, as by [`crate::Model::with_dropout`]; [`super::Trainer`] refuses
    /// another one.
    pub attention_dropout: Option<f64>,
    /// The same of the embedding, and of what attention and the feed-forward part of each layer add.
    pub hidden_dropout: f64,
    /// Largest learning rate.
    pub lr: f64,
    /// Final learning rate; `None`: a tenth of `lr`.
    pub min_lr: Option<f64>,
    /// Warm-up, in tokens; `None`: 2 % of `train_tokens`.
    pub lr_warmup_tokens: Option<u64>,
    /// Tokens at which the cosine ends; `None`: `train_tokens`.
    pub lr_decay_tokens: Option<u64>,
    /// Decoupled weight decay on matrices.
    pub weight_decay: f64,
    /// Largest global gradient norm; 0 turns clipping off.
    pub clip_grad: f64,
    /// AdamW's first decay rate.
    pub beta1: f64,
    /// AdamW's second decay rate.
    pub beta2: f64,
    /// AdamW's epsilon.
    pub eps: f64,
    /// How far a step moves the biases by which routers choose experts, for families that have them (DeepSeek-V3, GLM-4.5): up for
    /// experts with less than the mean load, down for those with more. 0 leaves them as they are.
    pub bias_update_speed: f64,
    /// Seed of every random draw: initialisation, shuffling, routing.
    pub seed: u64,
    /// Steps between validations.
    pub eval_interval: u64,
    /// Whether a run that starts at step 0 validates before its first step too.
    pub eval_on_start: bool,
    /// Micro-batches evaluated per source; 0 means the whole source.
    pub eval_iters: usize,
    /// Steps between checkpoints.
    pub save_interval: u64,
    /// Newest checkpoints kept, besides the best.
    pub keep_last: usize,
    /// Steps between records in the metrics files.
    pub log_interval: u64,
}

impl Default for TrainConfig {
    /// Settings for a small model on a CPU: 2M tokens in steps of 16 sequences.
    fn default() -> Self {
        let adam = AdamWConfig::default();
        Self {
            data: Vec::new(),
            valid: Vec::new(),
            data_cache: None,
            blend: Blend::Equal,
            valid_fraction: 0.02,
            seq_length: None,
            train_tokens: 2_000_000,
            micro_batch_size: 8,
            global_batch_size: 16,
            precision: Precision::Bf16,
            recompute: Recompute::None,
            attention_dropout: None,
            hidden_dropout: 0.0,
            lr: 2e-3,
            min_lr: None,
            lr_warmup_tokens: None,
            lr_decay_tokens: None,
            weight_decay: adam.weight_decay,
            clip_grad: adam.clip_grad,
            beta1: adam.beta1,
            beta2: adam.beta2,
            eps: adam.eps,
            bias_update_speed: 0.0,
            seed: 1234,
            eval_interval: 100,
            eval_on_start: false,
            eval_iters: 10,
            save_interval: 500,
            keep_last: 2,
            log_interval: 10,
        }
    }
}

impl TrainConfig {
    /// Reads a `.toml` or `.json` file; settings it leaves out keep their defaults, unknown ones are refused.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Format`] if it does not parse or ends in neither.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        match path.extension().and_then(|e| e.to_str()) {
            Some("toml") => toml::from_str(&text).map_err(|e| Error::format(path, e.to_string())),
            Some("json") => serde_json::from_str(&text).map_err(|e| Error::format(path, e.to_string())),
            _ => Err(Error::format(path, "expected a file ending in .toml or .json")),
        }
    }

    /// Makes of the settings in a checkpoint of an earlier version those of this one.
    pub(super) fn update_saved(config: &mut serde_json::Map<String, serde_json::Value>) {
        // Before 2026-11-26 runs had a number of workers, which changed no result.
        config.remove("workers");
        // What is not there was not dropped.
        config.entry("attention_dropout").or_insert_with(|| 0.0.into());
    }

    /// Fills the derived settings for a model of `max_seq_len` tokens and checks everything.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting, what came and what fits.
    pub fn resolved(mut self, max_seq_len: usize) -> Result<Self> {
        self.check_sizes()?;
        let seq_length = *self.seq_length.get_or_insert(max_seq_len);
        if !(1..=max_seq_len).contains(&seq_length) {
            return Err(Error::Config(format!(
                "seq_length must lie in 1..={max_seq_len} (the model's longest sequence), got {seq_length}"
            )));
        }
        self.check_products()?;
        self.min_lr.get_or_insert(self.lr * 0.1);
        let decay = *self.lr_decay_tokens.get_or_insert(self.train_tokens);
        self.lr_warmup_tokens.get_or_insert((self.train_tokens / 50).min(decay));
        self.attention_dropout.get_or_insert(0.0);
        self.dropout().validate()?;
        if !(0.0..f64::INFINITY).contains(&self.bias_update_speed) {
            return Err(Error::Config(format!(
                "bias_update_speed must be 0 or more (DeepSeek-V3's is 0.001), got {}",
                self.bias_update_speed
            )));
        }
        self.schedule().validate()?;
        self.adamw().validate()?;
        Ok(self)
    }

    fn check_sizes(&self) -> Result<()> {
        let at_least_one = [
            ("train_tokens", self.train_tokens),
            ("micro_batch_size", self.micro_batch_size as u64),
            ("global_batch_size", self.global_batch_size as u64),
            ("eval_interval", self.eval_interval),
            ("save_interval", self.save_interval),
            ("keep_last", self.keep_last as u64),
            ("log_interval", self.log_interval),
        ];
        if let Some((name, _)) = at_least_one.iter().find(|(_, value)| *value == 0) {
            return Err(Error::Config(format!("{name} must be at least 1, got 0")));
        }
        if !self.global_batch_size.is_multiple_of(self.micro_batch_size) {
            return Err(Error::Config(format!(
                "global_batch_size {} is not a multiple of micro_batch_size {}; change one of them",
                self.global_batch_size, self.micro_batch_size
            )));
        }
        if !(0.0..1.0).contains(&self.valid_fraction) {
            return Err(Error::Config(format!("valid_fraction must lie in 0..1, got {}", self.valid_fraction)));
        }
        Ok(())
    }

    fn check_products(&self) -> Result<()> {
        let products = [
            ("global_batch_size times seq_length", self.global_batch_size.checked_mul(self.seq_len())),
            ("eval_iters times micro_batch_size", self.eval_iters.checked_mul(self.micro_batch_size)),
        ];
        if let Some((name, _)) = products.iter().find(|(_, product)| product.is_none()) {
            return Err(Error::Config(format!("{name} is more than can be counted; lower one of them")));
        }
        Ok(())
    }

    /// Refuses to move selection biases of a model that has none.
    pub(crate) fn check_balances(&self, has_selection_biases: bool) -> Result<()> {
        if self.bias_update_speed > 0.0 && !has_selection_biases {
            return Err(Error::Config(format!(
                "bias_update_speed {} has no effect: no router of this model chooses experts by a bias beside their scores (as DeepSeek-V3's e_score_correction_bias); drop it",
                self.bias_update_speed
            )));
        }
        Ok(())
    }

    /// Micro-batches of one step.
    pub fn grad_accum(&self) -> usize {
        self.global_batch_size / self.micro_batch_size
    }

    /// Tokens per sequence; the model's longest before [`TrainConfig::resolved`] is unknown, hence 0.
    pub fn seq_len(&self) -> usize {
        self.seq_length.unwrap_or(0)
    }

    /// Tokens of one step.
    pub fn tokens_per_step(&self) -> u64 {
        self.global_batch_size as u64 * self.seq_len() as u64
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.train_tokens.div_ceil(self.tokens_per_step().max(1))
    }

    /// The learning-rate schedule (of a resolved configuration).
    pub fn schedule(&self) -> LrSchedule {
        LrSchedule {
            lr_max: self.lr,
            lr_min: self.min_lr.unwrap_or(0.0),
            warmup_tokens: self.lr_warmup_tokens.unwrap_or(0),
            decay_tokens: self.lr_decay_tokens.unwrap_or(self.train_tokens),
        }
    }

    /// What training passes drop.
    pub fn dropout(&self) -> DropoutConfig {
        DropoutConfig { attention: self.attention_dropout.unwrap_or(0.0), hidden: self.hidden_dropout }
    }

    /// AdamW's settings.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.beta1,
            beta2: self.beta2,
            eps: self.eps,
            weight_decay: self.weight_decay,
            clip_grad: self.clip_grad,
        }
    }

    /// Refuses to continue a run of configuration `saved` with `self` where that would change its course. Length,
    /// recomputation, intervals and where the data and their tokens lie may change (the data's content is checked by fingerprint).
    ///
    /// # Errors
    /// [`Error::Config`] naming the first setting that differs, with both values.
    pub fn check_continues(&self, saved: &Self) -> Result<()> {
        const MAY_CHANGE: [&str; 11] = [
            "data",
            "valid",
            "data_cache",
            "train_tokens",
            "recompute",
            "eval_interval",
            "eval_on_start",
            "eval_iters",
            "save_interval",
            "keep_last",
            "log_interval",
        ];
        let as_map = |config: &Self| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(map)) => map,
            _ => serde_json::Map::new(),
        };
        let (now, then) = (as_map(self), as_map(saved));
        for (name, value) in now.iter().filter(|(name, _)| !MAY_CHANGE.contains(&name.as_str())) {
            let before = then.get(name).unwrap_or(&serde_json::Value::Null);
            if value != before {
                return Err(Error::Config(format!(
                    "{name} is {value}, the saved run had {before}; resume with the saved value or start a new run"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_resolve() {
        let config = TrainConfig::default().resolved(128).unwrap();
        assert_eq!((config.seq_len(), config.tokens_per_step(), config.grad_accum()), (128, 2048, 2));
        assert_eq!(config.total_steps(), 977, "2,000,000 / 2,048 rounded up");
        assert_eq!(config.schedule().warmup_tokens, 40_000);
        assert_eq!(config.clone().resolved(128).unwrap(), config, "resolving twice changes nothing");
    }

    #[track_caller]
    fn check_refused(word: &str, change: impl Fn(&mut TrainConfig)) {
        let mut config = TrainConfig::default();
        change(&mut config);
        let message = config.resolved(128).unwrap_err().to_string();
        assert!(message.contains(word), "{word}: {message}");
    }

    #[test]
    fn impossible_settings_are_named() {
        check_refused("global_batch_size 10", |c| c.global_batch_size = 10);
        check_refused("micro_batch_size", |c| c.micro_batch_size = 0);
        check_refused("train_tokens", |c| c.train_tokens = 0);
        check_refused("1..=128", |c| c.seq_length = Some(129));
        check_refused("seq_length", |c| c.seq_length = Some(0));
        check_refused("valid_fraction", |c| c.valid_fraction = 1.0);
        check_refused("lr must", |c| c.lr = -1.0);
        check_refused("min_lr", |c| c.min_lr = Some(1.0));
        check_refused("lr_warmup_tokens", |c| c.lr_warmup_tokens = Some(3_000_000));
        check_refused("beta2", |c| c.beta2 = 1.5);
        check_refused("keep_last", |c| c.keep_last = 0);
        check_refused("attention_dropout", |c| c.attention_dropout = Some(1.0));
        check_refused("bias_update_speed", |c| c.bias_update_speed = -0.001);
        check_refused("bias_update_speed", |c| c.bias_update_speed = f64::NAN);
        check_refused("hidden_dropout", |c| c.hidden_dropout = -0.1);
        check_refused("hidden_dropout", |c| c.hidden_dropout = f64::NAN);
        check_refused("eval_iters times micro_batch_size", |c| c.eval_iters = usize::MAX / 4);
        check_refused("global_batch_size times seq_length", |c| c.global_batch_size = usize::MAX / 8 * 8);
    }

    #[test]
    fn toml_and_json_files() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            TrainConfig::from_file(&path)
        };
        let want =
            TrainConfig { lr: 1e-3, blend: Blend::Tokens, data: vec!["a.txt=2".into()], ..TrainConfig::default() };
        assert_eq!(write("a.toml", "lr = 1e-3\nblend = \"tokens\"\ndata = [\"a.txt=2\"]").unwrap(), want);
        assert_eq!(write("a.json", r#"{"lr": 0.001, "blend": "tokens", "data": ["a.txt=2"]}"#).unwrap(), want);
        assert!(write("b.toml", "learning_rate = 1").unwrap_err().to_string().contains("learning_rate"));
        assert!(write("b.json", "{").is_err());
        assert!(write("b.yaml", "").unwrap_err().to_string().contains(".toml"));
    }

    #[test]
    fn only_the_course_of_a_run_is_fixed() {
        let saved = TrainConfig::default().resolved(128).unwrap();
        let (data_cache, log_interval, eval_on_start) = (Some("elsewhere".into()), 1, true);
        let longer = TrainConfig { train_tokens: 9_000_000, log_interval, eval_on_start, data_cache, ..saved.clone() };
        longer.check_continues(&saved).unwrap();
        let message = TrainConfig { lr: 1.0, ..saved.clone() }.check_continues(&saved).unwrap_err().to_string();
        assert!(message.contains("lr is 1.0") && message.contains("0.002"), "{message}");
        assert!(TrainConfig { seed: 1, ..saved.clone() }.check_continues(&saved).is_err());
        assert!(TrainConfig { hidden_dropout: 0.1, ..saved.clone() }.check_continues(&saved).is_err());
    }

    /// Runs of versions without a setting go on as if it were off.
    #[test]
    fn settings_of_earlier_versions_are_read() {
        let saved = TrainConfig::default().resolved(128).unwrap();
        let mut json = serde_json::to_value(&saved).unwrap();
        for name in ["attention_dropout", "hidden_dropout", "eval_on_start", "bias_update_speed"] {
            assert!(json.as_object_mut().unwrap().remove(name).is_some(), "{name}");
        }
        TrainConfig::update_saved(json.as_object_mut().unwrap());
        let read: TrainConfig = serde_json::from_value(json).unwrap();
        saved.check_continues(&read).unwrap();
        assert_eq!(read, saved);
    }
}
