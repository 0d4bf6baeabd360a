//! Invalidations of the device TLB: queued, begun by a doorbell with a number, answered by that number.
//!
//! Entries go as late as they may: when the latency has passed, not at the doorbell, so that software that does not wait is found
//! out. What a completion guarantees:
//! 1. no entry that is covered is in the TLB, other than one that software has written since;
//! 2. no access through such an entry is in flight;
//! 3. a translation that had been read from the page table is read again.

use shootdown_primitive::time::Instant;
use std::collections::VecDeque;

use rand::Rng;

use super::config::Plant;
use super::layout::{COUNT, EVERYTHING, HUGE, INVALIDATIONS, ONE_PASID, PAGES, PASID, SCOPE};
use super::state::State;
use super::tlb::Covers;

/// What one doorbell has begun.
struct Batch {
    number: u64,
    what: Vec<Covers>,
    /// When the entries go; `None`: never.
    due: Option<Instant>,
    /// They are gone, and accesses that began before this one are waited for.
    begun: Option<u64>,
    lost: bool,
    duplicated: bool,
}

#[derive(Default)]
pub(super) struct Invalidations {
    pub(super) address: u64,
    queued: Vec<Covers>,
    batches: Vec<Batch>,
    completions: VecDeque<u64>,
    /// Completions that come a second time.
    again: Vec<(Instant, u64)>,
}

impl Invalidations {
    pub(super) fn room(&self) -> u64 {
        (INVALIDATIONS - self.queued.len()) as u64
    }

    pub(super) fn queue(&mut self, value: u64) {
        let pasid = PASID.get(value);
        let what = match SCOPE.get(value) {
            PAGES => {
                let huge = HUGE.get(value) == 1;
                let shift = if huge { 21 } else { 12 };
                let first = self.address >> shift << shift;
                let bytes = (COUNT.get(value) + 1) << shift;
                Covers::Pages {
                    pasid,
                    huge,
                    first,
                    last: first.saturating_add(bytes - 1),
                }
            }
            ONE_PASID => Covers::Pasid(pasid),
            EVERYTHING => Covers::Everything,
            _ => return,
        };
        if self.queued.len() < INVALIDATIONS {
            self.queued.push(what);
        }
    }

    pub(super) fn completion(&mut self) -> u64 {
        self.completions.pop_front().unwrap_or(0)
    }

    /// When the next of them is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let batches = self.batches.iter().filter(|batch| batch.begun.is_none());
        let again = self.again.iter().map(|(due, _)| *due);
        batches.filter_map(|batch| batch.due).chain(again).min()
    }
}

impl State {
    /// The doorbell.
    pub(super) fn ring(&mut self, number: u64, now: Instant) {
        let faults = self.config.faults;
        let what = std::mem::take(&mut self.invalidations.queued);
        self.counts.invalidations += what.len() as u64;
        let mut due = now + self.config.latency.invalidate;
        if !faults.jitter.is_zero() {
            due += faults.jitter.mul_f64(self.rng.random::<f64>());
            self.counts.jittered += 1;
        }
        if self.draw(faults.late) {
            self.counts.late += 1;
            due += faults.late_by;
        }
        if self.draw(faults.unissued) {
            // Far ahead, far behind, and of no doorbell.
            self.counts.unissued += 1;
            due += faults.late_by;
            let wrong = [number.wrapping_add(1 << 20), u64::MAX];
            self.invalidations.completions.extend(wrong);
        }
        let stuck = self.draw(faults.stuck);
        self.counts.stuck += u64::from(stuck);
        let batch = Batch {
            number,
            what,
            due: (!stuck).then_some(due),
            begun: None,
            lost: self.draw(faults.lost),
            duplicated: self.draw(faults.duplicated),
        };
        self.invalidations.batches.push(batch);
    }

    /// Does what is due of the invalidations.
    pub(super) fn settle_invalidations(&mut self, now: Instant) {
        let again = &mut self.invalidations.again;
        let mut due: Vec<_> = again.extract_if(.., |(due, _)| *due <= now).collect();
        due.sort();
        for (_, number) in due {
            self.invalidations.completions.push_back(number);
        }
        let mut batches = std::mem::take(&mut self.invalidations.batches);
        // In the order of their times, which is not that of their doorbells.
        batches.sort_by_key(|batch| batch.due);
        batches.retain_mut(|batch| {
            if batch.begun.is_none() && batch.due.is_some_and(|due| due <= now) {
                for what in &batch.what {
                    self.tlb.invalidate(what);
                    self.cancel_walks(what);
                }
                batch.begun = Some(self.latches);
            }
            let Some(begun) = batch.begun else {
                return true;
            };
            let waits = !self.config.plants.contains(Plant::NO_DRAIN)
                && batch.what.iter().any(|what| self.in_flight(what, begun));
            if !waits {
                self.complete(batch, now);
            }
            waits
        });
        self.invalidations.batches = batches;
    }

    fn complete(&mut self, batch: &Batch, now: Instant) {
        if batch.lost {
            self.counts.lost += 1;
            return;
        }
        self.invalidations.completions.push_back(batch.number);
        if batch.duplicated {
            self.counts.duplicated += 1;
            let due = now + self.config.faults.duplicate_after;
            self.invalidations.again.push((due, batch.number));
        }
    }
}
