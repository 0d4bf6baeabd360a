//! A GRU chiplet, register by register: contexts, control blocks, a TLB that really caches, purges that take time.
//!
//! A driver sees a [`Chiplet`] through [`Registers`] (a window of 128 MiB) and [`Interrupts`] (a vector for each fault map),
//! as it would see the real one. Where an access goes is decided by the chiplet's TLB and nothing else: an entry that was not
//! purged keeps naming its frame, and the bus really performs the access on it. The oracle only looks on.
//!
//! # What moves
//! Handle operations are passive: they have a time when they take effect, and are carried out by whoever touches the chiplet
//! at or after it. Instructions are carried out by one thread, which begins with the first START, sleeps while
//! there is nothing to do, and ends with the chiplet.
//!
//! # A miss
//! 1. The executor finds no entry, or none that allows the store. The control block stops; its fault handle says where. With
//!    TLB interrupts on, its bit in the context's fault map is set and the vector fires; without, its status is CALL_OS.
//! 2. Software translates, writes the fault handle, and with it (WRITE_RESTART) the entry is installed, *unless a purge that
//!    covers it came since the miss* (race R16), and the control block tries again.
//!
//! # A purge
//! Software writes a TLB-global handle and polls it. When it is IDLE the entries are gone, no access through them is in
//! flight, and the faults that were pending in its range will have their drop-ins ignored. It may never get there:
//! [`FaultPlan`] injects what broken hardware does. The reset register then is the next thing to try.
//!
//! # Invariants and locks
//! - One lock a chiplet protects everything but the memory of control blocks and data segments, which is atomic. Order:
//!   chiplet lock → interrupt vector. It is held for short times, never during an access and never while waiting.
//! - Whoever polls a control block takes no lock.
//! - At most one access a chiplet is in flight; it is published under the lock before it begins.
//! - A control block is changed by its user while IDLE or ended, and by the chiplet otherwise.

mod config;
mod context;
mod control;
mod doorbell;
mod exec;
mod extended;
mod fault;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod instruction;
mod interrupts;
pub mod layout;
mod message;
mod plan;
mod purge;
mod segment;
mod stats;
mod tlb;

#[cfg(test)]
mod tests;

use std::time::Duration;

use shootdown::{DeviceError, Interrupts, Range, Registers};
use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError};
use shootdown_primitive::thread::{self, JoinHandle};

pub use config::{ChipletConfig, Eviction, FaultKind, FaultPlan, Latency, Plant, Scripted};
pub use stats::Counts;
pub use tlb::{TlbEntry, TlbKey};

use control::Core;
use layout::{
    CBE, CCH, CONTEXTS, DSR_BYTES, DSR_OFFSET, GSEG_STRIDE, HANDLE_STRIDE, MANAGEMENT, RESET,
    SLOTS, TFH, TFM, TFMS, TGH, TGHS, WINDOW_BYTES,
};
use segment::CbWrite;

use crate::bus::Bus;

/// What a register belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Register {
    ControlBlock {
        context: usize,
        number: usize,
        word: usize,
    },
    Data {
        context: usize,
        offset: u64,
    },
    FaultMap {
        index: usize,
        word: usize,
    },
    Purge {
        index: usize,
        word: usize,
    },
    Extended {
        slot: usize,
        word: usize,
    },
    Fault {
        slot: usize,
        word: usize,
    },
    Context {
        index: usize,
        word: usize,
    },
    Reset,
}

impl Register {
    fn at(offset: u64) -> Option<Self> {
        if !offset.is_multiple_of(8) || offset >= WINDOW_BYTES {
            return None;
        }
        if let Some(offset) = offset.checked_sub(MANAGEMENT) {
            return Self::management(offset);
        }
        let context = (offset / GSEG_STRIDE) as usize;
        let within = offset % GSEG_STRIDE;
        if let Some((number, word)) = element(within, 0, SLOTS) {
            return Some(Self::ControlBlock {
                context,
                number,
                word,
            });
        }
        let offset = within
            .checked_sub(DSR_OFFSET)
            .filter(|offset| *offset < DSR_BYTES)?;
        Some(Self::Data { context, offset })
    }

    fn management(offset: u64) -> Option<Self> {
        if offset == RESET {
            return Some(Self::Reset);
        }
        if let Some((index, word)) = element(offset, TFM, TFMS) {
            return Some(Self::FaultMap { index, word });
        }
        if let Some((index, word)) = element(offset, TGH, TGHS) {
            return Some(Self::Purge { index, word });
        }
        if let Some((slot, word)) = element(offset, CBE, SLOTS) {
            return Some(Self::Extended { slot, word });
        }
        if let Some((slot, word)) = element(offset, TFH, SLOTS) {
            return Some(Self::Fault { slot, word });
        }
        let (index, word) = element(offset, CCH, CONTEXTS)?;
        Some(Self::Context { index, word })
    }
}

/// Which of the `count` handles from `base` on, and which word of it, is at `offset`.
fn element(offset: u64, base: u64, count: usize) -> Option<(usize, usize)> {
    let within = offset.checked_sub(base)?;
    let index = (within / HANDLE_STRIDE) as usize;
    (index < count).then_some((index, (within % HANDLE_STRIDE / 8) as usize))
}

/// One GRU chiplet. Dropping it ends its thread.
pub struct Chiplet {
    core: Arc<Core>,
    /// The executor, once a context has been started, and whether there may be one.
    executor: Mutex<Executor>,
}

enum Executor {
    None,
    Running(JoinHandle<()>),
    Ended,
}

impl Chiplet {
    /// A chiplet on `bus`, in the state after a reset.
    pub fn new(bus: Bus, config: ChipletConfig) -> Arc<Self> {
        Arc::new(Self {
            core: Arc::new(Core::new(bus, config)),
            executor: Mutex::new(Executor::None),
        })
    }

    /// How it was built.
    pub fn config(&self) -> &ChipletConfig {
        &self.core.config
    }

    /// The entries of the TLB, the oldest first. Takes the chiplet's lock; allocates.
    pub fn tlb_entries(&self) -> Vec<TlbEntry> {
        self.core.settled().tlb.entries().copied().collect()
    }

    /// Whether the TLB has an entry of `asid`, of any page size, that overlaps `range`. Takes the chiplet's lock.
    pub fn tlb_holds(&self, asid: u32, range: Range) -> bool {
        let control = self.core.settled();
        let mut entries = control.tlb.entries();
        entries.any(|entry| entry.key.asid == asid && entry.key.range().overlaps(range))
    }

    /// What has been counted so far.
    pub fn counts(&self) -> Counts {
        self.core.counters.read()
    }

    /// Resets the chiplet, as writing 1 to the reset register does. It is done when that register reads 0: contexts are
    /// INACTIVE, the TLB is empty, all handles are IDLE. Neither waits nor fails.
    pub fn reset(&self) {
        self.core.reset(&mut self.core.lock());
    }

    /// Ends the chiplet's thread, after the access in flight, and waits for that. Registers can be read and written
    /// afterwards; instructions are not carried out any more.
    pub fn shutdown(&self) {
        let executor = std::mem::replace(&mut *self.executor(), Executor::Ended);
        self.core.doorbell.stop();
        if let Executor::Running(thread) = executor {
            // A panic of the executor has been printed by it; there is nobody here to hand it to.
            drop(thread.join());
        }
    }

    fn executor(&self) -> MutexGuard<'_, Executor> {
        // Changed by one assignment.
        self.executor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the executor if there is none yet.
    fn ensure_executor(&self) -> Result<(), DeviceError> {
        let mut executor = self.executor();
        if let Executor::None = *executor {
            let core = Arc::clone(&self.core);
            let thread = thread::Builder::new()
                .name(format!("gru-{}", self.core.config.device))
                .spawn(move || exec::run(&core))
                .map_err(|_| DeviceError::Gone {
                    reason: "the model could not create the chiplet's thread",
                })?;
            *executor = Executor::Running(thread);
        }
        Ok(())
    }
}

impl Drop for Chiplet {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Registers for Chiplet {
    fn len(&self) -> u64 {
        WINDOW_BYTES
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        let core = &*self.core;
        Ok(
            match Register::at(offset).ok_or_else(|| no_register(offset))? {
                Register::ControlBlock {
                    context,
                    number,
                    word,
                } => core.segment.read_cb(context, number, word),
                Register::Data { context, offset } => core.segment.read_dsr(context, offset),
                Register::FaultMap { index, word } => core.settled().fault_maps[index].read(word),
                Register::Purge { index, word } => core.read_tgh(&core.settled(), index, word),
                Register::Extended { slot, word } => {
                    core.read_extended(&core.settled(), slot, word)
                }
                Register::Fault { slot, word } => core.read_fault(&core.settled(), slot, word),
                Register::Context { index, word } => {
                    core.read_context(&core.settled(), index, word)
                }
                Register::Reset => core.settled().reset_asked.into(),
            },
        )
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        let core = &*self.core;
        match Register::at(offset).ok_or_else(|| no_register(offset))? {
            Register::ControlBlock {
                context,
                number,
                word,
            } => {
                if let CbWrite::Started(slot) = core.segment.write_cb(context, number, word, value)
                {
                    core.doorbell.ring(slot);
                }
            }
            Register::Data { context, offset } => core.segment.write_dsr(context, offset, value),
            Register::FaultMap { index, word } => {
                core.settled().fault_maps[index].clear(word, value);
            }
            Register::Purge { index, word } => {
                core.write_tgh(&mut core.settled(), index, word, value);
            }
            Register::Extended { slot, word } => {
                let _control = core.settled();
                core.segment.set_extended(slot, word, value);
            }
            Register::Fault { slot, word } => {
                core.write_fault(&mut core.settled(), slot, word, value);
            }
            Register::Context { index, word } => {
                if core.write_context(&mut core.settled(), index, word, value) {
                    self.ensure_executor()?;
                }
            }
            Register::Reset => {
                if value & 1 == 1 {
                    core.reset(&mut core.settled());
                }
            }
        }
        Ok(())
    }
}

impl Interrupts for Chiplet {
    fn vectors(&self) -> u32 {
        TFMS as u32
    }

    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError> {
        self.core
            .vectors
            .wait(vector, timeout)
            .ok_or(DeviceError::NoVector {
                vector,
                vectors: TFMS as u32,
            })
    }
}

fn no_register(offset: u64) -> DeviceError {
    DeviceError::NoRegister { offset, width: 8 }
}

/// Several chiplets on one bus.
#[derive(Clone)]
pub struct Model {
    bus: Bus,
    chiplets: Vec<Arc<Chiplet>>,
}

impl Model {
    /// `count` chiplets, all built as `config` says, with consecutive device numbers and seeds.
    pub fn new(bus: &Bus, count: u32, config: ChipletConfig) -> Self {
        let chiplets = (0..count)
            .map(|i| {
                let mut config = config;
                config.device += i;
                config.faults.seed = config.faults.seed.wrapping_add(i.into());
                Chiplet::new(bus.clone(), config)
            })
            .collect();
        Self {
            bus: bus.clone(),
            chiplets,
        }
    }

    /// The bus.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// The chiplet whose window is at `offset`.
    fn at(&self, offset: u64) -> Result<&Chiplet, DeviceError> {
        let chiplet = self.chiplets.get((offset / WINDOW_BYTES) as usize);
        chiplet.map(Arc::as_ref).ok_or(no_register(offset))
    }

    /// The chiplets, by device number.
    pub fn chiplets(&self) -> &[Arc<Chiplet>] {
        &self.chiplets
    }
}

/// All chiplets in one window, as the machine has them: chiplet `c` of blade `b` is 128 MiB x (2 b + c) from its start.
impl Registers for Model {
    fn len(&self) -> u64 {
        WINDOW_BYTES * self.chiplets.len() as u64
    }

    fn read(&self, offset: u64) -> Result<u64, DeviceError> {
        self.at(offset)?.read(offset % WINDOW_BYTES)
    }

    fn write(&self, offset: u64, value: u64) -> Result<(), DeviceError> {
        self.at(offset)?.write(offset % WINDOW_BYTES, value)
    }
}
