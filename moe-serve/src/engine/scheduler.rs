//! [`Scheduler`]: which sequences take part in the next step, and with how many tokens. It knows tokens and numbers of pages; it
//! touches no tensor.
//!
//! Sequences are served in the order of their priorities, then of their arrival. Those that generate come first in a step, then
//! prompts that are being read, in chunks of what is left of the step's tokens, then new ones, and last guesses. Where pages run out, what is only
//! kept for later goes first, then the pages of the last in that order, which reads its tokens again later: the first always
//! gets on.

use super::config::SchedulingConfig;
use super::sequence::{Order, Sequence, SequenceId};
use super::speculation::propose;
use moe_models::{Pages, PrefixCache};
use std::collections::BTreeMap;
use std::time::Instant;

/// What a sequence does in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) id: SequenceId,
    /// Tokens it reads.
    pub(super) new: usize,
    /// Guesses it reads after them.
    pub(super) drafts: Vec<u32>,
    /// Pages it is going to take.
    pages: usize,
}

impl Part {
    /// Tokens of the step that it takes.
    pub(super) fn len(&self) -> usize {
        self.new + self.drafts.len()
    }
}

/// What has happened so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    /// Times that a sequence lost its pages.
    pub(super) preemptions: u64,
    /// Tokens of prompts looked for among those kept, when a prompt's first continuation begins.
    pub(super) prefix_queries: u64,
    /// Tokens found there.
    pub(super) prefix_hits: u64,
}

/// One replica's pages.
#[derive(Debug)]
struct ReplicaPages {
    pages: Pages,
    prefix: Option<PrefixCache>,
    /// Pages that parts of the step at hand are going to take.
    promised: usize,
}

impl ReplicaPages {
    /// Whether `count` pages can be had, by giving up what is only kept.
    fn has(&mut self, count: usize) -> bool {
        let missing = self.missing(count);
        if let (Some(prefix), true) = (&mut self.prefix, missing > 0) {
            prefix.evict(missing);
        }
        self.pages.free() >= count + self.promised
    }

    /// The same, which gives up nothing where that would not do.
    fn has_or_keeps(&mut self, count: usize) -> bool {
        let missing = self.missing(count);
        (missing == 0 || self.prefix.as_ref().is_some_and(|prefix| prefix.has_idle(missing))) && self.has(count)
    }

    /// How many of `count` pages are not free.
    fn missing(&self, count: usize) -> usize {
        count.saturating_sub(self.pages.free().saturating_sub(self.promised))
    }
}

/// Sequences, and the pages they share.
#[derive(Debug)]
pub(super) struct Scheduler {
    config: SchedulingConfig,
    /// Whether keys and values depend on a sequence's seed.
    salted: bool,
    replicas: Vec<ReplicaPages>,
    waiting: BTreeMap<Order, Sequence>,
    running: Vec<Sequence>,
    counts: Counts,
}

impl Scheduler {
    pub(super) fn new(config: SchedulingConfig, replicas: Vec<Pages>, salted: bool) -> Self {
        let replica = |pages: Pages| {
            let prefix = config.prefix_caching.then(|| PrefixCache::new(&pages));
            ReplicaPages { pages, prefix, promised: 0 }
        };
        let replicas = replicas.into_iter().map(replica).collect();
        Self { config, salted, replicas, waiting: BTreeMap::new(), running: Vec::new(), counts: Counts::default() }
    }

    /// The pages that a sequence of this replica holds or takes.
    pub(super) fn pages(&self, replica: usize) -> &Pages {
        &self.replicas[replica].pages
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    pub(super) fn num_running(&self) -> usize {
        self.running.len()
    }

    pub(super) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Share of all pages that sequences hold.
    pub(super) fn page_usage(&self) -> f64 {
        let idle = |r: &ReplicaPages| r.pages.free() + r.prefix.as_ref().map_or(0, PrefixCache::idle_pages);
        let total: usize = self.replicas.iter().map(|r| r.pages.config().num_pages).sum();
        1.0 - self.replicas.iter().map(idle).sum::<usize>() as f64 / total as f64
    }

    /// Adds a sequence to those that wait.
    pub(super) fn add(&mut self, sequence: Sequence) {
        self.waiting.insert(sequence.order(), sequence);
    }

    pub(super) fn num_replicas(&self) -> usize {
        self.replicas.len()
    }

    /// A sequence that takes part in steps.
    pub(super) fn running_mut(&mut self, id: SequenceId) -> &mut Sequence {
        self.find_running(id).expect("a planned sequence is a running one")
    }

    fn find_running(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        self.running.iter_mut().find(|sequence| sequence.id == id)
    }

    /// The pages of a running sequence's replica.
    pub(super) fn pages_of(&self, id: SequenceId) -> Pages {
        self.replicas[self.running(id).replica].pages.clone()
    }

    /// The sequence that goes first among those that wait.
    pub(super) fn first_waiting(&self) -> Option<SequenceId> {
        self.waiting.values().next().map(|sequence| sequence.id)
    }

    /// Continuations 1 to `n` of the prompt that a running sequence has read, which start from what it holds.
    pub(super) fn fork(&mut self, id: SequenceId, n: usize) {
        let lead = self.running_mut(id);
        lead.reuses = true;
        let (prompt_len, prompt) = (lead.prompt_len, lead.token_ids[..lead.prompt_len].to_vec());
        let sibling = |k: usize| {
            let mut cached = lead.cached.clone();
            // The last token is read again, for what follows it.
            cached.truncate(prompt_len - 1);
            let id = SequenceId { choice: id.choice + k, ..id };
            Sequence { id, token_ids: prompt.clone(), cached, suspect: false, ..*lead }
        };
        let siblings: Vec<Sequence> = (1..n).map(sibling).collect();
        siblings.into_iter().for_each(|sequence| self.add(sequence));
    }

    /// Takes a sequence out.
    pub(super) fn remove(&mut self, id: SequenceId) -> Option<Sequence> {
        if let Some(at) = self.running.iter().position(|sequence| sequence.id == id) {
            return Some(self.running.remove(at));
        }
        let order = self.waiting.values().find(|sequence| sequence.id == id)?.order();
        self.waiting.remove(&order)
    }

    /// Takes out all sequences of a job.
    pub(super) fn remove_job(&mut self, job: u64) {
        self.running.retain(|sequence| sequence.id.job != job);
        self.waiting.retain(|_, sequence| sequence.id.job != job);
    }

    /// Keeps the full pages of a running sequence for others, if it has filled one since it had `before` tokens.
    pub(super) fn keep(&mut self, id: SequenceId, before: usize) {
        let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) else { return };
        let ReplicaPages { pages, prefix, .. } = &mut self.replicas[sequence.replica];
        let page_size = pages.config().page_size;
        if let (Some(prefix), true) = (prefix, sequence.cached.len() / page_size > before / page_size) {
            let salt = if self.salted { sequence.cached.seed() } else { 0 };
            prefix.keep(&sequence.token_ids, &mut sequence.cached, salt);
        }
    }

    /// Keeps nothing of what was read so far.
    pub(super) fn forget_prefixes(&mut self) {
        self.replicas.iter_mut().filter_map(|replica| replica.prefix.as_mut()).for_each(PrefixCache::clear);
    }

    /// Those of a failed step: their pages are taken to be damaged, and each must show that it does not fail alone.
    pub(super) fn suspect(&mut self, parts: &[Part]) {
        for part in parts {
            let Some(sequence) = self.find_running(part.id) else { continue };
            sequence.cached.truncate(0);
            sequence.suspect = true;
        }
    }

    /// The next step. Empty only if there is no sequence, since a replica's pages hold any one of them.
    pub(super) fn plan(&mut self, now: Instant) -> Vec<Part> {
        self.promote(now);
        self.running.sort_by_key(Sequence::order);
        self.replicas.iter_mut().for_each(|replica| replica.promised = 0);
        let mut step = Step { parts: Vec::new(), budget: self.config.max_batch_tokens, now };
        if let Some(suspect) = self.running.iter().find(|sequence| sequence.suspect).map(|sequence| sequence.id) {
            self.extend(suspect, &mut step);
        } else if self.waiting.first_key_value().is_some_and(|(_, sequence)| sequence.suspect) {
            self.admit(&mut step);
        }
        if !step.parts.is_empty() {
            return step.parts;
        }
        let ids = |scheduler: &Self, generates| {
            let them = scheduler.running.iter().filter(|sequence| sequence.generates() == generates);
            them.map(|sequence| sequence.id).collect::<Vec<_>>()
        };
        for generates in [true, false] {
            ids(self, generates).into_iter().for_each(|id| self.extend(id, &mut step));
        }
        self.admit(&mut step);
        self.guess(&mut step);
        step.parts
    }

    /// Whoever has waited for too long goes before all others.
    fn promote(&mut self, now: Instant) {
        let overdue = |sequence: &Sequence| {
            sequence.priority > i32::MIN
                && now.saturating_duration_since(sequence.waits_since) >= self.config.starvation
        };
        let orders: Vec<Order> = self.waiting.values().filter(|s| overdue(s)).map(Sequence::order).collect();
        for order in orders {
            if let Some(sequence) = self.waiting.remove(&order) {
                self.add(Sequence { priority: i32::MIN, ..sequence });
            }
        }
    }

    /// Gives a running sequence its part, if there are tokens and pages for it.
    fn extend(&mut self, id: SequenceId, step: &mut Step) {
        // A sequence before it may have taken its pages.
        let Some(at) = self.running.iter().position(|sequence| sequence.id == id) else { return };
        let sequence = &self.running[at];
        let new = sequence.pending().min(step.budget);
        if new == 0 {
            return;
        }
        self.settle(Part { id, new, drafts: Vec::new(), pages: 0 }, step);
    }

    /// Gives those that generate guesses, of the tokens and the free pages that are left: they are not worth another sequence's tokens
    /// or pages, nor what is kept of a prompt.
    fn guess(&mut self, step: &mut Step) {
        if self.config.speculation.num_tokens == 0 {
            return;
        }
        let Step { parts, budget, .. } = step;
        for part in parts {
            let sequence = self.running.iter().find(|sequence| sequence.id == part.id);
            let sequence = sequence.expect("a planned sequence is a running one");
            if !sequence.generates() {
                continue;
            }
            let limit = sequence.guessable().min(*budget);
            let drafts = propose(self.config.speculation, &sequence.token_ids, limit);
            let pages = sequence.cached.pages_needed(part.new + drafts.len());
            let replica = &mut self.replicas[sequence.replica];
            let more = pages - part.pages;
            if replica.promised + more <= replica.pages.free() {
                replica.promised += more;
                *budget -= drafts.len();
                *part = Part { drafts, pages, ..*part };
            }
        }
    }

    /// Puts the part of a running sequence into the step, with pages from those after it; without them it waits again.
    fn settle(&mut self, mut part: Part, step: &mut Step) {
        while !self.has_room(&mut part) {
            if !self.make_room(part.id, step) {
                return self.preempt(part.id, step);
            }
        }
        let replica = self.running(part.id).replica;
        self.replicas[replica].promised += part.pages;
        step.budget -= part.len();
        step.parts.push(part);
    }

    fn running(&self, id: SequenceId) -> &Sequence {
        self.running.iter().find(|sequence| sequence.id == id).expect("a planned sequence is a running one")
    }

    /// Whether the pages of a running sequence's part can be had.
    fn has_room(&mut self, part: &mut Part) -> bool {
        let sequence = self.running(part.id);
        let replica = sequence.replica;
        part.pages = sequence.cached.pages_needed(part.len());
        self.replicas[replica].has(part.pages)
    }

    /// Takes pages from a sequence that waits, or from the last of those that come after `id`; false where there is none.
    fn make_room(&mut self, id: SequenceId, step: &mut Step) -> bool {
        let (order, replica) = (self.running(id).order(), self.running(id).replica);
        let holds = |sequence: &&mut Sequence| sequence.replica == replica && sequence.cached.num_pages() > 0;
        if let Some(sequence) = self.waiting.values_mut().rev().find(holds) {
            sequence.cached.truncate(0);
            return true;
        }
        let later = self.running.iter().filter(|sequence| sequence.replica == replica && sequence.order() > order);
        let Some(last) = later.max_by_key(|sequence| sequence.order()).map(|sequence| sequence.id) else {
            return false;
        };
        self.preempt(last, step);
        true
    }

    /// A running sequence gives its pages back and waits.
    fn preempt(&mut self, id: SequenceId, step: &mut Step) {
        let Some(at) = self.running.iter().position(|sequence| sequence.id == id) else { return };
        let mut sequence = self.running.remove(at);
        if let Some(at) = step.parts.iter().position(|part| part.id == id) {
            let part = step.parts.remove(at);
            step.budget += part.len();
            self.replicas[sequence.replica].promised -= part.pages;
        }
        sequence.cached.truncate(0);
        sequence.waits_since = step.now;
        self.counts.preemptions += 1;
        self.add(sequence);
    }

    /// Lets sequences begin as long as there is room for all of their tokens.
    fn admit(&mut self, step: &mut Step) {
        while step.budget > 0 && self.running.len() < self.config.max_sequences {
            let Some((order, mut sequence)) = self.waiting.pop_first() else { return };
            if sequence.suspect && !step.parts.is_empty() {
                self.waiting.insert(order, sequence);
                return;
            }
            if !self.begin(&mut sequence) {
                self.waiting.insert(order, sequence);
                return;
            }
            let new = sequence.pending().min(step.budget);
            let (id, suspect) = (sequence.id, sequence.suspect);
            self.running.push(sequence);
            self.settle(Part { id, new, drafts: Vec::new(), pages: 0 }, step);
            if suspect || step.parts.last().is_none_or(|part| part.id != id) {
                return;
            }
        }
    }

    /// Chooses a replica that has room for all tokens of a sequence, one with less to do before others; false where none has.
    fn begin(&mut self, sequence: &mut Sequence) -> bool {
        if !sequence.cached.is_empty() {
            // What it goes on from lies on one of them.
            return self.fits(sequence);
        }
        let busy = |replica: usize| self.running.iter().filter(|other| other.replica == replica).count();
        let mut replicas: Vec<usize> = (0..self.replicas.len()).collect();
        replicas.sort_by_key(|&replica| busy(replica));
        for replica in replicas {
            sequence.replica = replica;
            let found = self.look_up(sequence);
            if self.fits(sequence) {
                if let (Some(hits), false) = (found, sequence.counted) {
                    self.counts.prefix_queries += sequence.prompt_len as u64;
                    self.counts.prefix_hits += hits as u64;
                    sequence.counted = true;
                }
                return true;
            }
            sequence.cached.truncate(0);
        }
        false
    }

    /// Whether the pages for all of a sequence's tokens can be had. One that could never begin otherwise begins where nothing else runs.
    fn fits(&mut self, sequence: &Sequence) -> bool {
        let replica = sequence.replica;
        let needed = sequence.cached.pages_needed(sequence.pending());
        // Where it may begin on another, nothing is given up in vain; the only one gives up what its next sequence needs anyway.
        let pages = &mut self.replicas;
        let has = if pages.len() > 1 { pages[replica].has_or_keeps(needed) } else { pages[replica].has(needed) };
        has || self.running.iter().all(|other| other.replica != replica)
    }

    /// Has a sequence without pages begin with what its replica keeps of its tokens; how many that are, if anything is kept for it.
    fn look_up(&mut self, sequence: &mut Sequence) -> Option<usize> {
        let ReplicaPages { pages, prefix, .. } = &mut self.replicas[sequence.replica];
        let seed = sequence.cached.seed();
        sequence.cached = match prefix {
            Some(prefix) if sequence.reuses => {
                let salt = if self.salted { seed } else { 0 };
                // The last token is read in any case: what follows it is wanted.
                prefix.lookup(&sequence.token_ids[..sequence.token_ids.len() - 1], salt)
            }
            _ => pages.sequence(),
        }
        .with_seed(seed);
        (prefix.is_some() && sequence.reuses).then(|| sequence.cached.len())
    }
}

/// A step that is being made up.
struct Step {
    parts: Vec<Part>,
    /// Tokens that are left of it.
    budget: usize,
    /// When it is made up.
    now: Instant,
}

#[cfg(test)]
#[path = "scheduler_tests.rs"]
mod tests;
