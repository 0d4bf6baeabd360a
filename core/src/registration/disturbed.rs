//! What a registration knows of the invalidations that hit it: for begin, retry and synchronize.
//!
//! The state word answers the undisturbed case: nothing is in progress, and as many have started as before. Else the slots of
//! [`Active`](crate::active::Active) are asked: which ranges are being invalidated, and over which range each of the newest was. So only
//! what *overlaps* the entry that is to be installed is in its way; what the slots have forgotten counts as overlapping, as does
//! what was before the first fault, since when the registration's word says that somebody asks. A registration keeps nothing
//! for it beyond its word.

use super::Inner;
use super::state::started_since;
use crate::active::{Claim, SLOTS};
use crate::addr::Range;

impl Inner {
    /// How many invalidations have started, if none is in progress that overlaps `entry`. The registration is live.
    pub(crate) fn undisturbed(&self, entry: Range) -> Option<u64> {
        let word = self.word.load();
        if !word.is_asked() {
            self.word.note_asked();
        }
        if word.is_calm() {
            return Some(word.started());
        }
        // Whoever is counted in the word has stated its range before: Acquire there.
        let active = self.space.registry.active();
        if active.overlapping(entry).next().is_some() {
            return None;
        }
        // Those that come from now on find the registration in the index.
        if word.has_missed() && active.overlapping(self.range).next().is_none() {
            self.word.clear_missed();
        }
        Some(word.started())
    }

    /// Whether one that overlaps `entry` may have started after the first `seen`.
    pub(crate) fn disturbed(&self, entry: Range, seen: u64) -> bool {
        let since = started_since(self.word.load().started(), seen);
        if since == 0 {
            return false;
        }
        let mut known = 0;
        let notes = self.space.registry.active().notes();
        for note in notes.filter(|note| note.registration == self.id()) {
            if (1..=since).contains(&started_since(note.number, seen)) {
                if note.range.overlaps(entry) {
                    return true;
                }
                known += 1;
            }
        }
        known < since && !planted!("r14-fault")
    }

    /// The invalidations in progress that may be using it.
    pub(crate) fn in_use_by(&self) -> [Option<Claim>; SLOTS] {
        let mut claims = [None; SLOTS];
        // Acquire: the claims of those that are counted in the word are seen.
        if self.word.load().uses() > 0 {
            let overlapping = self.space.registry.active().overlapping(self.range);
            claims
                .iter_mut()
                .zip(overlapping)
                .for_each(|(to, claim)| *to = Some(claim));
        }
        claims
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;

    use crate::{AddressSpace, Cause, Deadlines, ExternalInvalidation, Notifier, Range};

    struct Plain;
    impl Notifier for Plain {}

    fn page(nth: u64) -> Range {
        Range::new(nth << 12, 1 << 12).unwrap()
    }

    fn open(space: &AddressSpace, range: Range) -> ExternalInvalidation<'_> {
        space.begin_invalidation(range, Cause::External).unwrap()
    }

    fn watched(space: &AddressSpace) -> crate::Registration {
        let all = Range::new(0u64, 1 << 30).unwrap();
        space.register(all, Arc::new(Plain), &[]).unwrap()
    }

    fn space() -> AddressSpace {
        AddressSpace::without_memory(Deadlines::default())
    }

    #[test]
    fn only_an_overlapping_invalidation_disturbs() {
        let space = space();
        let registration = watched(&space);
        let inner = &registration.inner;
        let seen = inner.undisturbed(page(1)).unwrap();
        let running = open(&space, page(2));
        assert!(!inner.disturbed(page(1), seen));
        assert!(inner.disturbed(page(2), seen));
        let huge = Range::new(0u64, 1 << 21).unwrap();
        assert!(inner.disturbed(huge, seen), "a huge page over it");
        assert!(inner.undisturbed(page(2)).is_none());
        assert!(inner.undisturbed(page(1)).is_some());
        drop(running);
        assert!(inner.undisturbed(page(2)).is_some());
        assert!(inner.disturbed(page(2), seen), "its end does not undo it");
    }

    #[test]
    fn what_was_before_anybody_asked_counts_as_overlapping() {
        let space = space();
        let registration = watched(&space);
        let inner = &registration.inner;
        let seen = inner.word.load().started();
        drop(open(&space, page(2)));
        assert!(inner.disturbed(page(1), seen), "nothing is noted of it");
        let seen = inner.undisturbed(page(1)).unwrap();
        drop(open(&space, page(2)));
        assert!(!inner.disturbed(page(1), seen), "now it is");
    }

    #[test]
    fn the_first_fault_asks_too() {
        let space = space();
        let registration = watched(&space);
        let lock = crate::NotifierLock::new(());
        let fault = registration.begin(page(1), std::time::Duration::ZERO);
        let fault = fault.unwrap();
        drop(open(&space, page(2)));
        assert!(!fault.retry(&lock.lock()), "nothing overlaps it");
        drop(open(&space, page(1)));
        assert!(fault.retry(&lock.lock()));
    }

    #[test]
    fn what_the_slots_forgot_counts_as_overlapping() {
        let space = space();
        let registration = watched(&space);
        let seen = registration.inner.undisturbed(page(1)).unwrap();
        let mut forgotten = false;
        for nth in 0..100 {
            drop(open(&space, page(10 + nth)));
            let disturbed = registration.inner.disturbed(page(1), seen);
            assert!(disturbed || !forgotten, "what is forgotten stays so");
            forgotten |= disturbed;
            assert!(!forgotten || nth > 2, "a few are remembered");
        }
        assert!(forgotten);
    }

    #[test]
    fn a_newcomer_counts_as_invalidated_until_older_ones_end() {
        let space = space();
        let running = open(&space, page(1));
        // On this thread it would be put off.
        let registration = std::thread::scope(|scope| {
            let newcomer = scope.spawn(|| watched(&space));
            newcomer.join().unwrap()
        });
        let inner = &registration.inner;
        assert!(inner.undisturbed(page(1)).is_none());
        assert!(inner.undisturbed(page(7)).is_some(), "nothing overlaps it");
        assert!(inner.word.load().has_missed());
        drop(running);
        assert!(inner.undisturbed(page(1)).is_some());
        assert!(inner.word.load().is_calm(), "and is asked no more");
    }
}
