//! The device, as all parts of the driver share it.

use shootdown_primitive::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use shootdown_primitive::time::Duration;

use shootdown::{Device, DeviceError, Registers};

use crate::Config;
use crate::flush::{Flushes, Tlb};
use crate::layout::{QUEUES, pasid_entry};
use crate::queue::Work;
use crate::stats::Counters;

/// PASIDs: those of spaces that are over come back only after a flush, as the TLB may hold entries of them (R15).
pub(crate) struct Pasids {
    free: Vec<u64>,
    retired: Vec<u64>,
}

pub(crate) struct Core {
    pub(crate) registers: Arc<dyn Registers>,
    pub(crate) config: Config,
    flushes: Mutex<Flushes>,
    /// Held during a reset.
    pub(crate) reset: Mutex<()>,
    /// Odd during a reset, and after one that failed; another number after each.
    epoch: AtomicU64,
    /// A register could not be accessed in the shootdown path.
    dead: AtomicBool,
    pub(crate) pasids: Mutex<Pasids>,
    pub(crate) pasid_limit: u64,
    /// Tables of local memory that nobody has; they are zeroed.
    tables: Mutex<Vec<u64>>,
    pub(crate) table_limit: u64,
    /// Who has which queue.
    pub(crate) works: Mutex<[Option<Weak<Work>>; QUEUES]>,
    pub(crate) counters: Counters,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they protect is whole at any time.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    pub(crate) fn new(
        registers: Arc<dyn Registers>,
        config: Config,
        pasids: u64,
        tables: u64,
    ) -> Self {
        Self {
            registers,
            config,
            flushes: Mutex::default(),
            reset: Mutex::default(),
            epoch: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            pasids: Mutex::new(Pasids {
                free: (1..pasids).rev().collect(),
                // Nothing is allocated when one is retired, which a callback may do.
                retired: Vec::with_capacity(pasids as usize),
            }),
            pasid_limit: pasids.saturating_sub(1),
            tables: Mutex::new((0..tables).rev().collect()),
            table_limit: tables,
            works: Mutex::new([const { None }; QUEUES]),
            counters: Counters::default(),
        }
    }

    pub(crate) fn flushes(&self) -> MutexGuard<'_, Flushes> {
        lock(&self.flushes)
    }

    pub(crate) fn epoch(&self) -> u64 {
        // Acquire, with `end_reset`: who sees the epoch sees the device as the reset left it.
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn begin_reset(&self) {
        // AcqRel: queues are lost from here on.
        self.epoch.fetch_or(1, Ordering::AcqRel);
    }

    pub(crate) fn end_reset(&self) {
        // Release: it answers again, as long as it is not found dead anew.
        self.dead.store(false, Ordering::Release);
        self.epoch.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn is_dead(&self) -> bool {
        // Acquire, with `note`.
        self.dead.load(Ordering::Acquire)
    }

    /// A register access of the shootdown path: whoever polls is told if it failed.
    pub(crate) fn note(&self, result: Result<(), DeviceError>) {
        if result.is_err() {
            // Release, with `is_dead`.
            self.dead.store(true, Ordering::Release);
        }
    }

    /// A zeroed table.
    pub(crate) fn take_table(&self) -> Option<u64> {
        lock(&self.tables).pop()
    }

    /// Gives a table back, zeroed. Allocates nothing: there was room for all of them.
    pub(crate) fn give_table(&self, table: u64) {
        lock(&self.tables).push(table);
    }

    /// A PASID of which the device holds nothing. Not by two threads at a time.
    pub(crate) fn take_pasid(self: &Arc<Self>) -> Option<u64> {
        if let Some(pasid) = lock(&self.pasids).free.pop() {
            return Some(pasid);
        }
        let retired = lock(&self.pasids).retired.len();
        if retired == 0 {
            return None;
        }
        // First who is retired, then the flush: what is retired in between waits for the next.
        let flushed = Tlb(Arc::clone(self)).empty(None, self.config.deadline);
        if !flushed {
            return None;
        }
        self.counters.pasid_flushes.hit();
        let mut pasids = lock(&self.pasids);
        let Pasids { free, retired: all } = &mut *pasids;
        free.extend(all.drain(..retired));
        free.pop()
    }

    /// The PASID's space is over, and no queue has it.
    pub(crate) fn retire_pasid(&self, pasid: u64) {
        self.note(self.registers.write(pasid_entry(pasid), 0));
        lock(&self.pasids).retired.push(pasid);
    }

    /// The queues of a PASID that are not over.
    pub(crate) fn works_of(&self, pasid: u64) -> impl Iterator<Item = Arc<Work>> {
        (0..QUEUES).filter_map(move |number| {
            let work = lock(&self.works)[number].as_ref().and_then(Weak::upgrade);
            work.filter(|work| work.space.pasid == pasid && !work.has_ended())
        })
    }
}

/// The device and its number for registrations of this driver.
pub(crate) struct Attached {
    pub(crate) core: Arc<Core>,
    pub(crate) device: Device,
    pub(crate) key: u64,
}

/// Waits a little, then longer.
#[derive(Default)]
pub(crate) struct Backoff(u32);

impl Backoff {
    pub(crate) fn wait(&mut self) {
        self.0 += 1;
        if self.0 < 16 {
            shootdown_primitive::thread::yield_now();
        } else {
            shootdown_primitive::thread::sleep(Duration::from_micros(u64::from(self.0.min(200))));
        }
    }
}
