//! Making a call in its caller's place: as it is, unless it would leave a hole in an arena.

use super::super::arena;
use super::super::gate;
use super::call::{Call, Changes, pages};
use crate::addr::Range;

/// Arenas of the spaces that are watched.
pub(super) trait Arenas: Iterator<Item = Range> + Clone {}
impl<I: Iterator<Item = Range> + Clone> Arenas for I {}

impl Call {
    /// Makes the call.
    pub(super) fn perform(&self, changes: &Changes, arenas: impl Arenas) -> Result<usize, i32> {
        let inside = |range: Range| arenas.clone().any(|arena| arena.overlaps(range));
        if !changes.iter().any(|(range, _)| inside(range)) {
            return self.as_it_is(self.args);
        }
        match self.nr {
            libc::SYS_munmap => match pages(self.args[0], self.args[1]) {
                Some(range) => self.unmap(range, arenas),
                None => self.as_it_is(self.args),
            },
            libc::SYS_mremap => self.move_away(changes, arenas),
            libc::SYS_shmdt => {
                let result = self.as_it_is(self.args)?;
                for (range, _) in changes.iter() {
                    arena::reserve_hole(range, arenas.clone());
                }
                Ok(result)
            }
            _ => self.as_it_is(self.args),
        }
    }

    fn unmap(&self, range: Range, arenas: impl Arenas) -> Result<usize, i32> {
        // SAFETY: what a thread of this process asked for.
        let result = unsafe { arena::unmap(range, arenas) };
        result.map_err(|failed| {
            self.half.set(failed.half);
            failed.errno
        })
    }

    #[cold]
    fn move_away(&self, changes: &Changes, arenas: impl Arenas) -> Result<usize, i32> {
        let [at, old, new, flags, to, _] = self.args;
        let has = |flag: i32| flags & flag as usize != 0;
        let (fixed, keeps) = (has(libc::MREMAP_FIXED), has(libc::MREMAP_DONTUNMAP));
        let (old, new) = (pages(at, old), pages(at, new));
        let (Some(whole), Some(kept), false) = (old, new, keeps) else {
            return self.as_it_is(self.args);
        };
        if !fixed && kept.last() < whole.last() {
            // As long as it is to be, so that the kernel has looked at it. Then the rest goes.
            let args = [at, kept.len() as usize, kept.len() as usize, flags, 0, 0];
            let result = self.as_it_is(args)?;
            let rest = kept.last().get() + 1;
            let rest = Range::inclusive(rest, whole.last()).map_err(|_| libc::EINVAL)?;
            self.unmap(rest, arenas)?;
            return Ok(result);
        }
        if fixed && kept == whole {
            // The old addresses stay mapped until they are reserved. Not every mapping can be moved so.
            let (flags, len) = (
                flags | libc::MREMAP_DONTUNMAP as usize,
                whole.len() as usize,
            );
            let args = [at, len, len, flags, to, 0];
            if let Ok(result) = self.as_it_is(args) {
                // They are empty: if they stay so nothing is wrong.
                let _ = self.unmap(whole, arenas);
                return Ok(result);
            }
        }
        let result = self.as_it_is(self.args)?;
        if result != at {
            for (range, _) in changes.iter() {
                arena::reserve_hole(range, arenas.clone());
            }
        }
        Ok(result)
    }

    fn as_it_is(&self, mut args: [usize; 6]) -> Result<usize, i32> {
        if let Some(vectors) = self.own_vectors() {
            args[1] = vectors;
        }
        // SAFETY: what a thread of this process asked for, with its arguments: as sound, or not, as its own call would be.
        unsafe { gate::own_call(self.nr, args) }
    }
}
