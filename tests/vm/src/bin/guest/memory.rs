//! Memory that a device may change at any time: it is read and written volatile, never through references.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// A mapping of this process, gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    len: usize,
}

impl Memory {
    /// Private anonymous pages.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Anonymous pages that a forked child shares.
    pub(crate) fn shared(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// A part of a file.
    pub(crate) fn file(
        file: &File,
        offset: u64,
        len: usize,
        flags: libc::c_int,
    ) -> io::Result<Self> {
        Self::map(len, flags, file.as_raw_fd(), offset)
    }

    fn map(len: usize, flags: libc::c_int, fd: libc::c_int, offset: u64) -> io::Result<Self> {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses an address where nothing is.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                rights,
                flags,
                fd,
                offset as libc::off_t,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start =
            NonNull::new(start.cast()).ok_or_else(|| io::Error::other("a mapping at zero"))?;
        Ok(Self { start, len })
    }

    /// Its address.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr().addr() as u64
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Writes one byte everywhere.
    pub(crate) fn fill(&self, byte: u8) {
        for at in 0..self.len {
            // SAFETY: inside the mapping, which is writable as long as nobody asked for `protect`.
            unsafe { self.start.add(at).write_volatile(byte) };
        }
    }

    /// The first byte of `len` from `offset` that is not `byte`: where, and what it is.
    pub(crate) fn differs(&self, offset: usize, len: usize, byte: u8) -> Option<(usize, u8)> {
        assert!(offset + len <= self.len, "outside of the memory");
        (offset..offset + len).find_map(|at| {
            // SAFETY: inside the mapping.
            let found = unsafe { self.start.add(at).read_volatile() };
            (found != byte).then_some((at, found))
        })
    }

    /// Reads a register of four bytes.
    pub(crate) fn read_u32(&self, offset: usize) -> u32 {
        // SAFETY: `register` gives an aligned address inside the mapping.
        unsafe { self.register(offset, 4).cast::<u32>().read_volatile() }
    }

    /// Writes a register of four bytes.
    pub(crate) fn write_u32(&self, offset: usize, value: u32) {
        // SAFETY: `register` gives an aligned address inside the mapping.
        unsafe { self.register(offset, 4).cast::<u32>().write_volatile(value) }
    }

    /// Reads a register of eight bytes.
    pub(crate) fn read_u64(&self, offset: usize) -> u64 {
        // SAFETY: `register` gives an aligned address inside the mapping.
        unsafe { self.register(offset, 8).cast::<u64>().read_volatile() }
    }

    /// Writes a register of eight bytes.
    pub(crate) fn write_u64(&self, offset: usize, value: u64) {
        // SAFETY: `register` gives an aligned address inside the mapping.
        unsafe { self.register(offset, 8).cast::<u64>().write_volatile(value) }
    }

    fn register(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.is_multiple_of(len) && offset + len <= self.len,
            "no register at {offset:#x}"
        );
        // SAFETY: inside the mapping, which begins at a page.
        unsafe { self.start.add(offset).as_ptr() }
    }

    /// madvise over all of it.
    pub(crate) fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: our own mapping, of which no reference exists.
        done(unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) })
    }

    /// mprotect over all of it. Reads and writes that it forbids end the process.
    pub(crate) fn protect(&self, rights: libc::c_int) -> io::Result<()> {
        // SAFETY: our own mapping, of which no reference exists.
        done(unsafe { libc::mprotect(self.start.as_ptr().cast(), self.len, rights) })
    }

    /// Moves it to another address.
    pub(crate) fn remap(&mut self) -> io::Result<()> {
        let target = Self::anonymous(self.len)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let to = target.start.as_ptr();
        // SAFETY: both are our own mappings, of which no references exist; what was at the target is gone, and so is its owner.
        let moved =
            unsafe { libc::mremap(self.start.as_ptr().cast(), self.len, self.len, flags, to) };
        if moved == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        self.start = target.start;
        std::mem::forget(target);
        Ok(())
    }
}

fn done(returned: libc::c_int) -> io::Result<()> {
    if returned == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: our own mapping, of which no reference exists. A device that still has it mapped works on pinned pages.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}
