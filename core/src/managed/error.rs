//! Why a mapping cannot be made or changed.

use thiserror::Error;

use crate::addr::{Addr, PageSize, Range, RangeError};
use crate::context::Refused;
use crate::engine::InvalidateError;
use crate::memory::MemoryError;

/// Why a mapping could not be made or changed. Unless it says otherwise, nothing has changed.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Empty, or past 2^64.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Not whole pages.
    #[error("{range} is not whole pages of {page}: align both ends to {:#x}", page.bytes())]
    Misaligned {
        /// What was given.
        range: Range,
        /// The page size.
        page: PageSize,
    },
    /// Outside of what the space can map.
    #[error("{range} lies outside of the space's arena {arena}")]
    OutsideArena {
        /// What was given.
        range: Range,
        /// Where mappings may lie.
        arena: Range,
    },
    /// No room for so much.
    #[error("no free range of {len:#x} bytes in the arena {arena}")]
    NoRoom {
        /// What was asked for.
        len: u64,
        /// Where mappings may lie.
        arena: Range,
    },
    /// Part of it is not mapped.
    #[error("{range} is not mapped as a whole: there is nothing at {hole}")]
    NotMapped {
        /// What was given.
        range: Range,
        /// The first address without a mapping.
        hole: Addr,
    },
    /// Something is mapped there, or is going away.
    #[error("{range} is not free: {by} is mapped there")]
    Occupied {
        /// What was given.
        range: Range,
        /// What is there.
        by: Range,
    },
    /// Its pages are in quarantine: a device may still reach them.
    #[error(
        "{quarantined} in {range} is in quarantine: a device may still reach it; recover the device, then drain"
    )]
    InQuarantine {
        /// What was given.
        range: Range,
        /// What is in quarantine.
        quarantined: Range,
    },
    /// It is a segment, which can only be unmapped.
    #[error(
        "{range} holds the segment {segment}, which can be unmapped, but not discarded, protected or moved"
    )]
    Segment {
        /// What was given.
        range: Range,
        /// The segment.
        segment: Range,
    },
    /// The segment, or its share, is of another space.
    #[error("the segment belongs to address space {segment:#x}, not to {this:#x}")]
    OtherSpace {
        /// The space of the call, or of the guard.
        this: u64,
        /// The segment's, or its share's.
        segment: u64,
    },
    /// A `try_` form met a lock or a span that is held.
    #[error("{range} is being changed by another thread, or the map lock is held")]
    WouldBlock {
        /// What was given.
        range: Range,
    },
    /// The space exits, or has exited.
    #[error("the address space is exiting")]
    Exiting,
    /// The space has no process memory.
    #[error("this address space has no memory of its own: use begin_invalidation")]
    NoMemory,
    /// The memory could not do it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The shootdown failed; nothing has changed, but see its text for quarantine.
    #[error(transparent)]
    Invalidate(#[from] InvalidateError),
}
