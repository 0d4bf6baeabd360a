//! The operations: a span is claimed, the engine runs, the table follows the pages.

use super::table::{Found, Mappings, Sick, State, Then, Vma};
use super::{Map, MapError};
use crate::addr::{Addr, PageSize, PageSizes, Range};
use crate::context::{self, OpenInvalidation};
use crate::engine::{self, Failed, InvalidateError, Mode, What};
use crate::lock::Leave;
use crate::memory::{Memory, MemoryError, Rights};
use crate::notifier::Cause;
use crate::plan::Pieces;
use crate::primitive::Arc;
use crate::segment::SegmentInner;
use crate::space::Space;
use crate::tlb::{Device, Health};

/// How the caller holds the map lock.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Not: it is taken to claim the span, for write where the operation edits the map, else for read.
    Plain(Mode),
    /// For write, throughout.
    Guard,
}

/// An operation on mapped pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Unmap,
    Discard,
    Protect(Rights),
    Remap(Range),
    /// What became of pages in quarantine, once more: the unmap that failed, or nothing.
    Recover,
}

impl Change {
    fn cause(self) -> Cause {
        match self {
            Self::Unmap | Self::Recover => Cause::Unmap,
            Self::Discard => Cause::Discard,
            Self::Protect(_) => Cause::Protect,
            Self::Remap(_) => Cause::Remap,
        }
    }

    /// Whether it edits the map, as against the pages behind it.
    fn edits(self) -> bool {
        !matches!(self, Self::Discard | Self::Protect(_))
    }

    /// Whether the addresses go: what segments allow.
    pub(super) fn unmaps(self) -> bool {
        matches!(self, Self::Unmap | Self::Recover)
    }
}

fn memory(space: &Space) -> Result<(&dyn Memory, Range), MapError> {
    match (&space.memory, space.table.arena) {
        (Some(memory), Some(arena)) => Ok((&**memory, arena)),
        _ => Err(MapError::NoMemory),
    }
}

/// What an attempt to claim spans comes to.
enum Claim<T> {
    Claimed(T),
    /// Others have claimed something of this.
    Busy(Range),
}

/// Runs `claim` with the table locked until it claims spans; waits while they are claimed by others.
fn claim<T>(
    space: &Space,
    (lock, edits): (Lock, bool),
    call: &'static str,
    range: Range,
    mut claim: impl FnMut(&mut Mappings) -> Result<Claim<T>, MapError>,
) -> Result<T, MapError> {
    let busy = || MapError::WouldBlock { range };
    loop {
        let map_lock = &space.map_lock;
        let held = match lock {
            Lock::Plain(Mode::Blocking) if edits => Some(map_lock.write(call)?),
            Lock::Plain(Mode::Blocking) => Some(map_lock.read(call)?),
            Lock::Plain(Mode::Try) if edits => Some(map_lock.try_write(call)?.ok_or_else(busy)?),
            Lock::Plain(Mode::Try) => Some(map_lock.try_read(call)?.ok_or_else(busy)?),
            Lock::Guard => {
                context::wait_refusal(call)?;
                None
            }
        };
        let attempt = {
            let mut mappings = space.table.mappings.lock();
            if mappings.closed {
                return Err(MapError::Exiting);
            }
            claim(&mut mappings)?
        };
        let others = match attempt {
            Claim::Claimed(claimed) => return Ok(claimed),
            Claim::Busy(others) => others,
        };
        drop(held);
        if lock == Lock::Plain(Mode::Try) {
            return Err(busy());
        }
        space
            .events
            .wait(None, || !space.table.mappings.lock().is_claimed(others));
    }
}

fn unclaim<T>(
    space: &Space,
    spans: [Option<Range>; 2],
    edit: impl FnOnce(&mut Mappings) -> T,
) -> T {
    let mut mappings = space.table.mappings.lock();
    let edited = edit(&mut mappings);
    for span in spans.into_iter().flatten() {
        if let Some(at) = mappings.spans.iter().position(|one| *one == span) {
            mappings.spans.swap_remove(at);
        }
    }
    drop(mappings);
    space.events.ended();
    edited
}

/// Where to map: `Busy` if others are at work there.
fn place(
    mappings: &Mappings,
    what: &Map,
    asked: Range,
    arena: Range,
) -> Result<Claim<Range>, MapError> {
    let range = match what.at {
        None => mappings
            .find(what.len, what.page, arena)
            .ok_or(MapError::NoRoom {
                len: what.len,
                arena,
            })?,
        Some(_) if mappings.is_claimed(asked) => return Ok(Claim::Busy(asked)),
        Some(_) => asked,
    };
    match mappings.overlapping(range).next() {
        None => Ok(Claim::Claimed(range)),
        Some((by, vma)) => Err(match vma.state {
            State::Mapped => MapError::Occupied { range, by },
            State::Quarantined { .. } => MapError::InQuarantine {
                range,
                quarantined: by,
            },
        }),
    }
}

/// Checks what was asked for, as far as that does not depend on the table: the range if it were at the given address.
fn check_map(what: &Map, arena: Range) -> Result<Range, MapError> {
    let asked = Range::new(what.at.unwrap_or(arena.start()), what.len)?;
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
    Ok(asked)
}

pub(super) fn map(space: &Space, what: Map, lock: Lock) -> Result<Range, MapError> {
    let (memory, arena) = memory(space)?;
    if !memory.page_sizes().contains(what.page.into()) {
        return Err(MemoryError::PageSize { page: what.page }.into());
    }
    let asked = check_map(&what, arena)?;
    let range = claim(space, (lock, true), "map", asked, |mappings| {
        let place = place(mappings, &what, asked, arena)?;
        if let Claim::Claimed(range) = place {
            mappings.spans.push(range);
        }
        Ok(place)
    })?;
    let own = space.sources.own([Some(range), None]);
    let result = memory.map(range, what.page, what.rights);
    if let Some(own) = own {
        own.changed();
    }
    unclaim(space, [Some(range), None], |mappings| {
        if result.is_ok() {
            if what.at.is_none() && what.page == PageSize::FourKiB {
                mappings.hint = range.last().get().saturating_add(1);
            }
            let vma = Vma {
                last: range.last(),
                page: what.page,
                sizes: what.page.into(),
                rights: what.rights,
                state: State::Mapped,
                segment: None,
            };
            mappings.by_start.insert(range.start(), vma);
        }
    });
    result?;
    Ok(range)
}

/// Takes addresses for a segment, which `make` makes for them. No page changes, so no span is needed.
pub(crate) fn map_segment(
    space: &Space,
    len: u64,
    at: Option<Addr>,
    lock: Lock,
    make: impl FnOnce(Range) -> Arc<SegmentInner>,
) -> Result<Arc<SegmentInner>, MapError> {
    let (_, arena) = memory(space)?;
    let what = Map {
        at,
        ..Map::anonymous(len)
    };
    let asked = check_map(&what, arena)?;
    let mut make = Some(make);
    claim(space, (lock, true), "map_segment", asked, |mappings| {
        Ok(match place(mappings, &what, asked, arena)? {
            Claim::Busy(others) => Claim::Busy(others),
            Claim::Claimed(range) => {
                let make = make.take().expect("a claim is made once");
                let segment = make(range);
                let vma = Vma {
                    last: range.last(),
                    page: PageSize::FourKiB,
                    sizes: PageSizes::FOUR_KIB,
                    rights: Rights::empty(),
                    state: State::Mapped,
                    segment: Some(segment.clone()),
                };
                mappings.by_start.insert(range.start(), vma);
                Claim::Claimed(segment)
            }
        })
    })
}

/// Changes pages, and puts the shares of the segments that went with them.
pub(super) fn change(
    space: &Arc<Space>,
    range: Range,
    what: Change,
    lock: Lock,
) -> Result<(), MapError> {
    let mut ended = Vec::new();
    let result = run(space, range, (what, None), lock, &mut ended);
    // Not before the span was given back: a release may want to map there.
    for segment in ended {
        if lock == Lock::Plain(Mode::Try) {
            segment.give();
        } else {
            segment.put();
        }
    }
    result
}

/// Unmaps what is left of `segment` in `range`, and leaves its share to the caller.
pub(crate) fn unmap_part_of(
    segment: &Arc<SegmentInner>,
    space: &Arc<Space>,
    range: Range,
    lock: Lock,
) -> Result<(), MapError> {
    let what = (Change::Unmap, Some(segment));
    run(space, range, what, lock, &mut Vec::new())
}

/// The operation, on nothing but a given segment where there is one.
fn run(
    space: &Arc<Space>,
    range: Range,
    (change, only): (Change, Option<&Arc<SegmentInner>>),
    lock: Lock,
    ended: &mut Vec<Arc<SegmentInner>>,
) -> Result<(), MapError> {
    let (memory, arena) = memory(space)?;
    space.registry.expect(range);
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
    let (found, spans) = claim(
        space,
        (lock, change.edits()),
        "change a mapping",
        range,
        |mappings| {
            // Between the look for its parts and this claim somebody may have unmapped it, and mapped something else there (R14).
            if let Some(only) = only
                && !mappings.overlapping(range).all(|(_, vma)| vma.is_of(only))
            {
                let hole = range.start();
                return Err(MapError::NotMapped { range, hole });
            }
            let found = mappings.check(range, change)?;
            // A segment goes as a whole, whatever part of it is unmapped.
            let whole = found.segments.iter().map(|segment| segment.range);
            let hull = whole.fold(range, Range::hull);
            let spans = [Some(hull), target];
            if let Some(busy) = spans
                .into_iter()
                .flatten()
                .find(|one| mappings.is_claimed(*one))
            {
                return Ok(Claim::Busy(busy));
            }
            if let Some(to) = target {
                let by = mappings.overlapping(to).map(|(whole, _)| whole).next();
                if let Some(by) = by.or_else(|| to.overlaps(range).then_some(range)) {
                    return Err(MapError::Occupied { range: to, by });
                }
            }
            mappings.spans.extend(spans.into_iter().flatten());
            if found.large {
                mappings.set_apart(range);
            }
            Ok(Claim::Claimed((found, spans)))
        },
    )?;
    // What callbacks put off may want this span, or a map lock whose holder waits for it: it runs when the span is given back.
    let _leave = Leave;
    let open = OpenInvalidation::enter();
    let Found {
        segments,
        memory: has_memory,
        large,
    } = found;
    let mode = match lock {
        Lock::Plain(mode) => mode,
        Lock::Guard => Mode::Blocking,
    };
    let walk: &dyn Fn(_, &mut dyn FnMut(_, _)) = &|range, each| space.table.pieces(range, each);
    let what = What {
        pieces: if large {
            Pieces::Of(walk)
        } else {
            Pieces::All(PageSizes::FOUR_KIB)
        },
        cause: change.cause(),
        segments: &segments,
    };
    let result = engine::run(space, range, what, mode, || {
        let own = space.sources.own([Some(range), target]);
        if large {
            space.table.mappings.lock().cutting(range);
        }
        match change {
            _ if !has_memory => return Ok(()),
            Change::Unmap | Change::Recover => memory.unmap(range)?,
            Change::Discard => memory.discard(range)?,
            Change::Protect(rights) => memory.protect(range, rights)?,
            Change::Remap(to) => memory.remap(range, to)?,
        }
        if let Some(own) = &own {
            own.changed();
        }
        Ok(())
    });
    let gone = unclaim(space, spans, |mappings| {
        finish(mappings, (range, large), change, &result, &segments)
    });
    drop(open);
    drop(gone);
    ended.extend(segments.into_iter().filter(|one| one.is_over()));
    result.map_err(|failed| failed.error.into())
}

/// The table after the phases: as the pages are now.
fn finish(
    mappings: &mut Mappings,
    (range, large): (Range, bool),
    change: Change,
    result: &Result<(), Failed<'_>>,
    segments: &[Arc<SegmentInner>],
) -> Vec<Vma> {
    let mut gone = Vec::new();
    mappings.split(range);
    match result.as_ref().map_err(|failed| (&failed.error, failed)) {
        Ok(()) | Err((InvalidateError::HandlerPanicked { changed: true, .. }, _)) => {
            if large {
                mappings.has_cut(range);
            }
            match change {
                Change::Unmap | Change::Recover => gone = mappings.remove(range),
                Change::Discard => {}
                Change::Protect(rights) => mappings.each(range, |(_, vma)| vma.rights = rights),
                Change::Remap(to) => move_mappings(mappings, range, to),
            }
        }
        Err((
            error @ (InvalidateError::Quarantined { .. }
            | InvalidateError::NotDrained { .. }
            | InvalidateError::HandlerPanicked { .. }
            | InvalidateError::Change(MemoryError::Panicked)),
            failed,
        )) => {
            let then = if change.unmaps() {
                Then::Unmap
            } else {
                Then::Keep
            };
            mappings.each(range, |(_, vma)| vma.state = State::Quarantined { then });
            let mut devices: Vec<Device> = failed.devices().cloned().collect();
            if let InvalidateError::Quarantined { device, .. } = error {
                devices.push(device.clone());
            }
            let contexts = segments.iter().map(|segment| &segment.device);
            let sick = contexts.filter(|device| device.health() == Health::Quarantined);
            devices.extend(sick.cloned());
            mappings.sick.push(Sick {
                range,
                devices,
                registrations: failed.registrations().cloned().collect(),
                for_good: matches!(error, InvalidateError::Change(MemoryError::Panicked)),
            });
        }
        Err(_) => {}
    }
    gone
}

fn move_mappings(mappings: &mut Mappings, range: Range, to: Range) {
    let mut moved = Vec::new();
    mappings.each(range, |(start, vma)| moved.push((*start, vma.clone())));
    drop(mappings.remove(range));
    let shift = |addr: Addr| {
        let offset = addr.get() - range.start().get();
        Addr::new(to.start().get() + offset)
    };
    for (start, mut vma) in moved {
        vma.last = shift(vma.last);
        // A page that no longer lies on its own border has been split by the move.
        if !shift(start).is_aligned(vma.page) {
            vma.page = PageSize::FourKiB;
            vma.sizes = PageSizes::FOUR_KIB;
        }
        mappings.by_start.insert(shift(start), vma);
    }
}

/// Gives back what was in quarantine for devices that are healthy again: an unmap that had failed is done once more, all of
/// it; anything else leaves the pages as they are.
pub(crate) fn recover(space: &Arc<Space>) {
    for sick in space.table.recovered() {
        let range = sick.range;
        let unmap = {
            let mut mappings = space.table.mappings.lock();
            let unmap = mappings
                .overlapping(range)
                .any(|(_, vma)| vma.state == State::Quarantined { then: Then::Unmap });
            if !unmap {
                mappings.each(range, |(_, vma)| vma.state = State::Mapped);
            }
            unmap
        };
        if !unmap {
            continue;
        }
        let lock = Lock::Plain(Mode::Blocking);
        if let Err(error) = change(space, range, Change::Recover, lock) {
            tracing::warn!(space = space.id, %range, %error, "not given back from quarantine");
            let mut mappings = space.table.mappings.lock();
            // Unless it has gone into quarantine anew.
            if !mappings.sick.iter().any(|one| one.range == range) {
                mappings.sick.push(sick);
            }
        }
    }
}
