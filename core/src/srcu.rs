//! Sleepable read-copy-update of our own, for short read sections that never span a callback.
//!
//! A reader stores the current epoch in a slot, fences, and reads; a writer unlinks, fences, advances the epoch, and frees
//! what it unlinked once no slot holds an older epoch.
//!
//! ```text
//!   reader                                  writer
//!   epoch = domain.epoch                    root.store(new)
//!   slot.cas(0, epoch)                      fence(SeqCst)                  (B)
//!   fence(SeqCst)                  (A)      tag = epoch++
//!   root.load() ...                         all slots 0 or newer than tag?
//!   slot.store(0, Release)         (C)      then free the old root
//! ```
//! A and B are in one total order. If A is first the writer sees the slot and keeps the old root; if B is first the reader
//! sees the new one. C pairs with the writer's Acquire load of the slot: what the reader did is over before the free.
//! A reader that is delayed between its first two lines stores an old epoch, which only makes later writers wait longer.
//!
//! A slot belongs to a section, not to a thread: sections may nest, and a thread that ends leaves nothing behind. A
//! thread starts looking at a place that is its own most of the time, so that the compare-exchange is uncontended.
//! With more sections at once than [`SLOTS`] a reader yields until one is free; sections are short.

use std::collections::VecDeque;

use crate::primitive::atomic::{AtomicU64, Ordering, fence};
use crate::primitive::{Backoff, Mutex, home};

#[cfg(not(loom))]
const SLOTS: usize = 64;
#[cfg(loom)]
const SLOTS: usize = 2;

#[repr(align(128))]
#[derive(Debug)]
struct Slot(AtomicU64);

/// A domain: the readers and the retired things of one index. Dropping a `T` frees what was retired.
#[derive(Debug)]
pub(crate) struct Srcu<T> {
    epoch: AtomicU64,
    slots: Box<[Slot]>,
    /// Oldest first; each with the epoch that was current when it was unlinked.
    retired: Mutex<VecDeque<(u64, T)>>,
}

/// A read section.
#[derive(Debug)]
pub(crate) struct Section<'a>(&'a AtomicU64);

impl Drop for Section<'_> {
    fn drop(&mut self) {
        // (C)
        self.0.store(0, Ordering::Release);
    }
}

impl<T> Srcu<T> {
    pub(crate) fn new() -> Self {
        Self {
            epoch: AtomicU64::new(1),
            slots: (0..SLOTS).map(|_| Slot(AtomicU64::new(0))).collect(),
            retired: Mutex::new(VecDeque::new()),
        }
    }

    /// Begins a read section. Neither allocates nor blocks on a writer.
    pub(crate) fn read(&self) -> Section<'_> {
        let home = home();
        let mut backoff = Backoff::new();
        loop {
            for nth in 0..SLOTS {
                let slot = &self.slots[(home + nth) % SLOTS].0;
                let epoch = self.epoch.load(Ordering::Relaxed);
                // Acquire on success, with (C): the slot's last section is over. Relaxed load first: no write to
                // a slot that is taken.
                if slot.load(Ordering::Relaxed) == 0
                    && slot
                        .compare_exchange(0, epoch, Ordering::Acquire, Ordering::Relaxed)
                        .is_ok()
                {
                    if !planted!("r5-fence") {
                        fence(Ordering::SeqCst); // (A)
                    }
                    return Section(slot);
                }
            }
            backoff.wait();
        }
    }

    /// Hands over what has just been unlinked, to be freed once no reader can see it. Gives back what is due; never waits.
    /// Allocates and frees: the writer's side only.
    #[must_use = "what is due is the caller's to drop, under no lock"]
    pub(crate) fn retire(&self, things: impl IntoIterator<Item = T>) -> Vec<(u64, T)> {
        fence(Ordering::SeqCst); // (B)
        // Relaxed: the fence orders it after the unlink, and the queue's lock orders writers.
        let mut retired = self.retired.lock();
        let tag = self.epoch.fetch_add(1, Ordering::Relaxed);
        retired.extend(things.into_iter().map(|thing| (tag, thing)));
        let due = self.oldest_reader();
        let ready = retired.iter().take_while(|(tag, _)| *tag < due).count();
        retired.drain(..ready).collect()
    }

    /// Frees everything that was retired; waits for the sections that may still see it.
    pub(crate) fn reclaim(&self) {
        let mut backoff = Backoff::new();
        loop {
            drop(self.retire([]));
            if self.retired.lock().is_empty() {
                return;
            }
            backoff.wait();
        }
    }

    /// The oldest epoch that a running section may have begun in; the largest number when none runs.
    fn oldest_reader(&self) -> u64 {
        if planted!("r5-grace") {
            return u64::MAX;
        }
        let running = self.slots.iter().filter_map(|slot| {
            // Acquire, with (C).
            match slot.0.load(Ordering::Acquire) {
                0 => None,
                epoch => Some(epoch),
            }
        });
        running.min().unwrap_or(u64::MAX)
    }

    #[cfg(all(test, not(loom)))]
    fn waiting(&self) -> usize {
        self.retired.lock().len()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn what_is_retired_outlives_the_sections_that_may_see_it() {
        let domain = Srcu::new();
        let section = domain.read();
        drop(domain.retire([1]));
        assert_eq!(domain.waiting(), 1);
        drop(section);
        drop(domain.retire([2]));
        assert_eq!(domain.waiting(), 0);
    }

    #[test]
    fn a_section_that_began_later_does_not_hold_up_the_free() {
        let domain = Srcu::new();
        let old = domain.read();
        drop(domain.retire([1]));
        let _young = domain.read();
        drop(old);
        drop(domain.retire([2]));
        assert_eq!(domain.waiting(), 1, "only what the young section may see");
    }

    #[test]
    fn sections_nest_and_use_up_all_slots() {
        let domain: Srcu<()> = Srcu::new();
        let all: Vec<_> = (0..SLOTS).map(|_| domain.read()).collect();
        drop(all);
        let _again = domain.read();
    }
}
