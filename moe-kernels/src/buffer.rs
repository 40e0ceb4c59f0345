//! Memory for packed operands: aligned to cache lines, in huge pages where it is large, and kept by each thread between
//! calls, because fresh pages cost more than the packing itself.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::Arc;
#[cfg(target_os = "linux")]
use std::sync::{Mutex, PoisonError, Weak};

/// Bytes of a cache line.
const LINE: usize = 64;
/// Bytes of a huge page, which buffers of at least as many are aligned to. Read with 4 KiB pages, weights come at three
/// quarters of the memory's speed (24 instead of 31 GB/s on two Zen 4 cores).
const HUGE_PAGE: usize = 2 << 20;

/// 32-bit words aligned to 64 bytes.
pub struct Words {
    start: NonNull<u32>,
    len: usize,
    /// Words there is memory for, all of them initialised.
    capacity: usize,
    memory: Memory,
}

/// Whose the words are.
enum Memory {
    /// The allocator's.
    Allocated,
    /// A map of their own.
    #[cfg(target_os = "linux")]
    Mapped,
    /// A part of a map that is nobody else's.
    #[cfg(target_os = "linux")]
    Part { _of: Arc<Chunk> },
    /// Somebody's who shares them: only read.
    Shared { _owner: Arc<dyn AsRef<[u8]> + Send + Sync> },
}

/// A stretch of somebody's bytes, which stay where they are as long as anybody has it.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBytes {
    /// `range` of the bytes of `owner`, which are always the same ones; `None` if it has fewer.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Option<Self> {
        (*owner).as_ref().get(range.clone())?;
        Some(Self { owner, range })
    }

    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedBytes").field("range", &self.range).finish_non_exhaustive()
    }
}

// SAFETY: the memory belongs to the value alone, and words have no ties to a thread.
unsafe impl Send for Words {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Words {}

impl Words {
    /// `len` zero words.
    pub fn zeros(len: usize) -> Self {
        if len == 0 {
            return Self { start: NonNull::dangling(), len: 0, capacity: 0, memory: Memory::Allocated };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout is not empty. Fresh memory is zero without being touched, so that it is the threads that fill it
        // that wait for its pages.
        let start = unsafe {
            let bytes = alloc_zeroed(layout);
            let Some(start) = NonNull::new(bytes.cast::<u32>()) else { handle_alloc_error(layout) };
            if layout.align() == HUGE_PAGE {
                ask_for_huge_pages(bytes, layout.size());
            }
            start
        };
        Self { start, len, capacity: len, memory: Memory::Allocated }
    }

    /// `len` zero words that are going to stay: large ones in pages of their own, since an allocator that aligns to huge pages
    /// keeps up to one more beside each (17% of OLMoE's experts in bf16); small ones side by side, since an allocator rounds them up
    /// (experts of 128 KiB to 160).
    pub(crate) fn lasting(len: usize) -> Self {
        #[cfg(target_os = "linux")]
        {
            let bytes = len * size_of::<u32>();
            let place = match bytes {
                0 => None,
                HUGE_PAGE.. => map_huge(bytes).map(|start| (start, Memory::Mapped)),
                _ => Chunk::part(bytes).map(|(start, of)| (start, Memory::Part { _of: of })),
            };
            if let Some((start, memory)) = place {
                return Self { start: start.cast(), len, capacity: len, memory };
            }
        }
        Self::zeros(len)
    }

    /// Words that lie in `bytes`, without copying them; `None` if they do not begin at a cache line or end inside of a word.
    pub(crate) fn shared(bytes: SharedBytes) -> Option<Self> {
        let slice = bytes.as_slice();
        let (len, start) = (slice.len() / 4, NonNull::from(slice).cast::<u32>());
        if !slice.len().is_multiple_of(4) || !start.addr().get().is_multiple_of(LINE) {
            return None;
        }
        Some(Self { start, len, capacity: len, memory: Memory::Shared { _owner: bytes.owner } })
    }

    fn layout(len: usize) -> Layout {
        let bytes = len.checked_mul(4).expect("a buffer must fit the address space");
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        Layout::from_size_align(bytes, align).expect("a buffer must fit the address space")
    }

    /// Makes room for `len` words; their content is whatever was there before.
    fn resize(&mut self, len: usize) {
        if len > self.capacity {
            *self = Self::zeros(len);
        }
        self.len = len;
    }

    /// The words.
    pub fn as_slice(&self) -> &[u32] {
        // SAFETY: `len` initialised words lie there, or none at a dangling address.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    /// The words; those of somebody who shares them are copied first.
    pub fn as_mut_slice(&mut self) -> &mut [u32] {
        if let Memory::Shared { .. } = self.memory {
            *self = self.clone();
        }
        // SAFETY: as in `as_slice`; the borrow is exclusive, and the words are nobody else's.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        match self.memory {
            // SAFETY: allocated in `zeros` with the layout of as many words.
            Memory::Allocated if self.capacity > 0 => unsafe {
                dealloc(self.start.as_ptr().cast(), Self::layout(self.capacity));
            },
            // SAFETY: mapped in `lasting`, with as many bytes, and by nobody else.
            #[cfg(target_os = "linux")]
            Memory::Mapped => unsafe {
                libc::munmap(self.start.as_ptr().cast(), map_bytes(self.capacity * size_of::<u32>()));
            },
            // It goes with the last of its parts.
            #[cfg(target_os = "linux")]
            Memory::Part { .. } => {}
            Memory::Allocated | Memory::Shared { .. } => {}
        }
    }
}

impl Default for Words {
    fn default() -> Self {
        Self::zeros(0)
    }
}

impl Clone for Words {
    fn clone(&self) -> Self {
        let mut copy = Self::zeros(self.len);
        copy.as_mut_slice().copy_from_slice(self.as_slice());
        copy
    }
}

impl fmt::Debug for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Words").field("len", &self.len).finish_non_exhaustive()
    }
}

/// Bytes of a [`Chunk`].
#[cfg(target_os = "linux")]
const CHUNK: usize = 8 * HUGE_PAGE;

/// A map whose parts are handed out once, one after another; given back to the system with the last of them.
#[cfg(target_os = "linux")]
struct Chunk {
    start: NonNull<u8>,
}

// SAFETY: a chunk is an address; its parts are each somebody's alone.
#[cfg(target_os = "linux")]
unsafe impl Send for Chunk {}
// SAFETY: as above.
#[cfg(target_os = "linux")]
unsafe impl Sync for Chunk {}

#[cfg(target_os = "linux")]
impl Chunk {
    /// `bytes` zero bytes, less than a huge page, at the beginning of a cache line, and what they lie in; `None` if the system gives
    /// no memory.
    fn part(bytes: usize) -> Option<(NonNull<u8>, Arc<Self>)> {
        /// The chunk that was made last, and how many of its bytes are taken.
        static LAST: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));
        let bytes = bytes.next_multiple_of(LINE);
        assert!(bytes <= HUGE_PAGE, "a larger buffer has a map of its own");
        let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
        let chunk = match last.0.upgrade() {
            Some(chunk) if bytes <= CHUNK - last.1 => chunk,
            _ => {
                let chunk = Arc::new(Self { start: map_huge(CHUNK)? });
                *last = (Arc::downgrade(&chunk), 0);
                chunk
            }
        };
        // SAFETY: the part ends inside of the map.
        let start = unsafe { chunk.start.add(last.1) };
        last.1 += bytes;
        Some((start, chunk))
    }
}

#[cfg(target_os = "linux")]
impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped in `part`, with as many bytes; nobody has a part of it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), CHUNK) };
    }
}

/// Whole pages.
#[cfg(target_os = "linux")]
fn map_bytes(bytes: usize) -> usize {
    bytes.next_multiple_of(4096)
}

/// Fresh zero pages for so many bytes, from the beginning of a huge page on; `None` if the system gives none.
#[cfg(target_os = "linux")]
fn map_huge(bytes: usize) -> Option<NonNull<u8>> {
    let (bytes, protection) = (map_bytes(bytes), libc::PROT_READ | libc::PROT_WRITE);
    // Room for the whole and what comes before its first huge page; what is not needed goes back untouched.
    let room = bytes.checked_add(HUGE_PAGE)?;
    // SAFETY: a new map, wherever the system puts it; the parts that are given back are whole pages of it, outside of
    // `[start, start + bytes)`.
    unsafe {
        let map = libc::mmap(ptr::null_mut(), room, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        if map == libc::MAP_FAILED {
            return None;
        }
        let before = map.cast::<u8>().align_offset(HUGE_PAGE);
        let start = map.cast::<u8>().add(before);
        if before > 0 {
            libc::munmap(map, before);
        }
        libc::munmap(start.add(bytes).cast(), room - before - bytes);
        ask_for_huge_pages(start, bytes);
        NonNull::new(start)
    }
}

/// Asks for huge pages under fresh memory; without them it is slower, not wrong.
///
/// # Safety
/// The bytes must be allocated, and aligned to a page.
unsafe fn ask_for_huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    // SAFETY: advice about memory that is ours; its content stays.
    unsafe {
        libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

/// Asks for huge pages under memory that an allocator gave and nothing has been written to, as far as whole ones lie in it.
pub(crate) fn prefer_huge_pages(words: &[u32]) {
    let (start, bytes) = (words.as_ptr().cast::<u8>().cast_mut(), size_of_val(words));
    let before = start.align_offset(HUGE_PAGE).min(bytes);
    let whole = (bytes - before) / HUGE_PAGE * HUGE_PAGE;
    if whole > 0 {
        // SAFETY: inside of the words, from the beginning of a huge page on.
        unsafe { ask_for_huge_pages(start.add(before), whole) };
    }
}

/// Largest buffer a thread keeps, 256 MiB.
const KEEP_WORDS: usize = 64 << 20;

thread_local! {
    static SPARE: RefCell<Vec<Words>> = const { RefCell::new(Vec::new()) };
}

/// Calls `body` with `len` words of scratch memory whose content is not defined.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [u32]) -> R) -> R {
    let mut words = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
    words.resize(len);
    let result = body(words.as_mut_slice());
    if words.capacity <= KEEP_WORDS {
        SPARE.with_borrow_mut(|spare| spare.push(words));
    }
    result
}

/// The bytes of numbers.
pub(crate) fn as_bytes<T: Number>(numbers: &[T]) -> &[u8] {
    // SAFETY: numbers have no padding, and any byte is initialised.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

/// Numbers of 4 bytes.
pub(crate) trait Number: Copy {
    /// From its bytes in memory.
    fn of_bytes(bytes: [u8; 4]) -> Self;
}

macro_rules! numbers {
    ($($number:ty),*) => {
        $(impl Number for $number {
            fn of_bytes(bytes: [u8; 4]) -> Self {
                Self::from_ne_bytes(bytes)
            }
        })*
    };
}
numbers!(u32, i32, f32);

/// The words as f32.
pub(crate) fn as_f32(words: &[u32]) -> &[f32] {
    // SAFETY: both are 4 bytes of the same alignment, and every bit pattern is an f32.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

/// [`with_scratch`] as f32.
pub(crate) fn with_scratch_f32<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    with_scratch(len, |words| {
        // SAFETY: both are 4 bytes of the same alignment, and every bit pattern is an f32.
        body(unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_nests_and_has_the_asked_length() {
        with_scratch(5, |outer| {
            outer.fill(7);
            with_scratch(1000, |inner| {
                inner.fill(9);
                assert_eq!((inner.len(), inner.as_ptr() as usize % 64), (1000, 0));
            });
            assert_eq!(outer, [7; 5]);
        });
        with_scratch(0, |none| assert!(none.is_empty()));
    }

    #[test]
    fn shared_words_stay_where_they_are_until_they_are_written_to() {
        let mut owner = Words::zeros(64);
        owner.as_mut_slice().iter_mut().enumerate().for_each(|(i, w)| *w = i as u32);
        struct Owner(Words);
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                as_bytes(self.0.as_slice())
            }
        }
        let (bytes, owner): (_, Arc<Owner>) = (owner.as_slice().as_ptr(), Arc::new(Owner(owner)));
        let part = |range: Range<usize>| SharedBytes::new(owner.clone(), range);
        assert!(part(0..257).is_none() && part(Range { start: 3, end: 2 }).is_none());
        assert!(Words::shared(part(4..64).unwrap()).is_none() && Words::shared(part(64..66).unwrap()).is_none());
        let mut words = Words::shared(part(64..128).unwrap()).unwrap();
        assert_eq!((words.as_slice()[0], words.as_slice().as_ptr()), (16, bytes.wrapping_add(16)));
        drop(owner);
        words.as_mut_slice()[1] = 7;
        assert!(words.as_slice()[..2] == [16, 7] && words.as_slice().as_ptr() != bytes.wrapping_add(16));
        assert_eq!(f32::of_bytes(1.5f32.to_ne_bytes()), 1.5);
    }

    #[test]
    fn small_lasting_buffers_lie_side_by_side_and_are_nobody_elses() {
        let make = |i: usize| {
            let mut words = Words::lasting(1 + i * 4099);
            assert!(words.as_slice().iter().all(|&word| word == 0));
            words.as_mut_slice().fill(i as u32);
            words
        };
        // Several chunks; some are given back while others are taken.
        let mut kept: Vec<Words> = (0..128).map(make).collect();
        kept.retain(|words| words.as_slice()[0] % 3 == 0);
        kept.extend((0..128).map(make));
        for words in &kept {
            let first = words.as_slice()[0];
            assert!(words.as_slice().iter().all(|&word| word == first));
            assert_eq!(
                (words.as_slice().len(), words.as_slice().as_ptr() as usize % LINE),
                (1 + first as usize * 4099, 0)
            );
        }
        std::thread::scope(|scope| {
            let all: Vec<_> = (0..4).map(|_| scope.spawn(|| (0..64).map(make).collect::<Vec<_>>())).collect();
            for words in all.into_iter().flat_map(|made| made.join().unwrap()) {
                assert!(words.as_slice().iter().all(|&word| word == words.as_slice()[0]));
            }
        });
    }

    #[test]
    fn large_buffers_are_zero_and_copied_whole() {
        for len in [0, 1, 15, 16, HUGE_PAGE / 4 - 1, HUGE_PAGE / 4, HUGE_PAGE + 7] {
            let mut words = Words::zeros(len);
            assert!(words.as_slice().len() == len && words.as_slice().iter().all(|&w| w == 0));
            words.as_mut_slice().iter_mut().enumerate().for_each(|(i, w)| *w = i as u32);
            assert_eq!(words.clone().as_slice(), words.as_slice());
            let mut lasting = Words::lasting(len);
            assert!(lasting.as_slice().len() == len && lasting.as_slice().iter().all(|&w| w == 0));
            lasting.as_mut_slice().copy_from_slice(words.as_slice());
            assert_eq!(lasting.clone().as_slice(), words.as_slice());
            let is_aligned = |words: &Words| (words.as_slice().as_ptr() as usize).is_multiple_of(HUGE_PAGE);
            assert!(len * 4 < HUGE_PAGE || is_aligned(&lasting));
            assert!(len * 4 < HUGE_PAGE || (words.as_slice().as_ptr() as usize).is_multiple_of(HUGE_PAGE));
        }
    }
}
