//! Contexts: what is behind a segment, loaded on its chiplet or saved, whatever the hardware does meanwhile.
//!
//! # Places
//! A context is *loaded* (it has one of the chiplet's, and units of its control blocks and data), *saved* (its state is in memory;
//! its user's next access loads it), *lost* in a reset, or *ended*. [`load`](crate::load) moves it between the first two.
//! Each access of a user is under the read lock of the place, so that whoever takes the context away waits for accesses, and later
//! ones find it gone.
//!
//! # Unload
//! In the shootdown of the segment's own addresses ([`DeviceContext::unload`]), with or without the map lock held:
//! 1. The *place* is ended: no user touches the registers any more.
//! 2. The *gate* closes: nobody resolves a fault of it any more. Whoever does is waited for, and gives up if it waits for an
//!    invalidation, which may be this one; it holds the map lock before it enters (R33).
//! 3. Faults in the fault map are forced to user polling, INTERRUPT_SYNC, DEALLOCATE. A fault that comes between locks the
//!    context once more and is forced as well.
//! 4. Its bit is taken from the word. Once no context is left, the ASID is retired by the next invalidation or with its tag.
//!
//! A context that the hardware does not give back within the deadline is *leaked*: it keeps its bit, so that it is still flushed,
//! its units and its tag, and its segment stays in quarantine, until the chiplet has been reset.
//!
//! # Locks
//! chiplet lock → place → gate. Nothing but registers is waited for with a place held.

use shootdown_primitive::sync::atomic::{AtomicU8, AtomicU64};
use shootdown_primitive::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use shootdown_primitive::time::{Duration, Instant};

use shootdown::{Cause, Device, DeviceContext, Op, Share, UnloadFailed};

use crate::chiplet::{Chiplet, Slot, State};
use crate::config::{MissMode, Plant, SegmentOptions};
use crate::error::{Ended, GruError};
use crate::handle::{self, Operation};
use crate::layout::{CBS_PER_UNIT, DATA_PER_UNIT, SEGMENT_BYTES, cch, configuration, slots};
use crate::load::Saved;
use crate::notifier::Binding;
use crate::stats::SegmentCounters;

/// How many are resolving a fault, and whether more may.
#[derive(Debug, Default)]
struct Gate {
    inside: usize,
    closed: bool,
}

/// Where a loaded context is on its chiplet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loaded {
    pub(crate) index: usize,
    /// 0 for one of the driver's own.
    pub(crate) asid: u32,
    pub(crate) cb_map: u64,
    pub(crate) data_map: u32,
    pub(crate) epoch: u64,
    pub(crate) since: Instant,
}

impl Loaded {
    /// The chiplet's slot of control block `cb`.
    pub(crate) fn slot(&self, cb: usize) -> Option<usize> {
        slots(self.cb_map).nth(cb)
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    Loaded(Loaded),
    Saved,
    /// The chiplet was reset while it was loaded as this context.
    Lost(usize),
    Ended(Ended),
}

/// Whose memory a context works on.
pub(crate) struct User {
    pub(crate) binding: Arc<Binding>,
    pub(crate) share: Arc<Share>,
}

pub(crate) struct Context {
    pub(crate) chiplet: Arc<Chiplet>,
    /// The chiplet, as the framework knows it.
    pub(crate) device: Device,
    /// An address space's; none for one of the driver's own, which names memory itself.
    pub(crate) user: Option<User>,
    pub(crate) options: SegmentOptions,
    place: RwLock<Place>,
    gate: Mutex<Gate>,
    left: Condvar,
    pub(crate) saved: Mutex<Saved>,
    /// Tries of each control block's instruction.
    pub(crate) tries: Box<[AtomicU8]>,
    /// What was left of each control block's block copy when something was last preloaded for what it reads, and for what it writes.
    pub(crate) preloaded: Box<[[AtomicU64; 2]]>,
    /// Completions that have interrupted, and whatever else makes a sleeper look.
    completions: Mutex<u64>,
    completed: Condvar,
    pub(crate) counters: SegmentCounters,
}

/// The user's mapping of a loaded context. Not to be held while waiting.
pub(crate) struct Mapped<'a> {
    pub(crate) loaded: Loaded,
    _place: RwLockReadGuard<'a, Place>,
}

/// Somebody resolves a fault of the context, which stays where it is meanwhile.
pub(crate) struct Inside<'a> {
    context: &'a Context,
    pub(crate) loaded: Loaded,
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.context.leave_gate();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // All of them protect single values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Context {
    /// A context that is not loaded yet, with its state all zero.
    pub(crate) fn new(
        chiplet: &Arc<Chiplet>,
        device: &Device,
        user: Option<User>,
        options: SegmentOptions,
    ) -> Arc<Self> {
        let blocks = options.units().0 * CBS_PER_UNIT;
        chiplet.enlist();
        Arc::new(Self {
            chiplet: Arc::clone(chiplet),
            device: device.clone(),
            user,
            options,
            place: RwLock::new(Place::Saved),
            gate: Mutex::default(),
            left: Condvar::new(),
            saved: Mutex::new(Saved::zero(blocks, options.units().1 * DATA_PER_UNIT)),
            tries: (0..blocks).map(|_| AtomicU8::new(0)).collect(),
            preloaded: (0..blocks).map(|_| Default::default()).collect(),
            completions: Mutex::new(0),
            completed: Condvar::new(),
            counters: SegmentCounters::default(),
        })
    }

    pub(crate) fn place(&self) -> RwLockReadGuard<'_, Place> {
        // Changed by single assignments.
        self.place.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn place_mut(&self) -> RwLockWriteGuard<'_, Place> {
        self.place.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn handle(
        &self,
        index: usize,
        operation: Operation,
        bits: u64,
    ) -> Result<(), GruError> {
        self.operate(configuration(index), operation, bits)
    }

    /// An operation of any of the chiplet's handles.
    pub(crate) fn operate(
        &self,
        base: u64,
        operation: Operation,
        bits: u64,
    ) -> Result<(), GruError> {
        let chiplet = &self.chiplet;
        let deadline = chiplet.config.handle_deadline;
        let timings = &chiplet.counters.operations;
        handle::run(
            &*chiplet.registers,
            timings,
            base,
            operation,
            bits,
            deadline,
        )
    }

    /// # Errors
    /// The chiplet was reset since the context was loaded.
    pub(crate) fn check_epoch(&self, loaded: &Loaded) -> Result<(), GruError> {
        if self.chiplet.epoch() == loaded.epoch {
            return Ok(());
        }
        Err(self.lost(loaded.index))
    }

    fn lost(&self, context: usize) -> GruError {
        GruError::ContextLost {
            chiplet: self.chiplet.name.clone(),
            context,
        }
    }

    pub(crate) fn control_blocks(&self) -> usize {
        self.tries.len()
    }

    pub(crate) fn data_bytes(&self) -> usize {
        self.options.units().1 * DATA_PER_UNIT
    }

    /// The user's mapping, for as long as it lives. Loads a context that is saved, and waits for that.
    ///
    /// # Errors
    /// It is over, lost, or cannot be loaded.
    pub(crate) fn mapped(self: &Arc<Self>) -> Result<Mapped<'_>, GruError> {
        loop {
            let place = self.place();
            match *place {
                Place::Loaded(loaded) => {
                    self.check_epoch(&loaded)?;
                    return Ok(Mapped {
                        loaded,
                        _place: place,
                    });
                }
                Place::Lost(index) => return Err(self.lost(index)),
                Place::Ended(why) => return Err(GruError::SegmentEnded { why }),
                Place::Saved => {}
            }
            drop(place);
            self.load()?;
        }
    }

    /// Why it is over; `None` while it is not.
    pub(crate) fn ended(&self) -> Option<Ended> {
        match *self.place() {
            Place::Ended(why) => Some(why),
            _ => None,
        }
    }

    /// Whether a reset has cost it its state.
    pub(crate) fn is_lost(&self) -> bool {
        match *self.place() {
            Place::Lost(_) => true,
            Place::Loaded(loaded) => self.check_epoch(&loaded).is_err(),
            Place::Saved | Place::Ended(_) => false,
        }
    }

    /// Where it is loaded; `None` while it is not.
    pub(crate) fn loaded(&self) -> Option<Loaded> {
        match *self.place() {
            Place::Loaded(loaded) => Some(loaded),
            _ => None,
        }
    }

    /// Enters the gate to resolve a fault. `None` once it is closed, or while the context is not loaded.
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        {
            let mut gate = lock(&self.gate);
            if gate.closed {
                return None;
            }
            gate.inside += 1;
        }
        // Counted first: who saves the context has the place, and looks at the count then.
        let Some(loaded) = self.loaded() else {
            self.leave_gate();
            return None;
        };
        Some(Inside {
            context: self,
            loaded,
        })
    }

    fn leave_gate(&self) {
        lock(&self.gate).inside -= 1;
        self.left.notify_all();
    }

    /// Whether somebody resolves a fault of it.
    pub(crate) fn is_entered(&self) -> bool {
        lock(&self.gate).inside > 0
    }

    /// Whether whoever is inside the gate is being waited for.
    pub(crate) fn is_closing(&self) -> bool {
        lock(&self.gate).closed
    }

    /// Has sleepers look.
    pub(crate) fn complete(&self) {
        *lock(&self.completions) += 1;
        self.completed.notify_all();
    }

    /// How often sleepers were told to look.
    pub(crate) fn completions(&self) -> u64 {
        *lock(&self.completions)
    }

    /// Sleeps until there are other completions than `seen`, for `time` at most.
    pub(crate) fn await_completion(&self, seen: u64, time: Duration) {
        let completions = lock(&self.completions);
        let sleeps = self
            .completed
            .wait_timeout_while(completions, time, |now| *now == seen);
        drop(sleeps.unwrap_or_else(PoisonError::into_inner));
    }

    /// Ends the context. Waits for the hardware, within its deadline, and for whoever is inside the gate. With the map lock held
    /// it is legal.
    ///
    /// # Errors
    /// The hardware did not give it back; it has ended for its user all the same, and can be ended once more.
    pub(crate) fn end(&self, why: Ended) -> Result<(), GruError> {
        self.end_by(why, Self::stop)
    }

    /// Ends a context that has no segment, for whose sake the framework would reset a chiplet that does not give it back.
    ///
    /// # Errors
    /// As [`Context::end`].
    pub(crate) fn discard(&self, why: Ended) -> Result<(), GruError> {
        self.end_by(why, Self::stop_or_reset)
    }

    fn end_by(
        &self,
        why: Ended,
        stop: fn(&Self, &Loaded) -> Result<(), GruError>,
    ) -> Result<(), GruError> {
        {
            let mut place = self.place_mut();
            if !matches!(*place, Place::Ended(_)) {
                *place = Place::Ended(why);
            }
        }
        self.complete();
        let mut gate = lock(&self.gate);
        gate.closed = true;
        while gate.inside > 0 {
            gate = self.left.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        drop(gate);
        let mut state = self.chiplet.lock();
        let own = |slot: &&Slot| std::ptr::eq(&*slot.context, self);
        let Some(loaded) = state
            .slots
            .iter()
            .flatten()
            .find(own)
            .map(|slot| slot.loaded)
        else {
            return Ok(());
        };
        let planted = self.chiplet.planted(Plant::CONTEXT_NOT_UNLOADED);
        let stopped = if planted { Ok(()) } else { stop(self, &loaded) };
        self.leave(&mut state, &loaded, stopped.is_ok());
        stopped
    }

    /// Gives the context back to the driver, or marks it as leaked.
    pub(crate) fn leave(&self, state: &mut State, loaded: &Loaded, stopped: bool) {
        let own = |slot: &&mut Slot| std::ptr::eq(&*slot.context, self);
        let Some(slot) = state.slots[loaded.index].as_mut().filter(own) else {
            // Reclaimed after a reset.
            return;
        };
        if stopped {
            self.unbind(loaded);
            state.slots[loaded.index] = None;
            self.chiplet.counters.contexts_unloaded.hit();
        } else if !std::mem::replace(&mut slot.leaked, true) {
            self.chiplet.counters.contexts_leaked.hit();
        }
    }

    /// Takes its bit from the word of its space.
    pub(crate) fn unbind(&self, loaded: &Loaded) {
        if let Some(user) = &self.user {
            self.chiplet.words.unbind(user.binding.tag, loaded.index);
        }
    }

    /// The bits that START is given beside the fault map.
    pub(crate) fn enables(&self, served: bool) -> u64 {
        let misses = match self.options.misses {
            MissMode::FaultMap if served => cch::TLB_INTERRUPT,
            MissMode::FaultMapPolled => cch::FAULT_BITS,
            // Where nobody serves the fault map its users have to.
            MissMode::UserPolling | MissMode::FaultMap => 0,
        };
        let unmapped = match self.user {
            Some(_) => 0,
            None => cch::UNMAP_ENABLE,
        };
        misses | unmapped | if served { cch::CB_INTERRUPT } else { 0 }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.chiplet.dismiss();
    }
}

impl DeviceContext for Context {
    fn device(&self) -> &Device {
        &self.device
    }

    fn unload(&self, op: &Op<'_>) -> Result<(), UnloadFailed> {
        let whole = op.range().len() == u128::from(SEGMENT_BYTES);
        let why = match op.cause() {
            Cause::Exit => Ended::SpaceExited,
            _ if whole => Ended::Unmapped,
            _ => Ended::PartlyUnmapped,
        };
        self.end(why).map_err(|error| UnloadFailed {
            reason: match error {
                GruError::HandleTimeout { what, .. } | GruError::HandleException { what, .. } => {
                    what
                }
                _ => "the chiplet is gone",
            },
        })
    }

    fn name(&self) -> &'static str {
        "a GRU context"
    }
}
