//! A driver for a page-table accelerator: a device with PASIDs, page tables that software writes, a device TLB, and page requests.
//!
//! It is **the template for a driver of one's own**. It is written over the traits of [`shootdown`] alone, so that it runs over whatever
//! implements them, and does what such a driver has to do and nothing else. Who copies it changes `layout` and `command`, and then
//! what their device does otherwise; the conformance kit says whether it is right.
//!
//! ```text
//!   Pta ── service thread ── ring of page requests ── begin, translate, retry, write entries ── answer
//!    │                                                              │
//!    ├─ Queue ── segment (portal) ── queue of the device ── PASID ──┤
//!    │             └─ share                                         ▼
//!    └─ Tlb ◄── engine ◄── registration ◄── Handler ── quiesce ── Mirror (page table in local memory)
//! ```
//!
//! # Where to find what
//! | file | trait | what is in it |
//! |---|---|---|
//! | `layout`, `command` | | the registers, and the commands: the device's own |
//! | `flush` | [`DeviceTlb`](shootdown::DeviceTlb) | issue, doorbell, completions that get lost or come twice, reset |
//! | `space` | [`Notifier`](shootdown::Notifier) | quiesce: pages leave the page table under the driver's lock; one registration a space, shared by its queues |
//! | `mirror` | | the page table, without an allocation under the lock |
//! | `fault` | | page requests: taken from the ring, a batch at a time, and answered |
//! | `stretch` | | begin and retry, for what lies side by side, and what is installed round it |
//! | `queue` | [`DeviceContext`](shootdown::DeviceContext) | the segment: a queue that ends with its mapping, under the map lock too |
//! | `device` | | PASIDs, which come back only after a flush; what a reset leaves |
//! | `pta` | | probe, and the opening of a queue |
//!
//! # What an invalidation comes to
//! 1. *quiesce* removes the pages from the page table, with the driver's lock held: a fault that had it before has written its entry,
//!    which is removed; one that gets it later is told to retry.
//! 2. *flush*: the device TLB is told which pages, by PASID; its completion says that the entries are gone, and that accesses through
//!    them have drained. So [`drained`](shootdown::Notifier::drained) and [`end`](shootdown::Notifier::end) have nothing to do.
//! 3. The pages change. What the device needs of them next it asks for.
//!
//! A device that does not answer is flushed as a whole, reset, and put into quarantine by the engine. After a reset its queues
//! are lost ([`PtaError::QueueLost`]): whoever has one opens another.
//!
//! # Locks
//! Order: map lock → the driver's list of spaces → the mirror of a space ([`NotifierLock`](shootdown::NotifierLock)) → the list
//! of queues → doorbells, portals. The last three are held for register accesses only.

mod command;
mod device;
mod error;
mod fault;
mod flush;
mod layout;
mod mirror;
mod pta;
mod queue;
mod space;
mod stats;
mod stretch;

pub use command::Command;
pub use error::PtaError;
pub use pta::{Config, Pta};
pub use queue::{Queue, Status};
pub use stats::PtaStats;
