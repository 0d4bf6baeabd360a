//! The operations: a span is claimed, the engine runs, the table follows the pages.

use super::table::{Mappings, Sick, State, Then, Vma};
use super::{Map, MapError};
use crate::addr::{Addr, PageSize, Range};
use crate::context;
use crate::engine::{self, InvalidateError, Mode};
use crate::memory::{Memory, MemoryError, Rights};
use crate::notifier::Cause;
use crate::primitive::Arc;
use crate::space::Space;
use crate::tlb::{Device, Health};

/// How the caller holds the map lock.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Lock {
    /// Not: it is taken to claim the span.
    Plain(Mode),
    /// For write, throughout.
    Guard,
}

/// An operation on mapped pages.
#[derive(Clone, Copy)]
pub(super) enum Change {
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

pub(super) fn map(space: &Space, what: Map, lock: Lock) -> Result<Range, MapError> {
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

pub(super) fn change(
    space: &Arc<Space>,
    range: Range,
    change: Change,
    lock: Lock,
) -> Result<(), MapError> {
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
