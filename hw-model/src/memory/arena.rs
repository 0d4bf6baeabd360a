//! The arena: a reserved piece of the process's address space, and the system calls that change it.
//!
//! Everything in it is either *cut off* (`PROT_NONE`, private, without memory) or a shared mapping of frames. Every call
//! replaces mappings by `MAP_FIXED` and is therefore atomic for the CPU: no address of the arena is ever free for
//! others to map.
//!
//! # Child processes
//! Mappings of frames are marked `MADV_DONTFORK`: a child that shared them would see its parent's frames change owners
//! below it, and no notifier of the parent's would tell it. In the child the addresses are unmapped. A `fork` that falls
//! between [`Arena::map`] and [`Arena::keep_from_children`] may inherit that one mapping; its parent is not harmed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use shootdown::{MemoryError, PageSize, Range, Rights};

use crate::error::ModelError;
use crate::physical::FRAME_BYTES;

/// The largest arena: the address space of a process is 128 TiB, and others live there.
const LIMIT: u64 = 1 << 46;

const ALIGN: u64 = PageSize::TwoMiB.bytes();

/// A reserved range, unmapped when dropped.
pub(super) struct Arena {
    range: Range,
}

impl Arena {
    /// Reserves `bytes`, rounded up to 2 MiB and aligned to it. May wait (system calls), as may all of the following.
    pub(super) fn reserve(bytes: u64) -> Result<Self, ModelError> {
        if bytes == 0 || bytes > LIMIT {
            return Err(ModelError::Arena {
                bytes,
                limit: LIMIT,
            });
        }
        let bytes = bytes.next_multiple_of(ALIGN);
        let whole = bytes + ALIGN;
        let failed = |call, bytes| ModelError::System {
            call,
            bytes,
            errno: io::Error::last_os_error().kind(),
        };
        // SAFETY: a new mapping wherever there is room; it replaces nothing.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                whole as usize,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(failed("mmap", whole));
        }
        let at = at as u64;
        let start = at.next_multiple_of(ALIGN);
        for (from, to) in [(at, start), (start + bytes, at + whole)] {
            // SAFETY: the piece lies in the mapping just made, outside what is kept, and nobody knows of it.
            if from < to && unsafe { libc::munmap(from as *mut _, (to - from) as usize) } != 0 {
                let error = failed("munmap", to - from);
                // SAFETY: as above. What lies before is gone, or could not be unmapped just now.
                unsafe { libc::munmap(start as *mut _, (at + whole - start) as usize) };
                return Err(error);
            }
        }
        let range = Range::new(start, bytes).map_err(|_| ModelError::Arena {
            bytes,
            limit: LIMIT,
        })?;
        Ok(Self { range })
    }

    /// The reserved range.
    pub(super) fn range(&self) -> Range {
        self.range
    }

    /// Maps the frames from `first` on at `range`, in place of whatever is there.
    pub(super) fn map(
        &self,
        frames: BorrowedFd<'_>,
        range: Range,
        first: u64,
        rights: Rights,
    ) -> Result<(), MemoryError> {
        let (at, len) = self.place(range);
        // SAFETY: `range` lies in the arena (asserted by `place`), which belongs to this memory: whoever uses addresses
        // in it knows that its pages change when this memory is asked to change them.
        let mapped = unsafe {
            libc::mmap(
                at,
                len,
                protection(rights),
                libc::MAP_SHARED | libc::MAP_FIXED,
                frames.as_raw_fd(),
                (first * FRAME_BYTES) as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(failed("mmap", range));
        }
        Ok(())
    }

    /// Keeps the frames that are mapped at `range` out of child processes.
    pub(super) fn keep_from_children(&self, range: Range) -> Result<(), MemoryError> {
        let (at, len) = self.place(range);
        // SAFETY: as in `map`; the advice changes nothing for this process.
        if unsafe { libc::madvise(at, len, libc::MADV_DONTFORK) } != 0 {
            return Err(failed("madvise", range));
        }
        Ok(())
    }

    /// Makes `range` inaccessible and without memory.
    pub(super) fn cut(&self, range: Range) -> Result<(), MemoryError> {
        let (at, len) = self.place(range);
        // SAFETY: as in `map`.
        let mapped = unsafe {
            libc::mmap(
                at,
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(failed("mmap", range));
        }
        Ok(())
    }

    /// Changes the rights of `range`, all of which is mapped.
    pub(super) fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        let (at, len) = self.place(range);
        // SAFETY: as in `map`; no mapping is made or goes.
        if unsafe { libc::mprotect(at, len, protection(rights)) } != 0 {
            return Err(failed("mprotect", range));
        }
        Ok(())
    }

    /// Address and length of `range`, for a system call.
    fn place(&self, range: Range) -> (*mut libc::c_void, usize) {
        assert!(
            self.range.contains(range) && range.is_aligned(PageSize::FourKiB),
            "{range} is not made of pages of the arena {}",
            self.range
        );
        (range.start().get() as *mut _, range.len() as usize)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let (at, len) = self.place(self.range);
        // SAFETY: the arena is unmapped once, here; its owner is gone. Unmapping the whole of it splits nothing, so the
        // kernel has no reason to refuse.
        let unmapped = unsafe { libc::munmap(at, len) };
        debug_assert_eq!(unmapped, 0);
    }
}

fn protection(rights: Rights) -> libc::c_int {
    let mut protection = libc::PROT_NONE;
    if rights.contains(Rights::READ) {
        protection |= libc::PROT_READ;
    }
    if rights.contains(Rights::WRITE) {
        protection |= libc::PROT_WRITE;
    }
    protection
}

/// The error of the system call that failed just now.
fn failed(call: &'static str, range: Range) -> MemoryError {
    MemoryError::System {
        call,
        range,
        errno: io::Error::last_os_error().kind(),
    }
}
