//! The memory of the space: the model's, with the kit looking on where it matters. A page table walk is where a fault has read what
//! may be stale a moment later; a change is where nothing may reach the pages any more.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use shootdown::{Addr, Memory, MemoryError, PageSize, PageSizes, Range, Rights, Translation};
use shootdown_hw_model::ModelMemory;

use crate::alloc::outside;
use crate::author::{Asked, Fault, Hardware, Reach};
use crate::log::Log;
use crate::rule::Rule;

/// Called with an address or a range.
pub(crate) type On<T> = Arc<dyn Fn(T) + Send + Sync>;

pub(crate) struct Watching<H> {
    inner: Arc<ModelMemory>,
    hardware: OnceLock<Arc<H>>,
    log: Arc<Log>,
    fault: Option<Fault>,
    /// What is broken where something is reached, whatever it is: in an exit.
    instead: Mutex<Option<Rule>>,
    on_translate: Mutex<Option<On<Addr>>>,
    on_change: Mutex<Option<On<Range>>>,
}

fn get<T: Clone>(cell: &Mutex<Option<T>>) -> Option<T> {
    cell.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn set<T>(cell: &Mutex<Option<T>>, to: Option<T>) {
    *cell.lock().unwrap_or_else(PoisonError::into_inner) = to;
}

impl<H: Hardware> Watching<H> {
    pub(crate) fn new(inner: Arc<ModelMemory>, log: Arc<Log>, fault: Option<Fault>) -> Self {
        Self {
            inner,
            hardware: OnceLock::new(),
            log,
            fault,
            instead: Mutex::new(None),
            on_translate: Mutex::new(None),
            on_change: Mutex::new(None),
        }
    }

    pub(crate) fn look_at(&self, hardware: &Arc<H>) {
        // Once, by the lab that made both.
        let _ = self.hardware.set(Arc::clone(hardware));
    }

    /// From here on changes are those of an exit.
    pub(crate) fn exits(&self, rule: Rule) {
        set(&self.instead, Some(rule));
    }

    pub(crate) fn on_translate(&self, call: Option<On<Addr>>) {
        set(&self.on_translate, call);
    }

    pub(crate) fn on_change(&self, call: Option<On<Range>>) {
        set(&self.on_change, call);
    }

    /// Whether the device could still reach part of it.
    pub(crate) fn reach(&self, part: Range) -> Option<Reach> {
        self.hardware.get()?.reach(self.inner.id(), part)
    }

    /// The pages of `part` are about to change: nothing reaches them.
    fn changes(&self, what: &str, part: Range) {
        outside(|| {
            if let Some(reach) = self.reach(part) {
                let (rule, how) = judge(reach);
                let rule = match (get(&self.instead), self.fault) {
                    (Some(instead), _) => instead,
                    (None, Some(Fault::Dead | Fault::Endless)) => Rule::Escalate,
                    _ => rule,
                };
                self.log.find(rule, || {
                    format!("when the pages of {part} were to change ({what}), {how}")
                });
            }
            if let Some(call) = get(&self.on_change) {
                call(part);
            }
        });
    }
}

/// What a device that could still reach a page says about its driver.
pub(crate) fn judge(reach: Reach) -> (Rule, String) {
    match reach {
        Reach::Entry { page, asked } => {
            let (rule, how) = match asked {
                Asked::Unknown => (Rule::Flush, "it was not flushed"),
                Asked::Nothing => (Rule::Flush, "the device had been asked to flush nothing"),
                Asked::Elsewhere => (
                    Rule::Narrow,
                    "the device had been asked to flush something else only",
                ),
                Asked::Pending => (
                    Rule::Acknowledge,
                    "the device had been asked to flush it and was not done",
                ),
            };
            (
                rule,
                format!("the device still had an entry for {page}: {how}"),
            )
        }
        Reach::Work { page } => (
            Rule::Drain,
            format!(
                "work in flight was still at {page}, with a translation that it had read before"
            ),
        ),
    }
}

impl<H: Hardware> Memory for Watching<H> {
    fn id(&self) -> u64 {
        self.inner.id()
    }

    fn arena(&self) -> Range {
        self.inner.arena()
    }

    fn page_sizes(&self) -> PageSizes {
        self.inner.page_sizes()
    }

    fn map(&self, range: Range, page: PageSize, rights: Rights) -> Result<(), MemoryError> {
        self.inner.map(range, page, rights)
    }

    fn unmap(&self, range: Range) -> Result<(), MemoryError> {
        self.changes("unmap", range);
        outside(|| self.inner.unmap(range))
    }

    fn discard(&self, range: Range) -> Result<(), MemoryError> {
        self.changes("discard", range);
        outside(|| self.inner.discard(range))
    }

    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        self.changes("protect", range);
        outside(|| self.inner.protect(range, rights))
    }

    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        self.changes("remap", from);
        outside(|| self.inner.remap(from, to))
    }

    fn translate(&self, addr: Addr) -> Option<Translation> {
        let found = self.inner.translate(addr);
        if let Some(call) = get(&self.on_translate) {
            call(addr);
        }
        found
    }
}
