//! What the next step of a control block is: its instruction decoded, its pages found in the TLB, or why there is none.

use rand::Rng;
use shootdown::Addr;

use super::config::FaultKind;
use super::control::{Control, Core, InFlight};
use super::exec::{PAGE, SCATTER, Step};
use super::fault::Miss;
use super::instruction::{Illegal, Instruction, Kind};
use super::layout::{ACTIVE, DSR_UNIT, STATUS, cb, cbe};
use super::tlb::{TlbEntry, TlbKey};
use crate::oracle::Stamp;

/// Why a step is not to be had.
enum Stop {
    Miss(Miss),
    Illegal(Illegal, u64),
}

/// What came of planning.
#[allow(
    clippy::large_enum_variant,
    reason = "one at a time, on the executor's stack"
)]
pub(super) enum Plan {
    Step(Step),
    /// The instruction has ended or stopped.
    Over,
    /// The context does not run.
    Refused,
}

impl Core {
    /// Finds what the next step is.
    pub(super) fn plan(&self, control: &mut Control, slot: usize) -> Plan {
        let context = control.owner[slot].filter(|context| control.contexts[*context].runs());
        let running = STATUS.get(self.segment.status(slot)) == ACTIVE;
        let parked = control.missing & (1 << slot) != 0;
        let Some(context) = context.filter(|_| running && !parked) else {
            self.doorbell.clear(slot);
            return Plan::Refused;
        };
        let dsr_map = control.contexts[context].dsr_map();
        let unmapped = control.contexts[context].unmapped;
        let words = self.segment.words(slot);
        let dsr_bytes = u64::from(dsr_map.count_ones()) * DSR_UNIT;
        let instruction = match Instruction::decode(&words, dsr_bytes, unmapped) {
            Ok(instruction) => instruction,
            Err(why) => {
                self.fail_block(control, slot, why, words[cb::BASE0]);
                return Plan::Over;
            }
        };
        let first = self.segment.extended(slot, cbe::ELEMENT);
        let single = matches!(instruction.kind, Kind::Atomic(_) | Kind::Message);
        if instruction.kind == Kind::Nop || (!single && first >= instruction.count) {
            self.complete(control, slot, 0);
            return Plan::Over;
        }
        match self.translate_step(control, context, &instruction, first) {
            Ok(mut step) => {
                if self.happens(control, FaultKind::Error, self.config.faults.error) {
                    self.inject_error(control, slot, words[cb::BASE0]);
                    return Plan::Over;
                }
                let nack = self.config.faults.nack;
                if instruction.kind == Kind::Message && self.happens(control, FaultKind::Nack, nack)
                {
                    self.counters.nacks.hit();
                    self.counters.faults_over.hit();
                    let results = [cb::LB_OVERFLOW, cb::AMO_NACKED, cb::PUT_NACKED];
                    step.nack = Some(results[control.rng.random_range(0..results.len())]);
                }
                let mapped = |entry: TlbEntry| (!instruction.unmapped).then_some(entry.key);
                let pages = [mapped(step.entry), step.destination.and_then(mapped)];
                control.in_flight = Some(InFlight {
                    context,
                    slot,
                    pages,
                });
                Plan::Step(step)
            }
            Err(Stop::Miss(miss)) => {
                self.miss(control, slot, context, miss);
                Plan::Over
            }
            Err(Stop::Illegal(why, vaddr)) => {
                self.fail_block(control, slot, why, vaddr);
                Plan::Over
            }
        }
    }

    /// The instruction ends with an error that is worth another try.
    fn inject_error(&self, control: &mut Control, slot: usize, vaddr: u64) {
        self.counters.errors.hit();
        self.counters.faults_over.hit();
        let nth = control.rng.random_range(0..cbe::RETRYABLE.len());
        let why = Illegal {
            cause: cbe::RETRYABLE[nth],
            detail: 0,
        };
        self.fail_block(control, slot, why, vaddr);
    }

    /// The step that begins with element `first`, if the TLB has its pages.
    fn translate_step(
        &self,
        control: &Control,
        context: usize,
        instruction: &Instruction,
        first: u64,
    ) -> Result<Step, Stop> {
        let dsr_map = control.contexts[context].dsr_map();
        let address = |element| self.address(instruction, dsr_map, element);
        let size = instruction.size;
        let at = address(first);
        let find = |vaddr, write, nth: usize| {
            let entry = self.translate(control, context, instruction, vaddr, write)?;
            if entry.kind != instruction.kinds[nth] {
                let cause = cbe::ADDRESS_KIND_MISMATCH;
                return Err(Stop::Illegal(Illegal { cause, detail: 0 }, vaddr));
            }
            Ok(entry)
        };
        let entry = find(at, instruction.writes(), 0)?;
        let left = instruction.count.saturating_sub(first);
        let mut destination = None;
        let count = match instruction.kind {
            Kind::Nop | Kind::Atomic(_) | Kind::Message => 1,
            Kind::Copy => {
                let to = instruction.destination(first);
                destination = Some(find(to, true, 1)?);
                (PAGE - (at % PAGE).max(to % PAGE)) / size
            }
            Kind::Vector { .. } if instruction.is_contiguous() => (PAGE - at % PAGE) / size,
            Kind::Vector { .. } => {
                let page = entry.key.range();
                let inside = |element: &u64| page.holds(Addr::new(address(*element)));
                (first..first + left.min(SCATTER))
                    .take_while(inside)
                    .count() as u64
            }
        };
        Ok(Step {
            instruction: *instruction,
            context,
            space: control.contexts[context].owner,
            dsr_map,
            first,
            count: count.min(left.max(1)),
            entry,
            destination,
            nack: None,
        })
    }

    /// The TLB's entry for an access of the context, or the miss. An unmapped address needs none.
    fn translate(
        &self,
        control: &Control,
        context: usize,
        instruction: &Instruction,
        vaddr: u64,
        write: bool,
    ) -> Result<TlbEntry, Stop> {
        if instruction.unmapped {
            let frame = vaddr / PAGE;
            if frame >= self.bus.physical().total() {
                let cause = cbe::ADDRESS_DECODE;
                return Err(Stop::Illegal(Illegal { cause, detail: 0 }, vaddr));
            }
            return Ok(TlbEntry {
                key: TlbKey::of(0, 0, vaddr),
                frame,
                writable: true,
                kind: cb::RAM,
                stamp: Stamp::default(),
            });
        }
        let region = control.contexts[context].region(vaddr);
        let miss = |modify| {
            Stop::Miss(Miss {
                asid: region.asid,
                vaddr,
                modify,
            })
        };
        match control.tlb.lookup(region.asid, region.sizes, vaddr) {
            None => Err(miss(false)),
            Some(entry) if write && !entry.writable => Err(miss(true)),
            Some(entry) => Ok(*entry),
        }
    }

    /// The address of an element of an instruction of the context with `dsr_map`.
    pub(super) fn address(&self, instruction: &Instruction, dsr_map: u32, element: u64) -> u64 {
        instruction.address(element, |element| {
            let mut index = [0; 8];
            self.segment
                .load(dsr_map, instruction.tri1 + element * 8, &mut index);
            u64::from_le_bytes(index)
        })
    }
}
