//! DMA windows: memory of an address space that devices reach, until the moment before its pages change.
//!
//! ```text
//!   open      register ─▶ begin ─▶ map all granules ─▶ retry?          all or nothing
//!   use       begin ─▶ lock ─▶ retry? ─▶ map what is missing ─▶ doorbell ─▶ unlock
//!   shootdown quiesce: lock, unlock, stop ─▶ drained ─▶ (device TLBs) ─▶ cut off: one unmap a container ─▶ pages ─▶ resume
//!   close     stop ─▶ drained ─▶ unmap all ─▶ unregister ─▶ IOVA is given back
//! ```
//! A window is mapped in *granules*. The IOMMU unmaps whole granules only, so an operation on a page takes its granule away; the rest
//! of it comes back with the next touch, at the same IOVA, as does the page if there is one again.
//!
//! Lock order: the window's `NotifierLock` → an endpoint's own. System calls that map are made with it held: a
//! shootdown of the window waits for them, a non-blocking one is refused meanwhile.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shootdown::{
    Addr, AddressSpace, CutOffFailed, DeviceError, DmaWindow, Drain, Notifier, NotifierLock, Op,
    Outcome, Range, Registration, Rights, Unregistered, WouldBlock,
};

use crate::bits::Bits;
use crate::history::{Entry, Operation};
use crate::iommu::Iommu;
use crate::options::{WindowError, WindowOptions};
use crate::sys;
use crate::work::{DeviceWork, InFlight};

/// Granules that are mapped with the lock held at a time: a shootdown waits for so many system calls at most.
const STEP: u64 = 256;

/// Non-blocking operations that were refused and have not ended yet, by number: they were not stopped, so they are not resumed.
/// As many as an address space has operations in progress.
#[derive(Debug)]
struct RefusedOps([AtomicU64; 64]);

impl RefusedOps {
    fn add(&self, op: &Op<'_>) {
        // Relaxed throughout: quiesce and end of one operation are called by one thread.
        let free = self.0.iter().find(|slot| {
            slot.compare_exchange(0, op.id() + 1, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        });
        debug_assert!(free.is_some(), "more operations than an address space has");
    }

    fn take(&self, op: &Op<'_>) -> bool {
        self.0.iter().any(|slot| {
            slot.compare_exchange(op.id() + 1, 0, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Open,
    Closed,
}

struct Inner {
    id: u64,
    iommu: Arc<Iommu>,
    memory: Range,
    iova: Range,
    granule: u64,
    rights: Rights,
    deadline: Duration,
    keep_from_children: bool,
    work: Arc<dyn DeviceWork>,
    lock: NotifierLock<State>,
    /// One bit a granule: mapped in every endpoint. Set under the lock; cleared by the invalidation that has the granule to itself, as
    /// nothing is mapped while one overlaps it.
    mapped: Bits,
    /// In quarantine: whoever keeps the pages may take them away without an invalidation.
    quarantined: Bits,
    refused: RefusedOps,
    /// The device's work was stopped for good.
    stopped: AtomicBool,
    /// Nothing of it is mapped any more, nor will be.
    gone: AtomicBool,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Window")
            .field("id", &self.id)
            .field("memory", &self.memory)
            .field("iova", &self.iova)
            .field("granule", &self.granule)
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// The whole granules that `part` of the memory touches, by number.
    fn numbers(&self, part: Range) -> RangeInclusive<u64> {
        let start = self.memory.start().get();
        let number = |addr: Addr| (addr.get() - start) / self.granule;
        number(part.start())..=number(part.last())
    }

    /// The granules that lie in `part` of the memory as a whole.
    fn whole_numbers(&self, part: Range) -> Option<RangeInclusive<u64>> {
        let numbers = self.numbers(part);
        let (mut first, mut last) = (*numbers.start(), *numbers.end());
        if !part.contains(self.of(self.memory, first, first)) {
            first += 1;
        }
        if !part.contains(self.of(self.memory, last, last)) {
            last = last.checked_sub(1)?;
        }
        (first <= last).then_some(first..=last)
    }

    /// Granules `first` to `last` of a range that is as long as the memory; the very last granule may be short.
    fn of(&self, whole: Range, first: u64, last: u64) -> Range {
        let start = whole.start().get() + first * self.granule;
        let end = (last + 1)
            .checked_mul(self.granule)
            .and_then(|bytes| whole.start().get().checked_add(bytes - 1))
            .map_or(whole.last(), |end| whole.last().min(end.into()));
        Range::inclusive(start, end).expect("a granule is not empty")
    }

    /// The whole granules that `part` of the memory touches, as IOVA.
    fn granules(&self, part: Range) -> Range {
        let numbers = self.numbers(part);
        self.of(self.iova, *numbers.start(), *numbers.end())
    }

    fn record(&self, part: Range, operation: Operation) {
        self.iommu.record(Entry {
            window: self.id,
            iova: self.iova,
            memory: self.memory,
            part,
            operation,
            at: Instant::now(),
        });
    }

    /// Maps what of the granules is not mapped. With the lock held, and no invalidation of them in progress.
    fn map_missing(&self, numbers: RangeInclusive<u64>) -> Result<(), DeviceError> {
        let mut missing = numbers.clone().filter(|number| !self.mapped.get(*number));
        let Some(first) = missing.next() else {
            return Ok(());
        };
        let all = self.of(self.memory, first, *numbers.end());
        if self.keep_from_children && sys::keep_from_children(all).is_err() {
            // Part of it is not mapped at all.
            return Err(DeviceError::Unbacked {
                iova: self.of(self.iova, first, *numbers.end()),
                memory: all,
            });
        }
        for number in std::iter::once(first).chain(missing) {
            let [iova, memory] =
                [self.iova, self.memory].map(|whole| self.of(whole, number, number));
            self.iommu.map(iova, memory, self.rights)?;
            self.mapped.set(number..=number, true);
        }
        self.record(self.of(self.iova, first, *numbers.end()), Operation::Mapped);
        Ok(())
    }

    /// Takes whole granules away: one unmap of each endpoint that has any of them.
    fn unmap(&self, iova: Range) -> Result<(), DeviceError> {
        match self.iommu.unmap(iova) {
            Ok(()) | Err(DeviceError::NotMapped { .. }) => {}
            Err(error) => return Err(error),
        }
        let offset = iova.start().get() - self.iova.start().get();
        let last = iova.last().get() - self.iova.start().get();
        self.mapped
            .set(offset / self.granule..=last / self.granule, false);
        Ok(())
    }

    /// Stops the work, waits for what is in flight up to the deadline, unmaps everything. The second time it only tries again
    /// what failed.
    fn shut(&self) -> Result<(), DeviceError> {
        *self.lock.lock() = State::Closed;
        // Relaxed: who comes second repeats nothing but the unmapping, which its own locks order.
        if !self.stopped.swap(true, Ordering::Relaxed)
            && self.work.stop(self.iova, true) == Ok(InFlight::Work)
        {
            let begun = Instant::now();
            // Work that does not end is cut off all the same: it faults.
            while !self.work.drained(self.iova) && begun.elapsed() < self.deadline {
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        if self.gone.load(Ordering::Relaxed) {
            return Ok(());
        }
        let unmapped = self.unmap(self.iova);
        self.record(
            self.iova,
            match unmapped {
                Ok(()) => Operation::Closed,
                Err(_) => Operation::CloseFailed,
            },
        );
        self.gone.store(unmapped.is_ok(), Ordering::Relaxed);
        unmapped
    }
}

impl Notifier for Inner {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let stop = || {
            // Whoever holds it has rung its doorbell when it lets go; whoever takes it later sees that it has to retry.
            drop(self.lock.lock_for(op)?);
            self.work.stop(self.granules(op.range()), op.may_block())
        };
        match stop() {
            Ok(InFlight::Nothing) => Ok(op.idle()),
            Ok(InFlight::Work) => Ok(op.drain()),
            Err(refused) => {
                self.refused.add(op);
                Err(refused)
            }
        }
    }

    fn drained(&self, op: &Op<'_>) -> bool {
        self.work.drained(self.granules(op.range()))
    }

    fn cut_off(&self, op: &Op<'_>) -> Result<(), CutOffFailed> {
        let iova = self.granules(op.range());
        let unmapped = self.unmap(iova);
        self.record(
            iova,
            match unmapped {
                Ok(()) => Operation::CutOff(op.cause()),
                Err(_) => Operation::CutOffFailed(op.cause()),
            },
        );
        unmapped.map_err(|_| CutOffFailed { range: op.range() })
    }

    fn end(&self, op: &Op<'_>, outcome: Outcome) {
        if self.refused.take(op) {
            return;
        }
        let iova = self.granules(op.range());
        if outcome == Outcome::Unchanged {
            self.record(iova, Operation::Unchanged(op.cause()));
        }
        if outcome == Outcome::Quarantined {
            self.quarantined.set(self.numbers(op.range()), true);
        } else if let Some(whole) = self.whole_numbers(op.range()) {
            // Pages in quarantine are not changed: these are out of it.
            self.quarantined.set(whole, false);
        }
        self.work.resume(iova);
    }

    fn release(&self) {
        match self.shut() {
            Ok(()) => self.iommu.iovas().free(self.iova),
            // The address is not handed out again: a device may reach something through it.
            Err(error) => {
                tracing::error!(window = self.id, iova = %self.iova, %error, "not unmapped");
            }
        }
    }
}

/// A range of an address space that devices reach at an IOVA. Dropping it closes it.
#[derive(Debug)]
pub struct Window {
    inner: Arc<Inner>,
    /// Always there, but while the value is dropped.
    registration: Option<Registration>,
}

impl Window {
    /// Registers `memory`, pins it and maps it: all, or nothing. May wait for invalidations, and for the kernel.
    ///
    /// # Errors
    /// [`WindowError`]; nothing is mapped then, unless it is [`DeviceError::Mismatch`] that says so.
    pub fn open(
        iommu: &Arc<Iommu>,
        space: &AddressSpace,
        memory: Range,
        work: Arc<dyn DeviceWork>,
        options: WindowOptions,
    ) -> Result<Self, WindowError> {
        let WindowOptions { granule, .. } = options;
        let page = iommu.page();
        if !granule.is_power_of_two() || granule < page {
            return Err(WindowError::Granule { granule, page });
        }
        let whole = |range: Range| {
            let end = range.last().get().wrapping_add(1);
            let whole = range.start().get().is_multiple_of(page) && end.is_multiple_of(page);
            whole
                .then_some(())
                .ok_or(WindowError::Misaligned { range, page })
        };
        whole(memory)?;
        let no_iova = |sanitize| WindowError::NoIova {
            len: u64::try_from(memory.len()).unwrap_or(u64::MAX),
            at: options.at,
            last: options.last,
            sanitize,
        };
        let len = u64::try_from(memory.len()).map_err(|_| no_iova(false))?;
        let iova = {
            let mut iovas = iommu.iovas();
            let found = match options.at {
                None => iovas.allocate(len, granule, options.last),
                Some(at) => {
                    let wanted = Range::new(at, len).map_err(|_| no_iova(false))?;
                    whole(wanted)?;
                    let reachable = wanted.last() <= options.last;
                    reachable.then(|| iovas.allocate_at(wanted)).flatten()
                }
            };
            found.ok_or_else(|| no_iova(iovas.is_sanitizing()))?
        };
        let inner = Arc::new(Inner {
            id: iommu.next_window(),
            iommu: iommu.clone(),
            memory,
            iova,
            granule,
            rights: options.rights,
            deadline: options.deadline,
            keep_from_children: options.keep_from_children,
            work,
            lock: NotifierLock::new(State::Open),
            mapped: Bits::new(len.div_ceil(granule)),
            quarantined: Bits::new(len.div_ceil(granule)),
            refused: RefusedOps([const { AtomicU64::new(0) }; 64]),
            stopped: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        });
        let registered = space.register(memory, inner.clone(), &options.targets);
        let registration = registered.inspect_err(|_| iommu.iovas().free(iova))?;
        // From here on dropping it undoes everything, through `release`.
        let this = Self {
            inner,
            registration: Some(registration),
        };
        this.touch(memory, options.deadline)?;
        Ok(this)
    }

    fn registration(&self) -> &Registration {
        self.registration
            .as_ref()
            .expect("it is taken by drop only")
    }

    /// A number that [`Iommu::attribute`] knows it by.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// The memory.
    pub fn memory(&self) -> Range {
        self.inner.memory
    }

    /// Where devices see it.
    pub fn iova(&self) -> Range {
        self.inner.iova
    }

    /// What is mapped at a time, in bytes.
    pub fn granule(&self) -> u64 {
        self.inner.granule
    }

    /// Where devices see `part` of the memory.
    ///
    /// # Errors
    /// [`WindowError::Outside`].
    pub fn iova_of(&self, part: Range) -> Result<Range, WindowError> {
        let Inner { memory, iova, .. } = &*self.inner;
        if !memory.contains(part) {
            return Err(WindowError::Outside {
                part,
                window: *memory,
            });
        }
        let shift = |addr: Addr| addr.get() - memory.start().get() + iova.start().get();
        Ok(Range::inclusive(shift(part.start()), shift(part.last()))
            .expect("as long as a part that is not empty"))
    }

    /// Whether every byte of `part` was mapped just now. Only [`Window::with_mapped`] makes it stay so.
    ///
    /// # Errors
    /// [`WindowError::Outside`].
    pub fn is_mapped(&self, part: Range) -> Result<bool, WindowError> {
        self.iova_of(part)?;
        Ok(self
            .inner
            .numbers(part)
            .all(|number| self.inner.mapped.get(number)))
    }

    /// Maps what of `part` is not mapped, and calls `f` with its IOVA while nothing can take it away: there the doorbell is
    /// rung. A shootdown that begins meanwhile stops the device's work after `f`. Waits, for `time` at most, for
    /// invalidations of the granules; then for the kernel.
    ///
    /// `f` runs with the window's lock held: it allocates nothing, waits for nothing, and calls nothing of the space.
    ///
    /// # Errors
    /// [`WindowError`]; `f` was not called. What could be mapped stays mapped.
    pub fn with_mapped<T>(
        &self,
        part: Range,
        time: Duration,
        f: impl FnOnce(Range) -> T,
    ) -> Result<T, WindowError> {
        let iova = self.iova_of(part)?;
        let numbers = self.inner.numbers(part);
        let begun = Instant::now();
        let left = || time.saturating_sub(begun.elapsed());
        let (mut first, last) = (*numbers.start(), *numbers.end());
        while last - first >= STEP {
            let some = first..=first + STEP - 1;
            self.undisturbed(some.clone(), left(), |inner| inner.map_missing(some))?;
            first += STEP;
        }
        // All of it, as far as it has gone again meanwhile.
        self.undisturbed(numbers.clone(), left(), |inner| {
            inner.map_missing(numbers)?;
            Ok(f(iova))
        })
    }

    /// Calls `f` with the lock held while no invalidation of these granules is in progress.
    fn undisturbed<T>(
        &self,
        numbers: RangeInclusive<u64>,
        time: Duration,
        f: impl FnOnce(&Inner) -> Result<T, DeviceError>,
    ) -> Result<T, WindowError> {
        let inner = &*self.inner;
        let entry = inner.of(inner.memory, *numbers.start(), *numbers.end());
        let mut fault = self.registration().begin(entry, time)?;
        loop {
            let state = inner.lock.lock();
            if !fault.retry(&state) {
                if *state == State::Closed {
                    return Err(WindowError::Closed {
                        window: inner.memory,
                    });
                }
                if let Some(sick) = numbers.clone().find(|one| inner.quarantined.get(*one)) {
                    return Err(WindowError::Quarantined {
                        granule: inner.of(inner.memory, sick, sick),
                    });
                }
                return Ok(f(inner)?);
            }
            drop(state);
            fault.again()?;
        }
    }

    /// Maps what of `part` is not mapped (any more), at the IOVA that it had.
    ///
    /// # Errors
    /// As [`Window::with_mapped`].
    pub fn touch(&self, part: Range, time: Duration) -> Result<(), WindowError> {
        self.with_mapped(part, time, |_| ())
    }

    /// Ends it, in the only safe order: work is stopped, the IOMMU is told, the registration goes, the IOVA may be given to
    /// others. The memory stays, and is the caller's to unmap. Waits for work in flight up to the deadline of the options.
    ///
    /// # Errors
    /// The IOMMU did not unmap it: the window stays registered, so that its memory cannot go; try again. As
    /// [`Registration::unregister`], where that may not be called.
    pub fn close(&self) -> Result<Unregistered, WindowError> {
        self.inner.shut()?;
        Ok(self.registration().unregister()?)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        let registration = self.registration.take();
        if let Err(error) = self.inner.shut() {
            // It stays registered for ever: the memory is in quarantine when somebody unmaps it, not gone.
            std::mem::forget(registration);
            tracing::error!(window = self.inner.id, iova = %self.inner.iova, %error, "not unmapped");
        }
    }
}
