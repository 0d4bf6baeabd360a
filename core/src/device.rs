//! How a device is reached: registers, DMA windows, interrupts.
//!
//! Three peers implement these traits: the in-process model, VFIO, and a fake for unit tests. A driver that is written
//! against them runs unchanged over each.

use std::time::Duration;

use thiserror::Error;

use crate::addr::Range;
use crate::memory::Rights;

/// Why a device could not be reached.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The device is gone, or its mapping was taken away.
    #[error("the device is gone: {reason}")]
    Gone {
        /// What took it away.
        reason: &'static str,
    },
    /// There is no such register.
    #[error("no {width}-byte register at offset {offset:#x}")]
    NoRegister {
        /// Byte offset.
        offset: u64,
        /// Access width in bytes.
        width: u8,
    },
    /// There is no such interrupt vector.
    #[error("no interrupt vector {vector}: the device has {vectors}")]
    NoVector {
        /// The vector that was asked for.
        vector: u32,
        /// How many there are.
        vectors: u32,
    },
    /// This process was forked off the one that the device belongs to.
    #[error(
        "the device belongs to process {owner}: process {child} was forked off it and has to open its own"
    )]
    Forked {
        /// Who opened it.
        owner: u32,
        /// Who asked.
        child: u32,
    },
    /// Something is mapped at that IOVA already.
    #[error("IOVA {iova} is not free: unmap what is mapped there first, or take another")]
    Overlap {
        /// What was to be mapped.
        iova: Range,
    },
    /// The IOMMU takes no such range.
    #[error(
        "IOVA {iova} cannot be mapped to {memory}: both have to be whole pages of {page:#x} bytes, as long as each other, and inside what the IOMMU translates"
    )]
    Misaligned {
        /// What was to be mapped.
        iova: Range,
        /// What it was to be mapped to.
        memory: Range,
        /// The IOMMU's smallest page in bytes.
        page: u64,
    },
    /// The IOMMU has as many mappings as it may have.
    #[error(
        "no room to map IOVA {iova}: {limit} mappings are in use; unmap some, or map in larger granules"
    )]
    OutOfMappings {
        /// What was to be mapped.
        iova: Range,
        /// How many there may be.
        limit: u64,
    },
    /// The pages are not there, or do not allow the access.
    #[error(
        "IOVA {iova} cannot be mapped to {memory}: not all of that memory is mapped with the rights asked for, or of a kind that a device can reach"
    )]
    Unbacked {
        /// What was to be mapped.
        iova: Range,
        /// What it was to be mapped to.
        memory: Range,
    },
    /// The process may not lock so much memory.
    #[error(
        "IOVA {iova} cannot be mapped: pinning {} more bytes passes RLIMIT_MEMLOCK, {limit} bytes; raise it (ulimit -l, LimitMEMLOCK=) or grant CAP_IPC_LOCK", iova.len()
    )]
    LockLimit {
        /// What was to be mapped.
        iova: Range,
        /// The limit in bytes.
        limit: u64,
    },
    /// Nothing is mapped at that IOVA.
    #[error("nothing is mapped at IOVA {iova}")]
    NotMapped {
        /// What was to be unmapped.
        iova: Range,
    },
    /// The range begins or ends inside a mapping, and mappings cannot be cut.
    #[error("IOVA {iova} cuts the mapping {mapping}: unmap whole granules")]
    Cut {
        /// What was to be unmapped.
        iova: Range,
        /// What it would cut.
        mapping: Range,
    },
    /// The IOMMU took away less or more than was mapped: somebody else changes its mappings.
    #[error(
        "of IOVA {iova} {unmapped:#x} bytes were unmapped, not the {expected:#x} that are mapped: somebody else changes this IOMMU; the range counts as mapped"
    )]
    Mismatch {
        /// What was to be unmapped.
        iova: Range,
        /// What was mapped, in bytes.
        expected: u64,
        /// What the IOMMU says it unmapped, in bytes.
        unmapped: u64,
    },
    /// A system call failed in a way that has no name here.
    #[error("{call} failed: {}", std::io::Error::from_raw_os_error(*errno))]
    System {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        errno: i32,
    },
    /// The device did not become ready in time.
    #[error("{what} took longer than {deadline:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        deadline: Duration,
    },
}

/// A window of device registers, little-endian, 64 or 32 bits wide, at byte offsets that are multiples of their width.
/// Which widths a register has is the device's business: the others are refused by [`DeviceError::NoRegister`].
///
/// Reads and writes have device semantics: each happens exactly once, in program order of one thread. A write is
/// ordered after all earlier stores of that thread (release); a read is ordered before all later loads (acquire).
/// May be called with any lock held; never waits for anything but the bus.
pub trait Registers: Send + Sync {
    /// The size of the window in bytes.
    fn len(&self) -> u64;

    /// Whether the window has no registers.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the 64-bit register at byte `offset`.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    fn read(&self, offset: u64) -> Result<u64, DeviceError>;

    /// Writes the 64-bit register at byte `offset`.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError>;

    /// Reads the 32-bit register at byte `offset`. Without one of its own a window has none of that width.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    fn read32(&self, offset: u64) -> Result<u32, DeviceError> {
        Err(DeviceError::NoRegister { offset, width: 4 })
    }

    /// Writes the 32-bit register at byte `offset`. Without one of its own a window has none of that width.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    fn write32(&self, offset: u64, value: u32) -> Result<(), DeviceError> {
        let _ = value;
        Err(DeviceError::NoRegister { offset, width: 4 })
    }
}

/// Interrupt vectors of a device, each a counter of interrupts not yet taken.
pub trait Interrupts: Send + Sync {
    /// How many vectors there are.
    fn vectors(&self) -> u32;

    /// Waits until `vector` has fired or `timeout` has passed, and takes what is pending: how often it fired, 0 after
    /// the timeout.
    ///
    /// # Errors
    /// No such vector, or the device is gone.
    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError>;
}

/// An IOMMU's input address space (IOVA), mapped to memory of the process. An IOMMU outlives one device and is shared by
/// several.
///
/// A *granule* is what one call of [`DmaWindow::map`] maps; it can only be unmapped as a whole. Unmapping happens inside
/// the shootdown path: it neither allocates nor frees, and takes no lock under which somebody does.
pub trait DmaWindow: Send + Sync {
    /// The IOVAs that devices may be given.
    fn iova_ranges(&self) -> Vec<Range>;

    /// The IOMMU's smallest page in bytes: both ends of a granule are multiples of it.
    fn page(&self) -> u64 {
        4096
    }

    /// Maps `memory`, as one granule, at `iova`, which has the same length. The pages are pinned. May wait.
    ///
    /// # Errors
    /// Overlap, misalignment, no room, memory that is not there, device gone; nothing is mapped then.
    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError>;

    /// Takes every granule in `iova` away from the devices; parts of it that are not mapped are passed over. When it returns no
    /// device access through them is in flight. May wait.
    ///
    /// # Errors
    /// [`DeviceError::NotMapped`] if there is none; [`DeviceError::Cut`], and nothing is unmapped; what the IOMMU did
    /// otherwise, and the range counts as mapped: the caller has to expect devices to reach it.
    fn unmap(&self, iova: Range) -> Result<(), DeviceError>;
}
