//! One operation by an io_uring: the way round every filter of system calls.

use std::sync::atomic::{AtomicU32, Ordering};

use super::gate;
use super::scratch::NotTried;

/// The head of `struct io_uring_params`, as far as it is read here.
#[repr(C)]
#[derive(Default)]
struct Params {
    sq_entries: u32,
    cq_entries: u32,
    flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    features: u32,
    wq_fd: u32,
    resv: [u32; 3],
    /// head, tail, ring_mask, ring_entries, flags, dropped, array, resv1; then the user's address.
    sq_off: [u32; 8],
    sq_user: u64,
    /// head, tail, ring_mask, ring_entries, overflow, cqes, flags, resv1; then the user's address.
    cq_off: [u32; 8],
    cq_user: u64,
}

/// `struct io_uring_sqe`, as far as these need it.
#[repr(C)]
#[derive(Default)]
pub(super) struct Entry {
    opcode: u8,
    flags: u8,
    ioprio: u16,
    fd: i32,
    off: u64,
    addr: u64,
    len: u32,
    advice: u32,
    rest: [u64; 4],
}

impl Entry {
    pub(super) fn madvise(at: usize, len: usize, advice: i32) -> Self {
        Self {
            opcode: 25,
            fd: -1,
            addr: at as u64,
            len: len as u32,
            advice: advice as u32,
            ..Self::default()
        }
    }

    /// `len` bytes from the start.
    pub(super) fn fallocate(fd: usize, mode: i32, len: usize) -> Self {
        Self {
            opcode: 17,
            fd: fd as i32,
            addr: len as u64,
            len: mode as u32,
            ..Self::default()
        }
    }

    pub(super) fn ftruncate(fd: usize, len: usize) -> Self {
        Self {
            opcode: 55,
            fd: fd as i32,
            off: len as u64,
            ..Self::default()
        }
    }
}

const OFF_SQES: usize = 0x1000_0000;
const GETEVENTS: usize = 1;
const FEAT_SINGLE_MMAP: u32 = 1;
const RING: usize = 4096;

struct Ring {
    fd: usize,
    rings: usize,
    entries: usize,
}

impl Drop for Ring {
    fn drop(&mut self) {
        for at in [self.rings, self.entries] {
            if at != 0 {
                // SAFETY: mapped here.
                unsafe { libc::munmap(at as *mut libc::c_void, RING) };
            }
        }
        // SAFETY: opened here.
        unsafe { libc::close(self.fd as i32) };
    }
}

/// Has a new ring do it, and waits for that. `armed` is called just before.
pub(super) fn submit(entry: Entry, armed: impl FnOnce()) -> Result<usize, NotTried> {
    let said = |call: &str, errno| {
        let error = std::io::Error::from_raw_os_error(errno);
        format!("{call}: {error}")
    };
    let mut params = Params::default();
    let args = [2, &raw mut params as usize, 0, 0, 0, 0];
    // SAFETY: the parameters are as large as the kernel expects.
    let fd = unsafe { gate::own_call(libc::SYS_io_uring_setup, args) }
        .map_err(|errno| said("io_uring_setup", errno))?;
    let mut ring = Ring {
        fd,
        rings: 0,
        entries: 0,
    };
    if params.features & FEAT_SINGLE_MMAP == 0 {
        return Err("io_uring without IORING_FEAT_SINGLE_MMAP".to_owned());
    }
    let map = |offset| {
        let rights = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let flags = (libc::MAP_SHARED | libc::MAP_POPULATE) as usize;
        // SAFETY: a new mapping where the kernel likes.
        unsafe { gate::own_call(libc::SYS_mmap, [0, RING, rights, flags, fd, offset]) }
            .map_err(|errno| said("mmap of the ring", errno))
    };
    ring.rings = map(0)?;
    ring.entries = map(OFF_SQES)?;
    let [_, tail, .., array, _] = params.sq_off;
    let rings = ring.rings;
    // SAFETY: two entries and the offsets that the kernel has given lie in the pages mapped above.
    let word = |offset: u32| unsafe { &*((rings + offset as usize) as *const AtomicU32) };
    // SAFETY: as above.
    unsafe { std::ptr::write(ring.entries as *mut Entry, entry) };
    word(array).store(0, Ordering::Relaxed);
    // Release: the kernel sees the entry with the tail.
    word(tail).store(1, Ordering::Release);
    armed();
    // SAFETY: no signal mask is given.
    unsafe { gate::own_call(libc::SYS_io_uring_enter, [fd, 1, 1, GETEVENTS, 0, 0]) }
        .map_err(|errno| said("io_uring_enter", errno))?;
    // The result is the second word after the 64 bits of user data. Acquire, with the kernel's release of its tail.
    word(params.cq_off[1]).load(Ordering::Acquire);
    let result = word(params.cq_off[5] + 8).load(Ordering::Relaxed) as i32;
    if result < 0 {
        return Err(said("what the io_uring did", -result));
    }
    Ok(0)
}
