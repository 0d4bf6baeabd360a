//! The budget of kernel mappings (VMAs).
//!
//! The kernel gives a process `vm.max_map_count` of them, and whoever runs into that limit finds that `munmap` fails as
//! well. So the model counts its own, process-wide, and refuses before the kernel does, with an error that says why.
//!
//! An operation first *reserves* the most that it can need at any moment, then does its system calls, then *settles*: the
//! reservation goes and the difference that it really made stays. Threads of the application have mappings of their own,
//! for which the default limit leaves room.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use shootdown::MemoryError;

/// What a kernel allows where it does not say: the default of Linux.
const USUAL_LIMIT: u64 = 65530;

/// A limit on kernel mappings, shared by memories.
#[derive(Debug)]
pub struct VmaBudget {
    limit: u64,
    /// In use or reserved.
    used: AtomicU64,
}

impl VmaBudget {
    /// A budget of `limit` mappings of its own, for memories that shall not use up the process's. Every memory takes three
    /// to begin with.
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
        })
    }

    /// The process's budget: what the kernel allows, less an eighth for everybody else.
    pub fn process() -> Arc<Self> {
        static PROCESS: LazyLock<Arc<VmaBudget>> = LazyLock::new(|| {
            let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count")
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .unwrap_or(USUAL_LIMIT);
            VmaBudget::new(limit - limit / 8)
        });
        Arc::clone(&PROCESS)
    }

    /// How many there may be.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How many are in use, or reserved by operations under way.
    pub fn used(&self) -> u64 {
        // Relaxed: a count that guards nothing.
        self.used.load(Ordering::Relaxed)
    }

    /// Reserves `needed` more.
    pub(super) fn reserve(&self, needed: u64) -> Result<Reservation<'_>, MemoryError> {
        // Relaxed, both: only the sum counts.
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
                used.checked_add(needed).filter(|sum| *sum <= self.limit)
            })
            .map_err(|used| MemoryError::OutOfVmas {
                needed,
                used,
                limit: self.limit,
            })?;
        Ok(Reservation {
            budget: self,
            reserved: needed,
        })
    }

    /// Gives back `count` that were in use.
    pub(super) fn give_back(&self, count: u64) {
        // Relaxed: as in `reserve`.
        self.used.fetch_sub(count, Ordering::Relaxed);
    }
}

/// Mappings that an operation may make; given back when dropped.
pub(super) struct Reservation<'a> {
    budget: &'a VmaBudget,
    reserved: u64,
}

impl Reservation<'_> {
    /// The operation is done and made `difference` more mappings than there were, or fewer. A difference that passes the
    /// reservation (two neighbours were changed at once) is counted all the same.
    pub(super) fn settle(self, difference: i64) {
        // Relaxed: as in `reserve`. The reservation itself goes with the drop.
        match u64::try_from(difference) {
            Ok(more) => {
                self.budget.used.fetch_add(more, Ordering::Relaxed);
            }
            Err(_) => self.budget.give_back(difference.unsigned_abs()),
        }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.budget.give_back(self.reserved);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reserved_goes_back_and_what_is_settled_stays() {
        let budget = VmaBudget::new(10);
        drop(budget.reserve(10).unwrap());
        budget.reserve(8).unwrap().settle(5);
        assert_eq!(budget.used(), 5);
        budget.reserve(2).unwrap().settle(-3);
        assert_eq!(budget.used(), 2);
    }

    #[test]
    fn past_the_limit_is_a_typed_error_that_names_it() {
        let budget = VmaBudget::new(10);
        let _held = budget.reserve(7).unwrap();
        assert_eq!(
            budget.reserve(4).err(),
            Some(MemoryError::OutOfVmas {
                needed: 4,
                used: 7,
                limit: 10
            })
        );
        assert_eq!(budget.used(), 7);
        assert!(budget.reserve(u64::MAX).is_err());
    }

    #[test]
    fn the_process_has_less_than_the_kernel_allows() {
        let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let kernel: u64 = text.trim().parse().unwrap();
        assert!(VmaBudget::process().limit() < kernel);
    }
}
