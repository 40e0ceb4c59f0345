//! Plans of steps, on numbers alone: the model is what the test says.

use super::super::config::SpeculationConfig;
use super::*;
use moe_models::{LogitsOf, PagedStep, PoolConfig};
use std::time::Duration;

const PAGE: usize = 4;

struct Bench {
    scheduler: Scheduler,
    pages: Vec<Pages>,
    begun: Instant,
}

impl Bench {
    fn new(config: SchedulingConfig, num_pages: &[usize]) -> Self {
        let pool = |&num_pages: &usize| Pages::new(PoolConfig { num_pages, page_size: PAGE }).expect("small");
        let pages: Vec<Pages> = num_pages.iter().map(pool).collect();
        Self { scheduler: Scheduler::new(config, pages.clone(), false), pages, begun: Instant::now() }
    }

    fn add(&mut self, job: u64, priority: i32, token_ids: Vec<u32>) -> SequenceId {
        let id = SequenceId { job, choice: 0 };
        let prompt_len = token_ids.len();
        self.scheduler.add(Sequence {
            id,
            priority,
            waits_since: self.begun,
            counted: false,
            token_ids,
            prompt_len,
            max_len: prompt_len + 100,
            cached: self.pages[0].sequence(),
            replica: 0,
            reuses: true,
            suspect: false,
            closing: false,
        });
        id
    }

    /// Plans and runs a step: `(job, new tokens, guesses)` of each part. Every sequence that is read to its end gets token 7.
    fn step(&mut self) -> Vec<(u64, usize, usize)> {
        self.step_at(Duration::ZERO)
    }

    fn step_at(&mut self, after: Duration) -> Vec<(u64, usize, usize)> {
        let parts = self.scheduler.plan(self.begun + after);
        for part in &parts {
            let pages = self.scheduler.pages_of(part.id);
            let sequence = self.scheduler.running_mut(part.id);
            let start = sequence.cached.len();
            PagedStep::default()
                .add(&mut sequence.cached, &vec![0; part.len()], LogitsOf::None, &pages)
                .expect("the plan has counted the pages");
            sequence.cached.grow(part.len());
            if start + part.new == sequence.token_ids.len() {
                sequence.cached.truncate(sequence.token_ids.len());
                sequence.token_ids.push(7);
                sequence.suspect = false;
            }
            self.scheduler.keep(part.id, start);
        }
        parts.iter().map(|part| (part.id.job, part.new, part.drafts.len())).collect()
    }
}

fn config(max_batch_tokens: usize, max_sequences: usize) -> SchedulingConfig {
    SchedulingConfig { max_batch_tokens, max_sequences, prefix_caching: false, ..SchedulingConfig::default() }
}

fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| 1000 * seed + i).collect()
}

#[test]
fn those_that_generate_come_first_and_prompts_take_what_is_left() {
    let mut bench = Bench::new(config(8, 3), &[100]);
    bench.add(0, 0, prompt(0, 3));
    bench.add(1, 0, prompt(1, 14));
    bench.add(2, 0, prompt(2, 5));
    bench.add(3, 0, prompt(3, 1));
    assert_eq!(bench.step(), [(0, 3, 0), (1, 5, 0)]);
    assert_eq!(bench.step(), [(0, 1, 0), (1, 7, 0)]);
    assert_eq!(bench.step(), [(0, 1, 0), (1, 2, 0), (2, 5, 0)]);
    assert_eq!(bench.step(), [(0, 1, 0), (1, 1, 0), (2, 1, 0)], "three at a time");
    bench.scheduler.remove_job(1);
    assert_eq!(bench.step(), [(0, 1, 0), (2, 1, 0), (3, 1, 0)]);
}

#[test]
fn smaller_priorities_go_first_until_one_has_waited_too_long() {
    let starving = SchedulingConfig { starvation: Duration::from_secs(9), ..config(64, 1) };
    let mut bench = Bench::new(starving, &[100]);
    bench.add(0, 5, prompt(0, 2));
    bench.add(1, 0, prompt(1, 2));
    bench.add(2, -3, prompt(2, 2));
    assert_eq!(bench.step(), [(2, 2, 0)]);
    bench.scheduler.remove_job(2);
    assert_eq!(bench.step(), [(1, 2, 0)]);
    bench.scheduler.remove_job(1);
    bench.add(3, -100, prompt(3, 2));
    bench.begun -= Duration::from_secs(1);
    assert_eq!(bench.step_at(Duration::from_secs(11)), [(0, 2, 0)], "it has waited for more than 9 s");
}

#[test]
fn pages_are_taken_from_the_last_and_the_first_always_gets_on() {
    // 6 pages of 4 tokens: two sequences of 11 tokens fit, and not one token more of each.
    let mut bench = Bench::new(config(64, 8), &[6]);
    bench.add(0, 0, prompt(0, 11));
    bench.add(1, 0, prompt(1, 11));
    bench.add(2, 0, prompt(2, 3));
    assert_eq!(bench.step(), [(0, 11, 0), (1, 11, 0)], "the third has no room");
    assert_eq!(bench.step(), [(0, 1, 0), (1, 1, 0)]);
    assert_eq!(bench.scheduler.counts().preemptions, 0);
    // Both need a page now. The second gives its up and waits, the room it leaves is too small for all of its tokens.
    assert_eq!(bench.step(), [(0, 1, 0)]);
    assert_eq!(bench.scheduler.counts().preemptions, 1);
    assert_eq!(bench.step(), [(0, 1, 0)]);
    bench.scheduler.remove_job(0);
    assert_eq!(bench.step(), [(1, 13, 0), (2, 3, 0)], "it reads all again, what it had generated too");
    bench.scheduler.remove_job(1);
    bench.scheduler.remove_job(2);
    assert_eq!(bench.pages[0].free(), 6);
}

#[test]
fn a_more_important_sequence_takes_pages_from_a_less_important_one() {
    let mut bench = Bench::new(config(64, 8), &[4]);
    bench.add(0, 1, prompt(0, 7));
    bench.step();
    bench.add(1, 0, prompt(1, 7));
    assert_eq!(bench.step(), [(0, 1, 0), (1, 7, 0)]);
    assert_eq!(bench.step(), [(1, 1, 0)], "job 0 needed a third page, job 1 takes precedence over it");
    assert_eq!(bench.scheduler.counts().preemptions, 1);
}

#[test]
fn continuations_of_a_prompt_start_from_what_the_first_has_read() {
    let mut bench = Bench::new(config(64, 8), &[20]);
    let id = bench.add(0, 0, prompt(0, 10));
    assert_eq!(bench.step(), [(0, 10, 0)]);
    bench.scheduler.fork(id, 3);
    let before = bench.pages[0].free();
    let parts = bench.scheduler.plan(bench.begun);
    let parts: Vec<_> = parts.iter().map(|part| (part.id.choice, part.new)).collect();
    assert_eq!(parts, [(0, 1), (1, 1), (2, 1)], "one token each: the prompt's last, or the first's newest");
    assert_eq!(bench.pages[0].free(), before, "nothing was copied yet");
}

#[test]
fn waiting_continuations_give_shared_pages_back_first() {
    let mut bench = Bench::new(config(64, 1), &[4]);
    let id = bench.add(0, 0, prompt(0, 10));
    bench.step();
    bench.scheduler.fork(id, 2);
    for len in 12..=16 {
        assert_eq!(bench.step(), [(0, 1, 0)], "at {len} tokens");
    }
    assert_eq!(bench.scheduler.counts().preemptions, 0);
    bench.scheduler.remove(id);
    assert_eq!(bench.step(), [(0, 10, 0)], "the second reads the prompt itself");
}

#[test]
fn what_was_read_before_is_not_read_again() {
    let mut bench = Bench::new(SchedulingConfig { prefix_caching: true, ..config(64, 8) }, &[12]);
    bench.add(0, 0, prompt(0, 10));
    bench.step();
    bench.scheduler.remove_job(0);
    assert_eq!((bench.pages[0].free(), bench.scheduler.page_usage()), (10, 0.0), "two full pages are kept");
    bench.add(1, 0, prompt(0, 9));
    assert_eq!(bench.step(), [(1, 1, 0)]);
    let mut other = prompt(0, 8);
    other[5] = 99;
    bench.add(2, 0, other);
    assert_eq!(bench.step(), [(1, 1, 0), (2, 4, 0)]);
    // Of a prompt that is all there, the last page is read again: what follows its last token is wanted.
    bench.add(3, 0, prompt(0, 8));
    assert_eq!(bench.step()[2..], [(3, 4, 0)]);
    let counts = bench.scheduler.counts();
    assert_eq!((counts.prefix_queries, counts.prefix_hits), (10 + 9 + 8 + 8, 8 + 4 + 4));
    // Room is made by what is only kept.
    bench.scheduler.remove_job(1);
    bench.scheduler.remove_job(2);
    bench.scheduler.remove_job(3);
    bench.add(4, 0, prompt(4, 47));
    assert_eq!(bench.step(), [(4, 47, 0)]);
    assert_eq!(bench.scheduler.counts().preemptions, 0);
}

#[test]
fn guesses_take_no_more_than_tokens_and_pages_that_are_left() {
    let speculation = SpeculationConfig { num_tokens: 5, min_ngram: 1, max_ngram: 2 };
    let mut bench = Bench::new(SchedulingConfig { speculation, ..config(7, 2) }, &[6]);
    bench.add(0, 0, vec![7, 1, 2, 3, 4, 7]);
    assert_eq!(bench.step(), [(0, 6, 0)], "a prompt is read without guesses");
    // After 7 came 7, that is where the first guess is from.
    assert_eq!(bench.step(), [(0, 1, 1)]);
    bench.add(1, 0, prompt(1, 7));
    bench.scheduler.running_mut(SequenceId { job: 0, choice: 0 }).token_ids[7] = 1;
    assert_eq!(bench.step(), [(0, 1, 0), (1, 6, 0)], "no prompt waits for guesses");
    // What followed the latest 7: its own successor, and a 7.
    assert_eq!(bench.step(), [(0, 1, 2), (1, 1, 0)]);
    let sequence = bench.scheduler.running_mut(SequenceId { job: 0, choice: 0 });
    sequence.max_len = sequence.token_ids.len() + 1;
    assert_eq!(bench.step()[0].2, 0, "the last token to come is not worth one");
}

#[test]
fn after_a_failed_step_each_is_tried_alone() {
    let mut bench = Bench::new(config(64, 8), &[20]);
    for job in 0..3 {
        bench.add(job, 0, prompt(job as u32, 5));
    }
    let parts = bench.scheduler.plan(bench.begun);
    assert_eq!(parts.len(), 3);
    bench.scheduler.suspect(&parts);
    bench.add(3, 0, prompt(3, 2));
    assert_eq!(bench.step(), [(0, 5, 0)]);
    assert_eq!(bench.step(), [(1, 5, 0)]);
    bench.scheduler.remove_job(2);
    assert_eq!(bench.step(), [(0, 1, 0), (1, 1, 0), (3, 2, 0)]);
}

#[test]
fn sequences_are_spread_over_replicas() {
    let mut bench = Bench::new(config(64, 8), &[8, 8]);
    for job in 0..4 {
        bench.add(job, 0, prompt(job as u32, 5));
    }
    bench.step();
    let replica = |bench: &mut Bench, job| bench.scheduler.running_mut(SequenceId { job, choice: 0 }).replica;
    let replicas: Vec<usize> = (0..4).map(|job| replica(&mut bench, job)).collect();
    assert_eq!(replicas, [0, 1, 0, 1]);
    assert_eq!((bench.pages[0].free(), bench.pages[1].free()), (4, 4));
}

#[test]
fn what_is_kept_stays_where_giving_it_up_would_not_do() {
    let mut bench = Bench::new(SchedulingConfig { prefix_caching: true, ..config(64, 8) }, &[8, 8]);
    bench.add(0, 0, prompt(0, 9));
    bench.add(1, 0, prompt(1, 9));
    bench.step();
    bench.scheduler.remove_job(1);
    bench.add(2, 0, prompt(2, 9));
    assert_eq!(bench.step(), [(0, 1, 0), (2, 9, 0)]);
    assert_eq!((bench.pages[0].free(), bench.pages[1].free()), (5, 3), "two pages of the second are only kept");
    bench.add(3, 0, prompt(3, 25));
    assert_eq!(bench.step(), [(0, 1, 0), (2, 1, 0)], "seven pages are nowhere to be had");
    assert_eq!((bench.pages[0].free(), bench.pages[1].free()), (5, 3));
    bench.scheduler.remove_job(2);
    assert_eq!(bench.step(), [(0, 1, 0), (3, 25, 0)]);
}

#[test]
fn guesses_leave_each_its_token_and_its_pages() {
    let speculation = SpeculationConfig { num_tokens: 5, min_ngram: 1, max_ngram: 2 };
    let mut bench = Bench::new(SchedulingConfig { speculation, ..config(4, 3) }, &[100]);
    for job in 0..3 {
        bench.add(job, 0, vec![7]);
    }
    assert_eq!(bench.step(), [(0, 1, 0), (1, 1, 0), (2, 1, 0)]);
    bench.step();
    assert_eq!(bench.step(), [(0, 1, 1), (1, 1, 0), (2, 1, 0)], "one each, and one token is left");
    // Two pages: each holds one, and a guess of either would take the other's next.
    let mut bench = Bench::new(SchedulingConfig { speculation, ..config(64, 2) }, &[3]);
    bench.add(0, 0, vec![7, 7, 7]);
    bench.add(1, 0, vec![7, 7, 7]);
    assert_eq!(bench.step(), [(0, 3, 0), (1, 3, 0)]);
    assert_eq!(bench.step(), [(0, 1, 1), (1, 1, 0)], "the third page is free");
    assert_eq!(bench.scheduler.counts().preemptions, 0);
}

#[test]
fn what_is_forked_of_a_suspect_is_none() {
    let mut bench = Bench::new(config(64, 8), &[20]);
    let id = bench.add(0, 0, prompt(0, 5));
    bench.add(1, 0, prompt(1, 5));
    let parts = bench.scheduler.plan(bench.begun);
    bench.scheduler.suspect(&parts);
    assert_eq!(bench.step(), [(0, 5, 0)]);
    bench.scheduler.fork(id, 3);
    assert_eq!(bench.step(), [(1, 5, 0)], "the other suspect");
    assert_eq!(bench.step(), [(0, 1, 0), (1, 1, 0), (0, 1, 0), (0, 1, 0)], "then all together");
}

#[test]
fn who_has_lost_its_pages_waits_from_then_on() {
    let starving = SchedulingConfig { starvation: Duration::from_secs(30), ..config(64, 8) };
    let mut bench = Bench::new(starving, &[4]);
    bench.add(0, 10, prompt(0, 7));
    bench.step();
    bench.add(1, 0, prompt(1, 7));
    let late = Duration::from_secs(40);
    assert_eq!(bench.step_at(late), [(0, 1, 0), (1, 7, 0)]);
    assert_eq!(bench.step_at(late), [(1, 1, 0)], "it gives its pages to a more important one");
    assert_eq!(bench.scheduler.waiting.keys().next(), Some(&(10, SequenceId { job: 0, choice: 0 })));
    bench.scheduler.plan(bench.begun + late);
    assert_eq!(bench.scheduler.waiting.keys().next().map(|order| order.0), Some(10), "40 s ago it was running");
    bench.scheduler.plan(bench.begun + 2 * late);
    assert_eq!(bench.scheduler.waiting.keys().next().map(|order| order.0), Some(i32::MIN));
}

#[test]
fn a_replica_with_room_takes_what_another_has_none_for() {
    let mut bench = Bench::new(config(64, 8), &[6, 8]);
    bench.add(0, 0, prompt(0, 20));
    bench.add(1, 0, prompt(1, 3));
    assert_eq!(bench.step(), [(0, 20, 0), (1, 3, 0)]);
    // As many on each; the first has 1 page left, the second 7.
    bench.add(2, 0, prompt(2, 8));
    assert_eq!(bench.step(), [(0, 1, 0), (1, 1, 0), (2, 8, 0)]);
    assert_eq!(bench.scheduler.running_mut(SequenceId { job: 2, choice: 0 }).replica, 1);
    bench.add(3, 0, prompt(3, 40));
    bench.step();
    assert_eq!(bench.scheduler.num_waiting(), 1, "nobody has room for that");
}
