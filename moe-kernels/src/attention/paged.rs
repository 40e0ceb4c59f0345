//! Attention over keys and values in pages: blocks of tokens anywhere in a pool, a table of blocks per sequence.
//!
//! Blocks of whole panels are kept packed ([`super::pages`]) and multiplied as they lie. Of other blocks, a head's keys and
//! values are copied together piece by piece, each piece small enough to stay in the second-level cache until it has been
//! multiplied. Which blocks a sequence has changes no bit of the result. Neither allocates nor
//! fills blocks: that is the caller's.

use super::blocks::{Heads, Sequence, Source, Strip};
use super::pages::{PackedPages, PageLayout};
use super::{AttentionShape, KvShape, PagedKv, PagedSequence};
use crate::buffer::{prefer_huge_pages, with_scratch_f32};
use crate::custom::{expect_f32, with_inputs};
use crate::{Error, Precision, Result};
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Storage, Tensor};
use moe_core::ops::host;

/// Keys and values of a pool: packed as the products read them where blocks hold whole panels, else rows of f32.
///
/// # Errors
/// If there is too little memory.
pub fn new_pages(
    num_blocks: usize,
    block_size: usize,
    shape: KvShape,
    precision: Precision,
    device: &Device,
) -> Result<[Tensor; 2]> {
    let zeros = |words| Tensor::zeros((num_blocks, words), DType::U32, device);
    if !PageLayout::fits(block_size) || !device.is_cpu() {
        let rows = || Tensor::zeros((num_blocks, block_size, shape.width()), DType::F32, device);
        return Ok([rows()?, rows()?]);
    }
    let layout = PageLayout::new(block_size, shape, precision);
    let pages = [zeros(layout.key_page())?, zeros(layout.value_page())?];
    for pages in &pages {
        prefer_huge_pages(words(&pages.storage_and_layout())?);
    }
    Ok(pages)
}

impl PageLayout {
    fn new(page_size: usize, shape: KvShape, precision: Precision) -> Self {
        Self { precision, page_size, num_kv_heads: shape.num_kv_heads, head_dim: shape.head_dim }
    }

    /// The layout of a packed pool.
    fn of(pool: PagedKv<'_>, precision: Precision) -> Result<Self> {
        let layout = Self::new(pool.block_size, pool.shape, precision);
        let want = [[pool.num_blocks(), layout.key_page()], [pool.num_blocks(), layout.value_page()]];
        let fits = Self::fits(pool.block_size) && pool.keys.dims() == want[0] && pool.values.dims() == want[1];
        if !fits || pool.keys.dtype() != DType::U32 || pool.values.dtype() != DType::U32 {
            return Err(Error::Argument(format!(
                "a pool of blocks of {} tokens in {precision:?} must have keys and values of {want:?} words, got {:?} and \
                 {:?}; make it with new_pages in the precision it is used with",
                pool.block_size,
                pool.keys.dims(),
                pool.values.dims()
            )));
        }
        Ok(layout)
    }
}

/// Writes keys and values of new tokens into their places, in place.
///
/// # Shapes
/// `keys` and `values` `[tokens, width]`, f32 on the CPU; `slots` `[tokens]`: `block * block_size + row` of each
///
/// # Errors
/// If a shape does not fit, a slot is outside the pool, or the pool is of another precision.
pub fn write_pages(
    pool: PagedKv<'_>,
    keys: &Tensor,
    values: &Tensor,
    slots: &[u32],
    precision: Precision,
) -> Result<()> {
    pool.check_write(keys, values, slots)?;
    expect_f32("write_pages", &[keys, values])?;
    let layout = if pool.is_in_rows() { None } else { Some(PageLayout::of(pool, precision)?) };
    for (pages, rows, part) in [(pool.keys, keys, Part::Keys), (pool.values, values, Part::Values)] {
        pages.inplace_op2(&rows.contiguous()?, &WriteRows { slots, layout, part })?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Keys,
    Values,
}

/// Copies row `i` to row `slots[i]` of a pool. (By heads on two threads a step of 32 sequences took as long, two Zen 4 cores,
/// 2026-11-27: what writing need not wait for, reading waits for then.)
struct WriteRows<'a> {
    slots: &'a [u32],
    /// Of packed pages.
    layout: Option<PageLayout>,
    part: Part,
}

impl InplaceOp2 for WriteRows<'_> {
    fn name(&self) -> &'static str {
        "write_pages"
    }

    fn cpu_fwd(
        &self,
        pages: &mut CpuStorage,
        pages_layout: &Layout,
        rows: &CpuStorage,
        rows_layout: &Layout,
    ) -> candle_core::Result<()> {
        let Some((start, end)) = pages_layout.contiguous_offsets() else {
            candle_core::bail!("a pool must be contiguous")
        };
        let (_, width) = rows_layout.shape().dims2()?;
        let each = host::elements::<f32>(rows, rows_layout)?.chunks_exact(width.max(1)).zip(self.slots);
        match (pages, self.layout) {
            (CpuStorage::F32(pages), None) => {
                let pages = &mut pages[start..end];
                each.for_each(|(row, &slot)| pages[slot as usize * width..][..width].copy_from_slice(row));
            }
            (CpuStorage::U32(pages), Some(layout)) => {
                let pages = &mut pages[start..end];
                for (values, &slot) in each {
                    let (block, row) = (slot as usize / layout.page_size, slot as usize % layout.page_size);
                    if self.part == Part::Keys {
                        let words = layout.key_page();
                        layout.write_keys(values, row, &mut pages[block * words..][..words]);
                    } else {
                        let words = layout.value_page();
                        layout.write_values(values, row, &mut pages[block * words..][..words]);
                    }
                }
            }
            _ => candle_core::bail!("a pool must be f32 in rows, or packed by these kernels"),
        }
        Ok(())
    }
}

/// Attention of the new tokens of each sequence over all tokens of that sequence. No gradient.
///
/// A sequence's rows have the bits of [`super::grouped_query_attention_cached`] on its keys and values in one piece,
/// whatever other sequences are in the batch.
///
/// # Shapes
/// `queries` `[sum of new, num_heads * head_dim]`, sequence after sequence; returns the same shape
///
/// # Errors
/// [`Error::Argument`] if the shapes do not fit, or a sequence has more new tokens than tokens, too few blocks for its
/// tokens, or a block that is not in the pool.
///
/// # Source
/// PagedAttention (Kwon et al. 2023), section 4.1.
pub fn paged_attention(
    queries: &Tensor,
    pool: PagedKv<'_>,
    sequences: &[PagedSequence<'_>],
    shape: AttentionShape,
    precision: Precision,
) -> Result<Tensor> {
    pool.check_read(queries, sequences, shape)?;
    attend_pages(&Heads::new(shape, pool.shape.head_dim, precision), queries, None, pool, sequences)
}

/// [`paged_attention`] where each head has a sink, `[num_heads]`: a logit more in the softmax's denominator.
///
/// # Errors
/// As there.
pub fn paged_attention_with_sinks(
    queries: &Tensor,
    sinks: &Tensor,
    pool: PagedKv<'_>,
    sequences: &[PagedSequence<'_>],
    shape: AttentionShape,
    precision: Precision,
) -> Result<Tensor> {
    pool.check_read(queries, sequences, shape)?;
    host::expect_shape("sinks", sinks, &[shape.num_heads])?;
    let heads = Heads::new(shape, pool.shape.head_dim, precision);
    let sinks = host::to_f32_vec(sinks)?;
    attend_pages(&heads, queries, Some(&sinks), pool, sequences)
}

/// [`paged_attention`] of checked arguments.
fn attend_pages(
    heads: &Heads,
    queries: &Tensor,
    sinks: Option<&[f32]>,
    pool: PagedKv<'_>,
    sequences: &[PagedSequence<'_>],
) -> Result<Tensor> {
    let out = if pool.is_in_rows() {
        with_inputs("paged_attention", &[queries, pool.keys, pool.values], |inputs| {
            let [keys, values] = [inputs[1].values, inputs[2].values];
            attend(heads, (inputs[0].values, sinks), sequences, |blocks| {
                [keys, values].map(|pool_rows| {
                    let (block_size, width) = (pool.block_size, heads.kv_width());
                    Source::Paged(PagedRows { pool: pool_rows, blocks, block_size, width })
                })
            })
        })?
    } else {
        let layout = PageLayout::of(pool, heads.precision)?;
        let (keys, values) = (pool.keys.storage_and_layout(), pool.values.storage_and_layout());
        let [keys, values] = [words(&keys)?, words(&values)?];
        let are_far = layout.are_far(sequences.iter().map(|sequence| sequence.len).sum());
        with_inputs("paged_attention", &[queries], |inputs| {
            attend(heads, (inputs[0].values, sinks), sequences, |blocks| {
                [Source::Packed(PackedPages { layout, keys, values, blocks, are_far }); 2]
            })
        })?
    };
    Ok(Tensor::from_vec(out, queries.shape(), queries.device())?)
}

/// The words of a packed pool.
fn words<'a>((storage, layout): &'a (impl std::ops::Deref<Target = Storage>, &Layout)) -> Result<&'a [u32]> {
    match (&**storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::U32(words)), Some((start, end))) => Ok(&words[start..end]),
        _ => Err(Error::Argument("a packed pool must be contiguous words on the CPU".into())),
    }
}

/// `[new tokens, d_model]`; `memory` gives keys and values of the sequence that has these blocks.
fn attend<'a>(
    heads: &Heads,
    (queries, sinks): (&[f32], Option<&[f32]>),
    sequences: &'a [PagedSequence<'a>],
    memory: impl Fn(&'a [u32]) -> [Source<'a>; 2],
) -> Vec<f32> {
    let mut out = vec![0.0; queries.len()];
    let mut first = 0;
    let parts: Vec<Sequence<'_>> = sequences
        .iter()
        .map(|&PagedSequence { blocks, len, new }| {
            let [keys, values] = memory(blocks);
            let queries = Strip::new(&queries[first..], heads.d_model());
            first += new * heads.d_model();
            Sequence { queries, new, keys, values, len }
        })
        .collect();
    heads.forward(&parts, sinks, &mut out);
    out
}

/// Rows per piece: even, because products of bf16 take rows in pairs. 128 KiB of a head of 128 columns.
const PIECE: usize = 256;

/// Keys or values of one sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct PagedRows<'a> {
    /// `[num_blocks, block_size, width]`
    pool: &'a [f32],
    blocks: &'a [u32],
    block_size: usize,
    width: usize,
}

impl PagedRows<'_> {
    /// Calls `body` with first row, number of rows and values `[rows, cols]` of consecutive pieces of the first `rows`
    /// rows, columns from `column` on.
    pub(super) fn for_pieces(
        &self,
        column: usize,
        cols: usize,
        rows: usize,
        mut body: impl FnMut(usize, usize, &[f32]),
    ) {
        with_scratch_f32(PIECE.min(rows) * cols, |scratch| {
            for first in (0..rows).step_by(PIECE) {
                let len = PIECE.min(rows - first);
                let piece = &mut scratch[..len * cols];
                for (row, to) in (first..).zip(piece.chunks_exact_mut(cols)) {
                    to.copy_from_slice(&self.row(row)[column..column + cols]);
                }
                body(first, len, piece);
            }
        });
    }

    fn row(&self, row: usize) -> &[f32] {
        let block = self.blocks[row / self.block_size] as usize;
        &self.pool[(block * self.block_size + row % self.block_size) * self.width..][..self.width]
    }
}

#[cfg(test)]
mod tests {
    //! Pages against the same keys and values in one piece, bit for bit: in rows and packed.

    use super::*;
    use crate::Isa;
    use crate::attention::grouped_query_attention_cached;
    use moe_core::CandleOps;
    use moe_core::ops::DecoderOps;
    use moe_core::testing::{assert_close, random, values};

    const SHAPES: [AttentionShape; 4] = [
        AttentionShape::new(3, 3),
        AttentionShape::new(6, 2),
        AttentionShape { scale: Some(0.3), ..AttentionShape::new(5, 1) },
        AttentionShape { window: Some(37), ..AttentionShape::new(4, 2) },
    ];
    const PRECISIONS: [Precision; 2] = [Precision::F32, Precision::Bf16];
    /// Below 32 columns, with two panels of values, odd, even.
    const HEAD_DIMS: [usize; 4] = [10, 34, 7, 16];

    /// Keys and values of several sequences in one piece each, and the same in a pool whose blocks are handed out in any order.
    struct Case {
        shape: AttentionShape,
        head_dim: usize,
        block_size: usize,
        pages: [Tensor; 2],
        /// Blocks, len and new.
        sequences: Vec<(Vec<u32>, usize, usize)>,
        /// Keys and values, row by row.
        whole: Vec<[Tensor; 2]>,
        queries: Tensor,
    }

    impl Case {
        /// Every row of the pool holds NaN before: what no sequence has written must not show.
        fn new(
            shape: AttentionShape,
            head_dim: usize,
            block_size: usize,
            precision: Precision,
            lengths: &[(usize, usize)],
        ) -> Self {
            let num_blocks = 3 + lengths.iter().map(|(len, _)| len.div_ceil(block_size)).sum::<usize>();
            let kv = KvShape { num_kv_heads: shape.num_kv_heads, head_dim };
            let pages = new_pages(num_blocks, block_size, kv, precision, &Device::Cpu).unwrap();
            // Steps of 7 through the pool, which 7 does not divide.
            let step = if num_blocks.is_multiple_of(7) { 1 } else { 7 };
            let mut ids = (0..num_blocks).map(|i| ((i * step + 2) % num_blocks) as u32);
            let sequences: Vec<(Vec<u32>, usize, usize)> = (lengths.iter())
                .map(|&(len, new)| (ids.by_ref().take(len.div_ceil(block_size)).collect(), len, new))
                .collect();
            let rows = lengths.iter().map(|(_, new)| new).sum();
            let piece = |seed: u64, len: usize| random(seed, &[len, kv.width()], 1.0, DType::F32);
            let whole = (lengths.iter().zip(10..)).map(|((len, _), s)| [piece(s, *len), piece(s + 90, *len)]).collect();
            let queries = random(3, &[rows, shape.num_heads * head_dim], 1.0, DType::F32);
            let case = Self { shape, head_dim, block_size, pages, sequences, whole, queries };
            let all: Vec<u32> = (0..(num_blocks * block_size) as u32).collect();
            let nan = Tensor::full(f32::NAN, (all.len(), kv.width()), &Device::Cpu).unwrap();
            write_pages(case.pool(), &nan, &nan, &all, precision).unwrap();
            for ((blocks, len, _), [keys, values]) in case.sequences.iter().zip(&case.whole) {
                let slot = |t: usize| blocks[t / block_size] * block_size as u32 + (t % block_size) as u32;
                // In two pieces, the second from an odd row on.
                let (slots, cut) = ((0..*len).map(slot).collect::<Vec<_>>(), ((len / 2) | 1).min(*len));
                for (from, to) in [(0, cut), (cut, *len)] {
                    let part = |t: &Tensor| t.narrow(0, from, to - from).unwrap();
                    write_pages(case.pool(), &part(keys), &part(values), &slots[from..to], precision).unwrap();
                }
            }
            case
        }

        fn pool(&self) -> PagedKv<'_> {
            let shape = KvShape { num_kv_heads: self.shape.num_kv_heads, head_dim: self.head_dim };
            PagedKv { keys: &self.pages[0], values: &self.pages[1], block_size: self.block_size, shape }
        }

        fn sequences(&self) -> Vec<PagedSequence<'_>> {
            self.sequences.iter().map(|(blocks, len, new)| PagedSequence { blocks, len: *len, new: *new }).collect()
        }

        fn run(&self, precision: Precision) -> Tensor {
            paged_attention(&self.queries, self.pool(), &self.sequences(), self.shape, precision).unwrap()
        }

        /// Each sequence's keys and values in one piece.
        fn contiguous(&self, precision: Precision) -> Vec<f64> {
            let mut first = 0;
            let mut out = Vec::new();
            for ((_, _, new), [k, v]) in self.sequences.iter().zip(&self.whole) {
                let queries = self.queries.narrow(0, first, *new).unwrap();
                first += new;
                out.extend(values(&grouped_query_attention_cached(&queries, k, v, self.shape, precision).unwrap()));
            }
            out
        }
    }

    /// Lengths at the borders of blocks, of query blocks and of pieces; one token, several, none.
    const LENGTHS: [(usize, usize); 8] = [(1, 1), (5, 5), (48, 1), (49, 49), (257, 3), (16, 0), (530, 1), (300, 100)];

    #[test]
    fn pages_have_the_bits_of_one_piece() {
        for (shape, head_dim) in SHAPES.into_iter().zip(HEAD_DIMS) {
            for block_size in [1, 5, 16, 32, 64, 96] {
                for precision in PRECISIONS {
                    let case = Case::new(shape, head_dim, block_size, precision, &LENGTHS);
                    assert_eq!(case.pool().is_in_rows(), block_size % 32 != 0);
                    let got = values(&case.run(precision));
                    assert!(got == case.contiguous(precision), "{shape:?} {head_dim} {block_size} {precision:?}");
                }
            }
        }
    }

    #[test]
    fn neither_threads_nor_instruction_sets_nor_other_sequences_change_anything() {
        for (block_size, precision) in
            [16, 32].into_iter().flat_map(|size| PRECISIONS.map(|precision| (size, precision)))
        {
            for (shape, head_dim) in [(SHAPES[1], 34), (AttentionShape::new(8, 8), 40)] {
                let case = Case::new(shape, head_dim, block_size, precision, &LENGTHS);
                let run = |isa: Isa, threads: usize| {
                    let heads = Heads::new(case.shape, case.head_dim, precision).on(isa);
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    pool.install(|| {
                        values(&attend_pages(&heads, &case.queries, None, case.pool(), &case.sequences()).unwrap())
                    })
                };
                for isa in Isa::available() {
                    // Tiles have bits of their own in bf16.
                    let one = run(if isa.has_common_bits(precision) { Isa::Portable } else { isa }, 1);
                    for threads in [1, 2, 3, 5] {
                        assert!(run(isa, threads) == one, "{isa}, {threads} threads, {precision:?}, {block_size}");
                    }
                }
                let all = values(&case.run(precision));
                let mut first = 0;
                for sequence in case.sequences() {
                    let queries = case.queries.narrow(0, first, sequence.new).unwrap();
                    let alone = paged_attention(&queries, case.pool(), &[sequence], case.shape, precision).unwrap();
                    let width = case.queries.dims()[1];
                    assert_eq!(values(&alone), all[first * width..(first + sequence.new) * width], "{sequence:?}");
                    first += sequence.new;
                }
            }
        }
    }

    #[test]
    fn pages_equal_the_reference() {
        for (shape, head_dim) in SHAPES.into_iter().zip(HEAD_DIMS) {
            let case = Case::new(shape, head_dim, 4, Precision::F32, &[(9, 2), (3, 0), (1, 1), (70, 69)]);
            let want = CandleOps.paged_attention(&case.queries, case.pool(), &case.sequences(), shape).unwrap();
            assert_close(&case.run(Precision::F32), &want, 1e-5, &format!("{shape:?}"));
        }
        let none = Case::new(SHAPES[0], 10, 4, Precision::F32, &[(3, 0)]);
        assert_eq!(none.run(Precision::F32).dims(), [0, 30]);
    }

    #[test]
    fn bad_tables_and_pools_are_named() {
        let shape = SHAPES[0];
        let case = Case::new(shape, 10, 4, Precision::F32, &[(9, 2), (6, 1)]);
        let refused = |queries: usize, sequences: &[PagedSequence<'_>], part: &str| {
            let queries = case.queries.narrow(0, 0, queries).unwrap();
            let error = paged_attention(&queries, case.pool(), sequences, shape, Precision::F32).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        };
        let good = case.sequences();
        refused(2, &good, "queries");
        refused(3, &[good[0], PagedSequence { new: 7, ..good[1] }], "new of sequence 1");
        refused(3, &[good[0], PagedSequence { len: 9, ..good[1] }], "blocks of sequence 1");
        refused(3, &[good[0], PagedSequence { blocks: &[0, 8], ..good[1] }], "block 8");
        let spare = [good[1].blocks, &[u32::MAX]].concat();
        let longer = [good[0], PagedSequence { blocks: &spare, ..good[1] }];
        let got = paged_attention(&case.queries, case.pool(), &longer, shape, Precision::F32).unwrap();
        assert_eq!(values(&got), values(&case.run(Precision::F32)), "a block past the last token is not read");
        let short = PagedKv { values: &case.pages[1].narrow(0, 0, 2).unwrap(), ..case.pool() };
        assert!(paged_attention(&case.queries, short, &good, shape, Precision::F32).is_err());
        let rows = random(9, &[1, 30], 1.0, DType::F32);
        let write =
            |pool, slot, precision| write_pages(pool, &rows, &rows, &[slot], precision).unwrap_err().to_string();
        assert!(write(case.pool(), 4000, Precision::F32).contains("slot 4000"));
        let packed = Case::new(shape, 10, 32, Precision::F32, &[(9, 2)]);
        assert!(write(packed.pool(), 0, Precision::Bf16).contains("in the precision"));
        let error = CandleOps.paged_attention(&packed.queries, packed.pool(), &packed.sequences(), shape).unwrap_err();
        assert!(error.to_string().contains("another backend"), "{error}");
    }
}
