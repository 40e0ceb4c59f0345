//! [`KvPool`]: the memory of the pages, and which of them are free.

use super::CachedSequence;
use super::sequence::Page;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use moe_core::ops::PagedKv;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Columns that the keys and the values of a token have in each layer's pages.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CacheLayout {
    /// From the first layer to the last.
    pub widths: Vec<usize>,
}

impl CacheLayout {
    /// Bytes that one token takes.
    pub fn token_bytes(&self) -> usize {
        2 * size_of::<f32>() * self.widths.iter().sum::<usize>()
    }
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
    /// Tokens per page unless asked otherwise: small enough that little of a last page is lost.
    pub const PAGE_SIZE: usize = 16;

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
    /// Per layer keys and values, `[num_pages, page_size, width]` each.
    layers: Vec<[Tensor; 2]>,
    free: Arc<FreeList>,
}

impl KvPool {
    /// An empty pool. Memory of the CPU is touched, and so taken from the system, when a page is first written to.
    ///
    /// # Errors
    /// [`Error::Config`] for a pool without pages or one that is too large to number; if the device has too little memory.
    pub fn new(layout: &CacheLayout, config: PoolConfig, device: &Device) -> Result<Self> {
        let PoolConfig { num_pages, page_size } = config;
        let slots = num_pages.checked_mul(page_size).filter(|&slots| slots > 0 && u32::try_from(slots).is_ok());
        if slots.is_none() {
            return Err(Error::Config(format!(
                "a pool must have from 1 to 2^32 tokens, got {num_pages} pages of {page_size}"
            )));
        }
        let pages = |&width: &usize| -> Result<[Tensor; 2]> {
            let zeros = || Tensor::zeros((num_pages, page_size, width), DType::F32, device);
            Ok([zeros()?, zeros()?])
        };
        let layers = layout.widths.iter().map(pages).collect::<Result<_>>()?;
        let free = Arc::new(FreeList(Mutex::new((0..num_pages as u32).rev().collect())));
        Ok(Self { config, layers, free })
    }

    /// How large it is.
    pub fn config(&self) -> PoolConfig {
        self.config
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.lock().len()
    }

    /// Layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }

    /// A sequence without tokens.
    pub fn sequence(&self) -> CachedSequence {
        CachedSequence::new(Arc::clone(&self.free), self.config.page_size)
    }

    /// The pages of one layer.
    pub(crate) fn layer(&self, index: usize) -> PagedKv<'_> {
        let [keys, values] = &self.layers[index];
        PagedKv { keys, values }
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
