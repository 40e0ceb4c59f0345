//! Pages in the form that products read: what a token's keys and values are packed into when they are written, so that
//! attention packs nothing.
//!
//! A page holds a multiple of 32 tokens. Per key head it has
//!
//! ```text
//! keys     [tokens / 32][head_dim words][32 tokens]          panels whose columns are tokens
//! values   [head_dim / 32][tokens words][32 columns]         panels whose inner dimension is the tokens
//! ```
//!
//! with one word per f32, or per pair of bf16. A value's word of bf16 holds two tokens; the first of them clears the second,
//! so that nothing of an earlier owner of the page is ever multiplied.

use crate::Precision;
use crate::gemm::{PANEL_COLS, Panels, bf16_round, panel_words};

/// The layout of a layer's pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageLayout {
    pub(super) precision: Precision,
    pub(super) page_size: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
}

impl PageLayout {
    /// Whether pages of this size can be packed.
    pub(super) fn fits(page_size: usize) -> bool {
        page_size > 0 && page_size.is_multiple_of(PANEL_COLS)
    }

    fn key_words(self) -> usize {
        panel_words(self.precision, self.head_dim)
    }

    fn value_words(self) -> usize {
        panel_words(self.precision, self.page_size)
    }

    /// Words of one head's keys.
    fn key_head(self) -> usize {
        self.page_size * self.key_words()
    }

    /// Words of one head's values.
    fn value_head(self) -> usize {
        self.head_dim.next_multiple_of(PANEL_COLS) * self.value_words()
    }

    /// Words of the keys of a page.
    pub(super) fn key_page(self) -> usize {
        self.num_kv_heads * self.key_head()
    }

    /// Words of the values of a page.
    pub(super) fn value_page(self) -> usize {
        self.num_kv_heads * self.value_head()
    }

    /// Whether so many tokens' keys and values are more than stays in a cache.
    pub(super) fn are_far(self, tokens: usize) -> bool {
        let words = (self.key_page() + self.value_page()) * tokens.div_ceil(self.page_size);
        size_of::<u32>() * words > FAR
    }

    /// Writes the keys of one token, all heads, as row `row` of `page`.
    pub(super) fn write_keys(self, keys: &[f32], row: usize, page: &mut [u32]) {
        let panel = row / PANEL_COLS * PANEL_COLS * self.key_words() + row % PANEL_COLS;
        for (head, values) in keys.chunks_exact(self.head_dim).enumerate() {
            let to = &mut page[head * self.key_head() + panel..];
            match self.precision {
                Precision::F32 => {
                    values.iter().enumerate().for_each(|(p, v)| to[p * PANEL_COLS] = v.to_bits());
                }
                Precision::Bf16 => {
                    for (p, pair) in values.chunks(2).enumerate() {
                        let odd = pair.get(1).map_or(0, |v| bf16_round(*v).to_bits());
                        to[p * PANEL_COLS] = (bf16_round(pair[0]).to_bits() >> 16) | odd;
                    }
                }
            }
        }
    }

    /// Writes the values of one token, all heads, as row `row` of `page`.
    pub(super) fn write_values(self, values: &[f32], row: usize, page: &mut [u32]) {
        for (head, values) in values.chunks_exact(self.head_dim).enumerate() {
            for (panel, columns) in values.chunks(PANEL_COLS).enumerate() {
                let start = head * self.value_head() + panel * PANEL_COLS * self.value_words();
                match self.precision {
                    Precision::F32 => {
                        let to = &mut page[start + row * PANEL_COLS..][..columns.len()];
                        to.iter_mut().zip(columns).for_each(|(word, v)| *word = v.to_bits());
                    }
                    Precision::Bf16 => {
                        let to = &mut page[start + row / 2 * PANEL_COLS..][..columns.len()];
                        for (word, v) in to.iter_mut().zip(columns) {
                            let bits = bf16_round(*v).to_bits();
                            *word = if row.is_multiple_of(2) { bits >> 16 } else { *word & 0xffff | bits };
                        }
                    }
                }
            }
        }
    }

    /// The panels of one head's first `len` keys of a page.
    pub(super) fn keys(self, page: &[u32], head: usize, len: usize) -> Panels<'_> {
        Panels {
            words: &page[head * self.key_head()..][..self.key_head()],
            stride: PANEL_COLS * self.key_words(),
            cols: len,
            first: 0,
            len: self.head_dim,
        }
    }

    /// The panels of one head's first `len` values of a page, of which the first token is `first` in its sequence.
    pub(super) fn values(self, page: &[u32], head: usize, first: usize, len: usize) -> Panels<'_> {
        Panels {
            words: &page[head * self.value_head()..][..self.value_head()],
            stride: PANEL_COLS * self.value_words(),
            cols: self.head_dim,
            first,
            len,
        }
    }
}

/// The pages of one sequence in a layer's pool.
#[derive(Debug, Clone, Copy)]
pub(super) struct PackedPages<'a> {
    pub(super) layout: PageLayout,
    /// `[num_pages, key_page]` and `[num_pages, value_page]` words.
    pub(super) keys: &'a [u32],
    pub(super) values: &'a [u32],
    pub(super) blocks: &'a [u32],
    /// Whether they come from memory, so that a page is worth fetching while the one before is multiplied.
    pub(super) are_far: bool,
}

/// Bytes of all sequences' keys and values in a layer above which they come from memory: what a second-level cache holds. Tests reach
/// both. (Two Zen 4 cores, 7 layers of 5 heads of 32 columns, 160 tokens: fetching takes reading for 32 sequences from 1.0 to 0.67 ms of a
/// step of 2.1; a step of one sequence, whose pages are in the cache, it would slow down by 4 %. `moe-serve bench offline --phases`,
/// 2026-11-27, b9e856d.)
const FAR: usize = if cfg!(test) { 16 << 10 } else { 1 << 20 };

impl<'a> PackedPages<'a> {
    /// The first token of each page that holds some of the first `visible` tokens.
    pub(super) fn starts(&self, visible: usize) -> impl Iterator<Item = usize> + use<> {
        (0..visible).step_by(self.layout.page_size)
    }

    /// The panels of one head's keys in the page that begins with token `first`, as far as they are `visible`.
    pub(super) fn keys(&self, head: usize, first: usize, visible: usize) -> Panels<'a> {
        let (page, len) = self.page(self.keys, self.layout.key_page(), first, visible);
        self.layout.keys(page, head, len)
    }

    /// The same for values.
    pub(super) fn values(&self, head: usize, first: usize, visible: usize) -> Panels<'a> {
        let (page, len) = self.page(self.values, self.layout.value_page(), first, visible);
        self.layout.values(page, head, first, len)
    }

    /// Fetches what is multiplied after [`PackedPages::keys`] of these arguments: those of the next page, after the last the values.
    pub(super) fn fetch_after_keys(&self, head: usize, first: usize, visible: usize) {
        let next = first + self.layout.page_size;
        if !self.are_far {
            return;
        }
        let panels = if next < visible { self.keys(head, next, visible) } else { self.values(head, 0, visible) };
        panels.fetch(self.layout.precision);
    }

    /// Fetches what is multiplied after [`PackedPages::values`] of these arguments: those of the next page.
    pub(super) fn fetch_after_values(&self, head: usize, first: usize, visible: usize) {
        let next = first + self.layout.page_size;
        if self.are_far && next < visible {
            self.values(head, next, visible).fetch(self.layout.precision);
        }
    }

    fn page(&self, words: &'a [u32], page_words: usize, first: usize, visible: usize) -> (&'a [u32], usize) {
        let size = self.layout.page_size;
        let page = self.blocks[first / size] as usize;
        (&words[page * page_words..][..page_words], size.min(visible - first))
    }
}
