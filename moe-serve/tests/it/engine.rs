//! The engine alone: the tokens of a job depend on the job alone, and so does its failure.

use crate::support::{NAN_TEXT, PANIC_TEXT, ScriptedLm, ids, tokenizer};
use candle_core::Device;
use moe_core::CounterRng;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::{CausalLm, LayerExperts};
use moe_serve::engine::{
    CancelFlag, Engine, EngineConfig, FinishReason, Flow, Job, Listener, Observer, PromptOutput, SampledToken,
    SamplingParams, SchedulingConfig, SpeculationConfig, StepStats, StopParams,
};
use moe_serve::{Error, Result};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

const VOCAB: u32 = 61;
const CONTEXT: usize = 96;

/// Tokens with the bits of their log-probabilities: the one that stands there, then the likeliest.
type Logprobs = Vec<(u32, u32)>;

/// Per layer, chosen experts and the bits of their weights.
type ExpertBits = Vec<(Vec<u32>, Vec<u32>)>;

/// Everything one continuation was told, floats as their bits.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Told {
    pub(crate) tokens: Vec<(u32, bool, Logprobs)>,
    experts: Vec<ExpertBits>,
    finished: Option<FinishReason>,
}

/// Everything a job was told.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Answer {
    prompts: BTreeMap<usize, (Vec<Logprobs>, ExpertBits)>,
    pub(crate) choices: BTreeMap<usize, Told>,
    pub(crate) error: Option<String>,
}

fn bits(experts: Vec<LayerExperts>) -> ExpertBits {
    experts.into_iter().map(|e| (e.expert_ids, e.weights.into_iter().map(f32::to_bits).collect())).collect()
}

/// Writes an answer down and hands it over.
struct Recorder {
    answer: Answer,
    /// Continuations end by it after so many tokens, as by a stop string.
    stop_after: usize,
    done: mpsc::Sender<Answer>,
}

impl Listener for Recorder {
    fn prompt(&mut self, prompt_index: usize, output: PromptOutput) {
        let pairs = |t: moe_serve::engine::TokenLogprobs| {
            std::iter::once(t.token).chain(t.top).map(|t| (t.token_id, t.logprob.to_bits())).collect()
        };
        let logprobs = output.logprobs.into_iter().map(|t| t.map(pairs).unwrap_or_default()).collect();
        let before = self.answer.prompts.insert(prompt_index, (logprobs, bits(output.experts)));
        assert!(before.is_none(), "a prompt is told once");
    }

    fn token(&mut self, choice: usize, token: SampledToken) -> Flow {
        let told = self.answer.choices.entry(choice).or_default();
        let logprobs = token.logprobs.map(|t| std::iter::once(t.token).chain(t.top).collect::<Vec<_>>());
        let logprobs = logprobs.into_iter().flatten().map(|t| (t.token_id, t.logprob.to_bits())).collect();
        told.tokens.push((token.token_id, token.is_stop, logprobs));
        if told.tokens.len() == self.stop_after { Flow::Stop } else { Flow::Continue }
    }

    fn experts(&mut self, choice: usize, experts: Vec<LayerExperts>) {
        let told = self.answer.choices.entry(choice).or_default();
        told.experts.push(bits(experts));
        assert_eq!(told.experts.len(), told.tokens.len(), "experts follow their token");
    }

    fn finished(&mut self, choice: usize, reason: FinishReason) {
        self.answer.choices.entry(choice).or_default().finished = Some(reason);
    }

    fn done(&mut self, result: Result<()>) {
        self.answer.error = result.err().map(|error| error.to_string());
        self.done.send(self.answer.clone()).expect("the test waits");
    }
}

/// Adds up what steps were.
#[derive(Default)]
struct Totals(Mutex<(StepStats, usize)>);

impl Observer for Totals {
    fn step(&self, stats: &StepStats) {
        let mut totals = self.0.lock().expect("no panic");
        let drafts = (totals.0.drafts.0 + stats.drafts.0, totals.0.drafts.1 + stats.drafts.1);
        totals.1 = totals.1.max(stats.sequences);
        totals.0 = StepStats { drafts, ..*stats };
    }
}

/// For as many jobs.
pub(crate) fn config(
    lm: &dyn CausalLm,
    max_queue: usize,
    scheduling: SchedulingConfig,
    kv_cache_bytes: usize,
) -> EngineConfig {
    // The last two ids are padding, as many of the scripted model's are.
    let is_tiny = lm.vocab_size() == VOCAB as usize;
    EngineConfig {
        max_queue,
        num_tokens: if is_tiny { VOCAB as usize - 2 } else { tokenizer().get_vocab_size(true) },
        eos_token_ids: vec![0],
        suppressed: vec![5],
        scheduling,
        kv_cache_bytes,
    }
}

/// Runs all jobs on one engine, at once or one after the other.
pub(crate) fn run(
    lm: &Arc<dyn CausalLm>,
    jobs: &[(Job, usize)],
    scheduling: SchedulingConfig,
    kv_cache_bytes: usize,
    together: bool,
) -> (Vec<Answer>, StepStats, usize) {
    let totals = Arc::new(Totals::default());
    let config = config(lm.as_ref(), jobs.len(), scheduling, kv_cache_bytes);
    let engine = Engine::start(Arc::clone(lm), config, totals.clone()).expect("starts");
    let answers = if together {
        jobs.iter().map(|job| submit(&engine, job)).collect::<Vec<_>>().into_iter().map(wait).collect()
    } else {
        jobs.iter().map(|job| wait(submit(&engine, job))).collect()
    };
    drop(engine);
    let (stats, widest) = *totals.0.lock().expect("no panic");
    (answers, stats, widest)
}

/// Gives a job to an engine; its answer will come.
pub(crate) fn submit(engine: &Engine, (job, stop_after): &(Job, usize)) -> mpsc::Receiver<Answer> {
    let (done, answer) = mpsc::channel();
    let recorder = Recorder { answer: Answer::default(), stop_after: *stop_after, done };
    engine.submit(job.clone(), Box::new(recorder), CancelFlag::default()).expect("the queue is large enough");
    answer
}

pub(crate) fn wait(answer: mpsc::Receiver<Answer>) -> Answer {
    answer.recv_timeout(Duration::from_secs(120)).expect("an end")
}

/// Jobs of every kind; many begin the same way.
pub(crate) fn random_jobs(count: usize, seed: u64) -> Vec<(Job, usize)> {
    let mut rng = CounterRng::new(seed, 0);
    let mut below = move |n: usize| rng.below(n as u32) as usize;
    let mut text = |len: usize| (0..len).map(|_| below(VOCAB as usize) as u32).collect::<Vec<_>>();
    let stems: Vec<Vec<u32>> = (0..4).map(|_| text(64)).collect();
    let tails: Vec<Vec<u32>> = (0..count * 2).map(|_| text(24)).collect();
    let mut rng = CounterRng::new(seed, 1);
    let mut below = move |n: usize| rng.below(n as u32) as usize;
    let mut tails = tails.into_iter();
    (0..count)
        .map(|number| {
            let mut prompt = || {
                let mut ids = stems[below(4)][..[0, 7, 33, 40, 64][below(5)]].to_vec();
                let tail = tails.next().unwrap_or_default();
                ids.extend(&tail[..below(24)]);
                if ids.is_empty() { vec![3] } else { ids }
            };
            let prompts = (0..1 + number % 2).map(|_| prompt()).collect();
            let sampling = SamplingParams {
                temperature: [0.0, 0.0, 0.7, 1.3][below(4)],
                top_k: [0, 0, 9][below(3)],
                top_p: [1.0, 0.9][below(2)],
                min_p: [0.0, 0.0, 0.05][below(3)],
                repetition_penalty: [1.0, 1.0, 1.3][below(3)],
                presence_penalty: [0.0, 0.5][below(2)],
                frequency_penalty: [0.0, 0.0, 0.3][below(3)],
                logit_bias: if below(3) == 0 { vec![(7, 3.0), (11, -2.0)] } else { Vec::new() },
                seed: below(1 << 20) as u64,
            };
            let stop = StopParams {
                max_tokens: below(30),
                min_tokens: below(4),
                stop_token_ids: if below(3) == 0 { vec![9, 10] } else { Vec::new() },
                ignore_eos: below(2) == 0,
                max_length: (number % 9 == 4).then_some(50),
            };
            let job = Job {
                prompts,
                n: [1, 1, 1, 2, 3][below(5)],
                sampling,
                stop,
                logprobs: [None, None, Some(2)][below(3)],
                prompt_logprobs: [None, None, None, Some(1)][below(4)],
                experts: below(5) == 0,
                priority: below(3) as i32,
                grammar: None,
            };
            (job, [usize::MAX, usize::MAX, 6][below(3)])
        })
        .collect()
}

/// Of random weights; large ones, so that different draws show.
pub(crate) fn gpt() -> Gpt {
    let mut config = GptConfig::preset("tiny-pr-moe").expect("a preset");
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) =
        (VOCAB as usize, CONTEXT, 24, 2, 40);
    config.init_std = 0.2;
    Gpt::new(config, 3, &Device::Cpu).expect("fits")
}

fn model() -> Arc<dyn CausalLm> {
    Arc::new(gpt().into_packed().expect("packs"))
}

/// Issue "A serving engine": 500 random requests alone and together, in chunks, with and without kept prompts, lost pages and
/// guesses.
#[test]
fn tokens_depend_on_nothing_but_the_job() {
    let lm = model();
    let jobs = random_jobs(500, 17);
    let plain = SchedulingConfig { max_sequences: 1, prefix_caching: false, ..SchedulingConfig::default() };
    let (want, _, widest) = run(&lm, &jobs, plain.clone(), 0, false);
    assert_eq!(widest, 1);
    let guessing = SpeculationConfig { num_tokens: 4, min_ngram: 1, max_ngram: 3 };
    let (much, little) = (1 << 30, 0);
    let mut compared = 0;
    for (name, max_batch_tokens, max_sequences, prefix_caching, speculation, kv_cache_bytes) in [
        ("together", 512, 64, false, SpeculationConfig::default(), much),
        ("together, prompts kept", 512, 64, true, SpeculationConfig::default(), much),
        ("chunks of 16", 16, 16, true, SpeculationConfig::default(), much),
        ("chunks of 64, guesses", 64, 32, false, guessing, much),
        ("lost pages", 512, 8, false, SpeculationConfig::default(), little),
        ("lost pages, prompts kept, chunks of 16, guesses", 16, 8, true, guessing, little),
    ] {
        let scheduling =
            SchedulingConfig { max_batch_tokens, max_sequences, prefix_caching, speculation, ..plain.clone() };
        let (got, stats, widest) = run(&lm, &jobs, scheduling, kv_cache_bytes, true);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got, want, "{name}: job {i}: {:?}", jobs[i]);
            compared += got.choices.values().map(|told| told.tokens.len()).sum::<usize>();
        }
        // The case is what it says.
        assert!(widest >= if kv_cache_bytes == little { 2 } else { max_sequences.min(16) }, "{name}: {widest} at most");
        assert_eq!(stats.preemptions > 0, kv_cache_bytes == little, "{name}: {stats:?}");
        assert_eq!(stats.prefix.1 > 0, prefix_caching, "{name}: {stats:?}");
        assert_eq!(stats.drafts.1 > 0, speculation.num_tokens > 0, "{name}: {stats:?}");
    }
    println!("{compared} tokens of {} jobs in 6 cases are those of each job alone", jobs.len());
    assert!(compared > 20_000, "{compared}");
}

fn scripted_job(prompt: &str) -> (Job, usize) {
    let stop = StopParams { max_tokens: 20, ..StopParams::default() };
    let sampling = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
    (Job { prompts: vec![ids(prompt)], stop, sampling, ..Job::default() }, usize::MAX)
}

#[test]
fn a_job_that_fails_ends_alone() {
    let script = "the cat sat on the mat and the dog sat on the cat";
    let lm: Arc<dyn CausalLm> = Arc::new(ScriptedLm::new(script).slow(Duration::from_millis(1)));
    let texts = ["the", PANIC_TEXT, "the cat", NAN_TEXT, "the cat sat"];
    let jobs: Vec<_> = (0..20).map(|i| scripted_job(texts[i % texts.len()])).collect();
    let (answers, _, widest) = run(&lm, &jobs, SchedulingConfig::default(), 1 << 20, true);
    assert!(widest > 4, "at most {widest} ran together");
    let (good, _, _) = run(&lm, &[scripted_job("the")], SchedulingConfig::default(), 1 << 20, true);
    assert!(good[0].choices[&0].tokens.len() > 5);
    for (i, answer) in answers.iter().enumerate() {
        match i % texts.len() {
            0 => assert_eq!(answer, &good[0], "job {i}"),
            1 => assert!(answer.error.as_ref().is_some_and(|e| e.contains("cannot bear")), "job {i}: {answer:?}"),
            3 => assert!(answer.error.as_ref().is_some_and(|e| e.contains("not a number")), "job {i}: {answer:?}"),
            _ => assert_eq!(answer.error, None, "job {i}"),
        }
    }
}

/// Panics at its third token.
struct Clumsy(usize, mpsc::Sender<Result<()>>);

impl Listener for Clumsy {
    fn prompt(&mut self, _: usize, _: PromptOutput) {}
    fn token(&mut self, _: usize, _: SampledToken) -> Flow {
        self.0 += 1;
        assert!(self.0 < 3, "it dropped the token");
        Flow::Continue
    }
    fn experts(&mut self, _: usize, _: Vec<LayerExperts>) {}
    fn finished(&mut self, _: usize, _: FinishReason) {}
    fn done(&mut self, result: Result<()>) {
        self.1.send(result).expect("the test waits");
    }
}

#[test]
fn a_listener_that_panics_costs_its_own_job() {
    let lm: Arc<dyn CausalLm> = Arc::new(ScriptedLm::new("the cat sat on the mat and the dog"));
    let config = EngineConfig {
        max_queue: 4,
        num_tokens: tokenizer().get_vocab_size(true),
        eos_token_ids: vec![0],
        suppressed: Vec::new(),
        scheduling: SchedulingConfig::default(),
        kv_cache_bytes: 0,
    };
    let engine = Engine::start(Arc::clone(&lm), config, Arc::new(())).expect("starts");
    let (clumsy, ended) = mpsc::channel();
    let (done, answer) = mpsc::channel();
    let (job, stop_after) = scripted_job("the");
    engine.submit(job.clone(), Box::new(Clumsy(0, clumsy)), CancelFlag::default()).expect("room");
    let recorder = Recorder { answer: Answer::default(), stop_after, done };
    engine.submit(job, Box::new(recorder), CancelFlag::default()).expect("room");
    let limit = Duration::from_secs(20);
    assert!(
        matches!(ended.recv_timeout(limit).expect("an end"), Err(Error::EnginePanic(text)) if text.contains("dropped"))
    );
    assert_eq!(answer.recv_timeout(limit).expect("an end").error, None);
    assert!(engine.is_alive());
}

#[test]
fn a_queue_of_none_takes_what_can_start() {
    let lm: Arc<dyn CausalLm> = Arc::new(ScriptedLm::new("the cat sat on the mat"));
    let scheduling = SchedulingConfig { max_sequences: 1, ..SchedulingConfig::default() };
    let engine = Engine::start(Arc::clone(&lm), config(lm.as_ref(), 0, scheduling, 0), Arc::new(())).expect("starts");
    for round in 0..3 {
        // The end of a job is told before the engine waits for the next.
        let begun = std::time::Instant::now();
        while engine.check_room().is_err() {
            assert!(begun.elapsed() < Duration::from_secs(20), "round {round}: an idle engine is full");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(wait(submit(&engine, &scripted_job("the"))).error, None, "round {round}");
    }
}

#[test]
fn jobs_without_prompts_are_refused() {
    let lm: Arc<dyn CausalLm> = Arc::new(ScriptedLm::new("the cat"));
    let config = config(lm.as_ref(), 4, SchedulingConfig::default(), 0);
    let engine = Engine::start(lm, config, Arc::new(())).expect("starts");
    let (good, _) = scripted_job("the");
    for (job, field) in [
        (Job { prompts: Vec::new(), ..good.clone() }, "prompts"),
        (Job { prompts: vec![Vec::new()], ..good.clone() }, "prompts"),
        (Job { n: 0, ..good }, "n"),
    ] {
        let (done, _) = mpsc::channel();
        let recorder = Recorder { answer: Answer::default(), stop_after: 1, done };
        let refused = engine.submit(job, Box::new(recorder), CancelFlag::default());
        assert!(matches!(refused, Err(Error::Field { field: of, .. }) if of == field), "{field}");
    }
}
