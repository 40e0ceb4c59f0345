//! The few calls of NCCL and CUDA the engine makes, checked. All of this crate's `unsafe` for NCCL is here.
//!
//! The communicator is a nonblocking one: where NCCL needs time it says so, and is asked again.
#![allow(unsafe_code)]

use cudarc::driver::{CudaContext, CudaEvent, CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError};
use cudarc::nccl::result::{self, NcclError};
use cudarc::nccl::sys;
use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The result of calls of NCCL and CUDA; the text names the call.
pub(super) type Result<T> = std::result::Result<T, String>;

/// Bytes on the device, and the rank they are for or from.
pub(super) type Staged = (usize, CudaSlice<u8>);

/// Size of [`Link::new_id`].
pub(super) const ID_BYTES: usize = 128;

/// A GPU of this machine.
pub(super) struct Gpu {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl Gpu {
    /// Looks for the libraries and the device.
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: these load the libraries, whose initialisers run nothing of ours, and look up no symbol.
        let (driver, nccl) =
            unsafe { (cudarc::driver::sys::is_culib_present(), cudarc::nccl::sys::is_culib_present()) };
        if !driver {
            return Err("there is no CUDA driver on this machine (libcuda.so)".into());
        }
        if !nccl {
            return Err(
                "there is no NCCL on this machine (libnccl.so; a link of that name to libnccl.so.2 will do)".into()
            );
        }
        let context = CudaContext::new(ordinal).map_err(|error| cuda(&format!("opening GPU {ordinal}"), error))?;
        let stream = context.new_stream().map_err(|error| cuda("making a stream", error))?;
        Ok(Self { context, stream })
    }

    /// Copies to the device.
    pub(super) fn upload(&self, bytes: &[u8]) -> Result<CudaSlice<u8>> {
        self.stream.clone_htod(bytes).map_err(|error| cuda("copying to the GPU", error))
    }

    /// Room on the device.
    pub(super) fn room(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        self.stream.alloc_zeros(bytes).map_err(|error| cuda("allocating on the GPU", error))
    }

    /// Copies back from the device.
    pub(super) fn download(&self, bytes: &CudaSlice<u8>) -> Result<Vec<u8>> {
        self.stream.clone_dtoh(bytes).map_err(|error| cuda("copying from the GPU", error))
    }

    /// What is done when all that was begun until now is done.
    pub(super) fn mark(&self) -> Result<CudaEvent> {
        self.stream.record_event(None).map_err(|error| cuda("recording an event", error))
    }

    /// Whether it is done.
    pub(super) fn is_done(&self, event: &CudaEvent) -> Result<bool> {
        self.context.bind_to_thread().map_err(|error| cuda("using the GPU", error))?;
        event.try_is_complete().map_err(|error| cuda("the exchange", error))
    }
}

/// A communicator of NCCL's.
pub(super) struct Link {
    comm: sys::ncclComm_t,
    gpu: Gpu,
}

// SAFETY: NCCL lets any thread use a communicator, one at a time; it is used under the engine's mutex only.
unsafe impl Send for Link {}

impl Link {
    /// What all ranks start from; one of them makes it.
    pub(super) fn new_id() -> Result<[u8; ID_BYTES]> {
        let id = result::get_uniqueid().map_err(|error| nccl("ncclGetUniqueId", &error))?;
        Ok(id.internal.map(c_char_to_byte))
    }

    /// Begins to connect; done when it [`Link::is_ready`].
    pub(super) fn start(gpu: Gpu, id: [u8; ID_BYTES], rank: usize, size: usize) -> Result<Self> {
        gpu.context.bind_to_thread().map_err(|error| cuda("using the GPU", error))?;
        let id = sys::ncclUniqueId { internal: id.map(byte_to_c_char) };
        let mut config = nonblocking();
        let mut comm = MaybeUninit::uninit();
        // SAFETY: the configuration is as NCCL_CONFIG_INITIALIZER makes it; the handle is read after success only.
        unsafe { result::comm_init_rank_config(comm.as_mut_ptr(), int(size)?, id, int(rank)?, &mut config) }
            .map_err(|error| nccl("ncclCommInitRankConfig", &error))?;
        // SAFETY: written by the call above, which has succeeded.
        Ok(Self { comm: unsafe { comm.assume_init() }, gpu })
    }

    /// The device.
    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether what was begun last has got as far as the device's stream.
    pub(super) fn is_ready(&self) -> Result<bool> {
        let mut state = sys::ncclResult_t::ncclSuccess;
        // SAFETY: the communicator lives as long as `self`.
        unsafe { sys::ncclCommGetAsyncError(self.comm, &mut state) }
            .result()
            .map_err(|error| nccl("ncclCommGetAsyncError", &error))?;
        match state {
            sys::ncclResult_t::ncclSuccess => Ok(true),
            sys::ncclResult_t::ncclInProgress => Ok(false),
            error => Err(nccl("NCCL", &NcclError(error))),
        }
    }

    /// Begins to send and receive, all at once. The buffers are to be kept until an event after it is done, or the
    /// communicator is aborted.
    pub(super) fn exchange(&self, sends: &[Staged], receives: &mut [Staged]) -> Result<()> {
        self.gpu.context.bind_to_thread().map_err(|error| cuda("using the GPU", error))?;
        let stream = &self.gpu.stream;
        result::group_start().map_err(|error| nccl("ncclGroupStart", &error))?;
        let begun = (|| {
            for (peer, bytes) in sends {
                let (from, _recorded_on_drop) = bytes.device_ptr(stream);
                let (len, kind) = (bytes.len(), sys::ncclDataType_t::ncclUint8);
                // SAFETY: the buffer is on this device, has `len` bytes and is kept by the caller.
                unsafe { result::send(from as *const _, len, kind, int(*peer)?, self.comm, stream.cu_stream().cast()) }
                    .map_err(|error| nccl("ncclSend", &error))?;
            }
            for (peer, bytes) in receives {
                let (len, kind) = (bytes.len(), sys::ncclDataType_t::ncclUint8);
                let (to, _recorded_on_drop) = bytes.device_ptr_mut(stream);
                // SAFETY: as above; nobody else uses the buffer.
                unsafe { result::recv(to as *mut _, len, kind, int(*peer)?, self.comm, stream.cu_stream().cast()) }
                    .map_err(|error| nccl("ncclRecv", &error))?;
            }
            Ok(())
        })();
        // A group is ended in any case.
        let ended = result::group_end().map_err(|error| nccl("ncclGroupEnd", &error));
        begun.and(ended.map(drop))
    }

    /// Ends the communicator though exchanges are under way.
    pub(super) fn abort(self) {
        drop(self);
    }

    /// Ends the communicator once its exchanges are done, for which there is some time.
    pub(super) fn finish(mut self, most: Duration) {
        let until = Instant::now() + most;
        // SAFETY: the communicator is ours and used no more.
        let begun = unsafe { result::comm_finalize(self.comm) }.is_ok();
        while begun && Instant::now() < until {
            match self.is_ready() {
                Ok(false) => std::thread::sleep(Duration::from_micros(100)),
                Ok(true) => {
                    let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
                    // SAFETY: it is finalized, and taken out of `self`.
                    let _nothing_to_tell = unsafe { result::comm_destroy(comm) };
                    return;
                }
                Err(_) => return,
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.comm.is_null() {
            // SAFETY: the communicator is ours and not destroyed yet.
            let _nothing_to_tell = unsafe { result::comm_abort(self.comm) };
        }
    }
}

/// What `NCCL_CONFIG_INITIALIZER` of NCCL 2.17 gives, but nonblocking. A newer library takes its defaults for what came later.
fn nonblocking() -> sys::ncclConfig_t {
    const MAGIC: u32 = 0xcafe_beef;
    const VERSION: u32 = 21_700;
    const UNDEFINED: c_int = c_int::MIN;
    // SAFETY: the struct is plain integers and pointers; all-zero bytes are valid for these.
    let mut config: sys::ncclConfig_t = unsafe { std::mem::zeroed() };
    config.size = size_of::<sys::ncclConfig_t>();
    config.magic = MAGIC;
    config.version = VERSION;
    config.blocking = 0;
    config.cgaClusterSize = UNDEFINED;
    config.minCTAs = UNDEFINED;
    config.maxCTAs = UNDEFINED;
    config.splitShare = UNDEFINED;
    config
}

fn byte_to_c_char(byte: u8) -> std::ffi::c_char {
    std::ffi::c_char::from_ne_bytes([byte])
}

fn c_char_to_byte(char: std::ffi::c_char) -> u8 {
    u8::from_ne_bytes(char.to_ne_bytes())
}

fn int(value: usize) -> Result<c_int> {
    c_int::try_from(value).map_err(|_| format!("{value} is more than NCCL counts to"))
}

fn cuda(what: &str, error: DriverError) -> String {
    format!("{what} failed: {error:?}")
}

fn nccl(call: &str, error: &NcclError) -> String {
    format!("{call} failed: {:?}", error.0)
}
