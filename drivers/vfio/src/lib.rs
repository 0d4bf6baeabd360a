//! VFIO for [`shootdown`]: devices through type1 v2, and DMA windows that are cut off before their pages change.
//!
//! VFIO pins what it maps. A process may unmap, discard, move or protect that memory: the kernel lets it, tells nobody, and the
//! device goes on with the old pages. A [`Window`] closes this hole: it is a notifier on a range of an address space, and before
//! the pages of that range change the device's work has been stopped and drained, and the IOMMU has been told.
//!
//! # The pieces
//! ```text
//!   Device ── Region (Registers), Irqs (Interrupts), reset          Window ── DeviceWork (stop, drained, resume)
//!     │                                                               │  registration, IOVA, granules
//!   Container ── DmaWindow: one IOMMU address space of the kernel ◄── Iommu: one or more of them, visited together
//!     └─ Group ── what the hardware can tell apart
//! ```
//! [`open`] opens a device by its PCI address. A process without the privilege is handed descriptors instead:
//! [`Container::from_fd`], [`Group::from_fd`], [`Device::from_fd`]. All descriptors are close-on-exec, and a child that was forked
//! off is refused with [`DeviceError::Forked`](shootdown::DeviceError::Forked) whatever it tries.
//!
//! # What an IOMMU proves
//! * When an unmap has returned, no access through it is in flight: the kernel has flushed the IOMMU's TLB and, with ATS, the
//!   device's, and has waited for both.
//! * An unmap that succeeds can have unmapped nothing. What came back is therefore compared with a book of what is mapped, and
//!   every container is visited ([`DeviceError::Mismatch`](shootdown::DeviceError::Mismatch)).
//! * A device that goes on after the cut-off faults. Type1 reports such a fault to nobody but the kernel's log ([`KernelLog`]); where
//!   one is learned of, [`Iommu::faults`] and [`Iommu::attribute`] say whose IOVA it was and what was done to it last.
//!
//! # Locks, in their order
//! | lock | held during | under it |
//! |---|---|---|
//! | a window's `NotifierLock` | mapping what is missing, and the doorbell | the ones below |
//! | a container's book | one map or unmap | nothing is allocated |
//! | the history | recording one operation | nothing |
//!
//! The allocator of IOVAs has a lock of its own, which is never taken in the shootdown path.
//!
//! # What a physical device needs
//! An IOMMU that is switched on in firmware and kernel; all devices of the group bound to vfio-pci or to nothing; the right to open
//! `/dev/vfio/GROUP`; RLIMIT_MEMLOCK for what is mapped. Each error says which of them is missing.

#[macro_use]
mod planted;

mod answer;
mod bits;
mod book;
mod caps;
mod check;
mod container;
mod device;
mod error;
mod faults;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(missing_docs))]
pub mod fuzz;
mod history;
mod iommu;
mod iova;
mod irq;
mod options;
pub mod pci;
mod region;
mod reset;
mod sys;
mod window;
mod work;

pub use caps::ChainError;
pub use check::{Failed, Proof, Report, Step};
pub use container::{Container, Group, IommuInfo};
pub use device::{Departure, Device, HotReset, Sibling, open};
pub use error::VfioError;
pub use faults::{DmaFault, FaultSource, KernelLog};
pub use history::{Attribution, Operation};
pub use iommu::{Iommu, IommuError};
pub use iova::Reuse;
pub use irq::{Irqs, Kind};
pub use options::{WindowError, WindowOptions};
pub use region::{Region, Width};
pub use reset::FunctionReset;
pub use window::Window;
pub use work::{DeviceWork, InFlight};
