//! Real anonymous memory of this process, in an arena that is reserved beforehand.
//!
//! The only unsafe system calls of this crate. Every range that is given to them lies inside the arena, which belongs to this
//! value alone: it was mapped without access, and nobody else was told of it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions};

use crate::addr::{Addr, PageSize, PageSizes, Range};
use crate::memory::{Memory, MemoryError, Rights, Translation};
use crate::source::own_call;

/// Anonymous private 4 KiB pages of this process. Its addresses are its own: where a source watches, others who unmap there leave them
/// reserved ([`Unotify`](crate::Unotify)). Kept out of children. It shows no page table: devices that walk one use the
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

    fn bytes(range: Range) -> (usize, usize) {
        (range.start().get() as usize, range.len() as usize)
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
        let args = [
            start,
            len,
            protection as usize,
            flags as usize,
            usize::MAX,
            0,
        ];
        // SAFETY: the range lies in the arena, which belongs to this value; Rust references into it are the users' own
        // business, who got raw addresses only.
        unsafe { call("mmap", libc::SYS_mmap, range, args) }?;
        if !planted!("r30") {
            // SAFETY: as above. Best effort: the flag of the reservation is lost with its pages.
            let _ = unsafe { advise(range, libc::MADV_DONTFORK) };
        }
        Ok(())
    }
}

/// A call that changes `range`: the space has shot it down, and no source is to stop it once more.
///
/// # Safety
/// As the call itself.
unsafe fn call(
    name: &'static str,
    nr: libc::c_long,
    range: Range,
    args: [usize; 6],
) -> Result<(), MemoryError> {
    // SAFETY: the caller's promise.
    match unsafe { own_call(nr, args) } {
        Ok(_) => Ok(()),
        Err(errno) => Err(MemoryError::System {
            call: name,
            range,
            errno: io::Error::from_raw_os_error(errno).kind(),
        }),
    }
}

/// # Safety
/// As the advice.
unsafe fn advise(range: Range, advice: libc::c_int) -> Result<(), MemoryError> {
    let (start, len) = ProcessMemory::bytes(range);
    let args = [start, len, advice as usize, 0, 0, 0];
    // SAFETY: the caller's promise.
    unsafe { call("madvise", libc::SYS_madvise, range, args) }
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
        // SAFETY: the range lies in the arena; private anonymous pages read as zero afterwards.
        unsafe { advise(range, libc::MADV_DONTNEED) }
    }

    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        let (start, len) = Self::bytes(range);
        let args = [start, len, Self::protection(rights) as usize, 0, 0, 0];
        // SAFETY: the range lies in the arena.
        unsafe { call("mprotect", libc::SYS_mprotect, range, args) }
    }

    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        let (start, len) = Self::bytes(from);
        let (target, _) = Self::bytes(to);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        let args = [start, len, len, flags as usize, target, 0];
        // SAFETY: both lie in the arena, the target has nothing mapped. DONTUNMAP keeps the old addresses reserved, so that no
        // other mmap of the process can take them.
        unsafe { call("mremap", libc::SYS_mremap, from, args) }?;
        // The pages have moved: that the hole reads as zero instead of faulting is no reason to call it a failure.
        let _ = self.over(from, libc::PROT_NONE);
        Ok(())
    }

    fn translate(&self, _: Addr) -> Option<Translation> {
        None
    }
}
