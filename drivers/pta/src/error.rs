//! What can go wrong.

use shootdown_primitive::time::Duration;

use shootdown::{Addr, DeviceError, ExcludeError, InsertError, MapError, ResetError};
use thiserror::Error;

/// Why something was not done.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum PtaError {
    /// The device cannot be reached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It is another one.
    #[error(
        "the device says that it is {found:#x}, not {expected:#x}: it is no page-table accelerator of this revision"
    )]
    NotPta {
        /// What it says.
        found: u64,
        /// What it should say.
        expected: u64,
    },
    /// It does not become ready.
    #[error(transparent)]
    Reset(#[from] ResetError),
    /// The space exits, or is not watched well enough.
    #[error(transparent)]
    Insert(#[from] InsertError),
    /// The portal cannot be mapped, or not be unmapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The CPU is not kept away.
    #[error(transparent)]
    Exclude(#[from] ExcludeError),
    /// All PASIDs are in use, or the device did not acknowledge the flush that those of the past need.
    #[error(
        "no PASID is free: {limit} address spaces use the device, or it does not acknowledge the flush before one is used again"
    )]
    NoPasid {
        /// How many there are.
        limit: u64,
    },
    /// All queues are in use.
    #[error("no work queue is free: the device has {limit}")]
    NoQueue {
        /// How many there are.
        limit: usize,
    },
    /// Local memory is full of other spaces' tables.
    #[error(
        "no room for page tables: the {limit} tables of local memory are in use; close queues of other spaces"
    )]
    NoTables {
        /// How many there are.
        limit: u64,
    },
    /// There is no such slot.
    #[error("no slot {slot}: a queue has {count}")]
    NoSlot {
        /// Which.
        slot: usize,
        /// How many there are.
        count: usize,
    },
    /// A command is under way there.
    #[error("slot {slot} is at work: wait for it, or take another")]
    Busy {
        /// Which.
        slot: usize,
    },
    /// The device does not take the command.
    #[error(
        "the device refused the command in slot {slot}, with cause {cause}: addresses have to be below 2^48, and words aligned"
    )]
    Refused {
        /// Which.
        slot: usize,
        /// The device's word for it.
        cause: u64,
    },
    /// Nothing is mapped there, or not with the rights that are needed. What was done before is done.
    #[error("page fault at {at}, after {done} bytes")]
    PageFault {
        /// The first address that was not reached.
        at: Addr,
        /// Bytes that are done.
        done: u64,
    },
    /// The queue is over: it was unmapped, or its space has exited.
    #[error("the queue is over: its portal was unmapped, or its space has exited")]
    QueueEnded,
    /// The device was reset since the queue was opened.
    #[error("the device was reset since the queue was opened: open another")]
    QueueLost,
    /// The command goes on.
    #[error("slot {slot} is not done after {waited:?}")]
    Timeout {
        /// Which.
        slot: usize,
        /// How long was waited.
        waited: Duration,
    },
}
