//! Why an invalidation fails.

use std::time::Duration;

use thiserror::Error;

use crate::addr::Range;
use crate::context::Refused;
use crate::memory::MemoryError;
use crate::tlb::Device;

/// Why an invalidation failed. Unless it says otherwise the pages have not changed; everybody who got its start got its end.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum InvalidateError {
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A handler of a non-blocking invalidation would have had to wait.
    #[error(
        "a handler would have had to wait: the non-blocking invalidation of {range} was refused"
    )]
    WouldBlock {
        /// The range.
        range: Range,
    },
    /// A device did not acknowledge, whatever was tried: it may still reach the pages, which are in quarantine.
    #[error("device {} may still reach {range}: {reason}; the pages are in quarantine until it is recovered or reset", device.name())]
    Quarantined {
        /// The range.
        range: Range,
        /// The first such device.
        device: Device,
        /// Why; what its context said, where one could not be unloaded.
        reason: &'static str,
    },
    /// A handler without a device that could be flushed or reset did not drain, or could not cut the device off.
    #[error(
        "work of {handler} in flight in {range} did not end, or could not be cut off: the pages are in quarantine, and `drain` tries again while it is registered"
    )]
    NotDrained {
        /// The range.
        range: Range,
        /// What the handler is called.
        handler: &'static str,
    },
    /// A handler panicked. The others ran; its devices are in quarantine. If it did so before the pages changed they are in
    /// quarantine too; if only in `end`, they have changed.
    #[error("{handler} panicked during the invalidation of {range}: its devices are in quarantine{}", if *changed { "" } else { ", and so are the pages" })]
    HandlerPanicked {
        /// The range.
        range: Range,
        /// What the handler, or the context, is called.
        handler: &'static str,
        /// Whether the pages have changed.
        changed: bool,
    },
    /// More invalidations are in progress than there is room for.
    #[error(
        "no room for one more invalidation of {range} within {waited:?}: {limit} may be in progress at once"
    )]
    NoRoom {
        /// The range.
        range: Range,
        /// How long was waited.
        waited: Duration,
        /// The limit.
        limit: usize,
    },
    /// The space exits, or has exited, and shoots everything down itself.
    #[error(
        "the address space is exiting: call `exit`, which waits until no device reaches {range}"
    )]
    Exiting {
        /// The range.
        range: Range,
    },
    /// The change itself failed; handlers were told that nothing changed.
    #[error("the pages could not be changed: {0}")]
    Change(#[from] MemoryError),
}

/// Why a change that somebody else makes must not be made; where it is told late, why a device may still reach what is gone. It holds no
/// count of anything, so that whoever drops it frees nothing (R18).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum SinkError {
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// As [`InvalidateError::WouldBlock`]; of invalidations that may not wait.
    #[error(
        "a handler would have had to wait: the non-blocking invalidation of {range} was refused"
    )]
    WouldBlock {
        /// The range.
        range: Range,
    },
    /// As [`InvalidateError::Quarantined`]. Which device it is its health says, and the dump of the flight recorder.
    #[error(
        "a device may still reach {range}: {reason}; the pages are in quarantine until it is recovered or reset"
    )]
    Reached {
        /// The range.
        range: Range,
        /// Why.
        reason: &'static str,
    },
    /// As [`InvalidateError::NotDrained`].
    #[error(
        "work of {handler} in flight in {range} did not end, or could not be cut off: the pages are in quarantine"
    )]
    NotDrained {
        /// The range.
        range: Range,
        /// What the handler is called.
        handler: &'static str,
    },
    /// As [`InvalidateError::HandlerPanicked`].
    #[error("{handler} panicked during the invalidation of {range}: its devices are in quarantine{}", if *changed { "" } else { ", and so are the pages" })]
    HandlerPanicked {
        /// The range.
        range: Range,
        /// What the handler is called.
        handler: &'static str,
        /// Whether the pages have changed.
        changed: bool,
    },
    /// As [`InvalidateError::NoRoom`].
    #[error(
        "no room for one more invalidation of {range} within {waited:?}: {limit} may be in progress at once"
    )]
    NoRoom {
        /// The range.
        range: Range,
        /// How long was waited.
        waited: Duration,
        /// The limit.
        limit: usize,
    },
}

impl SinkError {
    /// The same with the first device that may still reach the pages.
    pub(super) fn with(self, device: Option<Device>) -> InvalidateError {
        match self {
            Self::Refused(refused) => refused.into(),
            Self::WouldBlock { range } => InvalidateError::WouldBlock { range },
            Self::Reached { range, reason } => InvalidateError::Quarantined {
                range,
                device: device.expect("who wants to know has it kept"),
                reason,
            },
            Self::NotDrained { range, handler } => InvalidateError::NotDrained { range, handler },
            Self::HandlerPanicked {
                range,
                handler,
                changed,
            } => InvalidateError::HandlerPanicked {
                range,
                handler,
                changed,
            },
            Self::NoRoom {
                range,
                waited,
                limit,
            } => InvalidateError::NoRoom {
                range,
                waited,
                limit,
            },
        }
    }
}
