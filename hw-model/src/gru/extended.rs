//! Extended control blocks: what the chiplet says of an instruction beside its status.
//!
//! State and execution status are made when they are read. Two of the twelve states, the check of an instruction and the issue of
//! a request, are over within one section of the chiplet's lock, and never seen.

use super::context::Interruption;
use super::control::{Control, Core};
use super::fault::Mode;
use super::layout::{ACTIVE, CALL_OS, EXCEPTION, STATUS, cb, cbe};

/// Bytes of a cache line.
const LINE: u64 = 64;

impl Core {
    /// Reads a word of an extended control block.
    pub(super) fn read_extended(&self, control: &Control, slot: usize, word: usize) -> u64 {
        let value = self.segment.extended(slot, word);
        if word >= cbe::COPY {
            return self.read_copy(control, slot, word);
        }
        if word != cbe::STATE {
            return value;
        }
        let Some(context) = control.owner[slot] else {
            return cbe::CBR_STATE.put(0, cbe::INACTIVE);
        };
        let context = &control.contexts[context];
        let in_flight = control.in_flight.is_some_and(|step| step.slot == slot);
        let status = STATUS.get(self.segment.status(slot));
        let mut bits = if context.is_done(control, slot) {
            cbe::INTERRUPT_PENDING
        } else {
            0
        };
        let interruption = context.interruption();
        let state = match (status, control.faults[slot].pending()) {
            (ACTIVE | CALL_OS, Some((mode, purged))) => {
                if purged {
                    bits |= cbe::TLB_INVALIDATED;
                }
                match (mode, interruption) {
                    (Mode::FaultMap, Some(Interruption::Begun)) => cbe::BUSY_INTERRUPT_MISS_FMM,
                    (Mode::FaultMap, _) => cbe::INTERRUPTED_MISS_FMM,
                    (Mode::UserPolling, Some(Interruption::Begun)) => cbe::BUSY_INTERRUPT_MISS_UPM,
                    (Mode::UserPolling, _) => cbe::INTERRUPTED_MISS_UPM,
                }
            }
            (ACTIVE | CALL_OS, None) => match interruption {
                Some(Interruption::Begun) => cbe::BUSY_INTERRUPT,
                Some(Interruption::Done) => {
                    bits |= cbe::WAS_INTERRUPTED;
                    cbe::INTERRUPTED
                }
                None if in_flight => {
                    bits |= cbe::IS_PENDING;
                    cbe::WAIT_RESPONSE
                }
                None => {
                    bits |= cbe::IS_QUEUED;
                    cbe::QUEUED
                }
            },
            (EXCEPTION, _) => {
                bits |= cbe::HAS_EXCEPTION | (cbe::STATUS.get(value) & cbe::ABORTED);
                cbe::IDLE
            }
            _ => cbe::IDLE,
        };
        cbe::STATUS.put(cbe::CBR_STATE.put(0, state), bits)
    }
    /// What of the instruction is left, for the kernel to see what it will come to.
    fn read_copy(&self, control: &Control, slot: usize, word: usize) -> u64 {
        if control.owner[slot].is_none() {
            return 0;
        }
        let words = self.segment.words(slot);
        let code = cb::ELEMENT.get(words[0]);
        let done = self.segment.extended(slot, cbe::ELEMENT);
        let at = |base: usize| words[base].wrapping_add(done << code);
        match word {
            cbe::COPY => cb::ELEMENT.put(cb::OPCODE.put(0, cb::OPCODE.get(words[0])), code),
            cbe::BASE0 => at(cb::BASE0),
            cbe::BASE1 => at(cb::BASE1),
            cbe::LEFT => {
                let left = cb::COUNT.get(words[cb::SHAPE]).saturating_sub(done);
                let lines = (at(cb::BASE0) % LINE + (left << code)).div_ceil(LINE);
                let most = cbe::LINES.mask() >> cbe::LINES.mask().trailing_zeros();
                cbe::LINES.put(cbe::ELEMENTS.put(0, left), lines.min(most))
            }
            _ => 0,
        }
    }
}
