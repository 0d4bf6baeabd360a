//! Entries for misses of one context, by one begin and one retry for all of them.
//!
//! Map lock for read, begin over all the *whole* entries (R34), translate, let the map lock go, retry under the driver lock, write the
//! entries under it and wait until they are in (R9; what else keeps a late entry out, and why the misses are looked at before the
//! sequence, says [`LateDropIns`](crate::LateDropIns)). Where an invalidation has come between for any of them nothing is written.
//! Nothing mapped, or a store that is not allowed, ends the instruction with an exception.
//!
//! # Preloads
//! A block copy misses once a page and side. Its extended control block says what it has yet to read and to write, so the pages that
//! follow the one that was missed are installed with it, by WRITE_ONLY, before the miss is answered: see
//! [`SegmentOptions::preload`](crate::SegmentOptions::preload). What it reads is installed for reading only, whatever the mapping allows;
//! what it writes has to be mapped for writing. No page is made ready for it: it is the page table that is looked at.
//!
//! # Locks
//! Order of holding, the first longest: owner of the space → gate of the context → driver lock. The map lock is taken before
//! the gate is entered, as who ends a context may hold it and waits for the gate, and let go before the driver lock is taken,
//! so that no change of the map waits for a handle. From the gate on nothing is allocated: who waits for it may be inside of the
//! application's allocator. So a [`Batch`] is made before.

use shootdown::{
    Addr, AddressSpace, Fault, FaultError, MapReadGuard, PageSize, Range, Rights, Translation,
};
use shootdown_primitive::sync::atomic::{Ordering, fence};
use shootdown_primitive::time::{Duration, Instant};

use crate::config::Plant;
use crate::context::{Context, Inside, User};
use crate::error::{Ended, GruError};
use crate::fault::{By, answer, each};
use crate::handle::Operation;
use crate::layout::{cbe, control_block, extended, fault, is_block_copy, page_code, status, tfh};

const SMALL: PageSize = PageSize::FourKiB;

/// Control blocks of a chiplet.
const BLOCKS: usize = 128;
/// Preloads of one batch; beyond them there are none.
const PRELOADS: usize = 1024;

/// What a block copy comes to after the page that it has missed.
#[derive(Clone, Copy)]
struct Ahead {
    /// Whole pages.
    pages: Range,
    stores: bool,
}

/// What came of a miss.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    /// Nothing yet.
    None,
    Installed,
    /// Nothing is mapped, or not with the rights that are needed.
    NotAllowed,
    /// Somebody else has answered.
    Gone,
    /// The handle did not do what it was told.
    Failed,
}

#[derive(Clone)]
struct Miss {
    cb: usize,
    slot: usize,
    address: Addr,
    /// A store through an entry that forbids it.
    modify: bool,
    ahead: Option<Ahead>,
    /// What the entry is for.
    entry: Range,
    found: Option<Translation>,
    /// In [`Batch::ahead`].
    preloads: (usize, usize),
    answer: Answer,
    /// How long that has taken, from when the batch was taken up.
    took: Duration,
}

/// Room for misses that are answered together, and for what is preloaded with them.
pub(crate) struct Batch {
    misses: Vec<Miss>,
    ahead: Vec<Translation>,
}

impl Batch {
    fn new(misses: usize, ahead: usize) -> Self {
        Self {
            misses: Vec::with_capacity(misses),
            ahead: Vec::with_capacity(ahead),
        }
    }

    /// For all misses that there can be at a time.
    pub(crate) fn of_a_chiplet() -> Self {
        Self::new(BLOCKS, PRELOADS)
    }

    /// For one miss of a context.
    pub(crate) fn of_one(context: &Context) -> Self {
        Self::new(1, context.options.preload.into())
    }
}

/// The miss of `cb`, if it is in the state that `by` wants: its address, and whether it is a store through an entry that forbids it.
pub(crate) fn pending(
    context: &Context,
    inside: &Inside<'_>,
    cb: usize,
    by: By,
) -> Result<Option<(Addr, bool)>, GruError> {
    let registers = &*context.chiplet.registers;
    let Some(slot) = inside.loaded.slot(cb) else {
        return Ok(None);
    };
    let dw0 = registers.read(fault(slot))?;
    if tfh::state(dw0) != by.state() {
        return Ok(None);
    }
    let address = Addr::new(registers.read(fault(slot) + tfh::MISS_ADDRESS)?);
    Ok(Some((address, status::cause(dw0) == tfh::MODIFY)))
}

/// The pages behind that of `address` which the block copy of control block `cb` comes to, as many as its segment wants. Once only for
/// each place that it comes to: one that misses there again has lost what it had to others, or to what was preloaded for its other side,
/// and would lose it for ever.
fn ahead(
    context: &Context,
    (index, cb, slot): (usize, usize, usize),
    address: Addr,
) -> Result<Option<Ahead>, GruError> {
    let most = u64::from(context.options.preload);
    let registers = &*context.chiplet.registers;
    // The user's own control block is read at no cost, so of what is no copy nothing else is.
    if most == 0 || !is_block_copy(registers.read(control_block(index, cb, 0))?) {
        return Ok(None);
    }
    let word = |word| registers.read(extended(slot, word));
    let copy = word(cbe::COPY)?;
    if !is_block_copy(copy) {
        return Ok(None);
    }
    let left = word(cbe::LEFT)?;
    let bases = [word(cbe::BASE0)?, word(cbe::BASE1)?];
    let Some(side) = bases.iter().position(|base| *base == address.get()) else {
        return Ok(None);
    };
    // Relaxed: a hint, to whoever answers the next miss of the control block.
    let before = context.preloaded[cb][side].swap(left, Ordering::Relaxed);
    let pages = || {
        let all = Range::new(address, cbe::left(copy, bases[0], left)[side]).ok()?;
        let next = Range::page(address, SMALL).end()?;
        let reach = Range::new(next, most * SMALL.bytes()).ok()?;
        all.align_out(SMALL).intersect(reach)
    };
    Ok(pages().filter(|_| before != left).map(|pages| Ahead {
        pages,
        stores: side == 1,
    }))
}

/// One try to answer the misses of `cbs`, begun at the time and with the time for invalidations that are given: takes those from it that
/// are over. Between the others came an invalidation.
///
/// # Errors
/// One of them could not be answered, and is taken as well; or none, as an invalidation went on for too long, or a device is in
/// quarantine.
pub(crate) fn resolve(
    context: &Context,
    cbs: &mut u128,
    space: &AddressSpace,
    map: MapReadGuard<'_>,
    (by, begun, time): (By, Instant, Duration),
    batch: &mut Batch,
) -> Result<(), GruError> {
    let (Some(inside), Some(user)) = (context.enter(), &context.user) else {
        *cbs = 0;
        return Ok(());
    };
    context.check_epoch(&inside.loaded)?;
    batch.misses.clear();
    for cb in each(*cbs) {
        let found = pending(context, &inside, cb, by)?.zip(inside.loaded.slot(cb));
        let Some(((address, modify), slot)) = found else {
            *cbs &= !(1 << cb);
            continue;
        };
        batch.misses.push(Miss {
            cb,
            slot,
            address,
            modify,
            ahead: ahead(context, (inside.loaded.index, cb, slot), address)?,
            entry: Range::page(address, SMALL),
            found: None,
            preloads: (0, 0),
            answer: Answer::None,
            took: Duration::ZERO,
        });
    }
    if batch.misses.is_empty() {
        return Ok(());
    }
    let filling = Filling {
        context,
        inside: &inside,
        user,
        by,
        begun,
        time,
    };
    let mut failed = None;
    match filling.fill(batch, space, map) {
        Ok(true) => {}
        Ok(false) => context.chiplet.counters.fault_retries.hit(),
        // One that is being unloaded has its faults forced by that.
        Err(GruError::SegmentEnded { .. }) => {
            *cbs = 0;
            return Ok(());
        }
        Err(GruError::Fault(
            error @ (FaultError::Deadline { .. } | FaultError::DeviceQuarantined { .. }),
        )) => return Err(error.into()),
        Err(GruError::Fault(error)) => {
            tracing::warn!(%error, "faults end with an exception");
            for miss in &mut batch.misses {
                miss.answer = Answer::NotAllowed;
            }
        }
        Err(error) => failed = Some(error),
    }
    for miss in &batch.misses {
        let took = match miss.answer {
            Answer::None => continue,
            Answer::Gone | Answer::Failed => None,
            Answer::Installed => Some(miss.took),
            Answer::NotAllowed => {
                *cbs &= !(1 << miss.cb);
                answer(context, &inside, miss.cb, Operation::FaultException)?;
                Some(begun.elapsed())
            }
        };
        *cbs &= !(1 << miss.cb);
        if let Some(took) = took {
            by.count(context);
            context.chiplet.fault_latency.record(took);
        }
    }
    match failed {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// How long a wait for an invalidation goes on before it is looked whether the context is being unloaded.
const SLICE: Duration = Duration::from_millis(1);

/// Whose misses are answered, by whom, and since when.
struct Filling<'a> {
    context: &'a Context,
    inside: &'a Inside<'a>,
    user: &'a User,
    by: By,
    /// When they were taken up.
    begun: Instant,
    /// How long it may take.
    time: Duration,
}

impl<'a> Filling<'a> {
    fn planted(&self, plant: Plant) -> bool {
        self.context.chiplet.planted(plant)
    }

    /// Begins to install `entries`. What it waits for may be the shootdown that unloads this very context, and waits for whoever is
    /// inside its gate: so it gives up once that closes.
    fn begin(&self, entries: Range) -> Result<Fault<'a>, GruError> {
        let waited = self.begun.elapsed();
        if self.time < waited && !self.time.is_zero() {
            let entry = entries;
            return Err(FaultError::Deadline { entry, waited }.into());
        }
        loop {
            let left = self.time.saturating_sub(self.begun.elapsed());
            match self.user.share.begin(entries, left.min(SLICE)) {
                Err(FaultError::Deadline { .. }) if self.context.is_closing() => {
                    return Err(GruError::SegmentEnded {
                        why: Ended::Unmapped,
                    });
                }
                Err(FaultError::Deadline { .. }) if left > SLICE => {}
                result => return Ok(result?),
            }
        }
    }

    /// What an entry for `miss` is for, and all that may be installed for it.
    fn reach(&self, space: &AddressSpace, miss: &mut Miss) -> Range {
        let small = Range::page(miss.address, SMALL);
        miss.found = space.translate(miss.address);
        miss.entry = match miss.found {
            Some(found) if !self.planted(Plant::WRONG_RANGE) => found.page,
            _ => small,
        };
        match miss.ahead {
            Some(ahead) if miss.entry == small => small.hull(ahead.pages),
            _ => miss.entry,
        }
    }

    /// All that may be installed for a batch.
    fn whole(&self, space: &AddressSpace, batch: &mut Batch) -> Range {
        let misses = batch.misses.iter_mut();
        let whole = misses.map(|miss| self.reach(space, miss));
        // Of no miss there is nothing to begin; all is right for that as well.
        whole.reduce(Range::hull).unwrap_or(Range::ALL)
    }

    /// Translates what is ahead of a batch's misses, each to the first page that will not do.
    fn translate_ahead(&self, space: &AddressSpace, batch: &mut Batch) {
        let Batch { misses, ahead } = batch;
        ahead.clear();
        for miss in misses {
            let first = ahead.len();
            miss.preloads = (first, first);
            let Some(wanted) = miss.ahead else { continue };
            let needed = if wanted.stores {
                Rights::READ_WRITE
            } else {
                Rights::READ
            };
            let will_do = |one: &Translation| one.page_size == SMALL && one.rights.contains(needed);
            if !miss.found.as_ref().is_some_and(will_do) {
                continue;
            }
            let mut next = Some(wanted.pages.start());
            space.walk(wanted.pages, &mut |found| {
                let is_next = next == Some(found.page.start());
                if !is_next || !will_do(&found) || ahead.len() == ahead.capacity() {
                    next = None;
                    return;
                }
                next = found.page.end();
                ahead.push(Translation {
                    rights: needed,
                    ..found
                });
            });
            miss.preloads.1 = ahead.len();
        }
    }

    /// Installs entries for the misses, as far as it may: whether it could, or else an invalidation has come between.
    fn fill(
        &self,
        batch: &mut Batch,
        space: &AddressSpace,
        map: MapReadGuard<'_>,
    ) -> Result<bool, GruError> {
        let mut whole = self.whole(space, batch);
        let sequence = loop {
            let sequence = match self.planted(Plant::NOT_BEGUN) {
                true => None,
                false => Some(self.begin(whole)?),
            };
            // A large page may have been split, or mapped, meanwhile: the sequence has to cover what is installed.
            let now = self.whole(space, batch);
            if now == whole {
                break sequence;
            }
            whole = now;
        };
        self.translate_ahead(space, batch);
        drop(map);
        let checked = !self.planted(Plant::RETRY_NOT_CHECKED);
        let guard = checked.then(|| self.user.binding.lock.lock());
        for miss in &mut batch.misses {
            let now = pending(self.context, self.inside, miss.cb, self.by)?;
            if now != Some((miss.address, miss.modify)) {
                miss.answer = Answer::Gone;
            }
        }
        // With the fence in `quiesce`.
        fence(Ordering::SeqCst);
        // Where one of them is planted away nothing is checked.
        if let (Some(sequence), Some(guard)) = (&sequence, &guard)
            && sequence.retry(guard)
        {
            return Ok(false);
        }
        let mut installed = 0;
        let Batch { misses, ahead } = batch;
        let result = (misses.iter_mut())
            .filter(|miss| miss.answer == Answer::None)
            .try_for_each(|miss| {
                let ahead = &ahead[miss.preloads.0..miss.preloads.1];
                let answer = self.install(miss, ahead);
                miss.answer = *answer.as_ref().unwrap_or(&Answer::Failed);
                miss.took = self.begun.elapsed();
                answer?;
                installed += u64::from(miss.answer == Answer::Installed);
                Ok(())
            });
        let counters = &self.context.chiplet.counters;
        counters.faults_resolved.add(installed);
        counters.fault_batches.add(u64::from(installed > 0));
        result.map(|()| true)
    }

    /// Installs what answers one miss, after what is ahead of it: an answered one is none that could be written for.
    fn install(&self, miss: &Miss, ahead: &[Translation]) -> Result<Answer, GruError> {
        let needed = match miss.modify {
            true => Rights::READ_WRITE,
            false => Rights::READ,
        };
        let found = miss.found.filter(|found| found.rights.contains(needed));
        let Some(found) = found else {
            return Ok(Answer::NotAllowed);
        };
        let counters = (&self.context.chiplet.counters, &self.context.counters);
        // The nearest last: it is needed first.
        for page in ahead.iter().rev() {
            self.write(miss.slot, page, Operation::WriteOnly)?;
            counters.0.preloads.hit();
            counters.1.drop_ins.hit();
        }
        self.write(miss.slot, &found, Operation::WriteRestart)?;
        counters.1.drop_ins.hit();
        Ok(Answer::Installed)
    }

    fn write(&self, slot: usize, page: &Translation, how: Operation) -> Result<(), GruError> {
        let base = fault(slot);
        let registers = &*self.context.chiplet.registers;
        let writable = page.rights.contains(Rights::WRITE);
        let asid = self.inside.loaded.asid;
        let attributes = tfh::fill(asid, page_code(page.page_size), writable);
        registers.write(base + tfh::FILL_ADDRESS, page.page.start().get())?;
        registers.write(base + tfh::FILL, attributes)?;
        registers.write(base + tfh::FRAME, page.frame.0)?;
        self.context.operate(base, how, 0)
    }
}
