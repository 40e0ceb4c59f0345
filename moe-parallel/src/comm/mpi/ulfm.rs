//! [`Ulfm`]: going on without the processes that have died, with an Open MPI that can (5, under `mpirun --with-ft ulfm`).
//!
//! The calls are looked up when the job starts, so that one binary runs with an MPI that has them and with one that has not.
//! ("User-Level Failure Mitigation", Bland et al. 2013; an extension to the standard.)
#![allow(unsafe_code)]

use super::raw::{Processes, check};
use crate::comm::engine::LinkResult as Result;
use ::mpi::ffi;
use std::ffi::{CStr, c_int};
use std::mem::MaybeUninit;
use std::ops::RangeInclusive;

/// Open MPI's classes of errors for a process that has died: `MPIX_ERR_PROC_FAILED`, and the same of a receive from anybody.
/// An MPI without fault tolerance gives neither.
pub(super) const DEATHS: RangeInclusive<c_int> = 75..=76;

type OnComm = unsafe extern "C" fn(ffi::MPI_Comm) -> c_int;
type ToComm = unsafe extern "C" fn(ffi::MPI_Comm, *mut ffi::MPI_Comm) -> c_int;
type ToGroup = unsafe extern "C" fn(ffi::MPI_Comm, *mut ffi::MPI_Group) -> c_int;

/// The calls of the extension that are used here.
#[derive(Debug)]
pub(super) struct Ulfm {
    failure_ack: OnComm,
    failure_get_acked: ToGroup,
    comm_shrink: ToComm,
}

impl Ulfm {
    /// None if this MPI has no such calls.
    pub(super) fn find() -> Option<Self> {
        let (ack, get_acked) = (symbol(c"MPIX_Comm_failure_ack")?, symbol(c"MPIX_Comm_failure_get_acked")?);
        let shrink = symbol(c"MPIX_Comm_shrink")?;
        // SAFETY: these are the functions of these names, whose signatures the extension fixes.
        unsafe {
            Some(Self {
                failure_ack: std::mem::transmute::<*mut libc::c_void, OnComm>(ack),
                failure_get_acked: std::mem::transmute::<*mut libc::c_void, ToGroup>(get_acked),
                comm_shrink: std::mem::transmute::<*mut libc::c_void, ToComm>(shrink),
            })
        }
    }

    /// The processes of a communicator that are known to be dead. Receives from anybody no longer fail for them.
    pub(super) fn acknowledge(&self, comm: ffi::MPI_Comm) -> Result<Processes> {
        // SAFETY: `comm` is a communicator of a started MPI.
        check("MPIX_Comm_failure_ack", unsafe { (self.failure_ack)(comm) })?;
        let mut dead = MaybeUninit::uninit();
        // SAFETY: as above; the group is read after success only.
        check("MPIX_Comm_failure_get_acked", unsafe { (self.failure_get_acked)(comm, dead.as_mut_ptr()) })?;
        // SAFETY: written by the call above, which has succeeded.
        Ok(Processes(unsafe { dead.assume_init() }))
    }

    /// A communicator of the processes that live, in their order. Waits for all of them.
    pub(super) fn shrink(&self, comm: ffi::MPI_Comm) -> Result<ffi::MPI_Comm> {
        let mut smaller = MaybeUninit::uninit();
        // SAFETY: `comm` is a communicator of a started MPI; the new one is read after success only.
        check("MPIX_Comm_shrink", unsafe { (self.comm_shrink)(comm, smaller.as_mut_ptr()) })?;
        // SAFETY: written by the call above, which has succeeded.
        Ok(unsafe { smaller.assume_init() })
    }
}

/// A function among those this process has loaded.
fn symbol(name: &CStr) -> Option<*mut libc::c_void> {
    // SAFETY: the name is a C string; nothing is called yet.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}
