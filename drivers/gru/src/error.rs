//! What can go wrong, each with the value that did.

use std::time::Duration;

use shootdown::{Addr, DeviceError, FaultError, InsertError, MapError, Refused};
use thiserror::Error;

/// Why a segment ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Ended {
    /// It was unmapped.
    Unmapped,
    /// Part of it was unmapped, which ends all of it: the chiplet cannot run half a context.
    PartlyUnmapped,
    /// Its address space has exited.
    SpaceExited,
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unmapped => "it was unmapped",
            Self::PartlyUnmapped => "part of it was unmapped",
            Self::SpaceExited => "its address space has exited",
        })
    }
}

/// Why the driver could not do something.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum GruError {
    /// The chiplet could not be reached.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A handle stayed active.
    #[error("{what} did not end within {deadline:?}: reset the chiplet")]
    HandleTimeout {
        /// The operation.
        what: &'static str,
        /// How long was waited.
        deadline: Duration,
    },
    /// A handle ended with an exception.
    #[error("{what} failed with cause {cause}")]
    HandleException {
        /// The operation.
        what: &'static str,
        /// The hardware's cause.
        cause: u64,
    },
    /// All contexts, control blocks or data units of all chiplets are taken.
    #[error("no free context on any of {chiplets} chiplets: unmap another segment first")]
    NoContext {
        /// How many chiplets there are.
        chiplets: usize,
    },
    /// As many address spaces as the driver serves have segments.
    #[error("{limit} address spaces have segments already")]
    NoTag {
        /// How many.
        limit: usize,
    },
    /// Every ASID is in use by a loaded context.
    #[error("all {count} ASIDs are in use")]
    NoAsid {
        /// How many there are.
        count: usize,
    },
    /// The chiplet was reset, which ended its contexts.
    #[error("context {context} of chiplet {chiplet} was lost in a reset")]
    ContextLost {
        /// The chiplet's name.
        chiplet: String,
        /// The context.
        context: usize,
    },
    /// The segment is over.
    #[error("the segment is over: {why}")]
    SegmentEnded {
        /// Why.
        why: Ended,
    },
    /// The registration of the space failed.
    #[error(transparent)]
    Insert(#[from] InsertError),
    /// Its addresses could not be mapped, or not be unmapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A TLB miss could not be resolved.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// No such control block.
    #[error("no control block {cb}: the segment has {count}")]
    NoControlBlock {
        /// What was asked for.
        cb: usize,
        /// How many there are.
        count: usize,
    },
    /// Outside of the data segment, or not a multiple of 8.
    #[error("{len} bytes at {offset} of a data segment of {bytes} bytes, in whole words")]
    DataBounds {
        /// Byte offset.
        offset: usize,
        /// Bytes.
        len: usize,
        /// Bytes there are.
        bytes: usize,
    },
    /// The control block is at work.
    #[error("control block {cb} is at work: wait for it first")]
    Busy {
        /// Which.
        cb: usize,
    },
    /// The instruction ended with an exception.
    #[error("control block {cb} ended with exception causes {causes:#x} at {address}")]
    Exception {
        /// Which control block.
        cb: usize,
        /// The hardware's causes, one bit each.
        causes: u64,
        /// Where.
        address: Addr,
    },
    /// The instruction did not end in time; it goes on.
    #[error("control block {cb} is still at work after {waited:?}")]
    Timeout {
        /// Which control block.
        cb: usize,
        /// How long was waited.
        waited: Duration,
    },
}
