//! Pages: taken, shared, copied before a write, given back.

use super::*;
use crate::{Error, LogitsOf};
use candle_core::{Device, Tensor};
use moe_core::CandleOps;
use moe_core::ops::{DecoderOps, KvShape};
use moe_core::testing::values;

const SIZE: usize = 4;

fn pool(num_pages: usize) -> KvPool {
    let shape = |head_dim| KvShape { num_kv_heads: 1, head_dim };
    let layout = CacheLayout { layers: vec![shape(2), shape(3)] };
    KvPool::new(layout, PoolConfig { num_pages, page_size: SIZE }, &CandleOps, &Device::Cpu).unwrap()
}

/// Appends tokens that are numbered from `first`; each layer's keys become that number.
fn append(pool: &KvPool, sequence: &mut CachedSequence, new: usize, first: u32) -> crate::Result<()> {
    let mut step = PagedStep::default();
    step.add(sequence, &vec![0; new], LogitsOf::None, pool.pages())?;
    pool.copy_pages(&step)?;
    for layer in 0..2 {
        let pages = pool.layer(layer);
        let width = pages.shape.width();
        let rows = (0..new).flat_map(|t| vec![(first + t as u32) as f32; width]).collect::<Vec<_>>();
        let rows = Tensor::from_vec(rows, (new, width), &Device::Cpu)?;
        CandleOps.write_pages(pages, &rows, &rows, &step.slots)?;
    }
    sequence.grow(new);
    Ok(())
}

fn read(pool: &KvPool, sequence: &CachedSequence) -> Vec<f64> {
    let row = |t: usize| {
        let page = sequence.page_ids()[t / SIZE] as usize;
        let of = |layer: usize| values(&pool.layer(layer).values.get(page).unwrap().get(t % SIZE).unwrap())[0];
        assert_eq!(of(0), of(1), "layers agree");
        of(0)
    };
    (0..sequence.len()).map(row).collect()
}

#[test]
fn clones_share_pages_until_one_is_written_to() {
    let pool = pool(8);
    let mut first = pool.sequence();
    append(&pool, &mut first, 6, 10).unwrap();
    assert_eq!(pool.free_pages(), 6);
    let mut second = first.clone();
    assert_eq!(pool.free_pages(), 6, "a clone takes nothing");

    append(&pool, &mut second, 1, 90).unwrap();
    assert_eq!(pool.free_pages(), 5, "the shared last page was copied");
    assert_eq!(second.page_ids()[0], first.page_ids()[0], "the full page is still shared");
    append(&pool, &mut first, 3, 50).unwrap();
    assert_eq!(pool.free_pages(), 4, "the first owns its last page alone and grows by one");
    assert_eq!(read(&pool, &first), [10., 11., 12., 13., 14., 15., 50., 51., 52.]);
    assert_eq!(read(&pool, &second), [10., 11., 12., 13., 14., 15., 90.]);

    drop(first);
    assert_eq!(pool.free_pages(), 6);
    second.truncate(3);
    assert_eq!(pool.free_pages(), 7);
    append(&pool, &mut second, 2, 70).unwrap();
    assert_eq!(read(&pool, &second), [10., 11., 12., 70., 71.]);
    drop(second);
    assert_eq!(pool.free_pages(), 8);
}

#[test]
fn an_empty_pool_is_an_error_and_takes_nothing() {
    let pool = pool(2);
    let mut sequence = pool.sequence();
    append(&pool, &mut sequence, 5, 0).unwrap();
    let error = append(&pool, &mut sequence, 4, 5).unwrap_err();
    assert!(matches!(error, Error::OutOfPages { needed: 1, free: 0 }), "{error}");
    assert_eq!(sequence.len(), 5);
    append(&pool, &mut sequence, 3, 5).unwrap();
    let mut other = pool.sequence();
    assert!(append(&pool, &mut other, 1, 0).is_err());
    sequence.truncate(0);
    append(&pool, &mut other, 1, 0).unwrap();
    for bad in [PoolConfig { num_pages: 0, page_size: 4 }, PoolConfig { num_pages: 1 << 40, page_size: 4 }] {
        let error = KvPool::new(CacheLayout::default(), bad, &CandleOps, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("pool"), "{error}");
    }
}

#[test]
fn steps_number_positions_and_slots() {
    let pool = pool(4);
    let (mut a, mut b) = (pool.sequence().with_seed(7), pool.sequence());
    append(&pool, &mut a, 3, 0).unwrap();
    let mut step = PagedStep::default();
    step.add(&mut a, &[10, 11], LogitsOf::All, pool.pages()).unwrap();
    step.add(&mut b, &[12], LogitsOf::Last, pool.pages()).unwrap();
    step.add(&mut pool.sequence(), &[13, 14], LogitsOf::None, pool.pages()).unwrap();
    assert_eq!(step.token_ids(), [10, 11, 12, 13, 14]);
    assert_eq!(step.logit_rows(), [0, 1, 2]);
    assert_eq!(step.positions, [3, 4, 0, 0, 1]);
    assert_eq!(step.draws[..3], [(7, 3), (7, 4), (0, 0)]);
    let (pages_a, pages_b) = (a.page_ids(), b.page_ids());
    assert_eq!(step.slots[..3], [pages_a[0] * 4 + 3, pages_a[1] * 4, pages_b[0] * 4]);
    let lens: Vec<_> = step.sequences().iter().map(|s| (s.len, s.new)).collect();
    assert_eq!(lens, [(5, 2), (1, 1), (2, 2)]);
}

#[test]
fn steps_are_split_between_sequences_where_that_is_even() {
    let pool = pool(64);
    let step = |lengths: &[usize]| {
        let mut step = PagedStep::default();
        for (index, &new) in lengths.iter().enumerate() {
            let mut sequence = pool.sequence().with_seed(index as u64);
            append(&pool, &mut sequence, 1 + index, 0).unwrap();
            step.add(&mut sequence, &ids(0..new as u32), LogitsOf::Last, pool.pages()).unwrap();
        }
        step
    };
    for (lengths, count, want) in [
        (&[1usize, 1, 1, 1, 1][..], 2, Some(&[2usize, 3][..])),
        (&[1, 1, 1], 3, Some(&[1, 1, 1])),
        (&[5, 4, 6, 4], 2, Some(&[2, 2])),
        (&[8, 1, 1], 2, None),
        (&[1, 1, 8], 2, None),
        (&[9], 2, None),
        (&[1, 1, 1, 1], 1, None),
        (&[1, 1], 3, None),
        (&[], 2, None),
    ] {
        let whole = step(lengths);
        let parts = whole.split(count, SIZE);
        let sequences = parts.as_ref().map(|parts| parts.iter().map(PagedStep::num_sequences).collect::<Vec<_>>());
        assert_eq!(sequences.as_deref(), want, "{lengths:?} in {count}");
        let Some(parts) = parts else { continue };
        let all = |of: fn(&PagedStep) -> Vec<u32>| parts.iter().flat_map(of).collect::<Vec<_>>();
        assert_eq!(all(|step| step.token_ids().to_vec()), whole.token_ids());
        assert_eq!(all(|step| step.positions.clone()), whole.positions);
        assert_eq!(all(|step| step.slots.clone()), whole.slots);
        assert_eq!(parts.iter().flat_map(|step| step.draws.clone()).collect::<Vec<_>>(), whole.draws);
        assert_eq!(all(PagedStep::logit_rows).len(), lengths.len());
    }
}

fn ids(range: std::ops::Range<u32>) -> Vec<u32> {
    range.collect()
}

/// A sequence of these tokens, written to as if its keys were the tokens.
fn written(pool: &KvPool, token_ids: &[u32]) -> CachedSequence {
    let mut sequence = pool.sequence();
    append(pool, &mut sequence, token_ids.len(), token_ids[0]).unwrap();
    sequence
}

#[test]
fn a_kept_beginning_is_found_in_whole_pages() {
    let pool = pool(8);
    let mut cache = PrefixCache::new(pool.pages());
    assert!(cache.lookup(&ids(0..11), 0).is_empty());
    let mut first = written(&pool, &ids(0..11));
    cache.keep(&ids(0..11), &mut first, 0);
    assert_eq!((cache.len(), cache.idle_pages()), (2, 0), "the third page is not full");

    let mut again = cache.lookup(&ids(0..11), 0);
    assert_eq!((again.len(), &again.page_ids()[..], pool.free_pages()), (8, &first.page_ids()[..2], 5));
    append(&pool, &mut again, 1, 8).unwrap();
    assert_eq!(read(&pool, &again), (0..9).map(f64::from).collect::<Vec<_>>(), "shared pages are not written to");
    assert_eq!(cache.lookup(&ids(0..7), 0).len(), 4, "as far as the tokens go");
    assert_eq!(cache.lookup(&[0, 1, 2, 3, 9, 9, 9, 9], 0).len(), 4);
    assert!(cache.lookup(&[1, 1, 2, 3], 0).is_empty() && cache.lookup(&ids(4..8), 0).is_empty());
    assert!(cache.lookup(&ids(0..8), 1).is_empty(), "of another salt");

    drop((first, again));
    assert_eq!((pool.free_pages(), cache.idle_pages()), (6, 2), "kept without a sequence");
    assert_eq!(cache.lookup(&ids(0..8), 0).len(), 8);
    cache.clear();
    assert!(cache.is_empty() && pool.free_pages() == 8);
}

#[test]
fn sequences_that_wrote_the_same_share_it_afterwards() {
    let pool = pool(8);
    let mut cache = PrefixCache::new(pool.pages());
    let (mut first, mut second) = (written(&pool, &ids(0..9)), written(&pool, &ids(0..9)));
    assert_eq!(pool.free_pages(), 2);
    cache.keep(&ids(0..9), &mut first, 0);
    cache.keep(&ids(0..9), &mut second, 0);
    assert_eq!((pool.free_pages(), cache.len()), (4, 2));
    assert_eq!(second.page_ids()[..2], first.page_ids()[..2]);
    assert_eq!(read(&pool, &second), (0..9).map(f64::from).collect::<Vec<_>>());
}

#[test]
fn room_is_made_by_what_was_unused_for_the_longest() {
    let pool = pool(8);
    let mut cache = PrefixCache::new(pool.pages());
    for begin in [0, 100, 200] {
        let mut sequence = written(&pool, &ids(begin..begin + 8));
        cache.keep(&ids(begin..begin + 8), &mut sequence, 0);
    }
    let held = cache.lookup(&ids(0..8), 0);
    assert_eq!((pool.free_pages(), cache.idle_pages()), (2, 4));
    assert!(cache.has_idle(4) && !cache.has_idle(5));
    assert_eq!(cache.evict(1), 1);
    assert_eq!(cache.lookup(&ids(100..108), 0).len(), 4, "the last page of the oldest text went first");
    assert_eq!(cache.lookup(&ids(200..208), 0).len(), 8);
    assert_eq!(cache.evict(9), 3, "pages that a sequence holds stay");
    assert_eq!((pool.free_pages(), cache.len()), (6, 2));
    assert_eq!(cache.lookup(&ids(0..8), 0).page_ids(), held.page_ids());
    drop(held);
    assert_eq!(cache.evict(9), 2);
    assert_eq!(pool.free_pages(), 8);
}

#[test]
fn a_step_travels_as_words() {
    let pool = pool(9);
    let (mut a, mut b) = (pool.sequence().with_seed(u64::MAX - 5), pool.sequence());
    append(&pool, &mut a, 6, 0).unwrap();
    let mut step = PagedStep::default();
    step.add(&mut a.clone(), &[10, 11, 12], LogitsOf::All, pool.pages()).unwrap();
    step.add(&mut b, &[13], LogitsOf::Last, pool.pages()).unwrap();
    step.add(&mut pool.sequence(), &[14, 15, 16, 17, 18], LogitsOf::None, pool.pages()).unwrap();
    assert_eq!(step.copies().len(), 1);
    let words = step.to_words();
    assert_eq!(PagedStep::from_words(&words, pool.config()).unwrap(), step);
    let empty = PagedStep::default();
    assert_eq!(PagedStep::from_words(&empty.to_words(), pool.config()).unwrap(), empty);
    for cut in 0..words.len() {
        assert!(PagedStep::from_words(&words[..cut], pool.config()).is_err(), "cut at {cut}");
    }
    let few = PoolConfig { num_pages: 2, ..pool.config() };
    assert!(PagedStep::from_words(&words, few).unwrap_err().to_string().contains("page"));
    let mut random = moe_core::CounterRng::new(5, 0);
    for _ in 0..2000 {
        let mut damaged = words.clone();
        for _ in 0..1 + random.below(3) {
            let at = random.below(words.len() as u32) as usize;
            damaged[at] = [random.next_u32(), random.below(8)][random.below(2) as usize];
        }
        // Whatever comes out, nothing panics and no page is out of reach.
        if let Ok(step) = PagedStep::from_words(&damaged, pool.config()) {
            assert!(step.slots.iter().all(|&slot| (slot as usize) < 9 * SIZE));
        }
    }
}
