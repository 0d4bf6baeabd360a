//! Invalidations that somebody outside drives.

use super::{InvalidateError, Invalidation, Mode, What};
use crate::addr::Range;
use crate::context;
use crate::notifier::{Cause, Outcome};
use crate::plan::Pieces;

/// An invalidation that somebody outside drives: the pages change between [`begin`](crate::AddressSpace::begin_invalidation)
/// and [`ExternalInvalidation::end`]. Bound to its thread; on it everything counts as inside a callback meanwhile.
/// Dropping it counts as [`Outcome::Changed`].
pub struct ExternalInvalidation<'s> {
    invalidation: Invalidation<'s>,
}

impl std::fmt::Debug for ExternalInvalidation<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Of one that hits nothing it says nothing of its own.
        let busy = self.invalidation.desk.as_ref().filter(|desk| desk.busy);
        f.debug_tuple("ExternalInvalidation")
            .field(&busy.map(|desk| desk.core))
            .finish()
    }
}

impl ExternalInvalidation<'_> {
    /// The pages have changed, or not.
    ///
    /// # Errors
    /// [`InvalidateError::HandlerPanicked`](crate::InvalidateError::HandlerPanicked) if an `end` did; everybody else has been told.
    pub fn end(mut self, outcome: Outcome) -> Result<(), InvalidateError> {
        let ended = self.invalidation.end(outcome);
        let panicked = ended.map_or(Ok(()), |ended| ended.panic_at_end());
        panicked.map_err(|error| error.with(None))
    }
}

impl crate::AddressSpace {
    /// Shoots `range` down because somebody else is about to change its pages: on return no device reaches them, until the
    /// guard is ended. Also for spaces without process memory. Legal with the map lock held.
    ///
    /// What callbacks have put off, releases above all, runs on this thread when the guard is dropped, and an error may hold the last
    /// count of a device: not for a thread that holds the allocator's lock, as a hook of an allocator does (R18). Such a one is a
    /// [`Source`](crate::Source): what [`Sink::begin`](crate::Sink::begin) gives hands all that over, and frees nothing.
    ///
    /// # Errors
    /// The pages must not change then. [`Refused`](crate::Refused) inside a callback and with a `NotifierLock` held;
    /// [`InvalidateError::Exiting`] once exit has begun.
    pub fn begin_invalidation(
        &self,
        range: Range,
        cause: Cause,
    ) -> Result<ExternalInvalidation<'_>, InvalidateError> {
        self.external(range, cause, Mode::Blocking)
    }

    /// The same, where handlers may not wait for locks.
    ///
    /// # Errors
    /// [`InvalidateError::WouldBlock`](crate::InvalidateError::WouldBlock) besides.
    pub fn try_begin_invalidation(
        &self,
        range: Range,
        cause: Cause,
    ) -> Result<ExternalInvalidation<'_>, InvalidateError> {
        self.external(range, cause, Mode::Try)
    }

    #[inline]
    fn external(
        &self,
        range: Range,
        cause: Cause,
        mode: Mode,
    ) -> Result<ExternalInvalidation<'_>, InvalidateError> {
        context::wait_refusal("begin_invalidation")?;
        if self.space.exit_has_begun() {
            return Err(InvalidateError::Exiting { range });
        }
        let what = What {
            range,
            pieces: Pieces::Unknown,
            cause,
            segments: &[],
        };
        self.space.sources.others_change();
        let begun = Invalidation::begin(&self.space, what, mode);
        let mut invalidation = begun.map_err(|failed| failed.error)?;
        if self.space.exit_has_begun() {
            // Exit may have detached everybody before this walked the index, with a device that does not answer. Then the walk has
            // seen that, and the mark was set before.
            invalidation.end(Outcome::Unchanged);
            return Err(InvalidateError::Exiting { range });
        }
        Ok(ExternalInvalidation { invalidation })
    }
}
