//! System calls as somebody makes them who has never heard of this crate.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

use shootdown::Range;

pub(crate) const PAGE: u64 = 4096;

pub(crate) fn start(range: Range) -> usize {
    range.start().get() as usize
}

pub(crate) fn page(range: Range, nth: u64) -> Range {
    Range::new(range.start().get() + nth * PAGE, PAGE).unwrap()
}

/// The call, by its number: the result or the errno.
pub(crate) fn raw(nr: libc::c_long, [a, b, c, d, e, f]: [usize; 6]) -> Result<usize, i32> {
    // SAFETY: tests hand in ranges of their own.
    match unsafe { libc::syscall(nr, a, b, c, d, e, f) } {
        -1 => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
        result => Ok(result as usize),
    }
}

pub(crate) fn munmap(range: Range) -> Result<usize, i32> {
    raw(
        libc::SYS_munmap,
        [start(range), range.len() as usize, 0, 0, 0, 0],
    )
}

/// Fresh pages over the range; whether that went well.
pub(crate) fn map_fixed(range: Range) -> bool {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as usize;
    let args = [start(range), range.len() as usize, 3, flags, usize::MAX, 0];
    raw(libc::SYS_mmap, args).is_ok()
}

/// Whether the first byte can be read: the kernel tries.
pub(crate) fn is_mapped(range: Range) -> bool {
    read(range).is_some()
}

pub(crate) fn read(range: Range) -> Option<u8> {
    let mut byte = 0u8;
    let local = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: start(range) as *mut libc::c_void,
        iov_len: 1,
    };
    let own = std::process::id() as i32;
    // SAFETY: one byte of this frame is written; what is read may be anything.
    let read = unsafe { libc::process_vm_readv(own, &local, 1, &remote, 1, 0) };
    (read == 1).then_some(byte)
}

pub(crate) fn touch(range: Range) {
    for at in (start(range)..start(range) + range.len() as usize).step_by(PAGE as usize) {
        // SAFETY: the test has mapped it, writable.
        unsafe { std::ptr::write_volatile(at as *mut u8, 0xa5) };
    }
}
