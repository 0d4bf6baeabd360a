//! What a registration knows of the invalidations that hit it: for begin and retry.
//!
//! Counts of the started and the active ones answer the undisturbed case by two loads. Beside them a short log of ranges,
//! under a mutex that is held for a few instructions, answers whether an invalidation *overlaps* the entry that is to be
//! installed; where the log is too short the answer is "yes".

use crate::active::{Active, Claim};
use crate::addr::Range;
use crate::primitive::Mutex;
use crate::primitive::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Invalidations remembered.
const LOG: usize = 4;

#[derive(Clone, Copy, Debug)]
struct Entry {
    range: Range,
    number: u64,
    active: bool,
}

#[derive(Debug, Default)]
struct Log {
    entries: [Option<Entry>; LOG],
    /// Active ones that found no place.
    unlogged: u32,
    /// The highest number that the log does not have any more.
    forgotten: u64,
    /// Invalidations that were in progress when the registration was inserted, and did not find it.
    older: Vec<Claim>,
}

#[derive(Debug)]
pub(crate) struct Recent {
    started: AtomicU64,
    active: AtomicU32,
    /// There are `older` ones; rarely.
    has_older: AtomicBool,
    log: Mutex<Log>,
}

/// Where an invalidation is logged; given back at its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Logged(Option<usize>);

impl Recent {
    pub(crate) fn new() -> Self {
        Self {
            started: AtomicU64::new(0),
            active: AtomicU32::new(0),
            has_older: AtomicBool::new(false),
            log: Mutex::new(Log::default()),
        }
    }

    /// The registration has just been published: notes the invalidations in progress that cannot have found it.
    pub(crate) fn arrive(&self, active: &Active, range: Range) {
        // Collected before the lock is taken, which the shootdown path takes: nobody may allocate under it.
        let older: Vec<Claim> = active.overlapping(range).collect();
        let mut log = self.log.lock();
        log.older = older;
        // Release, with the Acquire in `undisturbed`; before that nobody else has a handle to begin with.
        self.has_older
            .store(!log.older.is_empty(), Ordering::Release);
    }

    /// An invalidation of `range` starts.
    pub(crate) fn start(&self, range: Range) -> Logged {
        let mut log = self.log.lock();
        let number = self.started.load(Ordering::Relaxed) + 1;
        let place = (0..LOG)
            .filter(|at| log.entries[*at].is_none_or(|entry| !entry.active))
            .min_by_key(|at| log.entries[*at].map_or(0, |entry| entry.number));
        match place {
            Some(at) => {
                if let Some(old) = log.entries[at] {
                    log.forgotten = log.forgotten.max(old.number);
                }
                log.entries[at] = Some(Entry {
                    range,
                    number,
                    active: true,
                });
            }
            None => {
                log.unlogged += 1;
                log.forgotten = number;
            }
        }
        // First active, then started, with the loads the other way round in `undisturbed`: who sees this one started and
        // none active knows that it has ended. Release, as the ranges above go with them.
        self.active.fetch_add(1, Ordering::Release);
        self.started.store(number, Ordering::Release);
        Logged(place)
    }

    /// It has ended.
    pub(crate) fn end(&self, logged: Logged) {
        let mut log = self.log.lock();
        match logged.0 {
            Some(at) => {
                if let Some(entry) = &mut log.entries[at] {
                    entry.active = false;
                }
            }
            None => log.unlogged -= 1,
        }
        self.active.fetch_sub(1, Ordering::Release);
    }

    /// How many have started.
    pub(crate) fn started(&self) -> u64 {
        let log = self.log.lock();
        let started = self.started.load(Ordering::Relaxed);
        drop(log);
        started
    }

    /// Whether the first `begun` have ended. Those that found no place in the log count as the oldest.
    pub(crate) fn have_ended(&self, begun: u64) -> bool {
        let log = self.log.lock();
        let mut entries = log.entries.iter().flatten();
        log.unlogged == 0 && !entries.any(|one| one.active && one.number <= begun)
    }

    /// How many have started, if no active one overlaps `range`.
    pub(crate) fn undisturbed(&self, range: Range, active: &Active) -> Option<u64> {
        let started = self.started.load(Ordering::Acquire);
        if self.active.load(Ordering::Acquire) == 0 && !self.has_older.load(Ordering::Acquire) {
            return Some(started);
        }
        let mut log = self.log.lock();
        log.older.retain(|claim| active.is_active(*claim));
        self.has_older
            .store(!log.older.is_empty(), Ordering::Release);
        let overlapped = log.unlogged > 0
            || !log.older.is_empty()
            || log
                .entries
                .iter()
                .flatten()
                .any(|one| one.active && one.range.overlaps(range));
        (!overlapped).then(|| self.started.load(Ordering::Relaxed))
    }

    /// Whether one that overlaps `range` may have started after the first `seen`.
    pub(crate) fn disturbed(&self, range: Range, seen: u64) -> bool {
        if self.started.load(Ordering::Acquire) == seen {
            return false;
        }
        let log = self.log.lock();
        log.forgotten > seen && !planted!("r14-fault")
            || log
                .entries
                .iter()
                .flatten()
                .any(|one| one.number > seen && one.range.overlaps(range))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn page(nth: u64) -> Range {
        Range::new(nth << 12, 1 << 12).unwrap()
    }

    #[test]
    fn only_an_overlapping_invalidation_disturbs() {
        let (recent, active) = (Recent::new(), Active::new());
        let seen = recent.undisturbed(page(1), &active).unwrap();
        let logged = recent.start(page(2));
        assert!(!recent.disturbed(page(1), seen));
        assert!(recent.disturbed(page(2), seen));
        assert!(
            recent.disturbed(Range::new(0u64, 1 << 21).unwrap(), seen),
            "a huge page over it"
        );
        assert!(recent.undisturbed(page(2), &active).is_none());
        assert!(recent.undisturbed(page(1), &active).is_some());
        recent.end(logged);
        assert!(recent.undisturbed(page(2), &active).is_some());
        assert!(recent.disturbed(page(2), seen), "its end does not undo it");
    }

    #[test]
    fn what_the_log_forgot_counts_as_overlapping() {
        let (recent, active) = (Recent::new(), Active::new());
        let seen = recent.undisturbed(page(1), &active).unwrap();
        for nth in 0..=LOG as u64 {
            let logged = recent.start(page(10 + nth));
            recent.end(logged);
        }
        assert!(recent.disturbed(page(1), seen));
    }

    #[test]
    fn more_active_ones_than_the_log_holds_disturb_everybody() {
        let (recent, active) = (Recent::new(), Active::new());
        let logged: Vec<_> = (0..=LOG as u64)
            .map(|nth| recent.start(page(10 + nth)))
            .collect();
        assert!(recent.undisturbed(page(1), &active).is_none());
        logged.into_iter().for_each(|one| recent.end(one));
        assert!(recent.undisturbed(page(1), &active).is_some());
    }

    #[test]
    fn a_newcomer_counts_as_invalidated_until_older_ones_end() {
        let (recent, active) = (Recent::new(), Active::new());
        let claim = active.claim(page(1)).unwrap();
        recent.arrive(&active, Range::new(0u64, 1 << 20).unwrap());
        assert!(recent.undisturbed(page(7), &active).is_none());
        active.end(claim);
        assert!(recent.undisturbed(page(7), &active).is_some());
    }
}
