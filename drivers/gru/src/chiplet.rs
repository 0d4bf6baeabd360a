//! One chiplet: its registers, its purges, who has which context; and its TLB as the framework sees it.
//!
//! The shootdown path ([`ChipletTlb`]) reads the words of [`Words`] and uses [`Purges`]: no lock, no allocation. Everything
//! else (loading, unloading, ASIDs) is under the chiplet's lock, which is held while handles are waited for, each for the
//! handle deadline at most.
//!
//! Lock order: map lock → a context's teardown → chiplet lock. The driver lock (`NotifierLock`) is taken with none of the
//! last two held.
//!
//! # Reset
//! It ends every context. The *epoch* is odd while a reset is in progress and another one afterwards; a context remembers the
//! epoch that it was loaded in, and is lost in any other. One reset serves all who ask for one before it is over. A chiplet that
//! does not come back is *dead*: the epoch stays odd, so that nothing is loaded, and nothing counts as acknowledged, until a
//! later reset succeeds.

use shootdown::{
    Completion, DeviceTlb, FlushCommand, Issue, Limits, PageSizes, Registers, ResetError, Scope,
    Ticket,
};
use shootdown_primitive::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError};
use shootdown_primitive::time::{Duration, Instant};

use crate::asid::{Asids, Words};
use crate::config::{Config, Plant};
use crate::context::{Context, Loaded};
use crate::error::GruError;
use crate::handle::{Backoff, Timing};
use crate::layout::{CONTEXTS, RESET, cch, configuration, page_code, slots, tgh};
use crate::load;
use crate::purge::{Purge, Purges, Unended};
use crate::stats::{Counters, Latencies};
use crate::status::Condition;

/// A context that is taken.
pub(crate) struct Slot {
    pub(crate) context: Arc<Context>,
    pub(crate) loaded: Loaded,
    /// The hardware did not give it back.
    pub(crate) leaked: bool,
}

/// What the chiplet's lock protects.
pub(crate) struct State {
    pub(crate) asids: Asids,
    pub(crate) slots: [Option<Slot>; CONTEXTS],
}

pub(crate) struct Chiplet {
    pub(crate) name: String,
    pub(crate) blade: u32,
    pub(crate) registers: Arc<dyn Registers>,
    pub(crate) words: Words,
    pub(crate) config: Config,
    pub(crate) counters: Arc<Counters>,
    pub(crate) fault_latency: Latencies,
    /// Segments that it serves, loaded or not.
    segments: AtomicUsize,
    /// Whether a thread serves the fault map; if not, misses wait for their users.
    pub(crate) served: AtomicBool,
    purges: Purges,
    epoch: AtomicU64,
    /// Held during a reset.
    resetting: Mutex<()>,
    /// Resets that are over, well or not.
    resets_over: AtomicU64,
    /// The last one failed.
    dead: AtomicBool,
    state: Mutex<State>,
}

impl std::fmt::Debug for Chiplet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chiplet")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Chiplet {
    pub(crate) fn new(
        (name, blade): (String, u32),
        registers: Arc<dyn Registers>,
        config: &Config,
        tags: usize,
        counters: Arc<Counters>,
    ) -> Self {
        let reuse = config.plants.contains(Plant::ASID_REUSED);
        Self {
            name,
            blade,
            registers,
            segments: AtomicUsize::new(0),
            words: Words::new(tags),
            config: config.clone(),
            counters,
            fault_latency: Latencies::default(),
            served: AtomicBool::new(false),
            purges: Purges::default(),
            epoch: AtomicU64::new(0),
            resetting: Mutex::new(()),
            resets_over: AtomicU64::new(0),
            dead: AtomicBool::new(false),
            state: Mutex::new(State {
                asids: Asids::new(config.asids.clone(), config.first_asid, reuse),
                slots: std::array::from_fn(|_| None),
            }),
        }
    }

    /// The chiplet's lock.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // Slots are changed by single assignments.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn planted(&self, plant: Plant) -> bool {
        self.config.plants.contains(plant)
    }

    /// The epoch; odd during a reset.
    pub(crate) fn epoch(&self) -> u64 {
        // Acquire, with the increments in `reset`: who sees the new epoch talks to the chiplet after the reset.
        self.epoch.load(Ordering::Acquire)
    }

    /// How it is.
    pub(crate) fn condition(&self) -> Condition {
        match self.epoch().is_multiple_of(2) {
            true => Condition::Well,
            false if self.is_dead() => Condition::Dead,
            false => Condition::Resetting,
        }
    }

    /// Segments that it serves, loaded or not.
    pub(crate) fn segments(&self) -> usize {
        // Relaxed: a hint, and a statistic.
        self.segments.load(Ordering::Relaxed)
    }

    /// Whether contexts can be loaded, or will be after a reset that is in progress.
    pub(crate) fn is_well(&self) -> bool {
        !self.is_dead()
    }

    /// A segment comes.
    pub(crate) fn enlist(&self) {
        // Relaxed: as in `segments`.
        self.segments.fetch_add(1, Ordering::Relaxed);
    }

    /// A segment goes.
    pub(crate) fn dismiss(&self) {
        // Relaxed: as in `segments`.
        self.segments.fetch_sub(1, Ordering::Relaxed);
    }

    /// Contexts that are taken.
    pub(crate) fn taken(&self) -> usize {
        let mut state = self.lock();
        load::reclaim(self, &mut state);
        state.slots.iter().flatten().count()
    }

    /// The context that control-block slot `slot` belongs to, and where it is loaded.
    pub(crate) fn owner(&self, slot: usize) -> Option<(Arc<Context>, Loaded)> {
        let state = self.lock();
        let mut taken = state.slots.iter().flatten();
        let owner = taken.find(|one| slots(one.loaded.cb_map).any(|own| own == slot))?;
        Some((Arc::clone(&owner.context), owner.loaded))
    }

    /// What purges have cost.
    pub(crate) fn purge_timing(&self) -> &Timing {
        &self.purges.timing
    }

    /// What became of purges that did not end by themselves.
    pub(crate) fn unended(&self) -> Unended {
        self.purges.unended(&*self.registers)
    }

    /// Empties the TLB and waits for that. A purge that is not acknowledged in half of the time is asked for once more.
    ///
    /// # Errors
    /// It is not acknowledged within the handle deadline.
    pub(crate) fn flush_all(&self) -> Result<(), GruError> {
        let registers = &*self.registers;
        let deadline = self.config.handle_deadline;
        for _ in 0..2 {
            let (begun, mut backoff) = (Instant::now(), Backoff::default());
            let mut ticket = None;
            while begun.elapsed() < deadline / 2 {
                if ticket.is_none() && self.purges.issue(registers, &Purge::whole())? {
                    ticket = Some(self.purges.ticket());
                }
                let done = |ticket| self.purges.poll(registers, ticket) == Completion::Done;
                if ticket.is_some_and(done) {
                    return Ok(());
                }
                backoff.wait();
            }
        }
        Err(GruError::HandleTimeout {
            what: "the flush of a whole TLB",
            deadline,
        })
    }

    /// What `command` is for this chiplet; `None` if it can hold nothing of it.
    fn purge_of(&self, command: FlushCommand) -> Option<Purge> {
        let (address, code, pages) = match command.scope {
            Scope::Device => return Some(Purge::whole()),
            _ if self.planted(Plant::NO_FLUSH_ON_UNMAP) => return None,
            Scope::Tag => (0, 0, tgh::PAGES),
            Scope::Pages { range, page_size } => (
                range.start().get(),
                page_code(page_size),
                range.pages(page_size).clamp(1, tgh::PAGES),
            ),
        };
        let had = self.words.load(command.tag).asid()?;
        let word = self.words.retire(command.tag);
        let Some(asid) = word.asid() else {
            tracing::trace!(chiplet = %self.name, asid = had, "ASID retired");
            self.counters.asids_retired.hit();
            return None;
        };
        Some(Purge {
            address,
            what: tgh::what(Some(asid), code, pages),
            contexts: tgh::contexts(word.contexts()),
            whole: false,
        })
    }

    /// As [`DeviceTlb::reset`]. Legal with the chiplet's lock held.
    pub(crate) fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        let timeout = ResetError::Timeout { deadline };
        // Acquire, with the release below.
        let seen = self.resets_over.load(Ordering::Acquire);
        let _one = self
            .resetting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.resets_over.load(Ordering::Acquire) == seen {
            let ticket = self.purges.ticket();
            // AcqRel: contexts are lost from here on.
            self.epoch.fetch_or(1, Ordering::AcqRel);
            let dead = self.try_reset(deadline).is_none();
            let counters = &self.counters;
            if dead {
                counters.resets_failed.hit();
            } else {
                self.purges.reset(&*self.registers, ticket);
                counters.resets.hit();
                // AcqRel: contexts can be loaded again.
                self.epoch.fetch_add(1, Ordering::AcqRel);
            }
            // Release, both: who sees that it is over sees what came of it.
            self.dead.store(dead, Ordering::Release);
            self.resets_over.fetch_add(1, Ordering::Release);
        }
        if self.is_dead() { Err(timeout) } else { Ok(()) }
    }

    /// Whether the last reset has failed.
    fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// `None` if the chiplet does not come back in time, or is gone.
    fn try_reset(&self, deadline: Duration) -> Option<()> {
        self.registers.write(RESET, 1).ok()?;
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        while self.registers.read(RESET).ok()? & 1 == 1 {
            if begun.elapsed() >= deadline {
                return None;
            }
            backoff.wait();
        }
        // What has been reset runs no context: one that says otherwise goes on with what it has in its TLB.
        for index in 0..CONTEXTS {
            let dw0 = self.registers.read(configuration(index)).ok()?;
            if cch::state(dw0) != cch::INACTIVE {
                return None;
            }
        }
        Some(())
    }
}

/// The chiplet's TLB, for the framework.
pub(crate) struct ChipletTlb(pub(crate) Arc<Chiplet>);

impl DeviceTlb for ChipletTlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            // One page more makes a purge complete, which is what a full flush is.
            pages_per_command: tgh::PAGES - 1,
            commands_per_batch: 8,
            full_flush_cost: 4,
        }
    }

    /// Entries are what [`fill`](crate::fill) installs: the page that the translation names.
    fn splits_pages(&self) -> bool {
        false
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        let chiplet = &*self.0;
        let counters = &*chiplet.counters;
        let Some(purge) = chiplet.purge_of(command) else {
            counters.purges_spared.hit();
            return Issue::NothingCached;
        };
        match chiplet.purges.issue(&*chiplet.registers, &purge) {
            Ok(true) => {
                let counter = match command.scope {
                    Scope::Pages { .. } => &counters.purges_pages,
                    Scope::Tag => &counters.purges_asid,
                    Scope::Device => &counters.purges_whole,
                };
                counter.hit();
                Issue::Queued
            }
            // A chiplet that is gone has no room either: the engine's deadlines lead to the reset, which says so.
            Ok(false) | Err(_) => {
                counters.purges_busy.hit();
                Issue::Busy
            }
        }
    }

    fn dispatch(&self) -> Ticket {
        Ticket(self.0.purges.ticket())
    }

    fn poll(&self, ticket: Ticket) -> Completion {
        let chiplet = &*self.0;
        if chiplet.planted(Plant::FLUSH_NOT_WAITED) {
            return Completion::Done;
        }
        if chiplet.is_dead() || chiplet.purges.is_exhausted() {
            return Completion::Failed;
        }
        chiplet.purges.poll(&*chiplet.registers, ticket.0)
    }

    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        self.0.reset(deadline)
    }
}
