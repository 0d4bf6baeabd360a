//! The managed source: the space's own map, unmap, protect, discard and remap.
//!
//! The table of mappings is behind a mutex that is held for short edits only. An operation *claims a span*: from then on
//! overlapping operations wait for it (or are refused, in the `try_` forms), disjoint ones go on in parallel. The plain forms
//! take the map lock to claim their span and drop it before the phases run; the forms on
//! [`MapWriteGuard`] keep it throughout. Waiting for a span with the map lock held is safe: nobody takes that lock
//! between start and end.
//!
//! An operation that a device did not acknowledge changes nothing: its pages stay where they are, marked as quarantined, and
//! are given to nobody until every device that could reach them is healthy again ([`AddressSpace::drain`]).

use std::collections::BTreeMap;

use thiserror::Error;

use crate::addr::{Addr, PageSize, PageSizes, Range, RangeError};
use crate::context::{self, Refused};
use crate::engine::{self, InvalidateError, Mode};
use crate::memory::{Memory, MemoryError, Rights, Translation};
use crate::notifier::Cause;
use crate::primitive::{Arc, Mutex};
use crate::space::{AddressSpace, MapWriteGuard, Space};
use crate::tlb::{Device, Health};

/// What to map.
#[derive(Clone, Copy, Debug)]
pub struct Map {
    len: u64,
    page: PageSize,
    rights: Rights,
    at: Option<Addr>,
}

impl Map {
    /// `len` bytes of zeroed, readable and writable 4 KiB pages, anywhere.
    pub fn anonymous(len: u64) -> Self {
        Self {
            len,
            page: PageSize::FourKiB,
            rights: Rights::READ_WRITE,
            at: None,
        }
    }

    /// With pages of another size.
    pub fn page_size(self, page: PageSize) -> Self {
        Self { page, ..self }
    }

    /// With other rights.
    pub fn rights(self, rights: Rights) -> Self {
        Self { rights, ..self }
    }

    /// At this address, which must be free.
    pub fn at(self, addr: Addr) -> Self {
        Self {
            at: Some(addr),
            ..self
        }
    }
}

/// Why a mapping could not be made or changed. Unless it says otherwise, nothing has changed.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum MapError {
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// Empty, or past 2^64.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// Not whole pages.
    #[error("{range} is not whole pages of {page}: align both ends to {:#x}", page.bytes())]
    Misaligned {
        /// What was given.
        range: Range,
        /// The page size.
        page: PageSize,
    },
    /// Outside of what the space can map.
    #[error("{range} lies outside of the space's arena {arena}")]
    OutsideArena {
        /// What was given.
        range: Range,
        /// Where mappings may lie.
        arena: Range,
    },
    /// No room for so much.
    #[error("no free range of {len:#x} bytes in the arena {arena}")]
    NoRoom {
        /// What was asked for.
        len: u64,
        /// Where mappings may lie.
        arena: Range,
    },
    /// Part of it is not mapped.
    #[error("{range} is not mapped as a whole: there is nothing at {hole}")]
    NotMapped {
        /// What was given.
        range: Range,
        /// The first address without a mapping.
        hole: Addr,
    },
    /// Something is mapped there, or is going away.
    #[error("{range} is not free: {by} is mapped there")]
    Occupied {
        /// What was given.
        range: Range,
        /// What is there.
        by: Range,
    },
    /// Its pages are in quarantine: a device may still reach them.
    #[error(
        "{quarantined} in {range} is in quarantine: a device may still reach it; recover the device, then drain"
    )]
    InQuarantine {
        /// What was given.
        range: Range,
        /// What is in quarantine.
        quarantined: Range,
    },
    /// A `try_` form met a lock or a span that is held.
    #[error("{range} is being changed by another thread, or the map lock is held")]
    WouldBlock {
        /// What was given.
        range: Range,
    },
    /// The space exits, or has exited.
    #[error("the address space is exiting")]
    Exiting,
    /// The space has no process memory.
    #[error("this address space has no memory of its own: use begin_invalidation")]
    NoMemory,
    /// The memory could not do it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The shootdown failed; nothing has changed, but see its text for quarantine.
    #[error(transparent)]
    Invalidate(#[from] InvalidateError),
}

/// What becomes of quarantined pages once no device can reach them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Then {
    Unmap,
    Keep,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Mapped,
    Quarantined { then: Then },
}

#[derive(Clone, Debug)]
struct Vma {
    last: Addr,
    page: PageSize,
    rights: Rights,
    state: State,
}

/// A range that is waited for by quarantine, with the devices that did not acknowledge.
#[derive(Debug)]
struct Sick {
    range: Range,
    devices: Vec<Device>,
}

#[derive(Debug, Default)]
struct Mappings {
    by_start: BTreeMap<Addr, Vma>,
    spans: Vec<Range>,
    sick: Vec<Sick>,
    /// No free address lies below.
    hint: u64,
}

#[derive(Debug)]
pub(crate) struct Table {
    arena: Option<Range>,
    mappings: Mutex<Mappings>,
}

impl Mappings {
    fn overlapping(&self, range: Range) -> impl Iterator<Item = (Range, &Vma)> {
        let before = self.by_start.range(..=range.start()).next_back();
        let first = before.map_or(range.start(), |(start, _)| *start);
        self.by_start
            .range(first..=range.last())
            .filter_map(move |(start, vma)| {
                let whole = Range::inclusive(*start, vma.last).ok()?;
                whole.overlaps(range).then_some((whole, vma))
            })
    }

    fn is_claimed(&self, range: Range) -> bool {
        self.spans.iter().any(|span| span.overlaps(range))
    }

    /// Refuses what is not mapped as a whole, or in quarantine.
    fn check(&self, range: Range) -> Result<PageSizes, MapError> {
        let mut next = range.start();
        let mut sizes = PageSizes::empty();
        for (whole, vma) in self.overlapping(range) {
            if whole.start() > next {
                return Err(MapError::NotMapped { range, hole: next });
            }
            if vma.state != State::Mapped {
                return Err(MapError::InQuarantine {
                    range,
                    quarantined: whole,
                });
            }
            // Entries may be as small as the device likes, and a page that was cut has become small ones.
            sizes |= PageSize::ALL
                .into_iter()
                .filter(|size| *size <= vma.page)
                .map(PageSizes::from)
                .collect();
            match whole.last().checked_add(1) {
                Some(after) if whole.last() < range.last() => next = after,
                _ => return Ok(sizes),
            }
        }
        Err(MapError::NotMapped { range, hole: next })
    }

    /// Cuts mappings at both ends of the range.
    fn split(&mut self, range: Range) {
        for at in [Some(range.start()), range.end()].into_iter().flatten() {
            if let Some((start, vma)) = self.by_start.range_mut(..at).next_back()
                && vma.last >= at
                && *start < at
            {
                let rest = vma.clone();
                vma.last = Addr::new(at.get() - 1);
                self.by_start.insert(at, rest);
            }
        }
    }

    fn each(&mut self, range: Range, edit: impl FnMut((&Addr, &mut Vma))) {
        self.by_start
            .range_mut(range.start()..=range.last())
            .for_each(edit);
    }

    fn remove(&mut self, range: Range) {
        self.by_start.retain(|start, _| !range.holds(*start));
        self.hint = self.hint.min(range.start().get());
    }

    /// The first free range from the hint on.
    fn find(&mut self, len: u64, page: PageSize, arena: Range) -> Option<Range> {
        let mut from = self.hint.max(arena.start().get());
        loop {
            let start = from.checked_next_multiple_of(page.bytes())?;
            let range = Range::new(start, len).ok()?;
            if !arena.contains(range) {
                return None;
            }
            let mapped = self.overlapping(range).map(|(whole, _)| whole);
            let claimed = self
                .spans
                .iter()
                .copied()
                .filter(|span| span.overlaps(range));
            match mapped.chain(claimed).map(|one| one.last().get()).max() {
                None => return Some(range),
                Some(last) => from = last.checked_add(1)?,
            }
        }
    }
}

impl Table {
    pub(crate) fn new(arena: Option<Range>) -> Self {
        Self {
            arena,
            mappings: Mutex::new(Mappings::default()),
        }
    }

    /// At exit: everything goes that no device can reach; false if something stays.
    pub(crate) fn clear(&self, memory: &dyn Memory) -> bool {
        let mut mappings = self.mappings.lock();
        mappings.by_start.retain(|start, vma| {
            let whole = Range::inclusive(*start, vma.last);
            let gone =
                vma.state == State::Mapped && whole.is_ok_and(|whole| memory.unmap(whole).is_ok());
            !gone
        });
        mappings.by_start.is_empty()
    }

    /// Gives back what was in quarantine for devices that are healthy again.
    pub(crate) fn recover(&self, memory: &dyn Memory) {
        let mut mappings = self.mappings.lock();
        let (well, sick) = std::mem::take(&mut mappings.sick)
            .into_iter()
            .partition(|one| {
                // Without a device to recover nothing can tell that the pages are out of reach.
                !one.devices.is_empty()
                    && one
                        .devices
                        .iter()
                        .all(|device| device.health() == Health::Healthy)
            });
        mappings.sick = sick;
        let well: Vec<Sick> = well;
        for Sick { range, devices } in well {
            let unmap = mappings
                .overlapping(range)
                .any(|(_, vma)| vma.state == State::Quarantined { then: Then::Unmap });
            if !unmap {
                mappings.each(range, |(_, vma)| vma.state = State::Mapped);
            } else if memory.unmap(range).is_ok() {
                mappings.remove(range);
            } else {
                mappings.sick.push(Sick { range, devices });
            }
        }
    }

    fn quarantined(&self) -> u64 {
        let mappings = self.mappings.lock();
        let sick = mappings
            .by_start
            .iter()
            .filter(|(_, vma)| vma.state != State::Mapped);
        sick.map(|(start, vma)| vma.last.get() - start.get() + 1)
            .sum()
    }
}

/// How the caller holds the map lock.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lock {
    /// Not: it is taken to claim the span.
    Plain(Mode),
    /// For write, throughout.
    Guard,
}

/// An operation on mapped pages.
#[derive(Clone, Copy)]
enum Change {
    Unmap,
    Discard,
    Protect(Rights),
    Remap(Range),
}

impl Change {
    fn cause(self) -> Cause {
        match self {
            Self::Unmap => Cause::Unmap,
            Self::Discard => Cause::Discard,
            Self::Protect(_) => Cause::Protect,
            Self::Remap(_) => Cause::Remap,
        }
    }
}

fn memory(space: &Space) -> Result<(&dyn Memory, Range), MapError> {
    match (&space.memory, space.table.arena) {
        (Some(memory), Some(arena)) => Ok((&**memory, arena)),
        _ => Err(MapError::NoMemory),
    }
}

/// Runs `claim` with the table locked until it claims spans; waits while they are claimed by others.
fn claim<T>(
    space: &Space,
    lock: Lock,
    call: &'static str,
    range: Range,
    mut claim: impl FnMut(&mut Mappings) -> Result<Option<T>, MapError>,
) -> Result<T, MapError> {
    let busy = || MapError::WouldBlock { range };
    loop {
        if space.is_exiting() {
            return Err(MapError::Exiting);
        }
        let held = match lock {
            Lock::Plain(Mode::Blocking) => Some(space.map_lock.write(call)?),
            Lock::Plain(Mode::Try) => Some(space.map_lock.try_write(call)?.ok_or_else(busy)?),
            Lock::Guard => {
                context::wait_refusal(call)?;
                None
            }
        };
        if let Some(claimed) = claim(&mut space.table.mappings.lock())? {
            return Ok(claimed);
        }
        drop(held);
        if lock == Lock::Plain(Mode::Try) {
            return Err(busy());
        }
        space
            .events
            .wait(None, || !space.table.mappings.lock().is_claimed(range));
    }
}

fn unclaim(space: &Space, spans: &[Range], edit: impl FnOnce(&mut Mappings)) {
    let mut mappings = space.table.mappings.lock();
    edit(&mut mappings);
    for span in spans {
        if let Some(at) = mappings.spans.iter().position(|one| one == span) {
            mappings.spans.swap_remove(at);
        }
    }
    drop(mappings);
    space.events.ended();
}

fn map(space: &Space, what: Map, lock: Lock) -> Result<Range, MapError> {
    let (memory, arena) = memory(space)?;
    let asked = Range::new(what.at.unwrap_or(arena.start()), what.len)?;
    if !memory.page_sizes().contains(what.page.into()) {
        return Err(MemoryError::PageSize { page: what.page }.into());
    }
    if !what.len.is_multiple_of(what.page.bytes())
        || !asked.start().is_aligned(what.page) && what.at.is_some()
    {
        return Err(MapError::Misaligned {
            range: asked,
            page: what.page,
        });
    }
    if what.at.is_some() && !arena.contains(asked) {
        return Err(MapError::OutsideArena {
            range: asked,
            arena,
        });
    }
    let range = claim(space, lock, "map", asked, |mappings| {
        let range = match what.at {
            None => mappings
                .find(what.len, what.page, arena)
                .ok_or(MapError::NoRoom {
                    len: what.len,
                    arena,
                })?,
            Some(_) if mappings.is_claimed(asked) => return Ok(None),
            Some(_) => asked,
        };
        if let Some((by, vma)) = mappings.overlapping(range).next() {
            return Err(match vma.state {
                State::Mapped => MapError::Occupied { range, by },
                State::Quarantined { .. } => MapError::InQuarantine {
                    range,
                    quarantined: by,
                },
            });
        }
        mappings.spans.push(range);
        Ok(Some(range))
    })?;
    let result = memory.map(range, what.page, what.rights);
    unclaim(space, &[range], |mappings| {
        if result.is_ok() {
            if what.at.is_none() && what.page == PageSize::FourKiB {
                mappings.hint = range.last().get().saturating_add(1);
            }
            let vma = Vma {
                last: range.last(),
                page: what.page,
                rights: what.rights,
                state: State::Mapped,
            };
            mappings.by_start.insert(range.start(), vma);
        }
    });
    result?;
    Ok(range)
}

fn change(space: &Arc<Space>, range: Range, change: Change, lock: Lock) -> Result<(), MapError> {
    let (memory, arena) = memory(space)?;
    let page = PageSize::FourKiB;
    let target = match change {
        Change::Remap(to) => Some(to),
        _ => None,
    };
    for one in [Some(range), target].into_iter().flatten() {
        if !one.is_aligned(page) {
            return Err(MapError::Misaligned { range: one, page });
        }
        if !arena.contains(one) {
            return Err(MapError::OutsideArena { range: one, arena });
        }
    }
    let spans: Vec<Range> = [Some(range), target].into_iter().flatten().collect();
    let hull = target.map_or(range, |to| range.hull(to));
    let sizes = claim(space, lock, "change a mapping", hull, |mappings| {
        if spans.iter().any(|one| mappings.is_claimed(*one)) {
            return Ok(None);
        }
        let sizes = mappings.check(range)?;
        if let Some(to) = target {
            let by = mappings.overlapping(to).map(|(whole, _)| whole).next();
            if let Some(by) = by.or_else(|| to.overlaps(range).then_some(range)) {
                return Err(MapError::Occupied { range: to, by });
            }
        }
        mappings.spans.extend(&spans);
        Ok(Some(sizes))
    })?;
    let mode = match lock {
        Lock::Plain(mode) => mode,
        Lock::Guard => Mode::Blocking,
    };
    let result = engine::run_sized(space, range, sizes, change.cause(), mode, || match change {
        Change::Unmap => memory.unmap(range),
        Change::Discard => memory.discard(range),
        Change::Protect(rights) => memory.protect(range, rights),
        Change::Remap(to) => memory.remap(range, to),
    });
    unclaim(space, &spans, |mappings| {
        finish(mappings, range, change, &result, space)
    });
    result.map_err(Into::into)
}

/// The table after the phases: as the pages are now.
fn finish(
    mappings: &mut Mappings,
    range: Range,
    change: Change,
    result: &Result<(), InvalidateError>,
    space: &Space,
) {
    mappings.split(range);
    match result {
        Ok(()) | Err(InvalidateError::HandlerPanicked { changed: true, .. }) => match change {
            Change::Unmap => mappings.remove(range),
            Change::Discard => {}
            Change::Protect(rights) => mappings.each(range, |(_, vma)| vma.rights = rights),
            Change::Remap(to) => {
                let mut moved = Vec::new();
                mappings.each(range, |(start, vma)| moved.push((*start, vma.clone())));
                mappings.remove(range);
                let shift = |addr: Addr| {
                    let offset = addr.get() - range.start().get();
                    Addr::new(to.start().get() + offset)
                };
                for (start, mut vma) in moved {
                    vma.last = shift(vma.last);
                    // A page that no longer lies on its own border has been split by the move.
                    if !shift(start).is_aligned(vma.page) {
                        vma.page = PageSize::FourKiB;
                    }
                    mappings.by_start.insert(shift(start), vma);
                }
            }
        },
        Err(
            InvalidateError::Quarantined { .. }
            | InvalidateError::NotDrained { .. }
            | InvalidateError::HandlerPanicked { .. },
        ) => {
            let then = match change {
                Change::Unmap => Then::Unmap,
                _ => Then::Keep,
            };
            mappings.each(range, |(_, vma)| vma.state = State::Quarantined { then });
            let mut devices: Vec<Device> = Vec::new();
            if let Err(InvalidateError::Quarantined { device, .. }) = result {
                devices.push(device.clone());
            }
            space.registry.walk(range, |_, inner| {
                for target in &inner.targets {
                    if target.device.health() == Health::Quarantined {
                        devices.push(target.device.clone());
                    }
                }
                std::ops::ControlFlow::Continue(())
            });
            mappings.sick.push(Sick { range, devices });
        }
        Err(_) => {}
    }
}

impl AddressSpace {
    /// Maps zeroed pages; where is returned. Waits for the map lock, and for operations at the address where one was given.
    ///
    /// # Errors
    /// [`MapError`].
    pub fn map(&self, what: Map) -> Result<Range, MapError> {
        map(&self.space, what, Lock::Plain(Mode::Blocking))
    }

    /// Takes the pages of `range` away, once no device can reach them. All of it must be mapped; cutting a mapping, and a
    /// large page, is fine. Waits for handlers and hardware, within the deadlines.
    ///
    /// # Errors
    /// [`MapError`]; [`InvalidateError::Quarantined`] in it says that the pages are still there, and stay.
    pub fn unmap(&self, range: Range) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Unmap,
            Lock::Plain(Mode::Blocking),
        )
    }

    /// Replaces the pages by zeroed ones. As [`AddressSpace::unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`].
    pub fn discard(&self, range: Range) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Discard,
            Lock::Plain(Mode::Blocking),
        )
    }

    /// Changes the access rights. As [`AddressSpace::unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`].
    pub fn protect(&self, range: Range, rights: Rights) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Protect(rights),
            Lock::Plain(Mode::Blocking),
        )
    }

    /// Moves the pages to `to`, which must be free and start the range of the same length. As [`AddressSpace::unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::unmap`].
    pub fn remap(&self, range: Range, to: Addr) -> Result<Range, MapError> {
        let to = target(range, to)?;
        change(
            &self.space,
            range,
            Change::Remap(to),
            Lock::Plain(Mode::Blocking),
        )
        .map(|()| to)
    }

    /// [`AddressSpace::unmap`] that waits neither for the map lock nor for another operation, and whose handlers do not wait for
    /// locks. Hardware is waited for.
    ///
    /// # Errors
    /// [`MapError::WouldBlock`] and [`InvalidateError::WouldBlock`] besides.
    pub fn try_unmap(&self, range: Range) -> Result<(), MapError> {
        change(&self.space, range, Change::Unmap, Lock::Plain(Mode::Try))
    }

    /// [`AddressSpace::discard`] that does not wait, as [`AddressSpace::try_unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::try_unmap`].
    pub fn try_discard(&self, range: Range) -> Result<(), MapError> {
        change(&self.space, range, Change::Discard, Lock::Plain(Mode::Try))
    }

    /// [`AddressSpace::protect`] that does not wait, as [`AddressSpace::try_unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::try_unmap`].
    pub fn try_protect(&self, range: Range, rights: Rights) -> Result<(), MapError> {
        change(
            &self.space,
            range,
            Change::Protect(rights),
            Lock::Plain(Mode::Try),
        )
    }

    /// [`AddressSpace::remap`] that does not wait, as [`AddressSpace::try_unmap`].
    ///
    /// # Errors
    /// As [`AddressSpace::try_unmap`].
    pub fn try_remap(&self, range: Range, to: Addr) -> Result<Range, MapError> {
        let to = target(range, to)?;
        change(
            &self.space,
            range,
            Change::Remap(to),
            Lock::Plain(Mode::Try),
        )
        .map(|()| to)
    }

    /// Walks the page table, for a fault between begin and retry. `None`: nothing is mapped at `addr`, or the memory shows
    /// no page table.
    pub fn translate(&self, addr: Addr) -> Option<Translation> {
        self.space.memory.as_ref()?.translate(addr)
    }

    /// Bytes of memory in quarantine.
    pub fn quarantined_bytes(&self) -> u64 {
        self.space.table.quarantined()
    }
}

fn target(range: Range, to: Addr) -> Result<Range, MapError> {
    let len = u64::try_from(range.len()).map_err(|_| RangeError::Overflow {
        start: to,
        len: u64::MAX,
    })?;
    Ok(Range::new(to, len)?)
}

impl MapWriteGuard<'_> {
    /// [`AddressSpace::map`] under the lock.
    ///
    /// # Errors
    /// As there.
    pub fn map(&self, what: Map) -> Result<Range, MapError> {
        map(self.space, what, Lock::Guard)
    }

    /// [`AddressSpace::unmap`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn unmap(&self, range: Range) -> Result<(), MapError> {
        change(self.space, range, Change::Unmap, Lock::Guard)
    }

    /// [`AddressSpace::discard`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn discard(&self, range: Range) -> Result<(), MapError> {
        change(self.space, range, Change::Discard, Lock::Guard)
    }

    /// [`AddressSpace::protect`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn protect(&self, range: Range, rights: Rights) -> Result<(), MapError> {
        change(self.space, range, Change::Protect(rights), Lock::Guard)
    }

    /// [`AddressSpace::remap`] with the lock kept throughout.
    ///
    /// # Errors
    /// As there.
    pub fn remap(&self, range: Range, to: Addr) -> Result<Range, MapError> {
        let to = target(range, to)?;
        change(self.space, range, Change::Remap(to), Lock::Guard).map(|()| to)
    }
}
