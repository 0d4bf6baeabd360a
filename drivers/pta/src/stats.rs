//! What the driver counts.

use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What the driver has counted.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[non_exhaustive]
        pub struct PtaStats {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The live counters. Relaxed throughout: they are statistics and order nothing.
        #[derive(Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        impl Counters {
            pub(crate) fn read(&self) -> PtaStats {
                PtaStats { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Page requests that were taken from the ring.
    requests,
    /// Of those, how many ended with the page in the page table.
    requests_resolved,
    /// Of those, how many ended with a fault: nothing is mapped there, or not with the rights that are needed.
    requests_refused,
    /// Times that a page request was begun anew, as an invalidation came between.
    request_retries,
    /// Stretches of page requests side by side of which any was resolved, all by one look at the sequence.
    request_batches,
    /// Stretches that an invalidation came between, and whose page requests were then taken up one by one.
    batches_cut,
    /// Times that the ring was found to have overflowed.
    ring_overflows,
    /// Pages that were written into a page table.
    pages_installed,
    /// Of those, how many nobody had asked for.
    pages_around,
    /// Pages that were taken out of one by an invalidation.
    pages_removed,
    /// Times that a space's whole page table was dropped for want of tables.
    mirrors_recycled,
    /// Queues that were opened.
    queues_opened,
    /// Queues that the device did not give back in time.
    queues_stuck,
    /// Flushes of the whole device before PASIDs were used again.
    pasid_flushes,
}

/// One counter.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn hit(&self) {
        self.add(1);
    }
}
