//! The missing MMU notifier for user-space accelerator drivers.
//!
//! VFIO pins pages and never learns that the process has unmapped, discarded, moved or protected them; the device goes on
//! through a stale translation. Inside the kernel `mmu_notifier` closes this hole. Here it is closed for drivers in user space: a driver
//! registers a handler on a range, and before the pages behind that range change the handler has run, and every device TLB that
//! it names has been flushed *and has acknowledged*.
//!
//! # The pieces
//! * [`AddressSpace`]: what is watched. *Managed* ones have [`Memory`] behind them and their own map, unmap, discard, protect and
//!   remap; for others [`AddressSpace::begin_invalidation`] tells of changes.
//! * [`Notifier`]: what a driver implements. [`Registration`]: a notifier on a range, with the [`Device`]s whose TLBs
//!   it stands for. [`Share`]: one registration for many segments.
//! * [`DeviceTlb`]: issue, dispatch, poll, reset: how a TLB is flushed.
//! * [`Segment`]: a device context ([`DeviceContext`]) behind a mapping of the space, which ends with that mapping.
//! * [`Source`]: tells of changes that others make. [`Unotify`] stops foreign calls until the devices are flushed, [`Uffd`] is told late;
//!   [`AddressSpace::watch`] starts one, [`Notifier::needs`] says what a driver can do with.
//! * [`Excluded`]: pages that the CPU does not reach until it touches one.
//! * [`Fault`]: begin and retry, for installing a translation beside invalidations.
//!
//! # The protocol
//! An invalidation goes through five phases, each for all devices concerned before the next begins, so that latencies overlap:
//! 1. **start**: overlapping registrations are in use; no translation that overlaps the range is installed from here on;
//! 2. **quiesce**: handlers stop new work, and say how to tell that what is in flight is done;
//! 3. **flush**: every TLB gets its commands and one doorbell; then all are waited for together;
//! 4. **cut off**: DMA mappings are taken away, contexts of segments whose own addresses go are unloaded;
//! 5. **change, end**: the pages change, and whoever was started is told how it ended.
//!
//! A device that does not acknowledge by its deadline is flushed as a whole, then reset, then *quarantined*, and so are the pages:
//! they stay where they are, nobody gets them again, and the caller gets a typed error. A dead device is not waited for twice.
//! A callback cannot be cut short; one that does not return is named by a watchdog, with its thread ([`Deadlines::callback`]).
//!
//! # Locks, in their order
//! | lock | taken by | held during |
//! |---|---|---|
//! | map lock ([`AddressSpace::lock_write`]) | callers, before start or not at all | in the forms on the guard: everything |
//! | span | map, unmap, discard, protect, remap | all phases, against overlapping operations only |
//! | [`NotifierLock`] | drivers, in `quiesce` and before `retry` | moments |
//! | the device's own | drivers | moments |
//!
//! Where a call is not legal it returns [`Refused`] and nothing has happened. Unregistering is legal everywhere but with a
//! `NotifierLock` held: with the map lock held it waits for running callbacks, inside a callback it returns at
//! once and the last to leave completes it. Inserting inside a callback takes effect when the thread is out of its callbacks.
//! `release` runs exactly once, where no lock is held.
//!
//! # What holding one proves
//! | value | proves |
//! |---|---|
//! | [`Range`] | it has at least one byte, and does not overflow |
//! | [`MapWriteGuard`], [`MapReadGuard`] | the map lock is held by this thread |
//! | [`NotifierGuard`] | a lock is held under which the map lock cannot be taken |
//! | [`Op`] | a callback is running for one operation |
//! | [`Issued`] | the flush of this operation was asked for; the acknowledgement is the engine's to await |
//! | [`Fault`] | begin has found the entry undisturbed |
//! | [`ExternalInvalidation`] | no device reaches the range |
//! | [`Segment`] | its addresses are its own, until they are unmapped |
//!
//! # Where to read on
//! `registration::state` has the state word on which every race of unregister, release, exit and put is decided; `engine` the
//! phases; `fault` begin and retry; `active` the slots of what is in progress; `registry` and `srcu` the lock-free walk; `managed` the spans; `segment` what a
//! segment's end comes to; `space` the exit; `watch` the watchdog; `source` what is seen of foreign calls, and when.

#[macro_use]
mod planted;

mod active;
mod addr;
mod context;
mod device;
mod engine;
mod events;
mod exclude;
mod fault;
#[cfg(all(any(test, fuzzing), not(loom)))]
#[cfg_attr(fuzzing, allow(missing_docs))]
pub mod fuzz;
mod ghosts;
mod home;
mod list;
mod lock;
mod managed;
mod memory;
#[cfg(all(test, loom))]
mod model;
mod notes;
mod notifier;
mod plan;
mod pool;
mod primitive;
mod process;
mod recorder;
mod registration;
mod registry;
mod segment;
mod share;
mod source;
mod space;
mod srcu;
mod stats;
mod tlb;
mod watch;

pub use addr::{Addr, PageSize, PageSizes, Range, RangeError};
pub use context::{Place, Refused};
pub use device::{DeviceError, DmaWindow, Interrupts, Registers};
pub use engine::{ExternalInvalidation, InvalidateError, SinkError};
pub use exclude::{ExcludeError, Excluded};
pub use fault::{Fault, FaultError};
pub use lock::{NotifierGuard, NotifierLock};
pub use managed::{Map, MapError};
pub use memory::{Exclusion, Frame, Memory, MemoryError, Rights, Touched, Translation};
pub use notifier::{Cause, CutOffFailed, Drain, Gather, Issued, Notifier, Op, Outcome, WouldBlock};
/// For the guards of other crates.
#[cfg(planted)]
pub use planted::is as is_planted;
pub use process::ProcessMemory;
pub use recorder::{Kind, Record};
pub use registration::{
    InsertError, Prepared, Registration, Synchronized, Target, UnregisterError, Unregistered,
};
pub use segment::{DeviceContext, Segment, UnloadFailed};
pub use share::Share;
pub use source::{
    ExternalChange, Needs, Observed, Observer, Operation, Operations, Seen, Sees, SelfTest,
    Shortfall, Sink, Source, SourceError, Tried, Uffd, Unotify, Watched, own_call,
};
pub use space::{AddressSpace, Deadlines, ExitError, MapReadGuard, MapWriteGuard, SpacePin};
pub use stats::Stats;
pub use tlb::{
    Completion, Device, DeviceStats, DeviceTlb, FlushCommand, Health, Issue, Limits, ResetError,
    Scope, Ticket,
};

/// The README's code runs as tests.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
