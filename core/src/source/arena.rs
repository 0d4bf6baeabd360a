//! Addresses of an arena that others unmap stay the arena's.
//!
//! The space does not know of a foreign `munmap`, and goes on counting the addresses as mapped. Were they free, a later `mmap` of
//! anybody's might be given them, and the space's own operations would destroy it. So they are reserved again, without access: at once by
//! whoever makes the call, or later by whoever is told of it, if nobody was faster. The space's `unmap` gives them back.
//!
//! A child by fork has them reserved as well, unlike the arena: to keep a mapping without memory out of children would cost whoever
//! unmaps as much again as the unmapping.

use super::gate;
use crate::addr::Range;

const RESERVED: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

fn map(range: Range, how: i32) -> Result<usize, i32> {
    let [start, len] = [range.start().get() as usize, range.len() as usize];
    let flags = (RESERVED | how) as usize;
    // SAFETY: somebody unmaps this range, or has: it is no memory that anybody relies on.
    unsafe { gate::own_call(libc::SYS_mmap, [start, len, 0, flags, usize::MAX, 0]) }
}

/// Reserves what of `range` lies in an arena, where nothing is mapped. What somebody has mapped there meanwhile stays. Whether all of it
/// is reserved: then nothing is there that anybody has mapped.
pub(super) fn reserve_hole(range: Range, arenas: impl Iterator<Item = Range>) -> bool {
    let mut reserved = 0;
    for part in arenas.filter_map(|arena| arena.intersect(range)) {
        if map(part, libc::MAP_FIXED_NOREPLACE).is_ok() {
            reserved += part.len();
        }
    }
    reserved == range.len()
}

/// An unmap that failed.
pub(super) struct NotUnmapped {
    pub(super) errno: i32,
    /// A part of it is gone.
    pub(super) half: bool,
}

/// Unmaps `whole`: inside of an arena by a reservation in the place of what was there, so that it is nobody else's at any time.
///
/// # Safety
/// As `munmap`.
pub(super) unsafe fn unmap(
    whole: Range,
    arenas: impl Iterator<Item = Range> + Clone,
) -> Result<usize, NotUnmapped> {
    let failed = |half| move |errno| NotUnmapped { errno, half };
    let mut rest = Some(whole);
    while let Some(range) = rest {
        let (start, last) = (range.start(), range.last());
        let inside = arenas.clone().find(|arena| arena.holds(start));
        let end = match inside {
            Some(arena) => arena.last().min(last),
            None => {
                let behind = arenas.clone().map(|arena| arena.start());
                let next = behind.filter(|one| *one > start && *one <= last).min();
                next.map_or(last, |next| (next.get() - 1).into())
            }
        };
        let part = Range::inclusive(start, end).expect("it starts before it ends");
        let gone = match inside {
            Some(_) => map(part, libc::MAP_FIXED),
            None => {
                let [start, len] = [start.get() as usize, part.len() as usize];
                // SAFETY: the caller's promise.
                unsafe { gate::own_call(libc::SYS_munmap, [start, len, 0, 0, 0, 0]) }
            }
        };
        gone.map_err(failed(range != whole))?;
        rest = end
            .checked_add(1)
            .and_then(|next| Range::inclusive(next, last).ok());
    }
    Ok(0)
}
