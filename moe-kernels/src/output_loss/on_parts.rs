//! For tests: the parts of one vocabulary, each on a thread of its own.

use moe_core::ops::{PartStatistics, VocabularyPart, VocabularyParts};
use std::sync::{Arc, Barrier, Mutex};

/// Where the parts of one vocabulary meet.
#[derive(Debug)]
struct Meeting {
    said: Vec<Mutex<Vec<PartStatistics>>>,
    barrier: Barrier,
}

#[derive(Debug)]
struct Member(Arc<Meeting>, usize);

impl VocabularyParts for Member {
    fn gather(&self, own: &[PartStatistics]) -> moe_core::Result<Vec<Vec<PartStatistics>>> {
        let Self(meeting, index) = self;
        *meeting.said[*index].lock().unwrap() = own.to_vec();
        meeting.barrier.wait();
        let all = meeting.said.iter().map(|said| said.lock().unwrap().clone()).collect();
        meeting.barrier.wait();
        Ok(all)
    }
}

/// What `work` gives on each of the parts of these sizes.
pub(crate) fn on_parts<R: Send>(sizes: &[usize], work: impl Fn(VocabularyPart) -> R + Sync) -> Vec<R> {
    let said = sizes.iter().map(|_| Mutex::default()).collect();
    let meeting = Arc::new(Meeting { said, barrier: Barrier::new(sizes.len()) });
    let mut start = 0;
    let parts: Vec<VocabularyPart> = sizes
        .iter()
        .enumerate()
        .map(|(index, size)| {
            let held = start..start + size;
            start = held.end;
            let parts = Arc::new(Member(Arc::clone(&meeting), index));
            VocabularyPart { held, size: sizes.iter().sum(), parts }
        })
        .collect();
    std::thread::scope(|scope| {
        let work = &work;
        let running: Vec<_> = parts.into_iter().map(|part| scope.spawn(move || work(part))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
