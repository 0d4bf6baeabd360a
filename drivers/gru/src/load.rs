//! Loading, saving, stealing: more segments than a chiplet has contexts for.
//!
//! # Load
//! Take a free context and allocation units, bind an ASID (its bit in the word comes *before* ALLOCATE, so that from there on
//! invalidations purge), ALLOCATE, copy the saved state, START, which lets unfinished instructions go on.
//!
//! # Save
//! INTERRUPT_SYNC stops the context between two accesses; its control blocks, their next elements, causes and its data are copied,
//! DEALLOCATE. What it has in the TLB stays, under an ASID that an invalidation takes away from a space that has no other context
//! there. A miss that waits for its user is forgotten: its control block misses again once it is loaded.
//!
//! # Steal
//! Whoever has no context takes one, the one that has been loaded longest, once that has been where it is for the *window*; else it
//! tries again after the *retry* time. Not stolen are contexts with a fault in the fault map or one that is being resolved: the
//! translation belongs to where they are. Contexts that a reset has cost their state are taken at once.

use shootdown_primitive::sync::atomic::Ordering;
use shootdown_primitive::sync::{Arc, PoisonError};
use shootdown_primitive::thread;
use shootdown_primitive::time::Instant;

use crate::chiplet::{Chiplet, Slot, State};
use crate::context::{Context, Loaded, Place};
use crate::error::GruError;
use crate::handle::Operation;
use crate::layout::{
    CB_WORDS, CONTEXTS, FAULT_MAP, MAP_WORDS, cbe, cch, configuration, control_block, data,
    extended, fault_map, slots,
};

/// A control block that is not on a chiplet.
#[derive(Clone, Copy, Default)]
struct Block {
    words: [u64; CB_WORDS],
    /// Those of the extended control block that belong to it.
    extended: [u64; cbe::STATE.end - cbe::STATE.start],
}

/// The state of a context that is not loaded.
pub(crate) struct Saved {
    blocks: Box<[Block]>,
    data: Box<[u64]>,
}

impl Saved {
    pub(crate) fn zero(blocks: usize, data_bytes: usize) -> Self {
        Self {
            blocks: vec![Block::default(); blocks].into(),
            data: vec![0; data_bytes / 8].into(),
        }
    }
}

/// The lowest `count` bits that `taken` leaves free.
fn free_bits(taken: u64, count: usize, width: u32) -> Option<u64> {
    let free = (0..width).filter(|bit| taken & (1 << bit) == 0);
    let map = free.take(count).fold(0u64, |map, bit| map | (1 << bit));
    (map.count_ones() as usize == count).then_some(map)
}

/// A free context, and free units for it.
struct Room {
    index: usize,
    cb_map: u64,
    data_map: u32,
}

impl Context {
    /// Loads it, once a context is free or can be stolen. Where it is over, or lost, there is nothing to do.
    ///
    /// # Errors
    /// [`GruError::NoneStealable`] after the load deadline; the hardware; no ASID.
    pub(crate) fn load(self: &Arc<Self>) -> Result<(), GruError> {
        let config = &self.chiplet.config;
        let begun = Instant::now();
        while !self.try_load(true)? {
            // A dead chiplet is not waited for.
            if !self.chiplet.is_well() {
                return Err(GruError::NoContext { chiplets: 1 });
            }
            let waited = begun.elapsed();
            let Some(left) = config.load_deadline.checked_sub(waited) else {
                return Err(GruError::NoneStealable {
                    chiplet: self.chiplet.name.clone(),
                    waited,
                });
            };
            thread::sleep(config.steal.retry.min(left));
        }
        Ok(())
    }

    /// Loads it if there is room, or if it may steal and somebody can be stolen from: whether it is not saved any more.
    ///
    /// # Errors
    /// The hardware, or no ASID.
    pub(crate) fn try_load(self: &Arc<Self>, steal: bool) -> Result<bool, GruError> {
        let mut state = self.chiplet.lock();
        if !matches!(*self.place(), Place::Saved) {
            return Ok(true);
        }
        let epoch = self.chiplet.epoch();
        if !epoch.is_multiple_of(2) {
            return Ok(false);
        }
        reclaim(&self.chiplet, &mut state);
        let mut stolen = false;
        let room = loop {
            if let Some(room) = self.room(&state) {
                break room;
            }
            if !steal || !steal_one(&self.chiplet, &mut state, epoch) {
                return Ok(false);
            }
            stolen = true;
        };
        self.load_at(&mut state, &room, epoch)?;
        if stolen {
            self.counters.steals.hit();
        }
        Ok(true)
    }

    fn room(&self, state: &State) -> Option<Room> {
        let index = (0..CONTEXTS).find(|index| state.slots[*index].is_none())?;
        let taken = state.slots.iter().flatten().map(|slot| &slot.loaded);
        let (cbs, units) = taken.fold((0, 0), |(cbs, units), one| {
            (cbs | one.cb_map, units | one.data_map)
        });
        let (blocks, data) = self.options.units();
        Some(Room {
            index,
            cb_map: free_bits(cbs, blocks, 64)?,
            data_map: free_bits(units.into(), data, 32)? as u32,
        })
    }

    fn load_at(
        self: &Arc<Self>,
        state: &mut State,
        room: &Room,
        epoch: u64,
    ) -> Result<(), GruError> {
        let chiplet = &self.chiplet;
        let loaded = Loaded {
            index: room.index,
            asid: self.bind(state, room.index)?,
            cb_map: room.cb_map,
            data_map: room.data_map,
            epoch,
            since: Instant::now(),
        };
        state.slots[room.index] = Some(Slot {
            context: Arc::clone(self),
            loaded,
            leaked: false,
        });
        if let Err(error) = self.start(&loaded) {
            // What a reset makes of the handle's operations is no news.
            let lost = self.check_epoch(&loaded);
            let freed = self.stop_or_reset(&loaded);
            self.leave(state, &loaded, freed.is_ok());
            return Err(lost.err().unwrap_or(error));
        }
        chiplet.counters.contexts_loaded.hit();
        let mut place = self.place_mut();
        // Who has ended it meanwhile waits for the chiplet's lock, and finds it loaded.
        if matches!(*place, Place::Saved) {
            *place = Place::Loaded(loaded);
        }
        Ok(())
    }

    /// Its space's ASID; 0 for one of the driver's own.
    fn bind(&self, state: &mut State, index: usize) -> Result<u32, GruError> {
        let chiplet = &self.chiplet;
        let Some(user) = &self.user else {
            return Ok(0);
        };
        let wraps = state.asids.wraps();
        let count = state.asids.count();
        let bound = chiplet
            .words
            .bind(user.binding.tag, index, &mut state.asids, || {
                chiplet.flush_all()
            });
        if state.asids.wraps() != wraps {
            chiplet.counters.asid_wraps.hit();
        }
        bound?.ok_or(GruError::NoAsid { count })
    }

    fn start(&self, loaded: &Loaded) -> Result<(), GruError> {
        let registers = &*self.chiplet.registers;
        let base = configuration(loaded.index);
        registers.write(base + cch::DATA_MAP, loaded.data_map.into())?;
        registers.write(base + cch::CB_MAP, loaded.cb_map)?;
        for word in cch::REGIONS {
            registers.write(base + word * 8, cch::region(loaded.asid))?;
        }
        let owner = self.user.as_ref().map_or(0, |user| user.binding.space);
        registers.write(base + cch::OWNER, owner)?;
        let allocate = || self.handle(loaded.index, Operation::Allocate, 0);
        match allocate() {
            // It has kept a context that it said was gone.
            Err(GruError::HandleException {
                cause: cch::WRONG_STATE,
                ..
            }) => {
                self.stop(loaded)?;
                allocate()?;
            }
            result => result?,
        }
        self.restore(loaded)?;
        // Acquire: a thread that serves the fault map began before this was set.
        let served = self.chiplet.served.load(Ordering::Acquire);
        let bits = self.enables(served) | (u64::from(FAULT_MAP) << 36);
        self.handle(loaded.index, Operation::Start, bits)?;
        self.check_epoch(loaded)
    }

    /// Copies the state to the chiplet.
    fn restore(&self, loaded: &Loaded) -> Result<(), GruError> {
        let registers = &*self.chiplet.registers;
        let saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        for ((cb, block), slot) in saved.blocks.iter().enumerate().zip(slots(loaded.cb_map)) {
            // ALLOCATE has cleared the others.
            let left = cbe::STATE.zip(block.extended);
            for (word, value) in left.filter(|(_, value)| *value != 0) {
                registers.write(extended(slot, word), value)?;
            }
            // The first word last: with it the block may be at work.
            for (word, value) in block.words.iter().enumerate().rev() {
                registers.write(control_block(loaded.index, cb, word), *value)?;
            }
        }
        for (nth, word) in saved.data.iter().enumerate() {
            registers.write(data(loaded.index, nth * 8), *word)?;
        }
        Ok(())
    }

    /// Copies the state of a stopped context from the chiplet.
    fn copy(&self, loaded: &Loaded) -> Result<(), GruError> {
        let registers = &*self.chiplet.registers;
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        let Saved {
            blocks,
            data: words,
        } = &mut *saved;
        for ((cb, block), slot) in blocks.iter_mut().enumerate().zip(slots(loaded.cb_map)) {
            for (word, value) in block.words.iter_mut().enumerate() {
                *value = registers.read(control_block(loaded.index, cb, word))?;
            }
            for (word, value) in cbe::STATE.zip(&mut block.extended) {
                *value = registers.read(extended(slot, word))?;
            }
        }
        for (nth, word) in words.iter_mut().enumerate() {
            *word = registers.read(data(loaded.index, nth * 8))?;
        }
        // Its completions have been seen: whoever sleeps for one looks, and the slots' next owner has none of them.
        let done = slots(loaded.cb_map).fold(0u128, |done, slot| done | (1 << slot));
        for word in 0..MAP_WORDS {
            let bits = (done >> (64 * word)) as u64;
            registers.write(fault_map(MAP_WORDS + word), bits)?;
        }
        Ok(())
    }

    /// Takes its context away, if nothing keeps it there: whether it was.
    fn save(&self, state: &mut State, loaded: &Loaded) -> Result<bool, GruError> {
        let mut place = self.place_mut();
        // Who is ending it waits for the chiplet's lock.
        if !matches!(*place, Place::Loaded(_)) {
            return Ok(false);
        }
        if self.is_entered() || self.is_locked(loaded)? {
            return Ok(false);
        }
        match self.handle(loaded.index, Operation::InterruptSync, 0) {
            Ok(()) => {}
            // A fault has come since.
            Err(GruError::HandleException {
                cause: cch::LOCKED, ..
            }) => return Ok(false),
            Err(error) => return Err(error),
        }
        self.copy(loaded)?;
        self.handle(loaded.index, Operation::Deallocate, 0)?;
        self.leave(state, loaded, true);
        *place = Place::Saved;
        drop(place);
        self.complete();
        Ok(true)
    }
}

/// Takes a context away from somebody: whether there was one to take.
fn steal_one(chiplet: &Chiplet, state: &mut State, epoch: u64) -> bool {
    let counters = &chiplet.counters;
    let taken = state.slots.iter().flatten().filter(|slot| !slot.leaked);
    let mut order: Vec<_> = taken
        .map(|slot| (Arc::clone(&slot.context), slot.loaded))
        .collect();
    order.sort_by_key(|(_, loaded)| loaded.since);
    for (victim, loaded) in order {
        if loaded.epoch != epoch {
            let mut place = victim.place_mut();
            if victim.is_entered() || !matches!(*place, Place::Loaded(_)) {
                continue;
            }
            victim.leave(state, &loaded, true);
            *place = Place::Lost(loaded.index);
            return true;
        }
        if loaded.since.elapsed() < chiplet.config.steal.window {
            counters.steals_too_early.hit();
            continue;
        }
        match victim.save(state, &loaded) {
            Ok(true) => {
                counters.contexts_stolen.hit();
                victim.counters.stolen.hit();
                return true;
            }
            Ok(false) => counters.steals_locked.hit(),
            Err(error) => {
                tracing::warn!(chiplet = %chiplet.name, context = loaded.index, %error, "not stolen");
            }
        }
    }
    false
}

/// Takes back what was leaked before a reset that has come to its end.
pub(crate) fn reclaim(chiplet: &Chiplet, state: &mut State) {
    let epoch = chiplet.epoch();
    if !epoch.is_multiple_of(2) {
        return;
    }
    for slot in &mut state.slots {
        if let Some(old) = slot.take_if(|old| old.leaked && old.loaded.epoch != epoch) {
            old.context.unbind(&old.loaded);
        }
    }
}
