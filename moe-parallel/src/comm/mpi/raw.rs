//! The few calls of MPI the engine makes, with their return codes checked. All of this crate's `unsafe` for MPI is here and in
//! [`ulfm`](super::ulfm).
//!
//! Nothing here blocks but [`MpiLink::start`], [`Link::shrink`] and [`Link::finalize`]. A buffer belongs to its [`MpiTransfer`]
//! until MPI is done with it; one that is dropped before is leaked, for MPI may still write to it.
#![allow(unsafe_code)]

use super::ulfm::{self, Ulfm};
use crate::comm::engine::{Link, LinkResult as Result, Tag, Threads, Transfer, Trouble};
use crate::comm::pace::Pace;
use ::mpi::ffi;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::time::Duration;

/// MPI counts in this type.
const MOST_BYTES: usize = c_int::MAX as usize;

/// A communicator of MPI's that is ours alone.
#[derive(Debug)]
pub(super) struct MpiLink {
    comm: ffi::MPI_Comm,
    rank: usize,
    /// The ranks they had when the job was started.
    origins: Vec<usize>,
    /// A process of the job has died.
    is_shrunken: bool,
    ulfm: Option<Ulfm>,
}

// SAFETY: MPI runs at thread level SERIALIZED at least (`MpiLink::start` checks): any thread may call it, one at a time.
// `MpiLink` and `MpiTransfer` are used under the engine's mutex only, which with `Threads::One` no other thread takes.
unsafe impl Send for MpiLink {}
// SAFETY: as for `MpiLink`.
unsafe impl Send for MpiTransfer {}

impl MpiLink {
    /// Starts MPI and waits, without a deadline, for all processes of the job.
    pub(super) fn start(threads: Threads) -> Result<Self> {
        let mut started = 0;
        // SAFETY: this call is allowed before MPI is started and after it has ended.
        check("MPI_Initialized", unsafe { ffi::MPI_Initialized(&mut started) })?;
        if started != 0 {
            return Err(Trouble::Other("MPI was started before; a process starts it once".into()));
        }
        // SAFETY: constants of the library.
        let (single, serialized, world) =
            unsafe { (ffi::RSMPI_THREAD_SINGLE, ffi::RSMPI_THREAD_SERIALIZED, ffi::RSMPI_COMM_WORLD) };
        let wanted = if threads == Threads::One { single } else { serialized };
        let mut level = 0;
        // SAFETY: MPI is not started yet; null stands for a program without arguments.
        check("MPI_Init_thread", unsafe {
            ffi::MPI_Init_thread(ptr::null_mut(), ptr::null_mut(), wanted, &mut level)
        })?;
        if level < wanted {
            // SAFETY: MPI is started and nothing is under way.
            check("MPI_Finalize", unsafe { ffi::MPI_Finalize() })?;
            let text = format!("this MPI offers thread level {level}, but {wanted} (serialized) is needed");
            return Err(text.into());
        }
        return_errors(world)?;
        let mut comm = MaybeUninit::uninit();
        // SAFETY: MPI is started; the new handle is read after success only.
        check("MPI_Comm_dup", unsafe { ffi::MPI_Comm_dup(world, comm.as_mut_ptr()) })?;
        // SAFETY: written by the call above, which has succeeded.
        Self::of(unsafe { comm.assume_init() }, None)
    }

    /// A communicator; of one that was shrunken, the ranks these had when the job was started.
    fn of(comm: ffi::MPI_Comm, origins: Option<Vec<usize>>) -> Result<Self> {
        return_errors(comm)?;
        let (mut rank, mut size) = (0, 0);
        // SAFETY: `comm` is a communicator of a started MPI.
        check("MPI_Comm_rank", unsafe { ffi::MPI_Comm_rank(comm, &mut rank) })?;
        // SAFETY: as above.
        check("MPI_Comm_size", unsafe { ffi::MPI_Comm_size(comm, &mut size) })?;
        let size = number(size)?;
        Ok(Self {
            comm,
            rank: number(rank)?,
            is_shrunken: origins.is_some(),
            origins: origins.unwrap_or_else(|| (0..size).collect()),
            ulfm: Ulfm::find(),
        })
    }
}

impl Link for MpiLink {
    type Transfer = MpiTransfer;

    const NAME: &'static str = "MPI";
    const MOST_BYTES: usize = MOST_BYTES;
    const SPINS: u32 = Pace::SPINS;
    const LEAVES_BEHIND: bool = false;

    fn rank(&self) -> usize {
        self.rank
    }

    fn origins(&self) -> &[usize] {
        &self.origins
    }

    fn send(&mut self, peer: usize, tag: Tag, buffer: Vec<u8>) -> Result<MpiTransfer> {
        let (bytes, peer) = (count(buffer.len())?, count(peer)?);
        let mut transfer = MpiTransfer { request: null_request(), buffer, arriving: None, done: false };
        // SAFETY: the buffer has `bytes` bytes and lives, unmoved, until the request is done: `MpiTransfer` sees to that.
        check("MPI_Isend", unsafe {
            let (data, kind) = (transfer.buffer.as_ptr().cast::<c_void>(), ffi::RSMPI_UINT8_T);
            ffi::MPI_Isend(data, bytes, kind, peer, tag as c_int, self.comm, &mut transfer.request)
        })?;
        Ok(transfer)
    }

    fn receive(&mut self) -> Result<Option<(usize, Tag, MpiTransfer)>> {
        // 1. Is there any?
        let (mut flag, mut status) = (0, MaybeUninit::uninit());
        // SAFETY: the status is read only if the flag says that it was written.
        check("MPI_Iprobe", unsafe {
            let (any, tag) = (ffi::RSMPI_ANY_SOURCE, ffi::RSMPI_ANY_TAG);
            ffi::MPI_Iprobe(any, tag, self.comm, &mut flag, status.as_mut_ptr())
        })?;
        if flag == 0 {
            return Ok(None);
        }
        // SAFETY: the flag says that there is a message, so its status was written.
        let status = unsafe { status.assume_init() };
        let bytes = received(&status)?;
        let tag = Tag::of(status.MPI_TAG)
            .ok_or_else(|| format!("a message with the unknown tag {} has come", status.MPI_TAG))?;
        let peer = usize::try_from(status.MPI_SOURCE)
            .ok()
            .filter(|&peer| peer < self.size())
            .ok_or_else(|| format!("a message of rank {} has come, of {} ranks", status.MPI_SOURCE, self.size()))?;

        // 2. The very message that was found: nobody else receives on this communicator.
        let buffer = Vec::with_capacity(bytes);
        let mut transfer = MpiTransfer { request: null_request(), buffer, arriving: Some(bytes), done: false };
        // SAFETY: the buffer has room for `bytes` bytes and lives, unmoved, until the request is done.
        check("MPI_Irecv", unsafe {
            let (data, kind) = (transfer.buffer.as_mut_ptr().cast::<c_void>(), ffi::RSMPI_UINT8_T);
            let (source, tag) = (status.MPI_SOURCE, status.MPI_TAG);
            ffi::MPI_Irecv(data, count(bytes)?, kind, source, tag, self.comm, &mut transfer.request)
        })?;
        Ok(Some((peer, tag, transfer)))
    }

    fn acknowledge_dead(&mut self) -> Result<Vec<usize>> {
        let Some(ulfm) = &self.ulfm else { return Ok(Vec::new()) };
        let dead = ulfm.acknowledge(self.comm)?;
        let dead = ranks_in(&dead, &group_of(self.comm)?)?;
        Ok(dead.into_iter().flatten().collect())
    }

    fn cannot_shrink(&self) -> Option<&'static str> {
        let why = "this MPI cannot go on without a rank; Open MPI 5 can, with --with-ft ulfm";
        self.ulfm.is_none().then_some(why)
    }

    /// All ranks that live are waited for, without a deadline. What is under way stays unfinished.
    fn shrink(self, _timeout: Duration) -> Result<Self> {
        let ulfm = self.ulfm.as_ref().ok_or_else(|| String::from("this MPI has no fault tolerance"))?;
        let comm = ulfm.shrink(self.comm)?;
        let before = ranks_in(&group_of(comm)?, &group_of(self.comm)?)?;
        let origin = |rank: Option<usize>| rank.and_then(|rank| self.origins.get(rank)).copied();
        let origins: Option<Vec<usize>> = before.into_iter().map(origin).collect();
        let origins = origins.ok_or_else(|| String::from("MPIX_Comm_shrink has added a rank"))?;
        Self::of(comm, Some(origins))
    }

    /// Ends MPI, and waits for all processes to do so. For the thread that has started it.
    ///
    /// Not where a process has died: Open MPI 5.0.11 waited for it without an end in 3 of 83 jobs.
    fn finalize(mut self) -> Result<()> {
        if self.is_shrunken {
            return Ok(());
        }
        // SAFETY: nothing is under way on the communicator, and it is not used again.
        check("MPI_Comm_free", unsafe { ffi::MPI_Comm_free(&mut self.comm) })?;
        // SAFETY: MPI is started, and `MpiLink` was the only way to it.
        check("MPI_Finalize", unsafe { ffi::MPI_Finalize() })
    }
}

/// A message under way, with its buffer, which is also kept (for ever) where MPI reports that it could not begin.
pub(super) struct MpiTransfer {
    request: ffi::MPI_Request,
    buffer: Vec<u8>,
    /// Of one that is received: how many bytes it has, which are the buffer's once it is done.
    arriving: Option<usize>,
    done: bool,
}

impl Transfer for MpiTransfer {
    fn test(&mut self) -> Result<bool> {
        if self.done {
            return Ok(true);
        }
        let (mut flag, mut status) = (0, MaybeUninit::uninit());
        // SAFETY: the request is active: `done` is false. The status is read only if the flag says that it was written.
        check("MPI_Test", unsafe { ffi::MPI_Test(&mut self.request, &mut flag, status.as_mut_ptr()) })?;
        if flag == 0 {
            return Ok(false);
        }
        self.done = true;
        if let Some(bytes) = self.arriving {
            // SAFETY: the flag says that the receive is done, so its status was written.
            let got = received(unsafe { status.assume_init_ref() })?;
            if got != bytes {
                return Err(format!("MPI_Irecv got {got} bytes of a message of {bytes}").into());
            }
            // SAFETY: MPI has written this many bytes, for which there is room.
            unsafe { self.buffer.set_len(bytes) };
        }
        Ok(true)
    }

    fn into_bytes(mut self) -> Vec<u8> {
        debug_assert!(self.done, "the message is under way");
        std::mem::take(&mut self.buffer)
    }
}

impl Drop for MpiTransfer {
    fn drop(&mut self) {
        if !self.done {
            std::mem::forget(std::mem::take(&mut self.buffer));
        }
    }
}

fn null_request() -> ffi::MPI_Request {
    // SAFETY: a constant of the library.
    unsafe { ffi::RSMPI_REQUEST_NULL }
}

/// Makes errors on this communicator return codes instead of ends of the process.
fn return_errors(comm: ffi::MPI_Comm) -> Result<()> {
    // SAFETY: `comm` is a communicator of a started MPI, the handler a constant of the library.
    check("MPI_Comm_set_errhandler", unsafe { ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN) })
}

/// Bytes of the message of this status.
fn received(status: &ffi::MPI_Status) -> Result<usize> {
    let mut bytes = 0;
    // SAFETY: the status was written by MPI.
    check("MPI_Get_count", unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut bytes) })?;
    number(bytes)
}

fn count(value: usize) -> Result<c_int> {
    c_int::try_from(value).map_err(|_| format!("{value} is more than the {MOST_BYTES} that MPI counts to").into())
}

fn number(value: c_int) -> Result<usize> {
    usize::try_from(value).map_err(|_| format!("MPI gives {value} as a rank or a size").into())
}

/// Some processes, as MPI lists them.
pub(super) struct Processes(pub(super) ffi::MPI_Group);

impl Drop for Processes {
    fn drop(&mut self) {
        // SAFETY: the group is ours and used no more.
        unsafe { ffi::MPI_Group_free(&mut self.0) };
    }
}

/// All processes of a communicator, also those that have died.
fn group_of(comm: ffi::MPI_Comm) -> Result<Processes> {
    let mut group = MaybeUninit::uninit();
    // SAFETY: `comm` is a communicator of a started MPI; the group is read after success only.
    check("MPI_Comm_group", unsafe { ffi::MPI_Comm_group(comm, group.as_mut_ptr()) })?;
    // SAFETY: written by the call above, which has succeeded.
    Ok(Processes(unsafe { group.assume_init() }))
}

/// For each of some processes its place among others, if it is one of them.
fn ranks_in(some: &Processes, others: &Processes) -> Result<Vec<Option<usize>>> {
    let mut size = 0;
    // SAFETY: the group is one of a started MPI.
    check("MPI_Group_size", unsafe { ffi::MPI_Group_size(some.0, &mut size) })?;
    let own: Vec<c_int> = (0..size).collect();
    let mut theirs = vec![0; own.len()];
    // SAFETY: both arrays have `size` elements, and the groups are ones of a started MPI.
    check("MPI_Group_translate_ranks", unsafe {
        ffi::MPI_Group_translate_ranks(some.0, size, own.as_ptr(), others.0, theirs.as_mut_ptr())
    })?;
    // What is no rank is a negative constant.
    Ok(theirs.into_iter().map(|rank| usize::try_from(rank).ok()).collect())
}

/// The error of a return code.
pub(super) fn check(call: &str, code: c_int) -> Result<()> {
    const SUCCESS: c_int = ffi::MPI_SUCCESS as c_int;
    if code == SUCCESS {
        return Ok(());
    }
    let mut class = 0;
    // SAFETY: any code may be asked for.
    let known = unsafe { ffi::MPI_Error_class(code, &mut class) } == SUCCESS;
    if known && ulfm::DEATHS.contains(&class) {
        return Err(Trouble::Death);
    }
    let mut text = [0u8; ffi::MPI_MAX_ERROR_STRING as usize + 1];
    let mut len = 0;
    // SAFETY: the buffer is longer than the longest text.
    let known = unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut len) } == SUCCESS;
    let text = usize::try_from(len).ok().and_then(|len| text.get(..len)).filter(|_| known);
    Err(format!("{call} failed with code {code}: {}", String::from_utf8_lossy(text.unwrap_or(b"unknown"))).into())
}
