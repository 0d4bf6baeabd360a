//! Contexts: loaded, in use, unloaded, whatever the hardware does meanwhile.
//!
//! # Load
//! Take a free context and allocation units, bind an ASID (its bit in the word comes *before* ALLOCATE, so that from there on
//! invalidations purge), ALLOCATE, zero what the last owner left, START.
//!
//! # End
//! 1. The *mapping* ends: no user touches the registers any more; each of their accesses is under its read lock.
//! 2. The *gate* closes: nobody resolves a fault of it any more, and whoever does is waited for. They wait for
//!    invalidations only, up to the fault deadline, and hold the map lock before they enter (R33).
//! 3. Faults in the fault map are forced to user polling, INTERRUPT_SYNC, DEALLOCATE. A fault that comes between locks the
//!    context once more and is forced as well.
//! 4. Its bit is taken from the word. Once no context is left, the ASID is retired by the next invalidation or with its tag.
//!
//! A context that the hardware does not give back within the deadline is *leaked*: it keeps its bit, so that it is still flushed,
//! its units and its tag, until the chiplet has been reset.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Instant;

use shootdown::Share;

use crate::chiplet::{Chiplet, Slot, State};
use crate::config::Plant;
use crate::error::{Ended, GruError};
use crate::handle;
use crate::layout::{
    CB_WORDS, CBS_PER_UNIT, CONTEXTS, DATA_PER_UNIT, FAULT_MAP, cch, configuration, control_block,
    data, fault, slots, tfh,
};
use crate::notifier::Binding;

/// How many are resolving a fault, and whether more may.
#[derive(Debug, Default)]
struct Gate {
    inside: usize,
    closed: bool,
}

pub(crate) struct Context {
    pub(crate) chiplet: Arc<Chiplet>,
    pub(crate) binding: Arc<Binding>,
    pub(crate) index: usize,
    pub(crate) asid: u32,
    cb_map: u64,
    data_map: u32,
    epoch: u64,
    mapping: RwLock<Option<Ended>>,
    gate: Mutex<Gate>,
    left: Condvar,
    share: Mutex<Option<Arc<Share>>>,
    /// Whether it has been unloaded; held while it is.
    torn: Mutex<bool>,
}

/// Somebody resolves a fault of the context.
pub(crate) struct Inside<'a>(&'a Context);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        lock(&self.0.gate).inside -= 1;
        self.0.left.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // All of them protect single values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The lowest `count` bits that `taken` leaves free.
fn free_bits(taken: u64, count: usize, width: u32) -> Option<u64> {
    let free = (0..width).filter(|bit| taken & (1 << bit) == 0);
    let map = free.take(count).fold(0u64, |map, bit| map | (1 << bit));
    (map.count_ones() as usize == count).then_some(map)
}

impl Context {
    /// Loads a context on `chiplet`; `None` if it has no room.
    ///
    /// # Errors
    /// The hardware, or no ASID.
    pub(crate) fn load(
        chiplet: &Arc<Chiplet>,
        binding: &Arc<Binding>,
        share: Share,
    ) -> Result<Result<Arc<Self>, Share>, GruError> {
        let mut state = chiplet.lock();
        let epoch = chiplet.epoch();
        reclaim(chiplet, &mut state, epoch);
        let Some((index, cb_map, data_map)) =
            room(chiplet, &state).filter(|_| epoch.is_multiple_of(2))
        else {
            return Ok(Err(share));
        };
        let wraps = state.asids.wraps();
        let count = state.asids.count();
        let bound = chiplet
            .words
            .bind(binding.tag, index, &mut state.asids, || chiplet.flush_all());
        if state.asids.wraps() != wraps {
            chiplet.counters.asid_wraps.hit();
        }
        let asid = bound?.ok_or(GruError::NoAsid { count })?;
        let context = Arc::new(Self {
            chiplet: Arc::clone(chiplet),
            binding: Arc::clone(binding),
            index,
            asid,
            cb_map,
            data_map,
            epoch,
            mapping: RwLock::new(None),
            gate: Mutex::default(),
            left: Condvar::new(),
            share: Mutex::new(Some(Arc::new(share))),
            torn: Mutex::new(false),
        });
        state.slots[index] = Some(Slot {
            context: Arc::clone(&context),
            leaked: false,
        });
        if let Err(error) = context.start() {
            let freed = context.stop();
            context.leave(&mut state, freed.is_ok());
            let share = lock(&context.share).take();
            // First the lock: the share may be the last, and the registration that ends with it takes the lock.
            drop(state);
            drop(share);
            return Err(error);
        }
        chiplet.counters.contexts_loaded.hit();
        Ok(Ok(context))
    }

    fn handle(&self, opcode: u64, bits: u64, what: &'static str) -> Result<(), GruError> {
        let deadline = self.chiplet.config.handle_deadline;
        let base = configuration(self.index);
        handle::run(&*self.chiplet.registers, base, opcode, bits, what, deadline)
    }

    fn start(&self) -> Result<(), GruError> {
        let registers = &*self.chiplet.registers;
        let base = configuration(self.index);
        registers.write(base + cch::DATA_MAP, self.data_map.into())?;
        registers.write(base + cch::CB_MAP, self.cb_map)?;
        for word in cch::REGIONS {
            registers.write(base + word * 8, cch::region(self.asid))?;
        }
        registers.write(base + cch::OWNER, self.binding.space)?;
        self.handle(cch::ALLOCATE, 0, "ALLOCATE of a context")?;
        for cb in 0..self.control_blocks() {
            for word in 0..CB_WORDS {
                registers.write(control_block(self.index, cb, word), 0)?;
            }
        }
        for offset in (0..self.data_bytes()).step_by(8) {
            registers.write(data(self.index, offset), 0)?;
        }
        // Acquire: a thread that serves the fault map began before this was set.
        let interrupts = if self.chiplet.served.load(Ordering::Acquire) {
            cch::TLB_INTERRUPT
        } else {
            0
        };
        let bits = interrupts | (u64::from(FAULT_MAP) << 36);
        self.handle(cch::START, bits, "START of a context")?;
        self.check_epoch()
    }

    /// # Errors
    /// The chiplet was reset since the context was loaded.
    pub(crate) fn check_epoch(&self) -> Result<(), GruError> {
        if self.chiplet.epoch() == self.epoch {
            return Ok(());
        }
        Err(GruError::ContextLost {
            chiplet: self.chiplet.name.clone(),
            context: self.index,
        })
    }

    pub(crate) fn control_blocks(&self) -> usize {
        self.cb_map.count_ones() as usize * CBS_PER_UNIT
    }

    pub(crate) fn data_bytes(&self) -> usize {
        self.data_map.count_ones() as usize * DATA_PER_UNIT
    }

    /// The chiplet's slot of control block `cb`.
    pub(crate) fn slot(&self, cb: usize) -> Option<usize> {
        slots(self.cb_map).nth(cb)
    }

    pub(crate) fn owns(&self, slot: usize) -> bool {
        self.cb_map & (1 << (slot / CBS_PER_UNIT)) != 0
    }

    /// The user's mapping, for as long as the guard lives. Not to be held while waiting.
    ///
    /// # Errors
    /// It is over.
    pub(crate) fn mapped(&self) -> Result<RwLockReadGuard<'_, Option<Ended>>, GruError> {
        let mapping = self.mapping.read().unwrap_or_else(PoisonError::into_inner);
        match *mapping {
            Some(why) => Err(GruError::SegmentEnded { why }),
            None => self.check_epoch().map(|()| mapping),
        }
    }

    /// Why it is over; `None` while it is not.
    pub(crate) fn ended(&self) -> Option<Ended> {
        *self.mapping.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters the gate to resolve a fault; gives the registration to check it against. `None` once it is closed.
    pub(crate) fn enter(&self) -> Option<(Inside<'_>, Arc<Share>)> {
        let mut gate = lock(&self.gate);
        if gate.closed {
            return None;
        }
        gate.inside += 1;
        let inside = Inside(self);
        drop(gate);
        let share = lock(&self.share).clone()?;
        Some((inside, share))
    }

    /// Ends the context: its share of the registration, for who is first. Waits for the hardware and for whoever resolves a
    /// fault of it, within their deadlines. With the map lock held it is legal.
    ///
    /// # Errors
    /// The hardware did not give it back; it has ended for its user all the same.
    pub(crate) fn end(&self, why: Ended) -> (Option<Share>, Result<(), GruError>) {
        {
            let mut mapping = self.mapping.write().unwrap_or_else(PoisonError::into_inner);
            mapping.get_or_insert(why);
        }
        let mut gate = lock(&self.gate);
        gate.closed = true;
        while gate.inside > 0 {
            gate = self.left.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        drop(gate);
        let mut torn = lock(&self.torn);
        let unloaded = if std::mem::replace(&mut *torn, true) {
            Ok(())
        } else {
            let mut state = self.chiplet.lock();
            let planted = self.chiplet.planted(Plant::CONTEXT_NOT_UNLOADED);
            let stopped = if planted { Ok(()) } else { self.stop() };
            self.leave(&mut state, stopped.is_ok());
            if stopped.is_ok() {
                self.chiplet.counters.contexts_unloaded.hit();
            }
            stopped
        };
        drop(torn);
        // Nobody else has it: all who are inside have left.
        let share = lock(&self.share).take().and_then(Arc::into_inner);
        (share, unloaded)
    }

    /// Stops the context and gives its resources back to the hardware, in whatever state it is.
    fn stop(&self) -> Result<(), GruError> {
        let deadline = self.chiplet.config.handle_deadline;
        let begun = Instant::now();
        loop {
            if self.check_epoch().is_err() && self.chiplet.epoch().is_multiple_of(2) {
                return Ok(());
            }
            self.force_user_polling()?;
            let stopped = self
                .handle(cch::INTERRUPT_SYNC, 0, "INTERRUPT_SYNC of a context")
                .or_else(not_running)
                .and_then(|()| self.handle(cch::DEALLOCATE, 0, "DEALLOCATE of a context"))
                .or_else(not_running);
            match stopped {
                Err(GruError::HandleException {
                    cause: cch::LOCKED, ..
                }) if begun.elapsed() < deadline => {}
                result => return result,
            }
        }
    }

    fn force_user_polling(&self) -> Result<(), GruError> {
        let registers = &*self.chiplet.registers;
        let deadline = self.chiplet.config.handle_deadline;
        for slot in slots(self.cb_map) {
            if tfh::state(registers.read(fault(slot))?) == tfh::MISS_MAP {
                let what = "USER_POLLING_MODE of a fault";
                handle::run(registers, fault(slot), tfh::USER_POLLING, 0, what, deadline)?;
            }
        }
        Ok(())
    }

    /// Gives the context back to the driver, or marks it as leaked.
    fn leave(&self, state: &mut State, stopped: bool) {
        if stopped {
            self.chiplet.words.unbind(self.binding.tag, self.index);
            state.slots[self.index] = None;
        } else if let Some(slot) = &mut state.slots[self.index] {
            slot.leaked = true;
            self.chiplet.counters.contexts_leaked.hit();
            tracing::error!(chiplet = %self.chiplet.name, context = self.index, "context leaked");
        }
    }
}

/// Cause 2, illegal state: there is nothing to stop, or nothing to deallocate.
fn not_running(error: GruError) -> Result<(), GruError> {
    match error {
        GruError::HandleException { cause: 2, .. } => Ok(()),
        error => Err(error),
    }
}

/// Takes back what was leaked before a reset.
fn reclaim(chiplet: &Chiplet, state: &mut State, epoch: u64) {
    for slot in &mut state.slots {
        if let Some(old) = slot.take_if(|old| old.leaked && old.context.epoch != epoch) {
            let context = old.context;
            chiplet.words.unbind(context.binding.tag, context.index);
        }
    }
}

/// A free context, and free control blocks and data for it.
fn room(chiplet: &Chiplet, state: &State) -> Option<(usize, u64, u32)> {
    let index = (0..CONTEXTS).find(|index| state.slots[*index].is_none())?;
    let taken = state.slots.iter().flatten().map(|slot| &slot.context);
    let (cbs, units) = taken.fold((0, 0), |(cbs, units), one| {
        (cbs | one.cb_map, units | one.data_map)
    });
    let config = &chiplet.config;
    let blocks = config.control_blocks.clamp(1, 128).div_ceil(CBS_PER_UNIT);
    let data = config.data_bytes.div_ceil(DATA_PER_UNIT);
    let cb_map = free_bits(cbs, blocks, 64)?;
    let data_map = free_bits(units.into(), data, 32)?;
    Some((index, cb_map, data_map as u32))
}
