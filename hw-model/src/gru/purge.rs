//! TLB-global handles: purges, and the faults that are injected into them.
//!
//! A purge removes its entries as late as it may: when its latency has passed, not when it is commanded, so that software
//! that does not wait for IDLE is found out. What it guarantees at IDLE:
//! 1. no entry that it covers is in the TLB,
//! 2. no access of the contexts in its bitmap through such an entry is in flight,
//! 3. a fault of those contexts that was pending in its range at any time since the command has its drop-in ignored.
//!
//! Faults are marked on arrival, since their drop-in may be written before the purge takes effect, and again at the end,
//! since they may have come between; entries that were dropped in between are removed at the end.

use rand::Rng;
use rand::rngs::SmallRng;
use shootdown_primitive::time::{Duration, Instant};

use super::config::FaultKind;
use super::control::{Control, Core, Handle, Operation};
use super::layout::{
    CAUSE_BAD_OPCODE, page_shift,
    tgh::{
        ASID, CONTEXTS, COUNT, COUNT_ALL, GLOBAL, NOP, PAGE_SIZE, STATE, STATE_IDLE,
        STATE_INVALIDATING, STATE_WAIT_DONE, TLBINV, VADDR, WHAT, WHERE,
    },
};
use super::tlb::Purge;

/// A TLB-global handle.
#[derive(Default)]
pub(super) struct Tgh {
    handle: Handle,
    /// The purge has been done and its completion was lost.
    lost: bool,
    /// The purge never begins.
    stuck: bool,
    /// Which purge of the chiplet it is.
    number: u64,
}

impl Tgh {
    pub(super) fn is_active(&self) -> bool {
        self.handle.is_active()
    }

    /// Whether it is at work on a purge that ends.
    pub(super) fn ends(&self) -> bool {
        self.is_active() && !self.lost && !self.stuck
    }

    /// What the handle's words describe. The address mask has no meaning in the model, which compares whole addresses.
    pub(super) fn purge(&self) -> Purge {
        let what = self.handle.read(WHAT);
        let code = PAGE_SIZE.get(what) as u8;
        let shift = page_shift(code).min(63);
        let first = self.handle.read(VADDR) >> shift << shift;
        let pages = COUNT.get(what) + 1;
        let bytes = pages.checked_mul(1 << shift);
        Purge {
            asid: (GLOBAL.get(what) == 0).then(|| ASID.get(what) as u32),
            code,
            first,
            last: bytes
                .and_then(|bytes| first.checked_add(bytes - 1))
                .unwrap_or(u64::MAX),
            complete: COUNT.get(what) == COUNT_ALL,
            contexts: CONTEXTS.get(self.handle.read(WHERE)) as u16,
        }
    }
}

impl Core {
    /// Reads a word of the handle.
    pub(super) fn read_tgh(&self, control: &Control, index: usize, word: usize) -> u64 {
        let tgh = &control.tghs[index];
        let value = tgh.handle.read(word);
        if word != 0 {
            return value;
        }
        let state = if !tgh.handle.is_active() {
            STATE_IDLE
        } else if tgh.lost || control.is_draining(Operation::Purge(index)) {
            STATE_WAIT_DONE
        } else {
            STATE_INVALIDATING
        };
        STATE.put(value, state)
    }

    /// Writes a word of the handle.
    pub(super) fn write_tgh(&self, control: &mut Control, index: usize, word: usize, value: u64) {
        let tgh = &mut control.tghs[index];
        if !tgh.handle.write(word, value, 0) {
            return;
        }
        match tgh.handle.opcode() {
            NOP => return tgh.handle.finish(Ok(())),
            TLBINV => {}
            _ => return tgh.handle.finish(Err(CAUSE_BAD_OPCODE)),
        }
        let purge = tgh.purge();
        match (purge.asid, purge.complete) {
            (None, _) => self.counters.purges_global.hit(),
            (_, true) => self.counters.purges_asid.hit(),
            _ => self.counters.purges_pages.hit(),
        }
        let faults = self.config.faults;
        control.purges += 1;
        let stuck = self.happens(control, FaultKind::Stuck, faults.stuck);
        let tgh = &mut control.tghs[index];
        (tgh.lost, tgh.stuck, tgh.number) = (false, stuck, control.purges);
        if stuck {
            return self.counters.purges_stuck.hit();
        }
        cancel(control, &purge);
        let mut latency = self.config.latency.purge;
        if !faults.jitter.is_zero() {
            latency += faults.jitter.mul_f64(control.rng.random::<f64>());
        }
        let overtaken = self.strikes(control, FaultKind::Reordered, 0.0, |_| Duration::ZERO);
        latency += overtaken.unwrap_or_default();
        let late = self.strikes(control, FaultKind::Late, faults.late, |_| faults.late_by);
        self.counters.completions_late.add(late.is_some().into());
        latency += late.unwrap_or_default();
        self.submit(control, Operation::Purge(index), latency, late.is_some());
    }

    /// Removes the entries.
    pub(super) fn begin_purge(&self, control: &mut Control, index: usize) {
        let purge = control.tghs[index].purge();
        self.remove(control, &purge);
    }

    /// No access through the entries is in flight.
    pub(super) fn end_purge(&self, control: &mut Control, index: usize) {
        let purge = control.tghs[index].purge();
        self.remove(control, &purge);
        let faults = self.config.faults;
        let number = control.tghs[index].number;
        // Without jitter, too, one that waits for an access is overtaken: that is no fault.
        let earlier = |tgh: &Tgh| tgh.number < number && tgh.ends();
        if faults.reorders() && control.tghs.iter().any(earlier) {
            self.counters.completions_reordered.hit();
            self.counters.faults_over.hit();
        }
        let kind = FaultKind::Duplicated;
        let again = self.strikes(control, kind, faults.duplicated, |_| faults.duplicate_after);
        if let Some(after) = again {
            self.counters.purges_duplicated.hit();
            control.file(Instant::now() + after, Operation::Repeat(purge), true);
        }
        if self.happens(control, FaultKind::Lost, faults.lost) {
            self.counters.completions_lost.hit();
            control.tghs[index].lost = true;
        } else {
            control.tghs[index].handle.finish(Ok(()));
        }
    }

    /// Removes what `purge` covers from the TLB, and marks the faults in it.
    pub(super) fn remove(&self, control: &mut Control, purge: &Purge) {
        control.tlb.purge(purge);
        cancel(control, purge);
    }

    /// Whether a fault of `kind` strikes on this occasion, with `probability` or because it is scripted, and by how much.
    pub(super) fn strikes(
        &self,
        control: &mut Control,
        kind: FaultKind,
        probability: f64,
        by: impl FnOnce(&mut SmallRng) -> Duration,
    ) -> Option<Duration> {
        let occasion = &mut control.occasions[kind as usize];
        *occasion += 1;
        let now = (self.config.device, kind, *occasion);
        if draw(control, probability) {
            return Some(by(&mut control.rng));
        }
        let mut scripted = self.config.faults.scripted.iter();
        scripted
            .find(|one| (one.device, one.kind, one.nth) == now)
            .map(|one| one.by)
    }

    /// As [`Core::strikes`], of faults that know no more or less.
    pub(super) fn happens(&self, control: &mut Control, kind: FaultKind, probability: f64) -> bool {
        self.strikes(control, kind, probability, |_| Duration::ZERO)
            .is_some()
    }
}

/// Marks the faults that are pending in `purge`.
fn cancel(control: &mut Control, purge: &Purge) {
    let mut left = control.missing;
    while left != 0 {
        let slot = left.trailing_zeros() as usize;
        left &= left - 1;
        if control.owner[slot].is_some_and(|context| purge.concerns(context)) {
            control.faults[slot].purged(purge);
        }
    }
}

/// True with `probability`.
fn draw(control: &mut Control, probability: f64) -> bool {
    probability > 0.0 && control.rng.random_bool(probability.min(1.0))
}
