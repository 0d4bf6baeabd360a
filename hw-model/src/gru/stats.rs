//! What a chiplet counts.

use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a chiplet has counted since it was built; a reset does not clear it.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[non_exhaustive]
        pub struct Counts {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The live counters. Relaxed throughout: they are statistics and order nothing.
        #[derive(Default)]
        pub(super) struct Counters {
            $(pub(super) $name: Counter,)*
        }

        impl Counters {
            pub(super) fn read(&self) -> Counts {
                Counts { $($name: self.$name.0.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Instructions that completed, without those that ended with an exception.
    instructions,
    /// Instructions that ended with an exception.
    exceptions,
    /// Bytes read from and written to memory.
    bytes,
    /// TLB misses.
    misses,
    /// Stores through an entry that does not allow them.
    modify_misses,
    /// Entries installed.
    drop_ins,
    /// Of those, how many by an operation that restarts nothing.
    preloads,
    /// Drop-ins that were ignored because a purge covered them since the miss, or because there was no such miss.
    drop_ins_cancelled,
    /// Interrupts that found none pending; others are one with that which is.
    interrupts,
    /// Entries that had to make room.
    evictions,
    /// Purges of pages of one ASID.
    purges_pages,
    /// Purges of one ASID.
    purges_asid,
    /// Purges of any ASID.
    purges_global,
    /// Injected: completions lost.
    completions_lost,
    /// Injected: completions late.
    completions_late,
    /// Injected: purges that never begin.
    purges_stuck,
    /// Injected: purges that overtook an earlier one.
    completions_reordered,
    /// Injected: purges that are to happen again.
    purges_duplicated,
    /// Of those, how many have happened again.
    purges_repeated,
    /// Injected: purges between a miss and its drop-in.
    purges_in_miss,
    /// Injected: instructions ended by an error that is worth another try.
    errors,
    /// Injected: messages that were not delivered.
    nacks,
    /// Messages that were delivered.
    messages,
    /// Accesses through no translation.
    unmapped,
    /// Injected: steps delayed.
    steps_delayed,
    /// Injected: resets that the chiplet survived.
    resets_survived,
    /// Of what was injected and ends by itself (late, reordered, duplicated, in a miss, delayed; errors and nacks at once), how much
    /// has ended.
    faults_over,
    /// Of that, how much a reset has ended instead.
    faults_cut_short,
    /// Purges that a reset ended and that were neither lost nor stuck.
    purges_cut_short,
    /// Resets that were done.
    resets,
}

/// One counter.
#[derive(Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(super) fn hit(&self) {
        self.add(1);
    }
}
