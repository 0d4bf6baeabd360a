//! A driver for NVMe controllers, over [`shootdown`]'s traits: one admin queue, one I/O queue, reads and writes through DMA windows.
//!
//! It is small, to be learned from. What it shows beside [edu's](../shootdown_edu/index.html): a device with work in flight that can
//! be waited for, asked to end (Abort), and in the end reset.
//!
//! # A shootdown
//! 1. *No new work*: commands are submitted inside [`Window::with_mapped`](shootdown_vfio::Window::with_mapped) only, which an
//!    invalidation of their memory shuts.
//! 2. *Stop*: each command in flight that reaches the memory is aborted; the controller may comply, or not.
//! 3. *Drained*: completions are taken until none of those commands is in flight.
//! 4. If that takes longer than the deadline the function is reset ([`FunctionReset`](shootdown_vfio::FunctionReset) as the windows'
//!    target): all commands end with [`NvmeError::Reset`], and [`Nvme::restart`] brings the controller back.
//! 5. *Cut off*: the IOMMU, then the pages.
//!
//! # Locks
//! A window's `NotifierLock` → the queues' lock. Under the latter nothing is allocated and nothing waits.
//!
//! Source of registers and formats: NVM Express Base Specification 1.4.

mod check;
mod command;
mod controller;
mod error;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(missing_docs))]
pub mod fuzz;
mod identify;
mod memory;
mod queue;
mod registers;

pub use check::{Check, CheckError, self_check};
pub use command::{Command, Direction};
pub use controller::{Nvme, NvmeConfig, NvmePorts};
pub use error::{NvmeError, Status};
pub use identify::{Controller, Namespace};
