//! A driver for QEMU's edu device, over [`shootdown`]'s traits alone: it runs over VFIO and over a model, unchanged.
//!
//! The device is small: an identity, a factorial, one DMA engine with a buffer of 4 KiB, one interrupt. It has no reset, no stop, and
//! no word for a DMA that failed. So its driver cannot quiesce anything: what is in flight when memory goes is cut off by
//! the IOMMU, and faults there. That cut-off is the device's only sync, and it is enough: the transfer that it
//! loses ends as every other does, with an interrupt, and its data is lost.
//!
//! A transfer begins 100 ms after its doorbell. [`self_check`] makes use of that: a DMA is armed, its memory is taken away
//! at once, and then it is looked at what the device could still do.

mod bytes;
mod check;
mod edu;
mod error;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(missing_docs))]
pub mod fuzz;

pub use check::{Check, CheckError, CheckPorts, self_check};
pub use edu::{Direction, Edu, EduConfig, Transfer};
pub use error::EduError;
