//! [`CachedSequence`]: the tokens of one sequence, as a list of pages.

use super::pool::{FreeList, Pages};
use crate::Result;
use std::sync::Arc;

/// A page that sequences hold; free again when the last of them lets go.
#[derive(Debug)]
pub(super) struct Page {
    id: u32,
    free: Arc<FreeList>,
}

impl Page {
    pub(super) fn new(id: u32, free: Arc<FreeList>) -> Self {
        Self { id, free }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.free.give_back(self.id);
    }
}

/// Cached keys and values of one sequence. Clones share its pages until one of them is written to.
#[derive(Debug, Clone)]
pub struct CachedSequence {
    pages: Vec<Arc<Page>>,
    len: usize,
    page_size: usize,
    seed: u64,
    free: Arc<FreeList>,
}

impl CachedSequence {
    pub(super) fn new(free: Arc<FreeList>, page_size: usize) -> Self {
        Self { pages: Vec::new(), len: 0, page_size, seed: 0, free }
    }

    /// The same with a seed for the draws of routers that draw in inference, if they are asked to.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Where the draws of this sequence come from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets all tokens but the first `len`; pages without tokens go back to the pool.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(self.page_size));
    }

    /// Pages held, shared ones too.
    pub fn num_pages(&self) -> usize {
        self.pages.len()
    }

    pub(super) fn is_of(&self, free: &Arc<FreeList>) -> bool {
        Arc::ptr_eq(&self.free, free)
    }

    pub(super) fn page(&self, index: usize) -> &Arc<Page> {
        &self.pages[index]
    }

    /// Holds `page`, which has the same rows, in place of page `index`.
    pub(super) fn exchange(&mut self, index: usize, page: &Arc<Page>) {
        if !Arc::ptr_eq(&self.pages[index], page) {
            self.pages[index] = Arc::clone(page);
        }
    }

    /// Appends a page of tokens.
    pub(super) fn push_full(&mut self, page: Arc<Page>) {
        debug_assert_eq!(self.len, self.pages.len() * self.page_size, "full pages follow full ones");
        self.pages.push(page);
        self.len += self.page_size;
    }

    /// The numbers of its pages, in the order of its tokens.
    pub(super) fn page_ids(&self) -> Vec<u32> {
        self.pages.iter().map(|page| page.id).collect()
    }

    /// Pages to take before `new` more tokens can be written: for them, and for a copy of a last page that others hold too.
    pub fn pages_needed(&self, new: usize) -> usize {
        let more = (self.len + new).div_ceil(self.page_size).saturating_sub(self.pages.len());
        more + usize::from(new > 0 && self.must_copy())
    }

    /// Whether the next token goes into a page that another sequence holds too.
    fn must_copy(&self) -> bool {
        let page = self.pages.get(self.len / self.page_size);
        page.is_some_and(|page| Arc::strong_count(page) > 1)
    }

    /// Makes room for `new` more tokens. A shared last page is exchanged for a new one, to which its rows must be copied: from
    /// which page to which.
    pub(super) fn reserve(&mut self, new: usize, pages: &Pages) -> Result<Option<(u32, u32)>> {
        let mut taken = pages.take(self.pages_needed(new))?;
        let copy = (new > 0 && self.must_copy()).then(|| {
            let page = taken.remove(0);
            let shared = std::mem::replace(&mut self.pages[self.len / self.page_size], page);
            (shared.id, self.pages[self.len / self.page_size].id)
        });
        self.pages.append(&mut taken);
        Ok(copy)
    }

    /// Counts tokens whose keys and values have been written; a [`crate::CausalLm`] does this when a pass went well.
    pub fn grow(&mut self, new: usize) {
        self.len += new;
    }
}
