//! The executor: one thread a chiplet that carries out instructions, an access of at most a page at a time.
//!
//! A *step* is one such access. Under the chiplet's lock it is planned: the context runs, the instruction is
//! decoded, the addresses are found in the TLB. Then the step is published as *in flight*, the lock is dropped, the bytes
//! move, the lock is taken again and the step ends. So no register access waits for a copy, and yet purges, interrupts of
//! the context and resets know what they have to wait for.
//!
//! An instruction's progress is its next element, in the extended control block. An interrupted instruction goes
//! on there. Atomics, messages and other instructions of one step end under the same lock section that ends the step: they
//! are either not begun or done, and never done twice.

use shootdown::{Addr, Frame};
use shootdown_primitive::sync::{Arc, MutexGuard};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use super::control::{Control, Core};
use super::instruction::{Atomic, Illegal, Instruction, Kind, Transfer};
use super::layout::{IDLE, cb, cbe};
use super::plan::Plan;
use super::tlb::TlbEntry;
use crate::oracle::Access;

/// The largest access.
pub(super) const PAGE: u64 = 4096;
/// Elements of one step when they do not lie one after the other.
pub(super) const SCATTER: u64 = 64;
/// Steps of one control block before the next has its turn.
const TURN: usize = 16;
/// How often a polling atomic looks when there is nothing else to do.
const POLL: Duration = Duration::from_micros(50);

/// A step in flight: what the access needs to know of the context and the TLB.
pub(super) struct Step {
    pub(super) instruction: Instruction,
    pub(super) context: usize,
    pub(super) space: u64,
    pub(super) dsr_map: u32,
    /// The first element, and how many.
    pub(super) first: u64,
    pub(super) count: u64,
    /// The entry of the first address.
    pub(super) entry: TlbEntry,
    /// That of a copy's destination.
    pub(super) destination: Option<TlbEntry>,
    /// Injected: what becomes of a message that is not delivered.
    pub(super) nack: Option<u64>,
}

/// What came of a step.
pub(super) struct Outcome {
    /// Elements done; none when a poll has to look again.
    pub(super) elements: u64,
    pub(super) bytes: u64,
    /// What an atomic found.
    pub(super) old: Option<u64>,
    pub(super) substatus: u64,
    /// It ends with an exception all the same.
    pub(super) illegal: Option<Illegal>,
}

/// What came of a turn.
enum Turn {
    Progress,
    /// A poll has to look again.
    Polls,
    Refused,
}

/// The executor's thread, until it is told to stop.
pub(super) fn run(core: &Arc<Core>) {
    core.doorbell.attach();
    let mut buffer = Box::new([0; PAGE as usize]);
    while !core.doorbell.stopped() {
        core.doorbell.take_poke();
        let mut wanted = core.doorbell.wanted();
        let mut progress = false;
        let mut polling = 0;
        while wanted != 0 {
            let slot = wanted.trailing_zeros() as usize;
            wanted &= wanted - 1;
            match core.turn(slot, &mut buffer) {
                Turn::Progress => progress = true,
                Turn::Polls => polling |= 1 << slot,
                Turn::Refused => {}
            }
        }
        if progress {
            continue;
        }
        let ready = core.settled().next_ready();
        let ready = ready.map(|ready| ready.saturating_duration_since(Instant::now()));
        let poll = (polling != 0).then_some(POLL);
        core.doorbell
            .sleep(ready.into_iter().chain(poll).min(), polling);
    }
}

impl Core {
    /// Some steps of the control block in `slot`.
    fn turn(&self, slot: usize, buffer: &mut [u8; PAGE as usize]) -> Turn {
        let mut control = self.settled();
        for _ in 0..TURN {
            let step = match self.plan(&mut control, slot) {
                Plan::Step(step) => step,
                Plan::Over => return Turn::Progress,
                Plan::Refused => return Turn::Refused,
            };
            let outcome;
            (outcome, control) = self.fly(control, &step, buffer);
            if self.land(&mut control, slot, &step, &outcome) {
                self.settle(&mut control);
                return if outcome.elements == 0 {
                    Turn::Polls
                } else {
                    Turn::Progress
                };
            }
            self.settle(&mut control);
        }
        Turn::Progress
    }

    /// Performs the access without the lock.
    fn fly<'a>(
        &'a self,
        mut control: MutexGuard<'a, Control>,
        step: &Step,
        buffer: &mut [u8; PAGE as usize],
    ) -> (Outcome, MutexGuard<'a, Control>) {
        let delay = self.delay(&mut control);
        drop(control);
        pause(self.config.latency.access + delay.unwrap_or_default());
        self.counters.faults_over.add(delay.is_some().into());
        let outcome = match step.instruction.kind {
            Kind::Nop => Outcome::of(step.count, 0),
            Kind::Copy => self.copy(step, buffer),
            Kind::Vector { transfer, .. } => self.vector(step, transfer, buffer),
            Kind::Message => self.message(step),
            Kind::Atomic(atomic) => self.atomic(step, atomic),
        };
        (outcome, self.lock())
    }

    /// Ends a step. Returns whether the instruction has ended, or has to look again.
    fn land(&self, control: &mut Control, slot: usize, step: &Step, outcome: &Outcome) -> bool {
        control.in_flight = None;
        self.counters.bytes.add(outcome.bytes);
        if outcome.elements == 0 {
            return true;
        }
        if let Some(why) = outcome.illegal {
            self.fail_block(control, slot, why, step.instruction.base0);
            return true;
        }
        let next = step.first + outcome.elements;
        let single = matches!(step.instruction.kind, Kind::Atomic(_) | Kind::Message);
        if !single && next < step.instruction.count {
            self.segment.set_extended(slot, cbe::ELEMENT, next);
            return false;
        }
        if let Some(old) = outcome.old {
            self.segment.set_result(slot, old);
        }
        self.complete(control, slot, outcome.substatus);
        true
    }

    pub(super) fn complete(&self, control: &mut Control, slot: usize, substatus: u64) {
        self.counters.instructions.hit();
        self.end_block(control, slot, IDLE, substatus);
    }

    /// The control block in `slot` ends, and goes back to its user.
    pub(super) fn end_block(
        &self,
        control: &mut Control,
        slot: usize,
        status: u64,
        substatus: u64,
    ) {
        let modifiers = cb::MODIFIERS.get(self.segment.status(slot));
        self.segment.set_extended(slot, cbe::ELEMENT, 0);
        let mut vector = None;
        if let Some(context) = control.owner[slot].filter(|_| modifiers & cb::INTERRUPT != 0) {
            let context = &control.contexts[context];
            vector = context.completion_vector();
            control.fault_maps[context.fault_map].set_done(slot);
        }
        // First the request, then the status: the user may start the block again as soon as it sees the status.
        self.doorbell.clear(slot);
        self.segment.set_status(slot, status, substatus);
        if let Some(vector) = vector {
            self.interrupt(vector);
        }
    }

    fn access(&self, step: &Step, entry: &TlbEntry, vaddr: u64, len: usize, write: bool) -> Access {
        Access {
            device: self.config.device,
            context: step.context as u32,
            space: step.space,
            addr: Addr::new(vaddr),
            len: len as u32,
            write,
            frame: Frame(entry.frame_of(vaddr)),
            stamp: entry.stamp,
        }
    }

    fn read(&self, step: &Step, entry: &TlbEntry, vaddr: u64, into: &mut [u8]) {
        let access = self.access(step, entry, vaddr, into.len(), false);
        if step.instruction.unmapped {
            self.counters.unmapped.hit();
            return self.bus.read_unmapped(&access, into);
        }
        self.bus.read(&access, into);
    }

    pub(super) fn write(&self, step: &Step, entry: &TlbEntry, vaddr: u64, from: &[u8]) {
        let access = self.access(step, entry, vaddr, from.len(), true);
        if step.instruction.unmapped {
            self.counters.unmapped.hit();
            return self.bus.write_unmapped(&access, from);
        }
        self.bus.write(&access, from);
    }

    /// What was at the first address, whose `len` bytes become what `op` makes of them.
    pub(super) fn update(
        &self,
        step: &Step,
        len: usize,
        op: &mut dyn FnMut(u64) -> Option<u64>,
    ) -> u64 {
        let access = self.access(step, &step.entry, step.instruction.base0, len, true);
        if step.instruction.unmapped {
            self.counters.unmapped.hit();
            return self.bus.atomic_unmapped(&access, op);
        }
        self.bus.atomic(&access, op)
    }

    fn copy(&self, step: &Step, buffer: &mut [u8; PAGE as usize]) -> Outcome {
        let bytes = step.count * step.instruction.size;
        let buffer = &mut buffer[..bytes as usize];
        if let Some(destination) = &step.destination {
            let from = step.instruction.address(step.first, |element| element);
            self.read(step, &step.entry, from, buffer);
            self.write(
                step,
                destination,
                step.instruction.destination(step.first),
                buffer,
            );
        }
        Outcome::of(step.count, 2 * bytes)
    }

    fn vector(&self, step: &Step, transfer: Transfer, buffer: &mut [u8; PAGE as usize]) -> Outcome {
        let instruction = &step.instruction;
        let size = instruction.size;
        // One piece where the elements lie one after the other, else one for each.
        let (pieces, per_piece) = if instruction.is_contiguous() {
            (1, step.count)
        } else {
            (step.count, 1)
        };
        let buffer = &mut buffer[..(per_piece * size) as usize];
        for piece in 0..pieces {
            let element = step.first + piece;
            let vaddr = self.address(instruction, step.dsr_map, element);
            // An index vector that changes during the step must not lead out of the page that is in flight.
            if !step.entry.key.range().holds(Addr::new(vaddr)) {
                return Outcome::of(piece, piece * size);
            }
            let offset = instruction.tri0 + element * size;
            match transfer {
                Transfer::Load => {
                    self.read(step, &step.entry, vaddr, buffer);
                    self.segment.store(step.dsr_map, offset, buffer);
                }
                Transfer::Store => {
                    self.segment.load(step.dsr_map, offset, buffer);
                    self.write(step, &step.entry, vaddr, buffer);
                }
                Transfer::Set => {
                    instruction.fill(buffer);
                    self.write(step, &step.entry, vaddr, buffer);
                }
                Transfer::Flush => {}
            }
        }
        let bytes = if transfer == Transfer::Flush {
            0
        } else {
            step.count * size
        };
        Outcome::of(step.count, bytes)
    }

    fn atomic(&self, step: &Step, atomic: Atomic) -> Outcome {
        let instruction = &step.instruction;
        let size = instruction.size as usize;
        let mut mask = [0; 8];
        if atomic == Atomic::MaskedCompareSwap {
            self.segment
                .load(step.dsr_map, instruction.tri0, &mut mask[..size]);
        }
        let operands = instruction.operands(u64::from_le_bytes(mask));
        let old = if atomic.writes() {
            self.update(step, size, &mut |old| atomic.apply(old, operands))
        } else {
            let mut value = [0; 8];
            self.read(step, &step.entry, instruction.base0, &mut value[..size]);
            u64::from_le_bytes(value)
        };
        Outcome {
            elements: atomic.is_over(old, operands).into(),
            bytes: instruction.size,
            old: Some(old),
            substatus: 0,
            illegal: None,
        }
    }
}

impl Outcome {
    fn of(elements: u64, bytes: u64) -> Self {
        Self {
            elements,
            bytes,
            old: None,
            substatus: 0,
            illegal: None,
        }
    }
}

/// Lets `latency` pass.
fn pause(latency: Duration) {
    if latency.is_zero() {
        return;
    }
    if latency > Duration::from_micros(200) {
        return thread::sleep(latency);
    }
    let start = Instant::now();
    while start.elapsed() < latency {
        thread::yield_now();
    }
}
