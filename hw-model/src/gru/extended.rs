//! Extended control blocks: what the chiplet says of an instruction beside its status.
//!
//! State and execution status are made when they are read. Two of the twelve states, the check of an instruction and the issue of
//! a request, are over within one section of the chiplet's lock, and never seen.

use super::context::Interruption;
use super::control::{Control, Core};
use super::fault::Mode;
use super::layout::{ACTIVE, CALL_OS, EXCEPTION, STATUS, cbe};

impl Core {
    /// Reads a word of an extended control block.
    pub(super) fn read_extended(&self, control: &Control, slot: usize, word: usize) -> u64 {
        let value = self.segment.extended(slot, word);
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
}
