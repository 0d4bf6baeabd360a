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

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use shootdown::{Addr, MemoryError, PageSize, Range, Rights, own_call};

use crate::error::ModelError;
use crate::physical::FRAME_BYTES;

/// The largest arena: the address space of a process is 128 TiB, and others live there.
const LIMIT: u64 = 1 << 46;

const ALIGN: u64 = PageSize::TwoMiB.bytes();

/// Linux places mappings from the top of the address space down, or from a third of it up (42 TiB), and programs at two thirds:
/// 16 to 32 TiB is far from all of them. Where in there is chance, so that two processes have different addresses.
const ASIDE: u64 = 1 << 44;
const ASIDE_TRIES: u64 = 16;

/// How addresses are kept for the arena.
const RESERVED: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// A new mapping of `bytes` without access; where.
fn nothing(at: u64, bytes: u64, flags: libc::c_int) -> io::Result<u64> {
    let (start, len) = (at as *mut libc::c_void, bytes as usize);
    let flags = RESERVED | flags;
    // SAFETY: a new mapping wherever there is room, or at an address where nothing is; it replaces nothing.
    let at = unsafe { libc::mmap(start, len, libc::PROT_NONE, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(at as u64)
}

/// As [`nothing`], wherever there is room; in a simulation at the first place that is free.
fn anywhere(bytes: u64) -> io::Result<u64> {
    let mut error = io::Error::from(io::ErrorKind::AddrInUse);
    for place in shootdown_primitive::places() {
        let flags = place.map_or(0, |_| libc::MAP_FIXED_NOREPLACE);
        match nothing(place.unwrap_or(0), bytes, flags) {
            Ok(at) => return Ok(at),
            Err(failed) => error = failed,
        }
    }
    Err(error)
}

/// What is reserved for an arena of `bytes`.
fn size(bytes: u64) -> Result<u64, ModelError> {
    let limit = LIMIT;
    if bytes == 0 || bytes > limit {
        return Err(ModelError::Arena { bytes, limit });
    }
    Ok(bytes.next_multiple_of(ALIGN))
}

fn failed(call: &'static str, bytes: u64, error: &io::Error) -> ModelError {
    ModelError::System {
        call,
        bytes,
        errno: error.kind(),
    }
}

/// A reserved range, unmapped when dropped.
pub(super) struct Arena {
    range: Range,
    /// How much further on, modulo 2^64, this process has it than devices do.
    shift: u64,
}

impl Arena {
    /// Reserves `bytes`, rounded up to 2 MiB and aligned to it. May wait (system calls), as may all of the following.
    pub(super) fn reserve(bytes: u64) -> Result<Self, ModelError> {
        let bytes = size(bytes)?;
        let whole = bytes + ALIGN;
        let at = anywhere(whole).map_err(|error| failed("mmap", whole, &error))?;
        let start = at.next_multiple_of(ALIGN);
        for (from, to) in [(at, start), (start + bytes, at + whole)] {
            // SAFETY: the piece lies in the mapping just made, outside what is kept, and nobody knows of it.
            if from < to && unsafe { libc::munmap(from as *mut _, (to - from) as usize) } != 0 {
                let error = failed("munmap", to - from, &io::Error::last_os_error());
                // SAFETY: as above. What lies before is gone, or could not be unmapped just now.
                unsafe { libc::munmap(start as *mut _, (at + whole - start) as usize) };
                return Err(error);
            }
        }
        Self::at(start, bytes)
    }

    /// As [`Arena::reserve`], at addresses that the kernel gives to nobody who does not ask for them: when somebody unmaps a
    /// piece of it, the hole is not taken by the next `mmap` of the process.
    pub(super) fn reserve_aside(bytes: u64) -> Result<Self, ModelError> {
        let bytes = size(bytes)?;
        let mut error = io::Error::from(io::ErrorKind::AddrInUse);
        // Keyed by chance.
        let chance = RandomState::new();
        for nth in 0..ASIDE_TRIES {
            let start = ASIDE + chance.hash_one(nth) % ASIDE / ALIGN * ALIGN;
            match nothing(start, bytes, libc::MAP_FIXED_NOREPLACE) {
                Ok(at) => return Self::at(at, bytes),
                Err(failed) => error = failed,
            }
        }
        Err(failed("mmap", bytes, &error))
    }

    fn at(start: u64, bytes: u64) -> Result<Self, ModelError> {
        let limit = LIMIT;
        let range = Range::new(start, bytes);
        let range = range.map_err(|_| ModelError::Arena { bytes, limit })?;
        Ok(Self { range, shift: 0 })
    }

    /// As [`Arena::reserve`], for devices at the addresses of `other`.
    pub(super) fn reserve_twin(other: &Self) -> Result<Self, ModelError> {
        let mut own = Self::reserve(other.range.len() as u64)?;
        let (here, there) = (own.range.start().get(), other.range.start().get());
        own.shift = here.wrapping_sub(there);
        own.range = other.range;
        Ok(own)
    }

    /// Where this process has what devices have at `addr`.
    pub(super) fn view(&self, addr: Addr) -> Addr {
        Addr::new(addr.get().wrapping_add(self.shift))
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
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        let (fd, offset) = (frames.as_raw_fd(), first * FRAME_BYTES);
        self.mmap(range, protection(rights), flags, fd, offset)
    }

    /// Keeps the frames that are mapped at `range` out of child processes.
    pub(super) fn keep_from_children(&self, range: Range) -> Result<(), MemoryError> {
        let advice = libc::MADV_DONTFORK as usize;
        self.call("madvise", libc::SYS_madvise, range, [advice, 0, 0, 0])
    }

    /// Takes the frames that are mapped at `range` out of the page tables of this process. The next access finds them again.
    pub(super) fn forget(&self, range: Range) -> Result<(), MemoryError> {
        let advice = libc::MADV_DONTNEED as usize;
        self.call("madvise", libc::SYS_madvise, range, [advice, 0, 0, 0])
    }

    /// Makes `range` inaccessible and without memory.
    pub(super) fn cut(&self, range: Range) -> Result<(), MemoryError> {
        self.mmap(range, libc::PROT_NONE, RESERVED | libc::MAP_FIXED, -1, 0)
    }

    fn mmap(
        &self,
        range: Range,
        protection: libc::c_int,
        flags: libc::c_int,
        fd: libc::c_int,
        offset: u64,
    ) -> Result<(), MemoryError> {
        let args = [
            protection as usize,
            flags as usize,
            fd as usize,
            offset as usize,
        ];
        self.call("mmap", libc::SYS_mmap, range, args)
    }

    /// A call whose first arguments are the range. The space has shot it down: no source is to stop it once more.
    fn call(
        &self,
        name: &'static str,
        nr: libc::c_long,
        range: Range,
        [c, d, e, f]: [usize; 4],
    ) -> Result<(), MemoryError> {
        let (at, len) = self.place(range);
        // SAFETY: `range` lies in the arena (asserted by `place`), which belongs to this memory: whoever uses addresses
        // in it knows that its pages change when this memory is asked to change them.
        match unsafe { own_call(nr, [at, len, c, d, e, f]) } {
            Ok(_) => Ok(()),
            Err(errno) => Err(MemoryError::System {
                call: name,
                range,
                errno: io::Error::from_raw_os_error(errno).kind(),
            }),
        }
    }

    /// Changes the rights of `range`, all of which is mapped.
    pub(super) fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        let args = [protection(rights) as usize, 0, 0, 0];
        self.call("mprotect", libc::SYS_mprotect, range, args)
    }

    /// Address and length of `range`, for a system call.
    fn place(&self, range: Range) -> (usize, usize) {
        assert!(
            self.range.contains(range) && range.is_aligned(PageSize::FourKiB),
            "{range} is not made of pages of the arena {}",
            self.range
        );
        (
            self.view(range.start()).get() as usize,
            range.len() as usize,
        )
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // Once, here; its owner is gone. Unmapping the whole of it splits nothing, so the kernel has no reason to refuse.
        let unmapped = self.call("munmap", libc::SYS_munmap, self.range, [0; 4]);
        debug_assert_eq!(unmapped, Ok(()));
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
