//! Attention over keys and values in pages: blocks of tokens anywhere in a pool, a table of blocks per sequence.
//!
//! A head's keys and values are copied together piece by piece, each piece small enough to stay in the second-level
//! cache until it has been multiplied. Which blocks a sequence has changes no bit of the result. Neither allocates nor
//! fills blocks: that is the caller's.

use super::blocks::{Heads, Sequence, Source, Strip};
use super::{AttentionShape, PagedKv, PagedSequence};
use crate::buffer::with_scratch_f32;
use crate::custom::{expect_f32, with_inputs};
use crate::{Precision, Result};
use candle_core::{CpuStorage, InplaceOp2, Layout, Tensor};
use moe_core::ops::host;

/// Writes keys and values of new tokens into their places, in place.
///
/// # Shapes
/// `keys` and `values` `[tokens, width]`, f32 on the CPU; `slots` `[tokens]`: `block * block_size + row` of each
///
/// # Errors
/// If a shape does not fit or a slot is outside the pool.
pub fn write_pages(pool: PagedKv<'_>, keys: &Tensor, values: &Tensor, slots: &[u32]) -> Result<()> {
    pool.check_write(keys, values, slots)?;
    expect_f32("write_pages", &[pool.keys, pool.values, keys, values])?;
    for (pages, rows) in [(pool.keys, keys), (pool.values, values)] {
        pages.inplace_op2(&rows.contiguous()?, &WriteRows(slots))?;
    }
    Ok(())
}

/// Copies row `i` to row `slots[i]` of a pool.
struct WriteRows<'a>(&'a [u32]);

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
        let (CpuStorage::F32(pages), Some((start, end))) = (pages, pages_layout.contiguous_offsets()) else {
            candle_core::bail!("a pool must be contiguous and f32")
        };
        let pages = &mut pages[start..end];
        let (_, width) = rows_layout.shape().dims2()?;
        for (row, &slot) in host::elements::<f32>(rows, rows_layout)?.chunks_exact(width.max(1)).zip(self.0) {
            pages[slot as usize * width..][..width].copy_from_slice(row);
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
    let head_dim = shape.head_dim(queries.dims2()?.1, pool.keys.dims3()?.2)?;
    pool.check_read(queries, sequences)?;
    let heads = Heads::new(shape, head_dim, precision);
    let out = with_inputs("paged_attention", &[queries, pool.keys, pool.values], |inputs| {
        attend(&heads, [0, 1, 2].map(|part| inputs[part].values), pool.block_size(), sequences)
    })?;
    Ok(Tensor::from_vec(out, queries.shape(), queries.device())?)
}

/// `[new tokens, d_model]`
fn attend(heads: &Heads, [q, k, v]: [&[f32]; 3], block_size: usize, sequences: &[PagedSequence<'_>]) -> Vec<f32> {
    let mut out = vec![0.0; q.len()];
    let mut first = 0;
    let parts: Vec<Sequence<'_>> = sequences
        .iter()
        .map(|&PagedSequence { blocks, len, new }| {
            let width = heads.kv_width();
            let [keys, values] = [k, v].map(|pool| Source::Paged(PagedRows { pool, blocks, block_size, width }));
            let queries = Strip::new(&q[first..], heads.d_model());
            first += new * heads.d_model();
            Sequence { queries, new, keys, values, len }
        })
        .collect();
    heads.forward(&parts, &mut out);
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
    //! Pages against the same keys and values in one piece, bit for bit.

    use super::*;
    use crate::Isa;
    use crate::attention::grouped_query_attention_cached;
    use candle_core::DType;
    use moe_core::CandleOps;
    use moe_core::ops::DecoderOps;
    use moe_core::testing::{assert_close, random, values};

    const SHAPES: [AttentionShape; 3] = [
        AttentionShape { num_heads: 3, num_kv_heads: 3 },
        AttentionShape { num_heads: 6, num_kv_heads: 2 },
        AttentionShape { num_heads: 5, num_kv_heads: 1 },
    ];
    const HEAD_DIM: usize = 10;

    /// A pool in which every element differs, sequences with blocks in any order, and their queries.
    struct Case {
        keys: Tensor,
        values: Tensor,
        /// Blocks, len and new.
        sequences: Vec<(Vec<u32>, usize, usize)>,
        queries: Tensor,
    }

    impl Case {
        fn new(shape: AttentionShape, block_size: usize, dtype: DType, lengths: &[(usize, usize)]) -> Self {
            let num_blocks = 3 + lengths.iter().map(|(len, _)| len.div_ceil(block_size)).sum::<usize>();
            // Steps of 7 through the pool, which 7 does not divide.
            let step = if num_blocks.is_multiple_of(7) { 1 } else { 7 };
            let mut ids = (0..num_blocks).map(|i| ((i * step + 2) % num_blocks) as u32);
            let sequences = (lengths.iter())
                .map(|&(len, new)| (ids.by_ref().take(len.div_ceil(block_size)).collect(), len, new))
                .collect();
            let kv = [num_blocks, block_size, shape.num_kv_heads * HEAD_DIM];
            let rows = lengths.iter().map(|(_, new)| new).sum();
            Self {
                keys: random(1, &kv, 1.0, dtype),
                values: random(2, &kv, 1.0, dtype),
                sequences,
                queries: random(3, &[rows, shape.num_heads * HEAD_DIM], 1.0, dtype),
            }
        }

        fn pool(&self) -> PagedKv<'_> {
            PagedKv { keys: &self.keys, values: &self.values }
        }

        fn sequences(&self) -> Vec<PagedSequence<'_>> {
            self.sequences.iter().map(|(blocks, len, new)| PagedSequence { blocks, len: *len, new: *new }).collect()
        }

        fn run(&self, shape: AttentionShape, precision: Precision) -> Tensor {
            paged_attention(&self.queries, self.pool(), &self.sequences(), shape, precision).unwrap()
        }

        /// Each sequence's keys and values in one piece, row by row.
        fn contiguous(&self, shape: AttentionShape, precision: Precision) -> Vec<f64> {
            let block_size = self.pool().block_size();
            let mut first = 0;
            let mut out = Vec::new();
            for (blocks, len, new) in &self.sequences {
                let row = |pool: &Tensor, t: usize| {
                    pool.get(blocks[t / block_size] as usize).unwrap().narrow(0, t % block_size, 1).unwrap()
                };
                let gather =
                    |pool: &Tensor| Tensor::cat(&(0..*len).map(|t| row(pool, t)).collect::<Vec<_>>(), 0).unwrap();
                let queries = self.queries.narrow(0, first, *new).unwrap();
                first += new;
                let (k, v) = (gather(&self.keys), gather(&self.values));
                out.extend(values(&grouped_query_attention_cached(&queries, &k, &v, shape, precision).unwrap()));
            }
            out
        }
    }

    /// Lengths at the borders of blocks, of query blocks and of pieces; one token, several, none.
    const LENGTHS: [(usize, usize); 8] = [(1, 1), (5, 5), (48, 1), (49, 49), (257, 3), (16, 0), (530, 1), (300, 100)];

    #[test]
    fn pages_have_the_bits_of_one_piece() {
        for shape in SHAPES {
            for block_size in [1, 5, 16, 64] {
                for precision in [Precision::F32, Precision::Bf16] {
                    let case = Case::new(shape, block_size, DType::F32, &LENGTHS);
                    let got = values(&case.run(shape, precision));
                    assert_eq!(got, case.contiguous(shape, precision), "{shape:?} {block_size} {precision:?}");
                }
            }
        }
    }

    #[test]
    fn neither_threads_nor_instruction_sets_nor_other_sequences_change_anything() {
        let shape = SHAPES[1];
        let case = Case::new(shape, 16, DType::F32, &LENGTHS);
        let run = |isa: Isa, threads: usize, precision: Precision| {
            let heads = Heads::new(shape, HEAD_DIM, precision).on(isa);
            let [q, k, v] =
                [&case.queries, &case.keys, &case.values].map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap());
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| attend(&heads, [&q, &k, &v], 16, &case.sequences()))
        };
        for precision in [Precision::F32, Precision::Bf16] {
            for isa in Isa::available() {
                // Tiles have bits of their own in bf16.
                let first = if isa.has_common_bits(precision) { Isa::Portable } else { isa };
                let one = run(first, 1, precision);
                for threads in [1, 2, 3, 5] {
                    assert!(run(isa, threads, precision) == one, "{isa}, {threads} threads, {precision:?}");
                }
            }
        }
        let all = values(&case.run(shape, Precision::F32));
        let mut first = 0;
        for sequence in case.sequences() {
            let queries = case.queries.narrow(0, first, sequence.new).unwrap();
            let alone = paged_attention(&queries, case.pool(), &[sequence], shape, Precision::F32).unwrap();
            let width = shape.num_heads * HEAD_DIM;
            assert_eq!(values(&alone), all[first * width..(first + sequence.new) * width], "{sequence:?}");
            first += sequence.new;
        }
    }

    #[test]
    fn pages_equal_the_reference() {
        for shape in SHAPES {
            let case = Case::new(shape, 4, DType::F32, &[(9, 2), (3, 0), (1, 1), (70, 69)]);
            let want = CandleOps.paged_attention(&case.queries, case.pool(), &case.sequences(), shape).unwrap();
            assert_close(&case.run(shape, Precision::F32), &want, 1e-5, &format!("{shape:?}"));
        }
        let none = Case::new(SHAPES[0], 4, DType::F32, &[(3, 0)]);
        assert_eq!(none.run(SHAPES[0], Precision::F32).dims(), [0, 30]);
        let wide = Case::new(SHAPES[0], 4, DType::F64, &[(3, 1)]);
        let error = paged_attention(&wide.queries, wide.pool(), &wide.sequences(), SHAPES[0], Precision::F32);
        assert!(error.unwrap_err().to_string().contains("F64"), "other types are refused by name");
    }

    #[test]
    fn rows_are_written_to_their_slots_and_nowhere_else() {
        let shape = SHAPES[1];
        let case = Case::new(shape, 4, DType::F32, &[(9, 2), (6, 1)]);
        let width = shape.num_kv_heads * HEAD_DIM;
        let (keys, rows) = (random(8, &[3, width], 1.0, DType::F32), random(9, &[3, width], 1.0, DType::F32));
        let slots = [17, 3, 0];
        let copy = || PagedKvOwned(case.keys.copy().unwrap(), case.values.copy().unwrap());
        let (ours, reference) = (copy(), copy());
        write_pages(ours.pool(), &keys, &rows, &slots).unwrap();
        CandleOps.write_pages(reference.pool(), &keys, &rows, &slots).unwrap();
        assert_eq!(values(&ours.0), values(&reference.0));
        assert_eq!(values(&ours.1), values(&reference.1));
        let kept = |t: &Tensor| values(&t.flatten(0, 1).unwrap().narrow(0, 4, 13).unwrap());
        assert_eq!(kept(&ours.0), kept(&case.keys));
        assert_eq!(values(&ours.1.flatten(0, 1).unwrap().get(17).unwrap()), values(&rows.get(0).unwrap()));
        assert!(write_pages(ours.pool(), &keys, &rows, &[0, 1, 4000]).unwrap_err().to_string().contains("slot 4000"));
    }

    struct PagedKvOwned(Tensor, Tensor);

    impl PagedKvOwned {
        fn pool(&self) -> PagedKv<'_> {
            PagedKv { keys: &self.0, values: &self.1 }
        }
    }

    #[test]
    fn bad_tables_are_named() {
        let shape = SHAPES[0];
        let case = Case::new(shape, 4, DType::F32, &[(9, 2), (6, 1)]);
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
        assert_eq!(values(&got), values(&case.run(shape, Precision::F32)), "a block past the last token is not read");
        let short = PagedKv { values: &case.values.narrow(0, 0, 2).unwrap(), ..case.pool() };
        assert!(paged_attention(&case.queries, short, &good, shape, Precision::F32).is_err());
    }
}
