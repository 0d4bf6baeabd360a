//! Counters. Each is counted where the thing happens; all are relaxed, as nothing is concluded from their order.

use std::time::Duration;

use hdrhistogram::Histogram;
use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};
use shootdown_primitive::sync::{Mutex, MutexGuard, PoisonError};

use crate::handle::Timings;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
            /// Of handles.
            pub(crate) operations: Timings,
        }

        /// What has been counted since the driver attached, and what is in use now.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[non_exhaustive]
        pub struct GruStats {
            $($(#[$doc])* pub $name: u64,)*
            /// Contexts that are loaded now, and those that dead hardware did not give back.
            pub contexts_in_use: u64,
            /// ASIDs that belong to an address space now, over all chiplets.
            pub asids_in_use: u64,
            /// Purges that never ended, or have not yet, and that a wider purge stood in for. Their handles are out of service
            /// until the next reset.
            pub purges_covered: u64,
            /// Purges that a reset ended.
            pub purges_reset: u64,
            /// Purges that are at work now.
            pub purges_open: u64,
        }

        impl GruStats {
            /// Counters that only grow, by name.
            pub fn counters(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }

        impl Counters {
            pub(crate) fn read(&self) -> GruStats {
                GruStats {
                    $($name: self.$name.get(),)*
                    ..GruStats::default()
                }
            }
        }
    };
}

#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn hit(&self) {
        self.add(1);
    }

    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What is counted of one segment.
#[derive(Debug, Default)]
pub(crate) struct SegmentCounters {
    pub(crate) misses_user: Counter,
    pub(crate) misses_interrupt: Counter,
    pub(crate) misses_polled: Counter,
    pub(crate) drop_ins: Counter,
    pub(crate) stolen: Counter,
    pub(crate) steals: Counter,
    pub(crate) retries: Counter,
}

/// What has been counted of one segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct SegmentStats {
    /// TLB misses answered on its user's call.
    pub misses_user: u64,
    /// TLB misses answered by the service thread.
    pub misses_interrupt: u64,
    /// TLB misses answered by whoever polled.
    pub misses_polled: u64,
    /// Entries installed for it.
    pub drop_ins: u64,
    /// Times that its context was stolen.
    pub stolen: u64,
    /// Times that it has stolen one.
    pub steals: u64,
    /// Instructions that were tried again.
    pub retries: u64,
}

impl SegmentCounters {
    pub(crate) fn read(&self) -> SegmentStats {
        SegmentStats {
            misses_user: self.misses_user.get(),
            misses_interrupt: self.misses_interrupt.get(),
            misses_polled: self.misses_polled.get(),
            drop_ins: self.drop_ins.get(),
            stolen: self.stolen.get(),
            steals: self.steals.get(),
            retries: self.retries.get(),
        }
    }
}

/// Latencies of one kind, up to a minute; longer ones count as that.
pub(crate) struct Latencies(Mutex<Histogram<u64>>);

impl Default for Latencies {
    fn default() -> Self {
        // Of fixed size: to record does not allocate. Written once, or it would become resident page by page, on the fault path.
        let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3);
        let mut histogram = histogram.expect("valid bounds and precision");
        histogram.reset();
        Self(Mutex::new(histogram))
    }
}

impl Latencies {
    fn lock(&self) -> MutexGuard<'_, Histogram<u64>> {
        // A histogram that was left half recorded is off by one.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.lock().saturating_record(nanos);
    }

    pub(crate) fn read(&self) -> Histogram<u64> {
        self.lock().clone()
    }
}

counters! {
    /// TLB misses that were answered by an entry.
    faults_resolved,
    /// Looks at the sequence that answered at least one of them by an entry: of a segment's misses, those that are in the fault map at
    /// a time are answered together.
    fault_batches,
    /// Entries that were installed beside them, for what a block copy comes to next.
    preloads,
    /// Rounds that began anew because an invalidation came between.
    fault_retries,
    /// TLB misses that were answered by an exception.
    fault_exceptions,
    /// TLB misses that were left to their user, as the map lock was not to be had.
    faults_to_user,
    /// TLB misses answered on the call of their user.
    misses_user,
    /// TLB misses answered by a service thread.
    misses_interrupt,
    /// TLB misses answered by whoever polled their control block.
    misses_polled,
    /// Interrupts that service threads have taken.
    interrupts,
    /// Completions that interrupted.
    completions,
    /// Purges of pages of one ASID that were started.
    purges_pages,
    /// Purges of everything of one ASID that were started.
    purges_asid,
    /// Purges of a whole chiplet that were started.
    purges_whole,
    /// Flushes that found no handle free, and were tried again.
    purges_busy,
    /// Flushes that needed no purge, as the space had no ASID on the chiplet.
    purges_spared,
    /// Instructions that were tried again after an error that is worth it.
    retries,
    /// Instructions that were given up after three tries.
    retries_exhausted,
    /// Instructions that ended with an exception for good.
    exceptions,
    /// Contexts that were stolen.
    contexts_stolen,
    /// Contexts that were not, as they had not been with their segment for long enough.
    steals_too_early,
    /// Contexts that were not, as a fault of theirs was unresolved.
    steals_locked,
    /// Times that a chiplet's ASIDs were used up and its TLB was flushed.
    asid_wraps,
    /// ASIDs given up because an invalidation met an address space without a loaded context.
    asids_retired,
    /// Messages that were delivered to a queue of the driver's own.
    messages_sent,
    /// Messages that were received from one.
    messages_received,
    /// Messages that found a queue full.
    messages_full,
    /// Messages that were not delivered at the first try, as the receiver was congested.
    messages_congested,
    /// Messages that software had to store, as the chiplet's store was refused.
    messages_stored,
    /// Times that a queue's halves were flipped.
    queue_flips,
    /// Contexts loaded.
    contexts_loaded,
    /// Contexts unloaded.
    contexts_unloaded,
    /// Contexts that the hardware did not give back.
    contexts_leaked,
    /// Resets of a chiplet.
    resets,
    /// Resets that a chiplet did not come back from in time.
    resets_failed,
}
