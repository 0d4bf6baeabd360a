//! The invalidations that are in progress, for those who come to a range while one is active.
//!
//! An invalidation claims a slot and states its range before it walks the index; a newcomer publishes itself in the index before
//! it looks at the slots. With a fence on both sides either the walk finds the newcomer, or the newcomer finds the
//! invalidation and counts as being invalidated until that one ends (R8).

use crate::addr::{Addr, Range};
use crate::primitive::atomic::{AtomicU64, Ordering, fence};
use crate::primitive::home;

/// Invalidations in progress at most, in one address space.
#[cfg(not(loom))]
pub(crate) const SLOTS: usize = 64;
#[cfg(loom)]
pub(crate) const SLOTS: usize = 2;

#[repr(align(64))]
#[derive(Debug)]
struct Slot {
    /// Odd while claimed.
    turn: AtomicU64,
    start: AtomicU64,
    last: AtomicU64,
}

/// One claim of one slot; never the same for another invalidation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Claim {
    slot: usize,
    turn: u64,
}

impl Claim {
    /// Nobody else has it until the end.
    pub(crate) fn slot(self) -> usize {
        self.slot
    }

    /// A number for the flight recorder.
    pub(crate) fn id(self) -> u64 {
        (self.slot as u64) << 48 | self.turn >> 1
    }
}

#[derive(Debug)]
pub(crate) struct Active(Box<[Slot]>);

impl Active {
    pub(crate) fn new() -> Self {
        let slot = |_| Slot {
            turn: AtomicU64::new(0),
            start: AtomicU64::new(0),
            last: AtomicU64::new(0),
        };
        Self((0..SLOTS).map(slot).collect())
    }

    /// States that `range` is being invalidated; `None` with all slots taken.
    pub(crate) fn claim(&self, range: Range) -> Option<Claim> {
        let home = home();
        (0..SLOTS).find_map(|nth| {
            let index = (home + nth) % SLOTS;
            let slot = &self.0[index];
            let turn = slot.turn.load(Ordering::Relaxed);
            if turn % 2 == 1 {
                return None;
            }
            // Acquire, with the Release in `end`.
            slot.turn
                .compare_exchange(turn, turn + 1, Ordering::Acquire, Ordering::Relaxed)
                .ok()?;
            slot.start.store(range.start().get(), Ordering::Relaxed);
            slot.last.store(range.last().get(), Ordering::Relaxed);
            // With the fence in `overlapping`: the walk that follows sees the newcomer, or the newcomer all three stores.
            if !planted!("r8") {
                fence(Ordering::SeqCst);
            }
            Some(Claim {
                slot: index,
                turn: turn + 1,
            })
        })
    }

    pub(crate) fn end(&self, claim: Claim) {
        // Release: who sees it ended sees what it did.
        self.0[claim.slot]
            .turn
            .store(claim.turn + 1, Ordering::Release);
    }

    pub(crate) fn is_active(&self, claim: Claim) -> bool {
        self.0[claim.slot].turn.load(Ordering::Acquire) == claim.turn
    }

    /// The invalidations in progress that overlap `range`, and may not have found what the caller published just now. A
    /// range that is being written may be read wrong; its walk then comes later and finds the newcomer.
    pub(crate) fn overlapping(&self, range: Range) -> impl Iterator<Item = Claim> {
        fence(Ordering::SeqCst);
        self.0.iter().enumerate().filter_map(move |(slot, one)| {
            let turn = one.turn.load(Ordering::Acquire);
            let start = Addr::new(one.start.load(Ordering::Relaxed));
            let last = Addr::new(one.last.load(Ordering::Relaxed));
            let hit = turn % 2 == 1 && start <= range.last() && range.start() <= last;
            hit.then_some(Claim { slot, turn })
        })
    }
}
