//! [`Pages`]: which pages of a pool are free. [`KvPool`]: these and their memory.

use super::sequence::Page;
use super::{CachedSequence, PagedStep};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_core::ops::{DecoderOps, KvShape, PagedKv};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What a token takes in each layer's pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CacheLayout {
    /// From the first layer to the last.
    pub layers: Vec<KvShape>,
}

/// How large a pool is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolConfig {
    /// Pages.
    pub num_pages: usize,
    /// Tokens per page.
    pub page_size: usize,
}

impl PoolConfig {
    /// Tokens per page unless asked otherwise: what the kernels keep packed, and small enough that little of a last page is
    /// lost.
    pub const PAGE_SIZE: usize = 32;

    /// Pages of [`PoolConfig::PAGE_SIZE`] for `sequences` of `tokens` each, however they are aligned.
    pub fn for_tokens(sequences: usize, tokens: usize) -> Self {
        Self { num_pages: sequences * (tokens.div_ceil(Self::PAGE_SIZE) + 1), page_size: Self::PAGE_SIZE }
    }
}

/// Numbers of pages that no sequence holds.
#[derive(Debug)]
pub(super) struct FreeList(Mutex<Vec<u32>>);

impl FreeList {
    fn lock(&self) -> MutexGuard<'_, Vec<u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn give_back(&self, id: u32) {
        self.lock().push(id);
    }
}

/// Which pages are free and which are held: numbers alone. Whoever plans steps needs no more than this; the memory may lie
/// elsewhere, with another rank. Clones are the same pages.
#[derive(Debug, Clone)]
pub struct Pages {
    config: PoolConfig,
    free: Arc<FreeList>,
}

impl Pages {
    /// All of them free.
    ///
    /// # Errors
    /// [`Error::Config`] for none, or more than can be numbered.
    pub fn new(config: PoolConfig) -> Result<Self> {
        let PoolConfig { num_pages, page_size } = config;
        let slots = num_pages.checked_mul(page_size).filter(|&slots| slots > 0 && u32::try_from(slots).is_ok());
        if slots.is_none() {
            return Err(Error::Config(format!(
                "a pool must have from 1 to 2^32 tokens, got {num_pages} pages of {page_size}"
            )));
        }
        Ok(Self { config, free: Arc::new(FreeList(Mutex::new((0..num_pages as u32).rev().collect()))) })
    }

    /// How many there are, and their size.
    pub fn config(&self) -> PoolConfig {
        self.config
    }

    /// Pages that no sequence holds.
    pub fn free(&self) -> usize {
        self.free.lock().len()
    }

    /// A sequence without tokens.
    pub fn sequence(&self) -> CachedSequence {
        CachedSequence::new(Arc::clone(&self.free), self.config.page_size)
    }

    /// Whether `sequence` was made here.
    pub(crate) fn owns(&self, sequence: &CachedSequence) -> bool {
        sequence.is_of(&self.free)
    }

    /// Takes `count` pages, or none.
    ///
    /// # Errors
    /// [`Error::OutOfPages`]
    pub(super) fn take(&self, count: usize) -> Result<Vec<Arc<Page>>> {
        let mut free = self.free.lock();
        if free.len() < count {
            return Err(Error::OutOfPages { needed: count, free: free.len() });
        }
        let at = free.len() - count;
        let ids = free.split_off(at);
        drop(free);
        Ok(ids.into_iter().rev().map(|id| Arc::new(Page::new(id, Arc::clone(&self.free)))).collect())
    }
}

/// Pages of keys and values for one model; made once, at start.
#[derive(Debug)]
pub struct KvPool {
    pages: Pages,
    layout: CacheLayout,
    /// Per layer keys and values, in the form of the backend.
    layers: Vec<[Tensor; 2]>,
}

impl KvPool {
    /// An empty pool for a model whose backend is `ops`; [`crate::CausalLm::new_pool`] knows both. Memory of the CPU is touched,
    /// and so taken from the system, when a page is first written to.
    ///
    /// # Errors
    /// [`Error::Config`] for a pool without pages or one that is too large to number; if the device has too little memory.
    pub fn new(layout: CacheLayout, config: PoolConfig, ops: &dyn DecoderOps, device: &Device) -> Result<Self> {
        let pages = Pages::new(config)?;
        let memory = |shape: &KvShape| Ok(ops.new_pages(config.num_pages, config.page_size, *shape, device)?);
        let layers = layout.layers.iter().map(memory).collect::<Result<_>>()?;
        Ok(Self { pages, layout, layers })
    }

    /// How large it is.
    pub fn config(&self) -> PoolConfig {
        self.pages.config
    }

    /// Which of its pages are free.
    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.pages.free()
    }

    /// What it was made for.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Size in memory once every page has been written to.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(|pages| pages.elem_count() * pages.dtype().size_in_bytes()).sum()
    }

    /// A sequence without tokens.
    pub fn sequence(&self) -> CachedSequence {
        self.pages.sequence()
    }

    /// Copies the pages that `step` asks for: before its pass, which writes to the copies.
    ///
    /// # Errors
    /// If the device fails, or a page is not one of the pool's.
    pub fn copy_pages(&self, step: &PagedStep) -> Result<()> {
        for &(from, to) in step.copies() {
            for pages in self.layers.iter().flatten() {
                let rows = pages.narrow(0, from as usize, 1)?.copy()?;
                pages.slice_set(&rows, 0, to as usize)?;
            }
        }
        Ok(())
    }

    /// The pages of one layer, for [`crate::blocks::Attention::forward_paged`].
    ///
    /// # Panics
    /// If the pool was made for fewer layers.
    pub fn layer(&self, index: usize) -> PagedKv<'_> {
        let [keys, values] = &self.layers[index];
        PagedKv { keys, values, block_size: self.pages.config.page_size, shape: self.layout.layers[index] }
    }
}
