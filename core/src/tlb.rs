//! Device TLBs: what a driver declares about one, and the handle that the framework keeps of it.
//!
//! A flush goes *issue* (queue a command), *dispatch* (ring the doorbell once for all that is queued), *poll* (has the
//! device acknowledged?). The engine issues to all devices, dispatches all, then polls all of them together, so that
//! the latencies of many devices overlap. What commands a range needs is worked out in [`plan`](crate::plan).

use std::fmt;
use std::time::Duration;

use thiserror::Error;

use crate::addr::{PageSize, PageSizes, Range};
use crate::plan::Abilities;
use crate::primitive::atomic::{AtomicU64, Ordering};
use crate::primitive::{Arc, Contained};
use crate::watch::Name;

/// What a flush command covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// The entries of one page size in a range, of the command's tag. The range is whole pages of that size.
    Pages {
        /// What to flush.
        range: Range,
        /// The size of the entries.
        page_size: PageSize,
    },
    /// Every entry of the command's tag.
    Tag,
    /// Every entry of the device.
    Device,
}

/// One flush command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FlushCommand {
    /// What the driver gave with the device when it registered: an ASID, a PASID, an index. Not looked at by the framework.
    pub tag: u64,
    /// What to flush.
    pub scope: Scope,
}

/// The answer of [`DeviceTlb::issue`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Issue {
    /// Queued; it takes effect after the next dispatch.
    Queued,
    /// The device holds nothing that the command covers and can install nothing of it (no context of the tag is
    /// loaded, say), so that nothing was queued.
    NothingCached,
    /// No room: dispatch, poll, and issue again.
    Busy,
}

/// Everything that was issued to one device before a dispatch. Not looked at by the framework.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ticket(pub u64);

/// What a device says of a ticket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Completion {
    /// Acknowledged: the entries are gone, and accesses through them have drained.
    Done,
    /// Not yet.
    Pending,
    /// The device reports that it could not do it.
    Failed,
}

/// Why a device could not be reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum ResetError {
    /// This device has no reset.
    #[error("the device has no reset")]
    Unsupported,
    /// The driver panicked.
    #[error("the driver panicked in the reset of the device")]
    Panicked,
    /// It did not come back.
    #[error("the device did not come back from reset within {deadline:?}")]
    Timeout {
        /// How long was waited.
        deadline: Duration,
    },
}

/// What a device TLB can do, declared once.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The sizes of its entries; never empty.
    pub entry_sizes: PageSizes,
    /// Pages (of one size) that one command covers at most; at least 1.
    pub pages_per_command: u64,
    /// Commands between two dispatches at most; at least 1. More become a full flush.
    pub commands_per_batch: usize,
    /// What [`Scope::Tag`] costs, counted in commands of one range: dearer range flushes become full ones.
    pub full_flush_cost: u64,
}

/// A device TLB, as a driver offers it.
///
/// All methods are called from the shootdown path, by several threads at once: they may not allocate, take no lock
/// that is held while memory is allocated or the map lock is taken, and wait for nothing but their own registers. Only
/// [`DeviceTlb::reset`] may wait, up to its deadline. One that panics has its device quarantined.
/// A panic where it is dropped goes no further.
pub trait DeviceTlb: Send + Sync + 'static {
    /// What it can do; read once.
    fn limits(&self) -> Limits;

    /// Whether it has entries smaller than the page that a translation names. Of one that has none, a page that is mapped as a
    /// large one is flushed by its own size alone. Read once.
    fn splits_pages(&self) -> bool {
        true
    }

    /// Queues one command.
    fn issue(&self, command: FlushCommand) -> Issue;

    /// Rings the doorbell for all that is queued, by any thread. Also rung, again and again, while `issue` says
    /// [`Issue::Busy`]: with nothing queued it must cost the device nothing.
    fn dispatch(&self) -> Ticket;

    /// Whether everything of `ticket` is acknowledged. Takes no lock that a stuck device can hold up. Asked again until it is, but for
    /// a while not where another device of the operation is waited for: the device has to get on with it by itself.
    fn poll(&self, ticket: Ticket) -> Completion;

    /// The last resort: stops the device and empties its TLB. Success means that no access through an old entry can
    /// happen any more. Contexts are lost.
    ///
    /// # Errors
    /// There is none, or the device did not come back within `deadline`.
    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        let _ = deadline;
        Err(ResetError::Unsupported)
    }
}

/// Commands of one device in one operation before they become a full flush of the tag.
pub(crate) const BATCH: usize = 8;

/// A device's standing with the framework.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Health {
    /// It acknowledges.
    Healthy,
    /// It did not acknowledge, could not be reset, or its handler panicked: it is not waited for again, and memory that
    /// it may still reach is quarantined.
    Quarantined,
}

/// Counters of one device. Each is counted where the thing happens.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct DeviceStats {
    /// Commands of a page range.
    pub flush_ops: u64,
    /// Commands of a whole tag or device.
    pub full_flushes: u64,
    /// Doorbells.
    pub dispatches: u64,
    /// Deadlines of a flush that were missed, each followed by a wider flush. Those that neither recovered were left to
    /// quarantine.
    pub timeouts: u64,
    /// Of those, recovered by the wider flush.
    pub recovered_by_flush: u64,
    /// Of those, recovered by a reset.
    pub recovered_by_reset: u64,
    /// Resets that succeeded, whatever they were for.
    pub resets: u64,
    /// Times that the device went into quarantine.
    pub quarantined: u64,
}

/// Where the recoveries begin in the word of a device's health.
const RECOVERIES: u32 = 32;

fn is_sick(health: u64) -> bool {
    health as u32 != 0
}

struct Inner {
    name: String,
    watched_as: Name,
    tlb: Contained<Box<dyn DeviceTlb>>,
    limits: Limits,
    abilities: Abilities,
    /// The upper half counts the recoveries. The lower one is 0 while it is healthy; each quarantine makes another number, so that a
    /// recovery does not undo one that came meanwhile.
    health: AtomicU64,
    flush_ops: AtomicU64,
    full_flushes: AtomicU64,
    dispatches: AtomicU64,
    timeouts: AtomicU64,
    recovered_by_flush: AtomicU64,
    recovered_by_reset: AtomicU64,
    resets: AtomicU64,
    quarantined: AtomicU64,
}

/// A device with a TLB, shared by every address space and registration that uses it. Cloning shares it.
#[derive(Clone)]
pub struct Device {
    inner: Arc<Inner>,
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.inner.name)
            .field("health", &self.health())
            .finish_non_exhaustive()
    }
}

impl Device {
    /// A device called `name` in reports, with its TLB.
    ///
    /// # Panics
    /// If the declared limits name no entry size: such a TLB could not be flushed.
    pub fn new(name: impl Into<String>, tlb: impl DeviceTlb) -> Self {
        let mut limits = tlb.limits();
        // More could not be expressed in bytes.
        limits.pages_per_command = limits.pages_per_command.clamp(1, 1 << 42);
        assert!(
            !limits.entry_sizes.is_empty(),
            "a device TLB declares at least one entry size"
        );
        let name = name.into();
        Self {
            inner: Arc::new(Inner {
                watched_as: Name::new(&name),
                name,
                limits,
                abilities: Abilities::new(&limits, tlb.splits_pages()),
                tlb: Contained::new(Box::new(tlb)),
                health: AtomicU64::new(0),
                flush_ops: AtomicU64::new(0),
                full_flushes: AtomicU64::new(0),
                dispatches: AtomicU64::new(0),
                timeouts: AtomicU64::new(0),
                recovered_by_flush: AtomicU64::new(0),
                recovered_by_reset: AtomicU64::new(0),
                resets: AtomicU64::new(0),
                quarantined: AtomicU64::new(0),
            }),
        }
    }

    /// The name in reports.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// What the watchdog calls it.
    pub(crate) fn watched_as(&self) -> Name {
        self.inner.watched_as
    }

    /// What its TLB declared.
    pub fn limits(&self) -> &Limits {
        &self.inner.limits
    }

    /// What its flushes are planned by.
    #[inline]
    pub(crate) fn abilities(&self) -> &Abilities {
        &self.inner.abilities
    }

    /// Whether it is in quarantine.
    #[inline]
    pub fn health(&self) -> Health {
        self.sickness()
            .map_or(Health::Healthy, |_| Health::Quarantined)
    }

    /// In quarantine: how often it was brought back before. What it held then it holds as long as this is the same.
    pub(crate) fn sickness(&self) -> Option<u64> {
        // Acquire, with the AcqRel in `recover`: who sees it healthy again also sees its TLB empty.
        let health = self.inner.health.load(Ordering::Acquire);
        is_sick(health).then_some(health >> RECOVERIES)
    }

    /// What happened so far.
    pub fn stats(&self) -> DeviceStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceStats {
            flush_ops: get(&self.inner.flush_ops),
            full_flushes: get(&self.inner.full_flushes),
            dispatches: get(&self.inner.dispatches),
            timeouts: get(&self.inner.timeouts),
            recovered_by_flush: get(&self.inner.recovered_by_flush),
            recovered_by_reset: get(&self.inner.recovered_by_reset),
            resets: get(&self.inner.resets),
            quarantined: get(&self.inner.quarantined),
        }
    }

    /// Tries to bring a quarantined device back: by a full flush that it acknowledges, or by a reset. Waits up to twice
    /// `deadline`. Memory quarantined for it is given back by the next
    /// [`AddressSpace::drain`](crate::AddressSpace::drain). Not to be called inside a callback.
    ///
    /// # Errors
    /// What the reset said; the device stays in quarantine.
    pub fn recover(&self, deadline: Duration) -> Result<(), ResetError> {
        let health = self.inner.health.load(Ordering::Acquire);
        if !is_sick(health) {
            return Ok(());
        }
        if !self.full_flush(deadline) {
            self.reset(deadline)?;
        }
        // AcqRel, with the load in `health`. A failure means that it went into quarantine again, or that another thread was first.
        let _ = self.inner.health.compare_exchange(
            health,
            (health >> RECOVERIES).wrapping_add(1) << RECOVERIES,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        match self.health() {
            Health::Healthy => Ok(()),
            Health::Quarantined => Err(ResetError::Timeout { deadline }),
        }
    }

    fn full_flush(&self, deadline: Duration) -> bool {
        let begun = crate::primitive::now();
        let mut backoff = crate::primitive::Backoff::new();
        let expired = || begun.elapsed() >= deadline;
        while self.issue(FlushCommand {
            tag: 0,
            scope: Scope::Device,
        }) == Issue::Busy
        {
            if expired() {
                return false;
            }
            self.dispatch();
            backoff.wait();
        }
        let Some(ticket) = self.dispatch() else {
            return false;
        };
        loop {
            match self.poll(ticket) {
                Completion::Done => return true,
                Completion::Failed => return false,
                Completion::Pending if expired() => return false,
                Completion::Pending => backoff.wait(),
            }
        }
    }

    pub(crate) fn issue(&self, command: FlushCommand) -> Issue {
        let issue = self.call(|tlb| tlb.issue(command)).unwrap_or(Issue::Busy);
        if issue == Issue::Queued {
            let counter = match command.scope {
                Scope::Pages { .. } => &self.inner.flush_ops,
                Scope::Tag | Scope::Device => &self.inner.full_flushes,
            };
            counter.fetch_add(1, Ordering::Relaxed);
        }
        issue
    }

    /// `None` if it panicked: then nothing tells what became of the commands.
    pub(crate) fn dispatch(&self) -> Option<Ticket> {
        self.inner.dispatches.fetch_add(1, Ordering::Relaxed);
        self.call(DeviceTlb::dispatch)
    }

    pub(crate) fn poll(&self, ticket: Ticket) -> Completion {
        self.call(|tlb| tlb.poll(ticket))
            .unwrap_or(Completion::Failed)
    }

    /// Calls the driver; `None` if it panicked, in which case the device is in quarantine.
    fn call<R>(&self, method: impl FnOnce(&dyn DeviceTlb) -> R) -> Option<R> {
        let result = crate::primitive::contain(|| method(&**self.inner.tlb));
        if result.is_none() {
            self.quarantine();
        }
        result
    }

    pub(crate) fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        self.call(|tlb| tlb.reset(deadline))
            .unwrap_or(Err(ResetError::Panicked))?;
        self.inner.resets.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    pub(crate) fn note_timeout(&self) {
        self.inner.timeouts.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_recovered_by_flush(&self) {
        self.inner
            .recovered_by_flush
            .fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn note_recovered_by_reset(&self) {
        self.inner
            .recovered_by_reset
            .fetch_add(1, Ordering::Relaxed);
    }

    /// Puts the device into quarantine, as the framework does with one that misses its last deadline: for a driver that has reset it
    /// for a reason of its own, and failed. Whether it was healthy before. Neither waits nor allocates; any lock may be held.
    pub fn quarantine(&self) -> bool {
        // AcqRel: the winner counts; Release orders what led here before what others conclude from it.
        let next = |health: u64| {
            let number = (health as u32).wrapping_add(1).max(1);
            Some(health >> RECOVERIES << RECOVERIES | u64::from(number))
        };
        let health = &self.inner.health;
        let before = health.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
        let fresh = before.is_ok_and(|before| !is_sick(before));
        if fresh {
            self.inner.quarantined.fetch_add(1, Ordering::Relaxed);
        }
        fresh
    }

    pub(crate) fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// Tells it from other devices, as long as it is there.
    pub(crate) fn key(&self) -> usize {
        std::ptr::from_ref::<Inner>(&self.inner) as usize
    }
}
