//! The state behind the management registers, and how their operations take time.
//!
//! A handle operation is *passive*: writing the command computes the time when it takes effect and files it in
//! [`Control::pending`]; whoever next takes the lock at or after that time, for a register or to execute, carries it out
//! ([`Core::settle`]). An operation that has to wait for an access in flight takes effect in two steps: `begin` stops what
//! would go on, then it lies in [`Control::draining`] until the access is over, then `end` reports. The executor settles
//! whenever it ends an access and something drains.

use std::collections::BTreeMap;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown_primitive::sync::{Mutex, MutexGuard, PoisonError};
use shootdown_primitive::time::{Duration, Instant};

use super::config::{ChipletConfig, FaultKind};
use super::context::Context;
use super::doorbell::Doorbell;
use super::fault::{Fault, FaultMap};
use super::interrupts::Vectors;
use super::layout::{
    ACTIVE, CAUSE, COMMAND, CONTEXTS, EXCEPTION, HANDLE_WORDS, IDLE, OPCODE, SLOTS, STATUS, TFMS,
    TGHS,
};
use super::purge::Tgh;
use super::segment::Segment;
use super::stats::Counters;
use super::tlb::{Purge, Tlb, TlbKey};
use crate::bus::Bus;

/// The part of a handle that all kinds share: its words, and the status of its operation.
#[derive(Clone, Copy, Default)]
pub(super) struct Handle {
    words: [u64; HANDLE_WORDS],
    status: u64,
    cause: u8,
}

impl Handle {
    /// A word; DW0 without the state of the handle's kind.
    pub(super) fn read(&self, word: usize) -> u64 {
        match word {
            0 => {
                let dw0 = STATUS.put(self.words[0], self.status);
                let dw0 = COMMAND.put(dw0, (self.status == ACTIVE).into());
                CAUSE.put(dw0, self.cause.into())
            }
            _ => self.words.get(word).copied().unwrap_or(0),
        }
    }

    /// A write by software, which is ignored while an operation is at work. `software` are the bits of DW0 that are kept.
    /// Returns whether it starts an operation.
    pub(super) fn write(&mut self, word: usize, value: u64, software: u64) -> bool {
        if self.status == ACTIVE {
            return false;
        }
        if word != 0 {
            if let Some(word) = self.words.get_mut(word) {
                *word = value;
            }
            return false;
        }
        self.words[0] = value & (software | OPCODE.mask());
        let starts = COMMAND.get(value) == 1 && STATUS.get(value) == ACTIVE;
        if starts {
            self.status = ACTIVE;
            self.cause = 0;
        }
        starts
    }

    /// Stores a word that only the hardware writes.
    pub(super) fn set(&mut self, word: usize, value: u64) {
        self.words[word] = value;
    }

    pub(super) fn opcode(&self) -> u64 {
        OPCODE.get(self.words[0])
    }

    pub(super) fn is_active(&self) -> bool {
        self.status == ACTIVE
    }

    /// Ends the operation, with a cause if it is an exception.
    pub(super) fn finish(&mut self, result: Result<(), u8>) {
        (self.status, self.cause) = match result {
            Ok(()) => (IDLE, 0),
            Err(cause) => (EXCEPTION, cause),
        };
    }
}

/// An operation that has been started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    /// Of a context handle.
    Context(usize),
    /// Of a TLB-global handle.
    Purge(usize),
    /// A purge that happens again, unasked.
    Repeat(Purge),
    /// Of a fault handle.
    Fault(usize),
    /// The interrupt of a miss, to a vector.
    Interrupt(usize),
    /// Of the chiplet.
    Reset,
}

/// The access that the executor is performing without the lock.
#[derive(Clone, Copy)]
pub(super) struct InFlight {
    /// The context it is for.
    pub(super) context: usize,
    /// The control block.
    pub(super) slot: usize,
    /// The entries it goes through: one, or those of both sides of a copy.
    pub(super) pages: [Option<TlbKey>; 2],
}

/// Everything that the chiplet's lock protects.
pub(super) struct Control {
    pub(super) contexts: [Context; CONTEXTS],
    pub(super) tghs: [Tgh; TGHS],
    pub(super) faults: Box<[Fault]>,
    pub(super) fault_maps: [FaultMap; TFMS],
    pub(super) tlb: Tlb,
    /// The context that each control-block slot belongs to.
    pub(super) owner: [Option<usize>; SLOTS],
    /// Slots with an unresolved fault.
    pub(super) missing: u128,
    pub(super) in_flight: Option<InFlight>,
    pub(super) rng: SmallRng,
    /// Occasions of each [`FaultKind`] so far.
    pub(super) occasions: [u64; FaultKind::COUNT],
    /// Purges that were started.
    pub(super) purges: u64,
    /// A reset has been asked for.
    pub(super) reset_asked: bool,
    /// It was not heeded.
    survived: bool,
    /// A reset waits for the access in flight; nothing new begins.
    pub(super) resetting: bool,
    /// Operations by the time when they take effect, then in the order of their start, and whether that time is an injected
    /// fault.
    pending: BTreeMap<(Instant, u64), (Operation, bool)>,
    started: u64,
    /// Operations that have begun and wait for the access in flight.
    draining: Vec<Operation>,
}

impl Control {
    /// Files `operation`, to take effect at `ready`, which is a fault if it is `injected`.
    pub(super) fn file(&mut self, ready: Instant, operation: Operation, injected: bool) {
        self.started += 1;
        let key = (ready, self.started);
        self.pending.insert(key, (operation, injected));
    }

    /// Whether `operation` has begun and waits for the access in flight.
    pub(super) fn is_draining(&self, operation: Operation) -> bool {
        self.draining.contains(&operation)
    }

    /// When the next operation takes effect.
    pub(super) fn next_ready(&self) -> Option<Instant> {
        self.pending.first_key_value().map(|((ready, _), _)| *ready)
    }

    /// Whether there is anything to settle, now or later.
    pub(super) fn has_operations(&self) -> bool {
        !self.pending.is_empty() || !self.draining.is_empty()
    }

    fn take_due(&mut self, now: Instant) -> Option<(Operation, bool)> {
        let first = self.pending.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }
}

/// A chiplet without its thread: what registers, executor and inspection work on.
pub(super) struct Core {
    pub(super) bus: Bus,
    pub(super) config: ChipletConfig,
    pub(super) segment: Segment,
    pub(super) doorbell: Doorbell,
    pub(super) vectors: Vectors,
    pub(super) counters: Counters,
    control: Mutex<Control>,
}

impl Core {
    pub(super) fn new(bus: Bus, config: ChipletConfig) -> Self {
        let control = Control {
            contexts: Default::default(),
            tghs: Default::default(),
            faults: (0..SLOTS).map(|_| Fault::default()).collect(),
            fault_maps: Default::default(),
            tlb: Tlb::new(config.tlb_entries, config.eviction),
            owner: [None; SLOTS],
            missing: 0,
            in_flight: None,
            rng: SmallRng::seed_from_u64(config.faults.seed),
            occasions: [0; FaultKind::COUNT],
            purges: 0,
            reset_asked: false,
            survived: false,
            resetting: false,
            pending: BTreeMap::new(),
            started: 0,
            draining: Vec::new(),
        };
        Self {
            bus,
            config,
            segment: Segment::new(),
            doorbell: Doorbell::default(),
            vectors: Vectors::default(),
            counters: Counters::default(),
            control: Mutex::new(control),
        }
    }

    /// The chiplet's lock.
    pub(super) fn lock(&self) -> MutexGuard<'_, Control> {
        // A panic under it is a bug of the model; what it left is still worth looking at.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The chiplet's lock, with everything that is due carried out.
    pub(super) fn settled(&self) -> MutexGuard<'_, Control> {
        let mut control = self.lock();
        self.settle(&mut control);
        control
    }

    /// Fires a vector.
    pub(super) fn interrupt(&self, vector: usize) {
        self.counters
            .interrupts
            .add(self.vectors.fire(vector).into());
    }

    /// How much longer a step takes than it should.
    pub(super) fn delay(&self, control: &mut Control) -> Option<Duration> {
        let faults = self.config.faults;
        let longest = |rng: &mut SmallRng| faults.delay.mul_f64(rng.random::<f64>());
        let delay = self.strikes(control, FaultKind::Delayed, faults.delayed, longest);
        self.counters.steps_delayed.add(delay.is_some().into());
        delay
    }

    /// Files an operation of a context or fault handle, or a reset, and carries out what is due.
    pub(super) fn submit_handle(&self, control: &mut Control, operation: Operation) {
        let delay = self.delay(control);
        let latency = self.config.latency.handle + delay.unwrap_or_default();
        self.submit(control, operation, latency, delay.is_some());
    }

    /// Files an operation that takes `latency`, which is a fault if it is `injected`, and carries out what is due.
    pub(super) fn submit(
        &self,
        control: &mut Control,
        operation: Operation,
        latency: Duration,
        injected: bool,
    ) {
        control.file(Instant::now() + latency, operation, injected);
        self.settle(control);
        if control.has_operations() {
            self.doorbell.poke();
        }
    }

    /// Carries out what is due.
    pub(super) fn settle(&self, control: &mut Control) {
        if !control.has_operations() {
            return;
        }
        let now = Instant::now();
        while let Some((operation, injected)) = control.take_due(now) {
            self.counters.faults_over.add(injected.into());
            if self.begin(control, operation) {
                control.draining.push(operation);
            }
            self.drained(control);
        }
        self.drained(control);
    }

    /// Ends the operations that no access in flight keeps waiting.
    fn drained(&self, control: &mut Control) {
        let mut i = 0;
        while let Some(&operation) = control.draining.get(i) {
            if self.waits(control, operation) {
                i += 1;
            } else {
                control.draining.remove(i);
                self.end(control, operation);
            }
        }
    }

    /// The first step of an operation. Returns whether it has a second one.
    fn begin(&self, control: &mut Control, operation: Operation) -> bool {
        match operation {
            Operation::Context(index) => return self.begin_context(control, index),
            Operation::Purge(index) => self.begin_purge(control, index),
            Operation::Repeat(purge) => self.remove(control, &purge),
            Operation::Fault(slot) => {
                self.run_fault(control, slot);
                return false;
            }
            Operation::Interrupt(vector) => {
                self.interrupt(vector);
                return false;
            }
            Operation::Reset => control.resetting = true,
        }
        true
    }

    /// Whether the access in flight keeps `operation` from its second step.
    fn waits(&self, control: &Control, operation: Operation) -> bool {
        let Some(in_flight) = control.in_flight else {
            return false;
        };
        let through = |purge: &Purge| {
            in_flight
                .pages
                .into_iter()
                .flatten()
                .any(|key| purge.concerns(in_flight.context) && purge.covers(key))
        };
        match operation {
            Operation::Context(index) => in_flight.context == index,
            Operation::Purge(index) => through(&control.tghs[index].purge()),
            Operation::Repeat(purge) => through(&purge),
            Operation::Fault(_) | Operation::Interrupt(_) => false,
            Operation::Reset => true,
        }
    }

    /// The second step.
    fn end(&self, control: &mut Control, operation: Operation) {
        match operation {
            Operation::Context(index) => self.end_context(control, index),
            Operation::Purge(index) => self.end_purge(control, index),
            Operation::Repeat(purge) => {
                self.remove(control, &purge);
                self.counters.purges_repeated.hit();
            }
            Operation::Fault(_) | Operation::Interrupt(_) => {}
            Operation::Reset => self.end_reset(control),
        }
    }

    /// A write of 1 to the reset register. One that comes while a reset is in progress is part of it.
    pub(super) fn reset(&self, control: &mut Control) {
        if control.reset_asked && !control.survived {
            return;
        }
        control.reset_asked = true;
        let survives = self.config.faults.survives_reset;
        control.survived = self.happens(control, FaultKind::SurvivesReset, survives);
        if control.survived {
            return self.counters.resets_survived.hit();
        }
        self.submit_handle(control, Operation::Reset);
    }

    /// Nothing is in flight: puts everything but counters and random numbers into its first state. A TLB-global handle that is
    /// idle keeps its words, so that who has not looked yet still sees that its purge has ended.
    fn end_reset(&self, control: &mut Control) {
        for context in 0..CONTEXTS {
            self.segment.set_running(context, false);
            self.segment.publish(context, 0, 0);
        }
        self.doorbell.clear_all();
        self.segment.clear();
        let purges = control.tghs.iter().filter(|tgh| tgh.ends()).count();
        self.counters.purges_cut_short.add(purges as u64);
        let faults = control.pending.values().filter(|(_, injected)| *injected);
        self.counters.faults_cut_short.add(faults.count() as u64);
        control.contexts = Default::default();
        for tgh in control.tghs.iter_mut().filter(|tgh| tgh.is_active()) {
            *tgh = Tgh::default();
        }
        control.faults.fill_with(Fault::default);
        control.fault_maps = Default::default();
        control.tlb.clear();
        control.owner = [None; SLOTS];
        control.missing = 0;
        control.pending.clear();
        control.draining.clear();
        control.reset_asked = false;
        control.resetting = false;
        self.counters.resets.hit();
    }
}
