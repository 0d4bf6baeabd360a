//! What stands behind a managed address space: the page tables and the pages.
//!
//! [`Memory`] does, without any question, what the address space asks of it, once every device has been
//! shot down; it is the *kernel* of the protocol's phase 5. It knows no registration. Two implementations exist:
//! [`ProcessMemory`](crate::ProcessMemory), real anonymous mappings, and the frames of the hardware model.

use thiserror::Error;

use crate::addr::{Addr, PageSize, Range};

bitflags::bitflags! {
    /// Access rights of a mapping.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Rights: u8 {
        /// Loads are allowed.
        const READ = 1;
        /// Stores are allowed.
        const WRITE = 2;
        /// Loads and stores.
        const READ_WRITE = 3;
    }
}

/// A frame of physical memory, by number, in units of 4 KiB.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct Frame(pub u64);

/// One page-table entry: what a device may install in its TLB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The virtual page: as large as the entry may be.
    pub page: Range,
    /// The size of that page.
    pub page_size: PageSize,
    /// The first frame behind it.
    pub frame: Frame,
    /// What accesses through it are allowed.
    pub rights: Rights,
}

/// Why memory could not be changed. Nothing has changed then, unless it says otherwise.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// No physical frames are left.
    #[error("out of frames: {needed} frames of 4 KiB needed, {free} free")]
    OutOfFrames {
        /// Frames that the request needed.
        needed: u64,
        /// Frames that were free.
        free: u64,
    },
    /// The budget of kernel mappings (VMAs) is used up.
    #[error(
        "out of VMAs: the request needs up to {needed} more, {used} of {limit} are in use (vm.max_map_count bounds them)"
    )]
    OutOfVmas {
        /// Mappings that the request could need.
        needed: u64,
        /// Mappings in use.
        used: u64,
        /// The budget.
        limit: u64,
    },
    /// This memory has no such page size.
    #[error("pages of {page} are not supported by this memory")]
    PageSize {
        /// What was asked for.
        page: PageSize,
    },
    /// It is not told when the CPU touches a page.
    #[error("nobody tells when the CPU touches {range}: {reason}")]
    TouchNotSeen {
        /// What the CPU was to be kept away from.
        range: Range,
        /// What is lacking.
        reason: &'static str,
    },
    /// It panicked in the middle of a change: nobody knows what it has done, and the pages are in quarantine for good.
    #[error("the memory panicked in the middle of a change: the pages are in quarantine for good")]
    Panicked,
    /// A system call failed.
    #[error("{call} of {range} failed: {errno}")]
    System {
        /// The system call's name.
        call: &'static str,
        /// The range that it was given.
        range: Range,
        /// The errno, as the C library names it.
        errno: std::io::ErrorKind,
    },
}

/// The page tables and pages behind a managed address space.
///
/// The address space calls these with whole pages inside [`Memory::arena`] only, never two at a time for overlapping
/// ranges, and holds no lock of its own meanwhile. All but [`Memory::translate`] may wait (system calls), may not
/// allocate from a heap that the application can have locked except in [`Memory::map`], and change nothing when they fail.
pub trait Memory: Send + Sync + 'static {
    /// The number by which hardware and dumps know these page tables, as a PASID does; unique in the process.
    fn id(&self) -> u64;

    /// Where mappings may lie.
    fn arena(&self) -> Range;

    /// The page sizes that [`Memory::map`] accepts.
    fn page_sizes(&self) -> crate::addr::PageSizes;

    /// Backs `range`, nothing of which is mapped, with zeroed pages. `range` is aligned to `page`.
    ///
    /// # Errors
    /// Out of frames, out of VMAs, or what the system call said.
    fn map(&self, range: Range, page: PageSize, rights: Rights) -> Result<(), MemoryError>;

    /// Takes the pages of `range` away. A larger page that is cut is split first.
    ///
    /// # Errors
    /// As [`Memory::map`].
    fn unmap(&self, range: Range) -> Result<(), MemoryError>;

    /// Replaces the pages of `range` by zeroed ones; the rights stay.
    ///
    /// # Errors
    /// As [`Memory::map`].
    fn discard(&self, range: Range) -> Result<(), MemoryError>;

    /// Changes the rights of `range`.
    ///
    /// # Errors
    /// As [`Memory::map`].
    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError>;

    /// Moves the pages of `from` to `to`, which has the same length and nothing mapped.
    ///
    /// # Errors
    /// As [`Memory::map`].
    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError>;

    /// Walks the page table. Lock-free or nearly so; what it returns may be stale the moment it returns, which is what
    /// [`begin`](crate::Registration::begin) and [`retry`](crate::Fault::retry) are for. `None`: nothing is mapped
    /// at `addr`, or this memory shows no page table.
    fn translate(&self, addr: Addr) -> Option<Translation>;

    /// Walks the page table of all of `range`: hands what [`Memory::translate`] says of each page that overlaps it to `found`, in order.
    /// As little of a promise as that, page by page. For a memory whose walks have a fixed cost.
    fn walk(&self, range: Range, found: &mut dyn FnMut(Translation)) {
        let mut next = Some(range.start());
        while let Some(addr) = next.filter(|addr| range.holds(*addr)) {
            let page = match self.translate(addr) {
                Some(one) => {
                    found(one);
                    one.page
                }
                None => Range::page(addr, PageSize::FourKiB),
            };
            next = page.end();
        }
    }

    /// Takes the pages of `range` away from the CPU, whose next access to one of them waits until `touched`, called with that page on
    /// a thread of the memory's own, has returned. Devices are not its business.
    ///
    /// # Errors
    /// [`MemoryError::TouchNotSeen`], as long as an implementer says nothing else.
    fn exclude(&self, range: Range, touched: Touched) -> Result<Box<dyn Exclusion>, MemoryError> {
        let _ = touched;
        Err(MemoryError::TouchNotSeen {
            range,
            reason: "this memory has no means to see it",
        })
    }
}

/// What is called when the CPU touches a page that it is kept away from.
pub type Touched = std::sync::Arc<dyn Fn(Range) + Send + Sync>;

/// Pages that the CPU is kept away from. Dropping it lets whoever waits go on, and gives the pages back.
pub trait Exclusion: Send + Sync {}
