//! Context configuration handles: the life of a context.
//!
//! ```text
//! INACTIVE --ALLOCATE--> MAPPED --START--> ACTIVE --INTERRUPT, INTERRUPT_SYNC--> INTERRUPTED
//!     ^                    |                  ^                                     |   |
//!     +----DEALLOCATE------+                  +----------------START----------------+   |
//!     +-------------------------------------DEALLOCATE----------------------------------+
//! ```
//! ALLOCATE claims control blocks and data segment, whose content is what the last owner left: software zeroes or restores
//! it. START takes ASIDs, page sizes, interrupts and the owner from the handle and lets every unfinished control block
//! go on: those that are ACTIVE, and those that wait for their user, which try again. An interrupt stops instructions between
//! two accesses. A fault that the fault map has reported and nobody has resolved locks the context: INTERRUPT_SYNC and
//! DEALLOCATE are exceptions until the fault has been resolved or forced to user polling.

use super::control::{Control, Core, Handle, Operation};
use super::fault::Mode;
use super::layout::{
    ACTIVE, CALL_OS, CAUSE_BAD_OPCODE, STATUS, cbe,
    cch::{
        ALLOCATE, ASID, CAUSE_LOCKED, CAUSE_RESOURCES, CAUSE_STATE, CAUSE_ZERO_MAP, CB_INTERRUPT,
        CB_MAP, DEALLOCATE, DSR_MAP, FAULT_BITS, FAULT_MAP, INTERRUPT, INTERRUPT_SYNC, OWNER,
        REGION, REGIONS, SIZES, SOFTWARE, START, STATE, TLB_INTERRUPT, UNMAP_ENABLE,
    },
};
use super::segment::slots;

/// State of a context, numbered as in DW0.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) enum State {
    /// Not in use.
    #[default]
    Inactive = 0,
    /// Owns resources, does not run.
    Mapped = 1,
    /// Runs.
    Active = 2,
    /// Stopped.
    Interrupted = 3,
}

/// How far an interrupt is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Interruption {
    Begun,
    Done,
}

/// A quarter of the address space, or what software makes of it.
#[derive(Clone, Copy, Default)]
pub(super) struct Region {
    /// Its ASID.
    pub(super) asid: u32,
    /// Bit k allows page-size code k.
    pub(super) sizes: u16,
}

/// One context and its handle. What follows the handle was taken from it by ALLOCATE (the maps) and START (the rest).
#[derive(Default)]
pub(super) struct Context {
    handle: Handle,
    state: State,
    /// An interrupt has begun: no instruction goes on.
    stopping: bool,
    cb_map: u64,
    dsr_map: u32,
    regions: [Region; REGIONS],
    /// The address space that the accesses are for, as the oracle sees it.
    pub(super) owner: u64,
    tlb_interrupt: bool,
    fault_bits: bool,
    cb_interrupt: bool,
    /// Instructions may name frames.
    pub(super) unmapped: bool,
    /// Its fault map and interrupt vector.
    pub(super) fault_map: usize,
}

impl Context {
    /// Whether instructions go on.
    pub(super) fn runs(&self) -> bool {
        self.state == State::Active && !self.stopping
    }

    /// The region of `vaddr`.
    pub(super) fn region(&self, vaddr: u64) -> Region {
        self.regions[(vaddr >> 61) as usize & 3]
    }

    pub(super) fn dsr_map(&self) -> u32 {
        self.dsr_map
    }

    /// How a miss is reported.
    pub(super) fn miss_mode(&self) -> Mode {
        if self.tlb_interrupt || self.fault_bits {
            Mode::FaultMap
        } else {
            Mode::UserPolling
        }
    }

    /// The vector that misses in the fault map fire, if they do.
    pub(super) fn miss_vector(&self) -> Option<usize> {
        self.tlb_interrupt.then_some(self.fault_map)
    }

    /// Whether it is stopped, or being stopped.
    pub(super) fn interruption(&self) -> Option<Interruption> {
        match self.state {
            State::Active if self.stopping => Some(Interruption::Begun),
            State::Interrupted => Some(Interruption::Done),
            _ => None,
        }
    }

    /// The vector that completions fire, if they do.
    pub(super) fn completion_vector(&self) -> Option<usize> {
        self.cb_interrupt.then_some(self.fault_map)
    }

    /// Whether software has yet to see the completion of the control block in `slot`.
    pub(super) fn is_done(&self, control: &Control, slot: usize) -> bool {
        control.fault_maps[self.fault_map].is_done(slot)
    }

    fn take_configuration(&mut self) {
        let dw0 = self.handle.read(0);
        self.tlb_interrupt = TLB_INTERRUPT.get(dw0) == 1;
        self.fault_bits = FAULT_BITS.get(dw0) == 1;
        self.cb_interrupt = CB_INTERRUPT.get(dw0) == 1;
        self.unmapped = UNMAP_ENABLE.get(dw0) == 1;
        self.fault_map = FAULT_MAP.get(dw0) as usize;
        self.owner = self.handle.read(OWNER);
        self.regions = std::array::from_fn(|i| {
            let word = self.handle.read(REGION + i);
            Region {
                asid: ASID.get(word) as u32,
                sizes: SIZES.get(word) as u16,
            }
        });
    }
}

impl Core {
    /// Reads a word of the handle.
    pub(super) fn read_context(&self, control: &Control, index: usize, word: usize) -> u64 {
        let context = &control.contexts[index];
        let value = context.handle.read(word);
        if word == 0 {
            STATE.put(value, context.state as u64)
        } else {
            value
        }
    }

    /// Writes a word of the handle. Returns whether it began START.
    pub(super) fn write_context(
        &self,
        control: &mut Control,
        index: usize,
        word: usize,
        value: u64,
    ) -> bool {
        let handle = &mut control.contexts[index].handle;
        if !handle.write(word, value, SOFTWARE) {
            return false;
        }
        let starts = handle.opcode() == START;
        self.submit_handle(control, Operation::Context(index));
        starts
    }

    /// Checks the operation, and stops the instructions of a context that is interrupted. Returns whether it goes on.
    pub(super) fn begin_context(&self, control: &mut Control, index: usize) -> bool {
        let result = self.check_context(control, index);
        let context = &mut control.contexts[index];
        match result {
            Err(cause) => context.handle.finish(Err(cause)),
            Ok(()) => {
                context.stopping |= matches!(context.handle.opcode(), INTERRUPT | INTERRUPT_SYNC);
            }
        }
        result.is_ok()
    }

    fn check_context(&self, control: &Control, index: usize) -> Result<(), u8> {
        let context = &control.contexts[index];
        let opcode = context.handle.opcode();
        let allowed = match (opcode, context.state) {
            (ALLOCATE, State::Inactive) => return check_resources(control, index),
            (START | DEALLOCATE, State::Mapped | State::Interrupted) => true,
            (INTERRUPT | INTERRUPT_SYNC, State::Active | State::Interrupted) => true,
            (ALLOCATE | START | DEALLOCATE | INTERRUPT | INTERRUPT_SYNC, _) => false,
            _ => return Err(CAUSE_BAD_OPCODE),
        };
        if !allowed {
            return Err(CAUSE_STATE);
        }
        let locked = slots(context.cb_map).any(|slot| control.faults[slot].locks_context());
        if locked && matches!(opcode, DEALLOCATE | INTERRUPT_SYNC) {
            return Err(CAUSE_LOCKED);
        }
        Ok(())
    }

    /// Nothing of the context is in flight: carries the operation out.
    pub(super) fn end_context(&self, control: &mut Control, index: usize) {
        match control.contexts[index].handle.opcode() {
            ALLOCATE => self.allocate(control, index),
            START => self.start(control, index),
            DEALLOCATE => self.deallocate(control, index),
            _ => {
                let context = &mut control.contexts[index];
                context.state = State::Interrupted;
                context.stopping = false;
                self.segment.set_running(index, false);
            }
        }
        control.contexts[index].handle.finish(Ok(()));
    }

    fn allocate(&self, control: &mut Control, index: usize) {
        let context = &mut control.contexts[index];
        context.cb_map = context.handle.read(CB_MAP);
        context.dsr_map = context.handle.read(DSR_MAP) as u32;
        context.state = State::Mapped;
        for slot in slots(context.cb_map) {
            control.owner[slot] = Some(index);
            for word in 0..cbe::WORDS {
                self.segment.set_extended(slot, word, 0);
            }
        }
        self.segment.publish(index, context.cb_map, context.dsr_map);
    }

    fn start(&self, control: &mut Control, index: usize) {
        let context = &mut control.contexts[index];
        context.take_configuration();
        context.state = State::Active;
        self.segment.set_running(index, true);
        for slot in slots(context.cb_map) {
            // A fault that is in the fault map stays there: whoever is resolving it relies on its being remembered what was
            // purged since.
            if control.faults[slot].locks_context() {
                continue;
            }
            if matches!(STATUS.get(self.segment.status(slot)), ACTIVE | CALL_OS) {
                control.faults[slot].forget();
                control.missing &= !(1 << slot);
                self.segment.set_status(slot, ACTIVE, 0);
                self.doorbell.ring(slot);
            }
        }
    }

    fn deallocate(&self, control: &mut Control, index: usize) {
        let context = &mut control.contexts[index];
        context.state = State::Inactive;
        self.segment.publish(index, 0, 0);
        for slot in slots(std::mem::take(&mut context.cb_map)) {
            control.owner[slot] = None;
            control.faults[slot].forget();
            control.missing &= !(1 << slot);
            self.doorbell.clear(slot);
        }
        context.dsr_map = 0;
    }
}

/// Whether the maps in the handle are free.
fn check_resources(control: &Control, index: usize) -> Result<(), u8> {
    let handle = &control.contexts[index].handle;
    let (cbs, dsr) = (handle.read(CB_MAP), handle.read(DSR_MAP) as u32);
    if cbs == 0 {
        return Err(CAUSE_ZERO_MAP);
    }
    let taken = |context: &Context| context.cb_map & cbs != 0 || context.dsr_map & dsr != 0;
    if control.contexts.iter().any(taken) {
        Err(CAUSE_RESOURCES)
    } else {
        Ok(())
    }
}
