//! How far a space is in its life, and how many registrations it has to release before it is over: one word, so that of an exit and
//! an insertion one is first. (R7)

use crate::primitive::atomic::{AtomicU64, Ordering};

const EXITING: u64 = 1;
const EXITED: u64 = 2;
/// A device may still have reached its memory when it had exited.
const REACHED: u64 = 4;
/// Inserted and not yet released.
const REGISTERED: u64 = 8;

/// Every step is a read-modify-write of this word, so they are totally ordered; AcqRel, so that whoever sees one sees what was done
/// before it.
#[derive(Debug)]
pub(super) struct Lifecycle(AtomicU64);

impl Lifecycle {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn has(&self, mark: u64) -> bool {
        self.0.load(Ordering::Acquire) & mark != 0
    }

    /// Counts so many as inserted, unless the space is exiting: an exit that comes later waits for them.
    pub(super) fn admit(&self, more: usize) -> bool {
        let counted = |word: u64| {
            let admits = word & EXITING == 0 || planted!("r7");
            admits.then_some(word + more as u64 * REGISTERED)
        };
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, counted)
            .is_ok()
    }

    /// So many of them are released, and have left the index.
    pub(super) fn released(&self, these: usize) {
        self.0
            .fetch_sub(these as u64 * REGISTERED, Ordering::AcqRel);
    }

    /// Inserted and not yet released.
    pub(super) fn registered(&self) -> usize {
        (self.0.load(Ordering::Acquire) / REGISTERED) as usize
    }

    /// From here on nobody is admitted. Whether this is the first exit.
    pub(super) fn exit(&self) -> bool {
        self.0.fetch_or(EXITING, Ordering::AcqRel) & EXITING == 0
    }

    pub(super) fn is_exiting(&self) -> bool {
        self.has(EXITING)
    }

    /// The first exit is over.
    pub(super) fn exited(&self, reached: bool) {
        let reached = if reached { REACHED } else { 0 };
        self.0.fetch_or(EXITED | reached, Ordering::AcqRel);
    }

    pub(super) fn has_exited(&self) -> bool {
        self.has(EXITED)
    }

    /// A device may still have reached its memory when it had exited.
    pub(super) fn was_reached(&self) -> bool {
        self.has(REACHED)
    }
}
