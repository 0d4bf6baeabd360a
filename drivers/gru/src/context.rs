//! Contexts: loaded, in use, unloaded, whatever the hardware does meanwhile.
//!
//! # Load
//! Take a free context and allocation units, bind an ASID (its bit in the word comes *before* ALLOCATE, so that from there on
//! invalidations purge), ALLOCATE, zero what the last owner left, START.
//!
//! # Unload
//! In the shootdown of the segment's own addresses ([`DeviceContext::unload`]), with or without the map lock held:
//! 1. The *mapping* ends: no user touches the registers any more; each of their accesses is under its read lock.
//! 2. The *gate* closes: nobody resolves a fault of it any more. Whoever does is waited for, and gives up if it waits for an
//!    invalidation, which may be this one; it holds the map lock before it enters (R33).
//! 3. Faults in the fault map are forced to user polling, INTERRUPT_SYNC, DEALLOCATE. A fault that comes between locks the
//!    context once more and is forced as well.
//! 4. Its bit is taken from the word. Once no context is left, the ASID is retired by the next invalidation or with its tag.
//!
//! A context that the hardware does not give back within the deadline is *leaked*: it keeps its bit, so that it is still flushed,
//! its units and its tag, and its segment stays in quarantine, until the chiplet has been reset.

use shootdown::{Cause, Device, DeviceContext, Op, Share, UnloadFailed};
use shootdown_primitive::sync::atomic::Ordering;
use shootdown_primitive::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard,
};
use shootdown_primitive::time::Instant;

use crate::chiplet::{Chiplet, Slot, State};
use crate::config::Plant;
use crate::error::{Ended, GruError};
use crate::handle::{self, Backoff};
use crate::layout::{
    CB_WORDS, CBS_PER_UNIT, CONTEXTS, DATA_PER_UNIT, FAULT_MAP, SEGMENT_BYTES, cch, configuration,
    control_block, data, fault, slots, tfh,
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
    /// The chiplet, as the framework knows it.
    device: Device,
    pub(crate) binding: Arc<Binding>,
    pub(crate) index: usize,
    pub(crate) asid: u32,
    cb_map: u64,
    data_map: u32,
    epoch: u64,
    mapping: RwLock<Option<Ended>>,
    gate: Mutex<Gate>,
    left: Condvar,
    pub(crate) share: Arc<Share>,
}

/// Somebody resolves a fault of the context.
pub(crate) struct Inside<'a>(&'a Context);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        lock(&self.0.gate).inside -= 1;
        self.0.left.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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
    /// Loads a context on `chiplet`, which is `device`; `None` if it has no room.
    ///
    /// # Errors
    /// The hardware, or no ASID.
    pub(crate) fn load(
        chiplet: &Arc<Chiplet>,
        device: &Device,
        binding: &Arc<Binding>,
        share: &Arc<Share>,
    ) -> Result<Option<Arc<Self>>, GruError> {
        let mut state = chiplet.lock();
        let epoch = chiplet.epoch();
        reclaim(chiplet, &mut state);
        let Some((index, cb_map, data_map)) =
            room(chiplet, &state).filter(|_| epoch.is_multiple_of(2))
        else {
            return Ok(None);
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
            device: device.clone(),
            binding: Arc::clone(binding),
            index,
            asid,
            cb_map,
            data_map,
            epoch,
            mapping: RwLock::new(None),
            gate: Mutex::default(),
            left: Condvar::new(),
            share: Arc::clone(share),
        });
        state.slots[index] = Some(Slot {
            context: Arc::clone(&context),
            leaked: false,
        });
        if let Err(error) = context.start() {
            // What a reset makes of the handle's operations is no news.
            let lost = context.check_epoch();
            let freed = context.stop_or_reset();
            context.leave(&mut state, freed.is_ok());
            return Err(lost.err().unwrap_or(error));
        }
        chiplet.counters.contexts_loaded.hit();
        Ok(Some(context))
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

    /// Enters the gate to resolve a fault. `None` once it is closed.
    pub(crate) fn enter(&self) -> Option<Inside<'_>> {
        let mut gate = lock(&self.gate);
        if gate.closed {
            return None;
        }
        gate.inside += 1;
        Some(Inside(self))
    }

    /// Whether whoever is inside the gate is being waited for.
    pub(crate) fn is_closing(&self) -> bool {
        lock(&self.gate).closed
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

    fn end_by(&self, why: Ended, stop: fn(&Self) -> Result<(), GruError>) -> Result<(), GruError> {
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
        let mut state = self.chiplet.lock();
        let planted = self.chiplet.planted(Plant::CONTEXT_NOT_UNLOADED);
        let stopped = if planted { Ok(()) } else { stop(self) };
        self.leave(&mut state, stopped.is_ok());
        stopped
    }

    /// Stops the context and gives its resources back to the hardware, in whatever state it is.
    fn stop(&self) -> Result<(), GruError> {
        let deadline = self.chiplet.config.handle_deadline;
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        loop {
            let epoch = self.chiplet.epoch();
            if epoch != self.epoch && epoch.is_multiple_of(2) {
                return Ok(());
            }
            if !self.chiplet.planted(Plant::FAULTS_NOT_FORCED) {
                self.force_user_polling()?;
            }
            let stopped = self
                .handle(cch::INTERRUPT_SYNC, 0, "INTERRUPT_SYNC of a context")
                .or_else(not_running)
                .and_then(|()| self.handle(cch::DEALLOCATE, 0, "DEALLOCATE of a context"))
                .or_else(not_running);
            match stopped {
                Err(GruError::HandleException {
                    cause: cch::LOCKED, ..
                }) if begun.elapsed() < deadline => backoff.wait(),
                result => return result,
            }
        }
    }

    /// As [`Context::stop`], and a chiplet that does not stop it is reset.
    fn stop_or_reset(&self) -> Result<(), GruError> {
        self.stop().or_else(|error| {
            let deadline = self.chiplet.config.handle_deadline;
            self.chiplet.reset(deadline).map_err(|_| error)
        })
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
        let own = |slot: &&mut Slot| std::ptr::eq(&*slot.context, self);
        let Some(slot) = state.slots[self.index].as_mut().filter(own) else {
            // Reclaimed after a reset.
            return;
        };
        if stopped {
            self.chiplet.words.unbind(self.binding.tag, self.index);
            state.slots[self.index] = None;
            self.chiplet.counters.contexts_unloaded.hit();
        } else if !std::mem::replace(&mut slot.leaked, true) {
            self.chiplet.counters.contexts_leaked.hit();
        }
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

/// Cause 2, illegal state: there is nothing to stop, or nothing to deallocate.
fn not_running(error: GruError) -> Result<(), GruError> {
    match error {
        GruError::HandleException { cause: 2, .. } => Ok(()),
        error => Err(error),
    }
}

/// Takes back what was leaked before a reset that has come to its end.
pub(crate) fn reclaim(chiplet: &Chiplet, state: &mut State) {
    let epoch = chiplet.epoch();
    if !epoch.is_multiple_of(2) {
        return;
    }
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
