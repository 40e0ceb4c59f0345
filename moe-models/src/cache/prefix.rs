//! [`PrefixCache`]: pages that hold the beginnings of sequences, kept for the next sequence that begins the same way.
//!
//! Only whole pages are kept. They are found by their tokens themselves, not by a hash of them, so no two texts are ever taken for
//! each other.

use super::Pages;
use super::sequence::{CachedSequence, Page};
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Number of a kept page.
type NodeId = u64;

/// What the first page of a text follows.
const ROOT: NodeId = 0;

/// A kept page is found by what it follows and its tokens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    parent: NodeId,
    /// What keys and values depend on beside the tokens; of first pages alone, for the others follow one.
    salt: u64,
    token_ids: Arc<[u32]>,
}

#[derive(Debug)]
struct Node {
    page: Arc<Page>,
    key: Key,
    children: usize,
    /// When it was last looked up or kept, counted in such events.
    used: u64,
}

/// Pages of one pool by the tokens they hold. They are given up, the one unused for the longest first, when room is needed.
#[derive(Debug)]
pub struct PrefixCache {
    pages: Pages,
    by_key: HashMap<Key, NodeId>,
    nodes: HashMap<NodeId, Node>,
    /// Nodes that no other follows, by their last use.
    leaves: BTreeSet<(u64, NodeId)>,
    next_id: NodeId,
    clock: u64,
}

impl PrefixCache {
    /// Nothing is kept yet.
    pub fn new(pages: &Pages) -> Self {
        Self {
            pages: pages.clone(),
            by_key: HashMap::new(),
            nodes: HashMap::new(),
            leaves: BTreeSet::new(),
            next_id: ROOT + 1,
            clock: 0,
        }
    }

    /// Pages kept, those that sequences hold too among them.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// Pages that nobody but this cache holds.
    pub fn idle_pages(&self) -> usize {
        self.idle().count()
    }

    /// Whether there are so many of them.
    pub fn has_idle(&self, count: usize) -> bool {
        count <= self.nodes.len() && self.idle().take(count).count() == count
    }

    fn idle(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|node| Arc::strong_count(&node.page) == 1)
    }

    /// A sequence of the longest kept beginning of `token_ids`. `salt` is what keys and values depend on beside the tokens: the
    /// sequence's seed where routers draw, else any one number.
    pub fn lookup(&mut self, token_ids: &[u32], salt: u64) -> CachedSequence {
        let mut sequence = self.pages.sequence();
        let mut parent = ROOT;
        for page_ids in token_ids.chunks_exact(self.pages.config().page_size) {
            let key = Key { parent, salt: if parent == ROOT { salt } else { 0 }, token_ids: page_ids.into() };
            let Some(&id) = self.by_key.get(&key) else { break };
            self.touch(id);
            sequence.push_full(Arc::clone(&self.nodes[&id].page));
            parent = id;
        }
        sequence
    }

    /// Keeps the full pages of `sequence`, whose tokens are `token_ids`. Of pages that are kept already with the same tokens the
    /// sequence takes over those and gives its own back.
    pub fn keep(&mut self, token_ids: &[u32], sequence: &mut CachedSequence, salt: u64) {
        debug_assert!(self.pages.owns(sequence) && sequence.len() <= token_ids.len());
        let mut parent = ROOT;
        let held = &token_ids[..sequence.len()];
        for (index, page_ids) in held.chunks_exact(self.pages.config().page_size).enumerate() {
            let key = Key { parent, salt: if parent == ROOT { salt } else { 0 }, token_ids: page_ids.into() };
            let id = match self.by_key.get(&key) {
                Some(&id) => id,
                None => self.insert(key, Arc::clone(sequence.page(index))),
            };
            self.touch(id);
            sequence.exchange(index, &self.nodes[&id].page);
            parent = id;
        }
    }

    /// Gives up pages that no sequence holds until `count` are given up or none is left; how many were.
    pub fn evict(&mut self, count: usize) -> usize {
        let mut evicted = 0;
        while evicted < count {
            let idle = |(_, id): &&(u64, NodeId)| Arc::strong_count(&self.nodes[id].page) == 1;
            let Some(&(_, id)) = self.leaves.iter().find(idle) else { break };
            self.remove(id);
            evicted += 1;
        }
        evicted
    }

    /// Gives up all pages; those that sequences hold stay theirs.
    pub fn clear(&mut self) {
        self.by_key.clear();
        self.nodes.clear();
        self.leaves.clear();
    }

    fn insert(&mut self, key: Key, page: Arc<Page>) -> NodeId {
        let id = self.next_id;
        self.next_id += 1;
        if let Some(parent) = self.nodes.get_mut(&key.parent) {
            parent.children += 1;
            self.leaves.remove(&(parent.used, key.parent));
        }
        self.by_key.insert(key.clone(), id);
        self.nodes.insert(id, Node { page, key, children: 0, used: self.clock });
        self.leaves.insert((self.clock, id));
        id
    }

    fn touch(&mut self, id: NodeId) {
        self.clock += 1;
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let before = std::mem::replace(&mut node.used, self.clock);
        if self.leaves.remove(&(before, id)) {
            self.leaves.insert((self.clock, id));
        }
    }

    /// Removes a leaf.
    fn remove(&mut self, id: NodeId) {
        let Some(node) = self.nodes.remove(&id) else { return };
        debug_assert_eq!(node.children, 0, "a page that others follow is kept");
        self.leaves.remove(&(node.used, id));
        self.by_key.remove(&node.key);
        if let Some(parent) = self.nodes.get_mut(&node.key.parent) {
            parent.children -= 1;
            if parent.children == 0 {
                self.leaves.insert((parent.used, node.key.parent));
            }
        }
    }
}
