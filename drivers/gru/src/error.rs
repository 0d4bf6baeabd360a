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

bitflags::bitflags! {
    /// Why an instruction ended with an exception: the hardware's cause bits.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Causes: u32 {
        /// Register error.
        const REGISTER = 1 << 0;
        /// No such opcode, element type, count, alignment, stride or queue: [`GruError::Exception`]'s detail numbers them from 1.
        const INVALID_INSTRUCTION = 1 << 1;
        /// Unmapped addresses where the context may not have them.
        const UNMAPPED_MODE_FORBIDDEN = 1 << 2;
        /// The check of the instruction's data failed.
        const CHECK_DATA = 1 << 3;
        /// The page is not of the address kind that the instruction names.
        const ADDRESS_KIND_MISMATCH = 1 << 4;
        /// Past the end of the data segment.
        const DATA_SEGMENT_LIMIT = 1 << 5;
        /// Nothing is mapped there (detail 1), or not for stores (detail 2).
        const TLB_FATAL = 1 << 6;
        /// Execution hardware; worth another try.
        const EXECUTION_ERROR = 1 << 7;
        /// TLB hardware; worth another try.
        const TLB_ERROR = 1 << 8;
        /// A request to a remote agent has timed out; worth another try.
        const REMOTE_TIMEOUT = 1 << 9;
        /// A request to the home agent has timed out; worth another try.
        const HOME_TIMEOUT = 1 << 10;
        /// A fatal response of a remote agent.
        const REMOTE_FATAL = 1 << 11;
        /// A response of a remote agent that is not fatal; worth another try.
        const REMOTE_NON_FATAL = 1 << 12;
        /// A fatal response of the home agent.
        const HOME_FATAL = 1 << 13;
        /// A response of the home agent that is not fatal; worth another try.
        const HOME_NON_FATAL = 1 << 14;
        /// An address that nobody decodes.
        const ADDRESS_DECODE = 1 << 15;
        /// The coherence protocol was violated.
        const PROTOCOL = 1 << 16;
        /// Bad data in a response of a remote agent; worth another try.
        const REMOTE_DATA = 1 << 17;
        /// Bad data in a response of the home agent; worth another try.
        const HOME_DATA = 1 << 18;
        /// An error that software forced.
        const FORCED = 1 << 19;
    }
}

impl Causes {
    const RETRYABLE: Self = Self::EXECUTION_ERROR
        .union(Self::TLB_ERROR)
        .union(Self::REMOTE_TIMEOUT)
        .union(Self::HOME_TIMEOUT)
        .union(Self::REMOTE_NON_FATAL)
        .union(Self::HOME_NON_FATAL)
        .union(Self::REMOTE_DATA)
        .union(Self::HOME_DATA);

    /// Whether the instruction is worth another try: nothing of it is wrong.
    pub fn is_retryable(self) -> bool {
        !self.is_empty() && Self::RETRYABLE.contains(self)
    }
}

impl std::fmt::Display for Causes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut first = true;
        for (name, _) in self.iter_names() {
            let between = if std::mem::take(&mut first) { "" } else { ", " };
            write!(f, "{between}{}", name.to_lowercase().replace('_', " "))?;
        }
        if first { f.write_str("none") } else { Ok(()) }
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
    /// No chiplet is well, or one that was told to serve a segment is not.
    #[error("none of {chiplets} chiplets can take a segment: reset one")]
    NoContext {
        /// How many chiplets there are.
        chiplets: usize,
    },
    /// No context could be had: those of other segments are locked by their faults, or the chiplet is being reset.
    #[error("no context of {chiplet} came free, or could be stolen, within {waited:?}: try again")]
    NoneStealable {
        /// The chiplet's name.
        chiplet: String,
        /// How long was waited.
        waited: Duration,
    },
    /// More than a whole chiplet has.
    #[error(
        "{control_blocks} control blocks and {data_bytes} data bytes: a segment has 1 to 128, and 32768 at most"
    )]
    TooLarge {
        /// Control blocks that were asked for.
        control_blocks: usize,
        /// Data bytes that were asked for.
        data_bytes: usize,
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
    /// No such blade.
    #[error("no blade {blade}: there are {blades}")]
    NoBlade {
        /// What was asked for.
        blade: u32,
        /// How many there are.
        blades: usize,
    },
    /// Memory of the driver's own shows no page table, so that its frames cannot be named.
    #[error(
        "nothing is known of the frame behind {address}: kernel services need a memory that translates"
    )]
    NotTranslated {
        /// Where.
        address: Addr,
    },
    /// A message queue of this size cannot be.
    #[error(
        "a queue of {lines} lines: it has 8 at least, 65536 at most, and as many in either half"
    )]
    QueueLines {
        /// What was asked for.
        lines: u32,
    },
    /// A message of this length cannot be.
    #[error("a message of {words} words: it has 1 to {most}")]
    MessageLength {
        /// What was to be sent.
        words: usize,
        /// The most.
        most: usize,
    },
    /// Both halves of a message queue are full.
    #[error("the message queue is full: receive first")]
    QueueFull,
    /// The receiver of a message was congested for too long.
    #[error("the receiver was congested for {waited:?}: try again")]
    Congested {
        /// How long was tried.
        waited: Duration,
    },
    /// All control blocks of a blade's kernel context are in use.
    #[error("no {count} control blocks of blade {blade} came free within {waited:?}")]
    NoFreeBlocks {
        /// The blade.
        blade: u32,
        /// How many were wanted.
        count: usize,
        /// How long was waited.
        waited: Duration,
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
    #[error("control block {cb} ended with an exception at {address}: {causes} (detail {detail})")]
    Exception {
        /// Which control block.
        cb: usize,
        /// The hardware's causes.
        causes: Causes,
        /// What the hardware says beside them, as [`Causes`] tells.
        detail: u64,
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
