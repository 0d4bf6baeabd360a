//! The invalidations that are in progress: slots, each owned by one of them from its claim to its end.
//!
//! A slot says three things to others:
//! * *that* an invalidation is in progress, and of which range: to newcomers, and to faults that have to wait for it (R8);
//! * whether its walk of the index is over: to writers, who free nothing that a walk may still see (R5, see [`srcu`]);
//! * which registrations it has found, and as their how manieth invalidation: to faults that ask what has disturbed them.
//!
//! ```text
//!   walker                                        newcomer, or another writer of the index
//!   slot.turn.cas(4n, 4n+1)                       publishes its change
//!   full fence                     (A)            fence(SeqCst)                                   (B)
//!   slot.range = range; slot.stated = 4n+1        looks at the turns of all slots
//!   walks the index
//!   slot.turn = 4n+3, Release      (C)
//!   ... phases 2 to 5 ...
//!   slot.turn.swap(4n+4)           (D)
//! ```
//! A and B are in one total order. If A is first the other sees the turn; if B is first the walk sees the change. So one store
//! that nobody else contends for, and one fence, are all that a walk costs, and they do for claim and read section both.
//!
//! Everything in a slot but the claiming compare-exchange is written by its owner alone.
//!
//! [`srcu`]: crate::srcu

use crate::addr::{Addr, Range};
use crate::home::home;
use crate::notes::{Note, Notes};
use crate::primitive::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use crate::primitive::{Backoff, fence_after_rmw};

/// Invalidations in progress at most, in one address space.
#[cfg(not(loom))]
pub(crate) const SLOTS: usize = 64;
#[cfg(loom)]
pub(crate) const SLOTS: usize = 2;

/// Registrations that a slot remembers to have found. Models have none, so that all is forgotten, and [`Notes`] a model of its own.
const NOTES: usize = if cfg!(loom) { 0 } else { 8 };

const CLAIMED: u64 = 1;
const WALKED: u64 = 2;
const TURN: u64 = 4;

#[repr(align(128))]
#[derive(Debug)]
struct Slot {
    /// Multiples of 4 while free; then with the two marks.
    turn: AtomicU64,
    /// The turn, as claimed, whose range is in the two words below.
    stated: AtomicU64,
    start: AtomicU64,
    last: AtomicU64,
    notes: Notes<NOTES>,
}

impl Slot {
    fn new() -> Self {
        let word = || AtomicU64::new(0);
        Self {
            turn: word(),
            stated: word(),
            start: word(),
            last: word(),
            notes: Notes::new(),
        }
    }

    fn range(&self) -> Option<Range> {
        let start = Addr::new(self.start.load(Ordering::Relaxed));
        Range::inclusive(start, Addr::new(self.last.load(Ordering::Relaxed))).ok()
    }
}

/// One claim of one slot; never the same for another invalidation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Claim {
    slot: usize,
    /// As it is while the walk goes on.
    turn: u64,
}

impl Claim {
    /// Of nothing.
    pub(crate) const fn none() -> Self {
        Self { slot: 0, turn: 0 }
    }

    /// Nobody else has it until the end.
    pub(crate) fn slot(self) -> usize {
        self.slot
    }

    /// A number for the flight recorder.
    pub(crate) fn id(self) -> u64 {
        (self.slot as u64) << 48 | (self.turn / TURN)
    }
}

#[derive(Debug)]
pub(crate) struct Active {
    slots: Box<[Slot; SLOTS]>,
    /// Slots above were never claimed. Raised before the first claim's fence, so that whoever has to see the claim sees this.
    used: AtomicUsize,
}

impl Active {
    pub(crate) fn new() -> Self {
        Self {
            slots: Box::new(std::array::from_fn(|_| Slot::new())),
            used: AtomicUsize::new(0),
        }
    }

    #[inline]
    fn slot(&self, claim: Claim) -> &Slot {
        // It is always below: so nothing is checked.
        &self.slots[claim.slot % SLOTS]
    }

    /// Begins an invalidation of `range` with its walk of the index; `None` with all slots taken.
    #[inline]
    pub(crate) fn claim(&self, range: Range) -> Option<Claim> {
        let home = home();
        self.claim_at(home % SLOTS, range)
            .or_else(|| self.claim_beside(home, range))
    }

    #[cold]
    fn claim_beside(&self, home: usize, range: Range) -> Option<Claim> {
        (1..SLOTS).find_map(|nth| self.claim_at((home + nth) % SLOTS, range))
    }

    #[inline]
    fn claim_at(&self, index: usize, range: Range) -> Option<Claim> {
        let slot = &self.slots[index % SLOTS];
        let turn = slot.turn.load(Ordering::Relaxed);
        if turn & CLAIMED != 0 {
            return None;
        }
        if self.used.load(Ordering::Relaxed) <= index {
            self.used.fetch_max(index + 1, Ordering::Relaxed);
        }
        let turn = turn + CLAIMED;
        // Acquire, with (D): what the last owner wrote is over. SeqCst for the fence.
        slot.turn
            .compare_exchange(turn - CLAIMED, turn, Ordering::SeqCst, Ordering::Relaxed)
            .ok()?;
        if !planted!("r8") {
            fence_after_rmw(); // (A)
        }
        slot.start.store(range.start().get(), Ordering::Relaxed);
        slot.last.store(range.last().get(), Ordering::Relaxed);
        // Release: who sees it stated sees the range.
        slot.stated.store(turn, Ordering::Release);
        Some(Claim { slot: index, turn })
    }

    /// The walk is over: nothing of the index is looked at any more but what is in use.
    #[inline]
    pub(crate) fn walked(&self, claim: Claim) {
        // (C) Release, with the Acquire in `is_walking`: what the walk read it has read.
        self.slot(claim)
            .turn
            .store(claim.turn | WALKED, Ordering::Release);
    }

    /// Ends it. A full fence: what the caller looks at next it looks at after the end.
    #[inline]
    pub(crate) fn end(&self, claim: Claim) {
        let next = claim.turn - CLAIMED + TURN;
        // (D) Release: who sees it ended sees what it did. A swap, not a store, for the fence.
        self.slot(claim).turn.swap(next, Ordering::SeqCst);
        fence_after_rmw();
    }

    fn used(&self) -> impl Iterator<Item = (usize, &Slot)> {
        let used = self.used.load(Ordering::Relaxed);
        self.slots[..used].iter().enumerate()
    }

    /// Whether the walk of `claim` goes on.
    #[inline]
    pub(crate) fn is_walking(&self, claim: Claim) -> bool {
        // Acquire, with (C) and (D).
        self.slot(claim).turn.load(Ordering::Acquire) == claim.turn
    }

    /// The walks that go on, and may see what was unlinked before the caller's fence.
    pub(crate) fn walks(&self) -> impl Iterator<Item = Claim> {
        self.used().filter_map(|(slot, one)| {
            let turn = one.turn.load(Ordering::Acquire);
            (turn & (CLAIMED | WALKED) == CLAIMED).then_some(Claim { slot, turn })
        })
    }

    /// Whether `claim` is in progress.
    pub(crate) fn is_active(&self, claim: Claim) -> bool {
        self.slot(claim).turn.load(Ordering::Acquire) & !WALKED == claim.turn
    }

    /// The invalidations in progress that overlap `range`. One that has not stated its range yet is waited for, which is a matter of two
    /// stores: taken for one that overlaps it would be waited for until its end, which may be long.
    pub(crate) fn overlapping(&self, range: Range) -> impl Iterator<Item = Claim> {
        self.used().filter_map(move |(slot, one)| {
            let turn = one.turn.load(Ordering::Acquire) & !WALKED;
            if turn & CLAIMED == 0 {
                return None;
            }
            let claim = Claim { slot, turn };
            let mut backoff = Backoff::new();
            while one.stated.load(Ordering::Acquire) != turn {
                if !self.is_active(claim) {
                    return None;
                }
                backoff.wait();
            }
            let apart = one.range().is_some_and(|stated| !stated.overlaps(range));
            // What was read may be the range of a later claim: then this one is over, which the fence makes seen.
            fence(Ordering::Acquire);
            (!apart && self.is_active(claim)).then_some(claim)
        })
    }

    /// The caller has just published a registration of `range`: whether an invalidation is in progress that overlaps it, and may
    /// not have found it.
    pub(crate) fn may_have_missed(&self, range: Range) -> bool {
        if !planted!("r8-newcomer") {
            fence(Ordering::SeqCst); // (B)
        }
        self.overlapping(range).next().is_some()
    }

    /// Remembers what `claim` has found.
    #[inline]
    pub(crate) fn note(&self, claim: Claim, note: Note) {
        self.slot(claim).notes.write(note);
    }

    /// What is remembered, each once.
    pub(crate) fn notes(&self) -> impl Iterator<Item = Note> {
        self.used().flat_map(|(_, slot)| slot.notes.read())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn page(nth: u64) -> Range {
        Range::new(nth << 12, 1 << 12).unwrap()
    }

    #[test]
    fn only_what_overlaps_is_in_the_way_and_only_until_its_end() {
        let active = Active::new();
        let claim = active.claim(page(1)).unwrap();
        assert!(!active.may_have_missed(page(2)));
        assert!(active.may_have_missed(Range::new(0u64, 1 << 21).unwrap()));
        active.walked(claim);
        assert!(active.may_have_missed(page(1)));
        active.end(claim);
        assert!(!active.may_have_missed(page(1)));
    }

    #[test]
    fn a_walk_is_over_before_its_invalidation() {
        let active = Active::new();
        let claim = active.claim(page(1)).unwrap();
        assert_eq!(active.walks().collect::<Vec<_>>(), [claim]);
        active.walked(claim);
        assert!(!active.is_walking(claim) && active.is_active(claim));
        active.end(claim);
        assert!(!active.is_active(claim));
        let next = active.claim(page(1)).unwrap();
        assert!(next != claim && !active.is_walking(claim));
    }

    #[test]
    fn every_slot_can_be_claimed_and_no_more() {
        let active = Active::new();
        let claims: Vec<_> = (0..SLOTS).map(|_| active.claim(page(1)).unwrap()).collect();
        assert!(active.claim(page(1)).is_none());
        claims.into_iter().for_each(|claim| active.end(claim));
        assert!(active.claim(page(1)).is_some());
    }
}
