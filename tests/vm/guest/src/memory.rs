//! Memory that a device may change at any time: it is read and written volatile, never through references.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use shootdown::{DeviceError, Range, Registers};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// Some memory of this process.
#[derive(Debug)]
pub(crate) struct View {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is an address and a length; all accesses are volatile, by raw pointers, and a race with another thread or a device
// is what the checks are about.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

/// A mapping of this process, gone when this is dropped.
#[derive(Debug)]
pub(crate) struct Memory(View);

impl Deref for Memory {
    type Target = View;

    fn deref(&self) -> &View {
        &self.0
    }
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

    /// Pages of 2 MiB from the kernel's pool.
    pub(crate) fn hugetlb(len: usize) -> io::Result<Self> {
        Self::map(
            len,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB,
            -1,
            0,
        )
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
        Ok(Self(View { start, len }))
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
        self.0.start = target.start;
        std::mem::forget(target);
        Ok(())
    }
}

impl View {
    /// Memory that somebody else mapped.
    ///
    /// # Safety
    /// It stays mapped for as long as the value is used, with the rights for what is done, and no reference to it exists.
    pub(crate) unsafe fn of(range: Range) -> Self {
        let start = std::ptr::with_exposed_provenance_mut(range.start().get() as usize);
        Self {
            start: NonNull::new(start).expect("nothing is mapped at zero"),
            len: range.len() as usize,
        }
    }

    /// Its addresses.
    pub(crate) fn range(&self) -> Range {
        Range::new(self.address(), self.len as u64).expect("a mapping is not empty")
    }

    /// Its address.
    pub(crate) fn address(&self) -> u64 {
        self.start.as_ptr().expose_provenance() as u64
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
}

/// A register that is there and aligned.
fn register(bar: &View, offset: u64, width: u8) -> Result<*mut u8, DeviceError> {
    let end = offset.checked_add(width.into());
    let inside = end.is_some_and(|end| end <= bar.len as u64);
    if !inside || !offset.is_multiple_of(width.into()) {
        return Err(DeviceError::NoRegister { offset, width });
    }
    Ok(bar.start.as_ptr().wrapping_add(offset as usize))
}

/// A BAR that was mapped by hand.
impl Registers for Memory {
    fn len(&self) -> u64 {
        self.0.len as u64
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        let place = register(self, offset, 8)?.cast::<u64>();
        // SAFETY: aligned and inside the mapping.
        Ok(unsafe { place.read_volatile() })
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        let place = register(self, offset, 8)?.cast::<u64>();
        // SAFETY: aligned and inside the mapping.
        unsafe { place.write_volatile(value) };
        Ok(())
    }

    fn read32(&self, offset: u64) -> Result<u32, DeviceError> {
        let place = register(self, offset, 4)?.cast::<u32>();
        // SAFETY: aligned and inside the mapping.
        Ok(unsafe { place.read_volatile() })
    }

    fn write32(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
        let place = register(self, offset, 4)?.cast::<u32>();
        // SAFETY: aligned and inside the mapping.
        unsafe { place.write_volatile(value) };
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
