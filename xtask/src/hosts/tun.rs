//! TUN devices and a precise wait for them: the calls of Linux that the forwarder needs. All of xtask's `unsafe` is here.
#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

/// Makes a network device whose packets (IP, nothing in front) are read from and written to the file, which never blocks. The
/// device goes when the file is closed, and works in whatever namespace it is moved to.
pub(super) fn open(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: a plain C structure, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte is left for the end of the name.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("device name {name:?} is too long")));
    }
    for (to, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the descriptor is open, and the request outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) })?;
    Ok(file)
}

/// Waits until a file can be read, or the timeout is over, to some microseconds; which can be read.
pub(super) fn wait(files: &[File], timeout: Duration) -> io::Result<Vec<bool>> {
    let poll = |file: &File| libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let mut polls: Vec<libc::pollfd> = files.iter().map(poll).collect();
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    // SAFETY: as many polls as are said, which outlive the call, as the timeout does; null leaves the signals as they are.
    let code =
        unsafe { libc::ppoll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, &raw const timeout, std::ptr::null()) };
    match check(code) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(polls.iter().map(|poll| poll.revents != 0).collect()),
    }
}

/// Makes the waits of this thread end on time, and puts it before others that want a core.
pub(super) fn hurry() -> io::Result<()> {
    const HIGHEST: libc::c_int = -20;
    let nanosecond: libc::c_ulong = 1;
    // SAFETY: a call about numbers alone.
    check(unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, nanosecond) })?;
    // SAFETY: as above; on Linux 0 is the calling thread.
    check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, HIGHEST) })
}

fn check(code: libc::c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
