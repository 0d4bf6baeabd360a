//! Real anonymous memory of this process, in an arena that is reserved beforehand.
//!
//! The only unsafe system calls of this crate. Every range that is given to them lies inside the arena, which belongs to this
//! value alone: it was mapped without access, and nobody else was told of it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions};

use crate::addr::{Addr, PageSize, PageSizes, Range};
use crate::memory::{Memory, MemoryError, Rights, Translation};

/// Anonymous private 4 KiB pages of this process. It shows no page table: devices that walk one use the
/// hardware model's memory, devices behind an IOMMU need none.
#[derive(Debug)]
pub struct ProcessMemory {
    id: u64,
    arena: Range,
    /// The reservation; unmapped when dropped.
    _reserved: MmapMut,
}

impl ProcessMemory {
    /// Reserves an arena of `bytes` of address space, which costs no memory. It is kept out of children (`MADV_DONTFORK`).
    ///
    /// # Errors
    /// What the system call said; zero bytes.
    pub fn reserve(bytes: usize) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1 << 33);
        let reserved = MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?;
        reserved.advise(memmap2::Advice::DontFork)?;
        let arena = Range::new(reserved.as_ptr() as u64, reserved.len() as u64)
            .map_err(io::Error::other)?;
        let this = Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            arena,
            _reserved: reserved,
        };
        this.unmap(arena).map_err(io::Error::other)?;
        Ok(this)
    }

    fn bytes(range: Range) -> (*mut libc::c_void, usize) {
        (
            range.start().get() as *mut libc::c_void,
            range.len() as usize,
        )
    }

    fn protection(rights: Rights) -> libc::c_int {
        let read = if rights.contains(Rights::READ) {
            libc::PROT_READ
        } else {
            0
        };
        let write = if rights.contains(Rights::WRITE) {
            libc::PROT_WRITE
        } else {
            0
        };
        read | write
    }

    /// Fresh anonymous pages over `range`.
    fn over(&self, range: Range, protection: libc::c_int) -> Result<(), MemoryError> {
        let (start, len) = Self::bytes(range);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the range lies in the arena, which belongs to this value; Rust references into it are the users' own
        // business, who got raw addresses only.
        let at = unsafe { libc::mmap(start, len, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(failed("mmap", range));
        }
        if !planted!("r30") {
            // SAFETY: as above. Best effort: the flag of the reservation is lost with its pages.
            unsafe { libc::madvise(start, len, libc::MADV_DONTFORK) };
        }
        Ok(())
    }
}

fn failed(call: &'static str, range: Range) -> MemoryError {
    MemoryError::System {
        call,
        range,
        errno: io::Error::last_os_error().kind(),
    }
}

impl Memory for ProcessMemory {
    fn id(&self) -> u64 {
        self.id
    }

    fn arena(&self) -> Range {
        self.arena
    }

    fn page_sizes(&self) -> PageSizes {
        PageSizes::FOUR_KIB
    }

    fn map(&self, range: Range, page: PageSize, rights: Rights) -> Result<(), MemoryError> {
        if page != PageSize::FourKiB {
            return Err(MemoryError::PageSize { page });
        }
        self.over(range, Self::protection(rights))
    }

    fn unmap(&self, range: Range) -> Result<(), MemoryError> {
        self.over(range, libc::PROT_NONE)
    }

    fn discard(&self, range: Range) -> Result<(), MemoryError> {
        let (start, len) = Self::bytes(range);
        // SAFETY: the range lies in the arena; private anonymous pages read as zero afterwards.
        match unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(failed("madvise", range)),
        }
    }

    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        let (start, len) = Self::bytes(range);
        // SAFETY: the range lies in the arena.
        match unsafe { libc::mprotect(start, len, Self::protection(rights)) } {
            0 => Ok(()),
            _ => Err(failed("mprotect", range)),
        }
    }

    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        let (start, len) = Self::bytes(from);
        let (target, _) = Self::bytes(to);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        // SAFETY: both lie in the arena, the target has nothing mapped. DONTUNMAP keeps the old addresses reserved, so that no
        // other mmap of the process can take them.
        let at = unsafe { libc::mremap(start, len, len, flags, target) };
        if at == libc::MAP_FAILED {
            return Err(failed("mremap", from));
        }
        // The pages have moved: that the hole reads as zero instead of faulting is no reason to call it a failure.
        let _ = self.over(from, libc::PROT_NONE);
        Ok(())
    }

    fn translate(&self, _: Addr) -> Option<Translation> {
        None
    }
}
