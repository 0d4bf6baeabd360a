//! TLB fault handles and fault maps: a miss, from the control block that stops to the drop-in that lets it go on.
//!
//! A fault remembers the purges of its ASID that came since the miss. A drop-in is ignored if one of them holds the address
//! that missed, or would have removed the entry that is to be dropped in: the translation that software read may be older than
//! the purge. The control block is restarted all the same, and misses again. A purge of other page sizes at other addresses
//! of a large entry does *not* cancel its drop-in: to see that coming is up to software (race R34).

use super::config::{FaultKind, Plant};
use super::control::{Control, Core, Handle, Operation};
use super::instruction::Illegal;
use super::layout::{
    ACTIVE, CALL_OS, CAUSE, CAUSE_BAD_OPCODE, EXCEPTION as STATUS_EXCEPTION, SLOTS, cbe,
    tfh::{
        ASID, CAUSE_MISS, CAUSE_MOD, DIRTY, EXCEPTION, FILL, FILL_VADDR, GAA, MISS_ASID,
        MISS_VADDR, NOOP, PAGE_SIZE, PFN, PFN_FIELD, RESTART, STATE, STATE_IDLE, STATE_INACTIVE,
        STATE_MISS_FMM, STATE_MISS_UPM, STATE_RESTART, STATE_WRITE_TLB, USER_POLLING, WRITE_ONLY,
        WRITE_RESTART,
    },
};
use super::tlb::{Purge, TlbEntry, TlbKey};
use shootdown::Addr;
use shootdown_primitive::time::Instant;

/// How many purges a fault remembers; after more, whatever is dropped in is ignored.
const REMEMBERED: usize = 16;

/// Who resolves a fault.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    /// The user has to call the system.
    UserPolling,
    /// It is in the fault map, and has interrupted if the context wants that; it locks its context.
    FaultMap,
}

/// Why an access did not find its way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Miss {
    pub(super) asid: u32,
    pub(super) vaddr: u64,
    /// There is an entry, but it does not allow the store.
    pub(super) modify: bool,
}

impl Miss {
    fn cause(self) -> u8 {
        if self.modify { CAUSE_MOD } else { CAUSE_MISS }
    }
}

/// An unresolved miss.
struct Unresolved {
    miss: Miss,
    mode: Mode,
    /// The purges of its ASID since it came.
    purges: Vec<Purge>,
    /// More of them than are remembered.
    overflow: bool,
}

/// The TLB fault handle of one control block.
#[derive(Default)]
pub(super) struct Fault {
    handle: Handle,
    unresolved: Option<Unresolved>,
}

impl Fault {
    /// Whether the context cannot be stopped because of it.
    pub(super) fn locks_context(&self) -> bool {
        self.unresolved
            .as_ref()
            .is_some_and(|unresolved| unresolved.mode == Mode::FaultMap)
    }

    /// How its unresolved miss is reported, if it has one, and whether a purge has come for that.
    pub(super) fn pending(&self) -> Option<(Mode, bool)> {
        let unresolved = self.unresolved.as_ref()?;
        let purged = unresolved.overflow || !unresolved.purges.is_empty();
        Some((unresolved.mode, purged))
    }

    /// Drops the fault unresolved.
    pub(super) fn forget(&mut self) {
        self.unresolved = None;
    }

    /// A purge has come, or has been done.
    pub(super) fn purged(&mut self, purge: &Purge) {
        let Some(unresolved) = &mut self.unresolved else {
            return;
        };
        let other = purge.asid.is_some_and(|asid| asid != unresolved.miss.asid);
        if other || unresolved.purges.contains(purge) {
            return;
        }
        if unresolved.purges.len() == REMEMBERED {
            unresolved.overflow = true;
        } else {
            unresolved.purges.push(*purge);
        }
    }

    /// The entry that the handle describes.
    fn fill_key(&self) -> TlbKey {
        let fill = self.handle.read(FILL);
        // 16 page sizes exist; the field has a bit more.
        let code = PAGE_SIZE.get(fill) as u8 & 0xf;
        TlbKey::of(ASID.get(fill) as u32, code, self.handle.read(FILL_VADDR))
    }

    /// Whether a drop-in of `key` is too late, or for nothing.
    fn cancels(&self, key: TlbKey) -> bool {
        self.unresolved.as_ref().is_none_or(|unresolved| {
            let Miss { asid, vaddr, .. } = unresolved.miss;
            let covered = |purge: &Purge| purge.covers(key) || purge.covers_miss(asid, vaddr);
            key.asid != asid || unresolved.overflow || unresolved.purges.iter().any(covered)
        })
    }
}

/// A fault map: one bit a control block.
#[derive(Default)]
pub(super) struct FaultMap {
    faults: u128,
    done: u128,
}

impl FaultMap {
    /// Reads one of its four words.
    pub(super) fn read(&self, word: usize) -> u64 {
        match word {
            0 => self.faults as u64,
            1 => (self.faults >> 64) as u64,
            2 => self.done as u64,
            3 => (self.done >> 64) as u64,
            _ => 0,
        }
    }

    /// Clears the bits of the word that are set in `value`.
    pub(super) fn clear(&mut self, word: usize, value: u64) {
        let (map, shift) = match word {
            0 | 1 => (&mut self.faults, 64 * word),
            2 | 3 => (&mut self.done, 64 * (word - 2)),
            _ => return,
        };
        *map &= !(u128::from(value) << shift);
    }

    /// A control block that asks for it has completed.
    pub(super) fn set_done(&mut self, slot: usize) {
        self.done |= 1 << slot;
    }

    /// Whether software has yet to see the completion of a control block.
    pub(super) fn is_done(&self, slot: usize) -> bool {
        self.done & (1 << slot) != 0
    }
}

impl Core {
    /// Reads a word of the handle.
    pub(super) fn read_fault(&self, control: &Control, slot: usize, word: usize) -> u64 {
        let fault = &control.faults[slot];
        let value = fault.handle.read(word);
        if word != 0 {
            return value;
        }
        let state = match &fault.unresolved {
            _ if control.owner[slot].is_none() => STATE_INACTIVE,
            _ if fault.handle.is_active() => match fault.handle.opcode() {
                WRITE_ONLY | WRITE_RESTART => STATE_WRITE_TLB,
                _ => STATE_RESTART,
            },
            None => STATE_IDLE,
            Some(unresolved) => match unresolved.mode {
                Mode::UserPolling => STATE_MISS_UPM,
                Mode::FaultMap => STATE_MISS_FMM,
            },
        };
        let value = STATE.put(value, state);
        match &fault.unresolved {
            Some(Unresolved { miss, .. }) => CAUSE.put(value, miss.cause().into()),
            None => value,
        }
    }

    /// Writes a word of the handle.
    pub(super) fn write_fault(&self, control: &mut Control, slot: usize, word: usize, value: u64) {
        if (1..FILL_VADDR).contains(&word) {
            return;
        }
        if control.faults[slot].handle.write(word, value, 0) {
            self.submit_handle(control, Operation::Fault(slot));
        }
    }

    /// The control block in `slot` stops with a miss.
    pub(super) fn miss(&self, control: &mut Control, slot: usize, context: usize, miss: Miss) {
        let counter = if miss.modify {
            &self.counters.modify_misses
        } else {
            &self.counters.misses
        };
        counter.hit();
        let mode = control.contexts[context].miss_mode();
        let fault = &mut control.faults[slot];
        fault.handle.set(MISS_VADDR, miss.vaddr);
        fault.handle.set(MISS_ASID, miss.asid.into());
        fault.unresolved = Some(Unresolved {
            miss,
            mode,
            purges: Vec::new(),
            overflow: false,
        });
        control.missing |= 1 << slot;
        let probability = self.config.faults.purge_in_miss;
        if self.happens(control, FaultKind::PurgeInMiss, probability) {
            self.counters.purges_in_miss.hit();
            self.remove(control, &Purge::page(miss.asid, miss.vaddr));
            self.counters.faults_over.hit();
        }
        self.doorbell.clear(slot);
        if mode == Mode::UserPolling {
            return self.segment.set_status(slot, CALL_OS, 0);
        }
        let context = &control.contexts[context];
        let (map, vector) = (context.fault_map, context.miss_vector());
        control.fault_maps[map].faults |= 1 << slot;
        let Some(vector) = vector else { return };
        match self.delay(control) {
            // The executor, which is here, looks at what is due before it sleeps.
            Some(delay) => {
                control.file(Instant::now() + delay, Operation::Interrupt(vector), true);
            }
            None => self.interrupt(vector),
        }
    }

    /// Carries out the handle's operation.
    pub(super) fn run_fault(&self, control: &mut Control, slot: usize) {
        let opcode = control.faults[slot].handle.opcode();
        let known = match opcode {
            NOOP => true,
            RESTART => {
                self.restart(control, slot);
                true
            }
            WRITE_ONLY => {
                let written = self.drop_in(control, slot);
                self.counters.preloads.add(written.into());
                true
            }
            WRITE_RESTART => {
                self.drop_in(control, slot);
                self.restart(control, slot);
                true
            }
            EXCEPTION => {
                self.fail(control, slot);
                true
            }
            USER_POLLING => {
                self.force_user_polling(control, slot);
                true
            }
            _ => false,
        };
        let result = if known { Ok(()) } else { Err(CAUSE_BAD_OPCODE) };
        control.faults[slot].handle.finish(result);
    }

    /// Whether it was not ignored.
    fn drop_in(&self, control: &mut Control, slot: usize) -> bool {
        let fault = &control.faults[slot];
        let key = fault.fill_key();
        let planted = self.config.plants.contains(Plant::DROP_IN_NOT_CANCELLED);
        let Some(context) = control.owner[slot].filter(|_| planted || !fault.cancels(key)) else {
            self.counters.drop_ins_cancelled.hit();
            return false;
        };
        let owner = control.contexts[context].owner;
        let entry = TlbEntry {
            key,
            frame: PFN_FIELD.get(fault.handle.read(PFN)),
            writable: DIRTY.get(fault.handle.read(FILL)) == 1,
            kind: GAA.get(fault.handle.read(FILL)),
            stamp: self.bus.oracle().stamp(owner, Addr::new(key.page)),
        };
        self.counters.drop_ins.hit();
        if control.tlb.install(entry, &mut control.rng) {
            self.counters.evictions.hit();
        }
        true
    }

    /// Takes the fault back, if there is one: the control block is not stopped by it any more.
    fn resolve(&self, control: &mut Control, slot: usize) -> Option<Miss> {
        let unresolved = control.faults[slot].unresolved.take()?;
        control.missing &= !(1 << slot);
        clear_fault_bit(control, slot);
        Some(unresolved.miss)
    }

    fn restart(&self, control: &mut Control, slot: usize) {
        if self.resolve(control, slot).is_some() {
            self.segment.set_status(slot, ACTIVE, 0);
            // Where the context does not run, the executor drops the request, and START repeats it.
            self.doorbell.ring(slot);
        }
    }

    fn fail(&self, control: &mut Control, slot: usize) {
        if let Some(miss) = self.resolve(control, slot) {
            let why = Illegal {
                cause: cbe::TLB_FATAL,
                detail: miss.cause().into(),
            };
            self.fail_block(control, slot, why, miss.vaddr);
        }
    }

    fn force_user_polling(&self, control: &mut Control, slot: usize) {
        if control.faults[slot].locks_context() {
            if let Some(unresolved) = &mut control.faults[slot].unresolved {
                unresolved.mode = Mode::UserPolling;
            }
            clear_fault_bit(control, slot);
            self.segment.set_status(slot, CALL_OS, 0);
        }
    }

    /// The control block in `slot` ends with an exception.
    pub(super) fn fail_block(&self, control: &mut Control, slot: usize, why: Illegal, vaddr: u64) {
        self.counters.exceptions.hit();
        let begun = self.segment.extended(slot, cbe::ELEMENT) != 0;
        let status = if begun { cbe::ABORTED } else { 0 };
        self.segment
            .set_extended(slot, cbe::STATE, cbe::STATUS.put(0, status));
        self.segment.set_extended(slot, cbe::CAUSE, why.cause);
        self.segment.set_extended(slot, cbe::DETAIL, why.detail);
        self.segment.set_extended(slot, cbe::VADDR, vaddr);
        self.end_block(control, slot, STATUS_EXCEPTION, 0);
    }
}

/// Clears the slot's bit in the fault map of its context.
fn clear_fault_bit(control: &mut Control, slot: usize) {
    debug_assert!(slot < SLOTS);
    if let Some(context) = control.owner[slot] {
        let map = control.contexts[context].fault_map;
        control.fault_maps[map].faults &= !(1 << slot);
    }
}
