//! What is really mapped, for a memory that others change: the kernel is asked.
//!
//! Others do not tell the model what they do, but a device that walks page tables sees it at once. So a walk finds what
//! both the model's table and the kernel's mappings say: a page that somebody else has unmapped, replaced or protected a moment
//! ago is not found any more, and one that he has put there is not found before the model has been told.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use shootdown::{Rights, Translation};

use crate::physical::FRAME_BYTES;

/// `struct procmap_query` of Linux 6.11, `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    addr: u64,
    start: u64,
    end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_addr: u64,
    build_id_addr: u64,
}

/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: libc::c_ulong = 3 << 30 | (size_of::<Query>() as u64) << 16 | 0x66 << 8 | 17;
const READABLE: u64 = 1;
const WRITABLE: u64 = 2;
const SHARED: u64 = 8;

/// The mappings of this process, and the file that the frames are.
pub(super) struct Kernel {
    maps: File,
    inode: u64,
    device: u64,
}

impl Kernel {
    /// Fails on a kernel that cannot be asked (before 6.11).
    pub(super) fn new(frames: BorrowedFd<'_>) -> io::Result<Self> {
        let mut about = MaybeUninit::<libc::stat>::uninit();
        // SAFETY: the kernel fills the structure.
        if unsafe { libc::fstat(frames.as_raw_fd(), about.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: filled just now.
        let about = unsafe { about.assume_init() };
        let this = Self {
            maps: File::open("/proc/self/maps")?,
            inode: about.st_ino,
            device: about.st_dev,
        };
        let here = Self::new as *const () as u64;
        this.query(here)?;
        Ok(this)
    }

    /// The mapping that holds `addr`.
    fn query(&self, addr: u64) -> io::Result<Query> {
        let mut query = Query {
            size: size_of::<Query>() as u64,
            addr,
            ..Query::default()
        };
        // SAFETY: the structure has the size that it says; neither name nor build identifier is asked for.
        match unsafe { libc::ioctl(self.maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) } {
            0 => Ok(query),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// What the kernel allows of a page that is `found` in the model's table; `None` if other frames are there, or none.
    pub(super) fn rights(&self, found: &Translation) -> Option<Rights> {
        let page = found.page;
        let query = self.query(page.start().get()).ok()?;
        let mut rights = Rights::empty();
        rights.set(Rights::READ, query.vma_flags & READABLE != 0);
        rights.set(Rights::WRITE, query.vma_flags & WRITABLE != 0);
        let device = libc::makedev(query.dev_major, query.dev_minor);
        let offset = query.offset + (page.start().get() - query.start);
        let same = query.vma_flags & SHARED != 0
            && (query.inode, device) == (self.inode, self.device)
            && offset == found.frame.0 * FRAME_BYTES
            && page.last().get() < query.end;
        same.then_some(rights)
    }
}
