//! [`KvPool`]: the memory of the pages, and which of them are free.

use super::CachedSequence;
use super::sequence::Page;
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

/// Pages of keys and values for one model; made once, at start.
#[derive(Debug)]
pub struct KvPool {
    config: PoolConfig,
    layout: CacheLayout,
    /// Per layer keys and values, in the form of the backend.
    layers: Vec<[Tensor; 2]>,
    free: Arc<FreeList>,
}

impl KvPool {
    /// An empty pool for a model whose backend is `ops`; [`crate::CausalLm::new_pool`] knows both. Memory of the CPU is touched,
    /// and so taken from the system, when a page is first written to.
    ///
    /// # Errors
    /// [`Error::Config`] for a pool without pages or one that is too large to number; if the device has too little memory.
    pub fn new(layout: CacheLayout, config: PoolConfig, ops: &dyn DecoderOps, device: &Device) -> Result<Self> {
        let PoolConfig { num_pages, page_size } = config;
        let slots = num_pages.checked_mul(page_size).filter(|&slots| slots > 0 && u32::try_from(slots).is_ok());
        if slots.is_none() {
            return Err(Error::Config(format!(
                "a pool must have from 1 to 2^32 tokens, got {num_pages} pages of {page_size}"
            )));
        }
        let pages = |shape: &KvShape| Ok(ops.new_pages(num_pages, page_size, *shape, device)?);
        let layers = layout.layers.iter().map(pages).collect::<Result<_>>()?;
        let free = Arc::new(FreeList(Mutex::new((0..num_pages as u32).rev().collect())));
        Ok(Self { config, layout, layers, free })
    }

    /// How large it is.
    pub fn config(&self) -> PoolConfig {
        self.config
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.lock().len()
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
        CachedSequence::new(Arc::clone(&self.free), self.config.page_size)
    }

    /// The pages of one layer.
    pub(crate) fn layer(&self, index: usize) -> PagedKv<'_> {
        let [keys, values] = &self.layers[index];
        PagedKv { keys, values, block_size: self.config.page_size, shape: self.layout.layers[index] }
    }

    /// Whether `sequence` was made by this pool.
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

    /// Copies the rows of one page to another, in all layers.
    pub(super) fn copy_page(&self, from: u32, to: u32) -> Result<()> {
        for pages in self.layers.iter().flatten() {
            let rows = pages.narrow(0, from as usize, 1)?.copy()?;
            pages.slice_set(&rows, 0, to as usize)?;
        }
        Ok(())
    }
}
