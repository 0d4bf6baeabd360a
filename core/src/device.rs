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
    /// The device did not become ready in time.
    #[error("{what} took longer than {deadline:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        deadline: Duration,
    },
}

/// A window of 64-bit device registers, little-endian, at byte offsets that are multiples of 8.
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

    /// Reads the register at byte `offset`.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    fn read(&self, offset: u64) -> Result<u64, DeviceError>;

    /// Writes the register at byte `offset`.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError>;
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

/// Part of an IOMMU's input address space, mapped to memory of the process. An IOMMU outlives one device and is
/// shared by several.
pub trait DmaWindow: Send + Sync {
    /// The input addresses (IOVA) that devices may be given.
    fn iova_ranges(&self) -> Vec<Range>;

    /// Maps `memory` at `iova`, which has the same length. May wait.
    ///
    /// # Errors
    /// Overlap, misalignment, no room, device gone; nothing is mapped then.
    fn map(&self, iova: Range, memory: Range, rights: Rights) -> Result<(), DeviceError>;

    /// Takes `iova` away from the devices; when it returns no device access through it is in flight. May wait.
    ///
    /// # Errors
    /// Nothing mapped there, a mapping that would be cut, device gone.
    fn unmap(&self, iova: Range) -> Result<(), DeviceError>;
}
