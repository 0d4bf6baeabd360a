//! Counters of an address space, each counted where the thing happens, on a shard that no other thread writes to, where the thread has a
//! home of its own: it counts by a load and a store. Others share a few more shards.

use crate::context::Place;
use crate::home::{HOMES, home};
use crate::primitive::atomic::{AtomicU64, Ordering};

/// Shards of threads without a home of their own.
const SHARED: usize = if cfg!(loom) { 1 } else { 8 };
const SHARDS: usize = HOMES + SHARED;
const COUNTERS: usize = 15;

#[derive(Clone, Copy)]
#[repr(usize)]
pub(crate) enum Counter {
    Invalidations,
    Hits,
    Refused,
    Quarantined,
    Panics,
    Faults,
    FaultRetries,
    Inserts,
    Releases,
    Segments,
    /// Five of them, in the order of [`Place::ALL`].
    Unregisters,
}

/// What happened in an address space so far.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Stats {
    /// Invalidations begun.
    pub invalidations: u64,
    /// Registrations called, over all invalidations.
    pub hits: u64,
    /// Non-blocking invalidations that a handler refused.
    pub refused: u64,
    /// Invalidations that ended with memory in quarantine.
    pub quarantined: u64,
    /// Handlers that panicked.
    pub panics: u64,
    /// Faults begun.
    pub faults: u64,
    /// Faults that had to go round again.
    pub fault_retries: u64,
    /// Registrations inserted: each is released once, by the exit of the space at the latest.
    pub inserts: u64,
    /// `release` calls that have returned.
    pub releases: u64,
    /// Segments whose contexts were unloaded.
    pub segments: u64,
    /// Callbacks that the watchdog has named because they did not return in time.
    pub overdue: u64,
    /// Unregisters by the place that they were called from, in the order of [`Place::ALL`].
    pub unregisters: [u64; 5],
}

#[repr(align(128))]
struct Shard([AtomicU64; COUNTERS]);

pub(crate) struct Counters([Shard; SHARDS]);

impl Counters {
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|_| {
            Shard(std::array::from_fn(|_| AtomicU64::new(0)))
        }))
    }

    #[inline]
    fn add_at(&self, index: usize, more: u64) {
        // Relaxed: counts order nothing.
        let home = home();
        if home < HOMES {
            let counter = &self.0[home].0[index];
            counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        } else {
            let counter = &self.0[HOMES + home % SHARED].0[index];
            counter.fetch_add(more, Ordering::Relaxed);
        }
    }

    #[inline]
    pub(crate) fn add(&self, counter: Counter, more: u64) {
        self.add_at(counter as usize, more);
    }

    pub(crate) fn unregister(&self, place: Place) {
        self.add_at(Counter::Unregisters as usize + place as usize, 1);
    }

    pub(crate) fn read(&self) -> Stats {
        let sum = |index: usize| {
            self.0
                .iter()
                .map(|shard| shard.0[index].load(Ordering::Relaxed))
                .sum()
        };
        let get = |counter: Counter| sum(counter as usize);
        Stats {
            invalidations: get(Counter::Invalidations),
            hits: get(Counter::Hits),
            refused: get(Counter::Refused),
            quarantined: get(Counter::Quarantined),
            panics: get(Counter::Panics),
            faults: get(Counter::Faults),
            fault_retries: get(Counter::FaultRetries),
            inserts: get(Counter::Inserts),
            releases: get(Counter::Releases),
            segments: get(Counter::Segments),
            overdue: 0,
            unregisters: std::array::from_fn(|place| sum(Counter::Unregisters as usize + place)),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn no_count_is_lost_whether_threads_are_alone_or_share() {
        // Those that share go on for longer than a thread is left to run.
        const TIMES: u64 = 500_000;
        let counters = Counters::new();
        let all = std::sync::Barrier::new(HOMES + 2 * SHARED);
        let count = || {
            let home = home();
            all.wait();
            let times = if home < HOMES { 1 } else { TIMES };
            (0..times).for_each(|_| counters.add(Counter::Hits, 1));
            all.wait();
            (home, times)
        };
        let counted: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..HOMES + 2 * SHARED)
                .map(|_| scope.spawn(count))
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join().unwrap());
            joined.collect()
        });
        for (home, times) in counted.iter().filter(|(home, _)| *home < HOMES) {
            let own = &counters.0[*home].0[Counter::Hits as usize];
            assert_eq!(own.load(Ordering::Relaxed), *times, "home {home}");
        }
        let all = counted.iter().map(|(_, times)| times).sum();
        assert_eq!(counters.read().hits, all);
    }
}
