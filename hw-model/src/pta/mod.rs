//! A page-table accelerator, register by register: PASIDs, page tables of its own, a device TLB, page requests.
//!
//! It copies, fills and compares memory of many address spaces at a time, through translations that software writes for it: the second
//! kind of device beside the [GRU](crate::gru), whose TLB software fills entry by entry. A driver sees a [`Pta`] through
//! [`Registers`] and [`Interrupts`]; [`layout`] has the numbers.
//!
//! ```text
//!   work queue ── PASID ── root ──► page tables in local memory ──► frame
//!       │                              ▲            │
//!    commands ──► device TLB ◄─────────┼── walk ────┘         invalidate ──► device TLB ──► completion
//!                     │                │
//!                     └── page request ┴── software writes an entry, and answers
//! ```
//!
//! # Translation
//! A PASID has a page table of four levels, in tables of 512 entries in *local memory*, which software writes through the register
//! window. Its leaves are pages of 4 KiB, and of 2 MiB one level up, readable, writable, or both. What has been read from it is
//! cached in the *device TLB* by (PASID, size, page), and stays there whatever becomes of the page table, until it is invalidated, has to
//! make room, or the device is reset. Only an entry that does not allow what is needed is read anew.
//!
//! # A page request
//! Where the page table has no entry that would do, the device puts a request into a ring, for one page, in a *group* of its own, and
//! fires vector 0; the command waits, others go on. Software answers the group: *retry*, and the page table is walked again, or
//! *invalid*, and the command ends. It ends too if nobody answers in time. A ring without room drops the request and says so; the
//! device then makes it again by itself.
//!
//! # An invalidation
//! Software queues what it wants gone, and rings with a number. When that number comes back as a completion the entries are gone, no
//! access through them is in flight, and translations that were being read have been dropped. Completions come in any order. The page
//! table is software's to change *before* it queues: what is left in it is read again.
//!
//! # Taking away
//! A queue, or a PASID, is stopped by disabling it: its commands end at once, but for those with an access in flight, and
//! [`layout::BUSY`] says until when there are any. Entries of a PASID stay in the device TLB: who gives it to somebody else flushes first. A reset ends everything and leaves
//! local memory zeroed; page tables and PASIDs are to be written anew.
//!
//! # Locks
//! One lock a device; under it only the interrupt's, which is a leaf. It is never held during an access, nor while waiting. Accesses
//! are performed by one thread, which ends with the device; everything else is carried out by whoever touches the device when its time
//! has come.

mod command;
mod config;
mod engine;
mod invalidate;
pub mod layout;
mod request;
mod state;
mod stats;
mod table;
#[cfg(test)]
mod tests;
mod tlb;

use shootdown_primitive::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use shootdown_primitive::thread::JoinHandle;
use shootdown_primitive::time::{Duration, Instant};

use shootdown::{DeviceError, Interrupts, Range, Registers};

pub use config::{FaultPlan, Latency, Plant, PtaConfig};
pub use stats::Counts;
pub use tlb::{Key, TlbEntry};

use self::layout::{
    BUSY, ENABLE, IDENTIFICATION, INVALIDATE, INVALIDATE_ADDRESS, INVALIDATE_COMPLETION,
    INVALIDATE_DOORBELL, LOCAL, NUMBER, PASID, PASID_LIMIT, PASID_TABLE, PASIDS, PORTALS,
    QUEUE_CONTROL, QUEUES, REQUEST_HEAD, REQUEST_RESPONSE, REQUEST_RING, REQUEST_SIZE,
    REQUEST_STATUS, REQUEST_TAIL, REQUESTS, RESET, SLOT_BYTES, SLOTS, TABLE_BYTES, TABLES, WHO,
};
use self::state::State;
use crate::bus::Bus;
use crate::error::ModelError;

/// What a register belongs to.
#[derive(Clone, Copy)]
enum Register {
    Plain(u64),
    Request { index: usize, word: usize },
    Pasid { index: usize, word: usize },
    Queue(usize),
    Slot { place: state::Place, word: usize },
    Local { table: usize, index: usize },
}

/// The number of an element of `count` that are `stride` bytes each, and the word in it.
fn element(within: Option<u64>, count: usize, stride: u64) -> Option<(usize, usize)> {
    let within = within?;
    let index = (within / stride) as usize;
    (index < count).then_some((index, (within % stride / 8) as usize))
}

impl Register {
    fn at(offset: u64, tables: usize) -> Option<Self> {
        if !offset.is_multiple_of(8) {
            return None;
        }
        let from = |base: u64| offset.checked_sub(base);
        if let Some((table, index)) = element(from(LOCAL), tables, TABLE_BYTES) {
            return Some(Self::Local { table, index });
        }
        if let Some((slot, word)) = element(from(PORTALS), QUEUES * SLOTS * 4, SLOT_BYTES) {
            // A portal is larger than its slots.
            let (queue, slot) = (slot / (SLOTS * 4), slot % (SLOTS * 4));
            let place = (queue, slot);
            return (slot < SLOTS).then_some(Self::Slot { place, word });
        }
        if let Some((index, _)) = element(from(QUEUE_CONTROL), QUEUES, 8) {
            return Some(Self::Queue(index));
        }
        if let Some((index, word)) = element(from(PASID_TABLE), PASIDS, 16) {
            return Some(Self::Pasid { index, word });
        }
        if let Some((index, word)) = element(from(REQUEST_RING), REQUESTS, 16) {
            return Some(Self::Request { index, word });
        }
        let plain = [
            IDENTIFICATION,
            RESET,
            TABLES,
            PASID_LIMIT,
            REQUEST_HEAD,
            REQUEST_TAIL,
            REQUEST_STATUS,
            REQUEST_RESPONSE,
            REQUEST_SIZE,
            INVALIDATE_ADDRESS,
            INVALIDATE,
            INVALIDATE_DOORBELL,
            INVALIDATE_COMPLETION,
        ];
        plain.contains(&offset).then_some(Self::Plain(offset))
    }
}

struct Core {
    bus: Bus,
    device: u32,
    /// Of local memory.
    tables: usize,
    state: Mutex<State>,
    /// There is work to do, or the end.
    changed: Condvar,
    /// Interrupts that were not taken. Leaf lock.
    pending: Mutex<u64>,
    fired: Condvar,
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic under it is a bug of the model; what it left is still worth looking at.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pending(&self) -> MutexGuard<'_, u64> {
        // A number is whole at any time.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fires the interrupt if it is due.
    fn fire(&self, state: &mut State) {
        if std::mem::take(&mut state.interrupt) {
            let mut pending = self.pending();
            state.counts.interrupts += u64::from(*pending == 0);
            *pending += 1;
            self.fired.notify_all();
        }
    }

    fn read(&self, register: Register) -> u64 {
        let mut state = self.lock();
        state.settle(Instant::now());
        let requests = &state.requests;
        match register {
            Register::Plain(offset) => match offset {
                IDENTIFICATION => WHO,
                RESET => state.is_resetting().into(),
                TABLES => self.tables as u64,
                PASID_LIMIT => state.config.pasids.min(PASIDS - 1) as u64 + 1,
                REQUEST_HEAD => requests.head,
                REQUEST_TAIL => requests.tail(),
                REQUEST_STATUS => requests.overflowed.into(),
                REQUEST_SIZE => requests.size(),
                INVALIDATE_ADDRESS => state.invalidations.address,
                INVALIDATE => state.invalidations.room(),
                INVALIDATE_COMPLETION => state.invalidations.completion(),
                _ => 0,
            },
            Register::Request { index, word } => requests.word(index, word),
            Register::Pasid { index, word } => {
                let pasid = state.pasids[index];
                let busy = state.is_busy(|_, queue| queue.pasid == index as u64);
                match word {
                    0 => {
                        let word = BUSY.put(ENABLE.put(0, pasid.enabled.into()), busy.into());
                        NUMBER.put(word, pasid.root)
                    }
                    _ => pasid.space,
                }
            }
            Register::Queue(index) => {
                let queue = &state.queues[index];
                let busy = state.is_busy(|number, _| number == index);
                let word = BUSY.put(ENABLE.put(0, queue.enabled.into()), busy.into());
                PASID.put(word, queue.pasid)
            }
            Register::Slot { place, word } => state.read_slot(place, word),
            Register::Local { table, index } => state.tables.read(table, index),
        }
    }

    fn write(&self, register: Register, value: u64) {
        let mut state = self.lock();
        let now = Instant::now();
        state.settle(now);
        match register {
            Register::Plain(offset) => match offset {
                RESET if value == 1 => state.reset(now),
                REQUEST_HEAD => state.requests.set_head(value),
                REQUEST_STATUS if value & 1 == 1 => state.requests.overflowed = false,
                REQUEST_RESPONSE => state.respond(value),
                INVALIDATE_ADDRESS => state.invalidations.address = value,
                INVALIDATE => state.invalidations.queue(value),
                INVALIDATE_DOORBELL => state.ring(value, now),
                _ => {}
            },
            Register::Request { .. } => {}
            Register::Pasid { index, word } => self.write_pasid(&mut state, index, word, value),
            Register::Queue(index) => {
                let queue = &mut state.queues[index];
                queue.enabled = ENABLE.get(value) == 1;
                if queue.enabled {
                    queue.pasid = PASID.get(value);
                }
                state.stop_disabled();
            }
            Register::Slot { place, word } => state.write_slot(place, word, value),
            Register::Local { table, index } => {
                let oracle = self.bus.oracle();
                state.tables.write(table, index, value, oracle);
            }
        }
        state.settle(now);
        self.fire(&mut state);
        drop(state);
        self.changed.notify_all();
    }

    fn write_pasid(&self, state: &mut State, index: usize, word: usize, value: u64) {
        if index == 0 || index > state.config.pasids {
            return;
        }
        let pasid = &mut state.pasids[index];
        if word == 1 {
            pasid.space = value;
            return;
        }
        let before = *pasid;
        pasid.enabled = ENABLE.get(value) == 1;
        pasid.root = NUMBER.get(value);
        let pasid = *pasid;
        if pasid.enabled {
            let root = pasid.root as usize;
            state.tables.root(root, pasid.space, self.bus.oracle());
        } else if before.enabled {
            state.tables.forget(before.space);
        }
        state.stop_disabled();
    }
}

/// A page-table accelerator. Dropping it ends its thread.
pub struct Pta {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Pta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pta")
            .field("device", &self.core.device)
            .finish_non_exhaustive()
    }
}

impl Pta {
    /// A device on `bus`, in the state after a reset.
    ///
    /// # Errors
    /// [`ModelError::System`]: the process cannot have a thread for it.
    pub fn new(bus: &Bus, config: PtaConfig) -> Result<Arc<Self>, ModelError> {
        let core = Arc::new(Core {
            bus: bus.clone(),
            device: config.device,
            tables: config.tables.max(1),
            state: Mutex::new(State::new(config)),
            changed: Condvar::new(),
            pending: Mutex::new(0),
            fired: Condvar::new(),
        });
        let engine = Arc::clone(&core);
        let thread = shootdown_primitive::thread::Builder::new()
            .name(format!("pta{}", config.device))
            .spawn(move || engine::run(&engine))
            .map_err(|error| ModelError::System {
                call: "clone",
                bytes: 0,
                errno: error.kind(),
            })?;
        Ok(Arc::new(Self {
            core,
            thread: Some(thread),
        }))
    }

    /// What it has counted.
    pub fn counts(&self) -> Counts {
        self.core.lock().counts
    }

    /// What is in its TLB, the oldest first.
    pub fn tlb_entries(&self) -> Vec<TlbEntry> {
        let mut state = self.core.lock();
        state.settle(Instant::now());
        state.tlb.entries().copied().collect()
    }

    /// A page of `part` that a queue which is enabled could reach in `space`: by an entry of the device TLB, or of the page table.
    pub fn maps(&self, space: u64, part: Range) -> Option<Range> {
        let mut state = self.core.lock();
        state.settle(Instant::now());
        let of = |pasid: u64| {
            let entry = state.pasids.get(pasid as usize);
            let mut queues = state.queues.iter();
            entry.is_some_and(|entry| entry.enabled && entry.space == space)
                && queues.any(|queue| queue.enabled && queue.pasid == pasid)
        };
        let keys = state.tlb.entries().map(|entry| entry.key);
        let mut cached = keys.filter(|key| of(key.pasid)).map(|key| key.range());
        let enabled = (0..PASIDS as u64).any(of);
        cached
            .find(|page| page.overlaps(part))
            .or_else(|| enabled.then(|| state.tables.maps(space, part)).flatten())
    }

    /// A page of `part` of `space` that an access is at which has its translation.
    pub fn works_at(&self, space: u64, part: Range) -> Option<Range> {
        self.core.lock().works_at(space, part)
    }

    /// Keeps accesses that have their translations from ending, or lets them go on.
    pub fn hold(&self, held: bool) {
        self.core.lock().held = held;
        self.core.changed.notify_all();
    }

    /// The page that a write of `value` to the register at `offset` would install.
    pub fn would_install(&self, offset: u64, value: u64) -> Option<Range> {
        match self.register(offset).ok()? {
            Register::Local { table, index } => {
                let state = self.core.lock();
                state.tables.would_install(table, index, value)
            }
            _ => None,
        }
    }

    fn register(&self, offset: u64) -> Result<Register, DeviceError> {
        Register::at(offset, self.core.tables).ok_or(DeviceError::NoRegister { offset, width: 8 })
    }
}

impl Drop for Pta {
    fn drop(&mut self) {
        self.core.lock().stopping = true;
        self.core.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the engine has been reported by its thread.
            drop(thread.join());
        }
    }
}

impl Registers for Pta {
    fn len(&self) -> u64 {
        LOCAL + self.core.tables as u64 * TABLE_BYTES
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        let register = self.register(offset)?;
        Ok(self.core.read(register))
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        let register = self.register(offset)?;
        self.core.write(register, value);
        Ok(())
    }
}

impl Interrupts for Pta {
    fn vectors(&self) -> u32 {
        1
    }

    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError> {
        if vector != 0 {
            return Err(DeviceError::NoVector { vector, vectors: 1 });
        }
        let quiet = |pending: &mut u64| *pending == 0;
        let (mut pending, _) = (self.core.fired)
            .wait_timeout_while(self.core.pending(), timeout, quiet)
            .unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut pending))
    }
}
