//! Counters. Each is counted where the thing happens; all are relaxed, as nothing is concluded from their order.

use std::time::Duration;

use hdrhistogram::Histogram;
use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};
use shootdown_primitive::sync::{Mutex, MutexGuard, PoisonError};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
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
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Latencies of one kind, up to a minute; longer ones count as that.
pub(crate) struct Latencies(Mutex<Histogram<u64>>);

impl Default for Latencies {
    fn default() -> Self {
        // Of fixed size: to record does not allocate.
        let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3);
        Self(Mutex::new(histogram.expect("valid bounds and precision")))
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
    /// Rounds that began anew because an invalidation came between.
    fault_retries,
    /// TLB misses that were answered by an exception.
    fault_exceptions,
    /// TLB misses that were left to their user, as the map lock was not to be had.
    faults_to_user,
    /// Times that a chiplet's ASIDs were used up and its TLB was flushed.
    asid_wraps,
    /// ASIDs given up because an invalidation met an address space without a loaded context.
    asids_retired,
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
