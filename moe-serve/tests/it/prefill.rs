//! A prompt that is being read can be given up.

use candle_core::{Device, Tensor};
use moe_models::{CacheLayout, CausalLm, KvPool, LayerExperts, PagedStep, Result, StepOutput};
use moe_serve::Error;
use moe_serve::engine::{
    CancelFlag, Engine, EngineConfig, FinishReason, Flow, Job, Listener, PromptOutput, SampledToken, SchedulingConfig,
    StopParams,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Counts the tokens it has read, and gives the job up after the first part of a prompt.
struct Reader {
    read: Arc<AtomicUsize>,
    cancel: CancelFlag,
}

impl CausalLm for Reader {
    fn vocab_size(&self) -> usize {
        8
    }
    fn max_seq_len(&self) -> usize {
        4096
    }
    fn num_layers(&self) -> usize {
        1
    }
    fn moe_layers(&self) -> Vec<(usize, usize)> {
        Vec::new()
    }
    fn cache_layout(&self) -> CacheLayout {
        CacheLayout::default()
    }
    fn device(&self) -> &Device {
        &Device::Cpu
    }
    fn run(&self, step: &PagedStep, _: &KvPool) -> Result<StepOutput> {
        self.read.fetch_add(step.token_ids().len(), Ordering::Relaxed);
        self.cancel.cancel();
        let rows = step.logit_rows().len();
        Ok(StepOutput { logits: Tensor::zeros((rows, 8), candle_core::DType::F32, &Device::Cpu)?, experts: Vec::new() })
    }
}

/// Tells how the job ended.
struct Ending(mpsc::Sender<std::result::Result<(), Error>>);

impl Listener for Ending {
    fn prompt(&mut self, _: usize, _: PromptOutput) {}
    fn token(&mut self, _: usize, _: SampledToken) -> Flow {
        Flow::Continue
    }
    fn experts(&mut self, _: usize, _: Vec<LayerExperts>) {}
    fn finished(&mut self, _: usize, _: FinishReason) {}
    fn done(&mut self, result: std::result::Result<(), Error>) {
        self.0.send(result).expect("the test waits");
    }
}

#[test]
fn a_prompt_is_given_up_midway() {
    let (read, cancel) = (Arc::new(AtomicUsize::new(0)), CancelFlag::default());
    let lm = Arc::new(Reader { read: Arc::clone(&read), cancel: cancel.clone() });
    let config = EngineConfig {
        max_queue: 1,
        num_tokens: 8,
        eos_token_ids: Vec::new(),
        suppressed: Vec::new(),
        scheduling: SchedulingConfig::default(),
        kv_cache_bytes: 0,
    };
    let engine = Engine::start(lm, config, Arc::new(())).expect("starts");
    let stop = StopParams { max_tokens: 1, ..StopParams::default() };
    let job = Job { prompts: vec![vec![1; 4000]], stop, ..Job::default() };
    let (sender, ending) = mpsc::channel();
    engine.submit(job, Box::new(Ending(sender)), cancel).expect("an empty queue");
    let result = ending.recv_timeout(Duration::from_secs(20)).expect("the job ends");
    assert!(matches!(result, Err(Error::Cancelled)), "{result:?}");
    let read = read.load(Ordering::Relaxed);
    assert!((1..1000).contains(&read), "{read} of 4000 tokens were read");
}
