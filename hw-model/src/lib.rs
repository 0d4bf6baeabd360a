//! Software hardware: what a device does to memory, without the device.
//!
//! Drivers of [`shootdown`] run over this model as they run over VFIO, and are judged while they do. It is faithful
//! where it hurts: translations are really cached, pages really go and are soon somebody else's, and an access through
//! a translation that should have been shot down really reads or destroys what is there now.
//!
//! # Memory
//! ```text
//!   application ──── loads, stores ────► ModelMemory ──── mmap ────┐
//!                                         │ page table             ▼
//!                                         │                    Physical (a memfd of frames)
//!                                         │ withdraw, publish      ▲
//!                                         ▼                        │
//!   device ── frame, stamp ──► Bus ── before, after ──► Oracle     │
//!                               └───────── the access ─────────────┘
//! ```
//! - [`Physical`]: frames of 4 KiB that processes map and devices reach by number.
//! - [`ModelMemory`]: a [`shootdown::Memory`], real mappings of those frames with a page table of its own.
//! - [`Bus`]: how devices access frames; [`Oracle`]: sees each of these accesses and knows what is really mapped.
//!
//! # Devices
//! - [`gru`]: chiplets with a TLB that software fills entry by entry, and misses that users poll for.
//! - [`pta`]: a page-table accelerator, which walks tables that software writes, by PASID, and makes page requests.
//! - [`edu`]: QEMU's, behind an IOMMU without a device TLB.
//!
//! None of these knows a registration, a notifier or the engine: they cannot be wrong in the same way as what they judge.
//!
//! # Locks
//! | lock | held for | under it |
//! |---|---|---|
//! | membership of the oracle | adding or dropping a space | a system call |
//! | borders of a page table | the update of a range's entries | nothing |
//! | frames | taking or giving back frames | nothing |
//! | findings | recording a wrong access | nothing |
//!
//! No two are ever held together. Devices' accesses take none but the last, and that only when they are wrong.

mod buddy;
mod bus;
pub mod edu;
mod error;
#[cfg(any(test, fuzzing))]
#[cfg_attr(fuzzing, allow(missing_docs))]
pub mod fuzz;
pub mod gru;
mod memory;
mod oracle;
mod physical;
pub mod pta;
mod shadow;
mod table;

pub use bus::Bus;
pub use error::ModelError;
pub use memory::{ModelMemory, VmaBudget};
pub use oracle::{Access, Finding, FindingKind, Oracle, Stamp};
pub use physical::Physical;
