//! Real anonymous memory of this process, in an arena that is reserved beforehand.
//!
//! Every range that is given to its system calls lies inside the arena, which belongs to this value alone: it was mapped without
//! access, and nobody else was told of it. The calls go through the [`gate`]: what they change has been shot down, so no source
//! needs to stop them.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapMut, MmapOptions};

use crate::addr::{Addr, PageSize, PageSizes, Range};
use crate::memory::{Memory, MemoryError, Rights, Translation};
use crate::source::gate;

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

    /// A system call on `range`: its first two arguments.
    ///
    /// # Safety
    /// All that the call changes lies in the arena, which belongs to this value; Rust references into it are the users' own
    /// business, who got raw addresses only.
    unsafe fn call(
        (nr, name): (libc::c_long, &'static str),
        range: Range,
        [c, d, e, f]: [usize; 4],
    ) -> Result<(), MemoryError> {
        let args = [
            range.start().get() as usize,
            range.len() as usize,
            c,
            d,
            e,
            f,
        ];
        // SAFETY: the caller's promise.
        let result = unsafe { gate::call(nr, args) };
        result.map(drop).map_err(|errno| MemoryError::System {
            call: name,
            range,
            errno: io::Error::from_raw_os_error(errno).kind(),
        })
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
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let args = [protection as usize, flags as usize, usize::MAX, 0];
        // SAFETY: the range lies in the arena.
        unsafe { Self::call((libc::SYS_mmap, "mmap"), range, args) }?;
        if !planted!("r30") {
            let args = [libc::MADV_DONTFORK as usize, 0, 0, 0];
            // SAFETY: as above. Best effort: the flag of the reservation is lost with its pages.
            let _ = unsafe { Self::call((libc::SYS_madvise, "madvise"), range, args) };
        }
        Ok(())
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
        let args = [libc::MADV_DONTNEED as usize, 0, 0, 0];
        // SAFETY: the range lies in the arena; private anonymous pages read as zero afterwards.
        unsafe { Self::call((libc::SYS_madvise, "madvise"), range, args) }
    }

    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        let args = [Self::protection(rights) as usize, 0, 0, 0];
        // SAFETY: the range lies in the arena.
        unsafe { Self::call((libc::SYS_mprotect, "mprotect"), range, args) }
    }

    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        let target = to.start().get() as usize;
        let args = [to.len() as usize, flags as usize, target, 0];
        // SAFETY: both lie in the arena, the target has nothing mapped. DONTUNMAP keeps the old addresses reserved, so that no
        // other mmap of the process can take them.
        unsafe { Self::call((libc::SYS_mremap, "mremap"), from, args) }?;
        // The pages have moved: that the hole reads as zero instead of faulting is no reason to call it a failure.
        let _ = self.over(from, libc::PROT_NONE);
        Ok(())
    }

    fn translate(&self, _: Addr) -> Option<Translation> {
        None
    }
}
