//! Invalidations that somebody outside drives.

use super::{Ended, Failed, InvalidateError, Invalidation, Mode, What};
use crate::addr::Range;
use crate::context;
use crate::lock::Leave;
use crate::notifier::{Cause, Outcome};
use crate::plan::Pieces;
use crate::primitive::Arc;
use crate::space::Space;

/// An invalidation that somebody outside drives: the pages change between [`begin`](crate::AddressSpace::begin_invalidation)
/// and [`ExternalInvalidation::end`]. Bound to its thread; on it everything counts as inside a callback meanwhile.
/// Dropping it counts as [`Outcome::Changed`].
pub struct ExternalInvalidation<'s> {
    // In this order: then what was put off runs.
    invalidation: Invalidation<'s>,
    _leave: Leave,
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
        match self.invalidation.end(outcome) {
            None => Ok(()),
            Some(ended) => told(ended),
        }
    }
}

/// Goes on with one that has been claimed.
#[inline(never)]
fn of_those_hit<'s>(
    claimed: &mut Invalidation<'s>,
    space: &'s Arc<Space>,
    range: Range,
    cause: Cause,
    mode: Mode,
) -> Result<(), Failed<'s>> {
    let what = What {
        pieces: Pieces::UNKNOWN,
        cause,
        segments: &[],
    };
    claimed.of_those_hit(space, range, what, mode)
}

/// What was put off runs when it is no longer open.
#[cold]
fn failed(claimed: Invalidation<'_>, failed: Failed<'_>) -> InvalidateError {
    drop(claimed);
    let _leave = Leave;
    failed.error
}

#[cold]
fn too_late(mut this: ExternalInvalidation<'_>, range: Range) -> InvalidateError {
    this.invalidation.end(Outcome::Unchanged);
    InvalidateError::Exiting { range }
}

#[cold]
fn told(ended: Ended<'_>) -> Result<(), InvalidateError> {
    ended.panic_at_end().map_err(|error| error.with(None))
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
    #[inline]
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
    #[inline]
    pub fn try_begin_invalidation(
        &self,
        range: Range,
        cause: Cause,
    ) -> Result<ExternalInvalidation<'_>, InvalidateError> {
        self.external(range, cause, Mode::Try)
    }

    fn external(
        &self,
        range: Range,
        cause: Cause,
        mode: Mode,
    ) -> Result<ExternalInvalidation<'_>, InvalidateError> {
        self.space.registry.expect(range);
        context::wait_refusal("begin_invalidation")?;
        if self.space.exit_has_begun() {
            return Err(InvalidateError::Exiting { range });
        }
        self.space.sources.others_change();
        let mut invalidation = Invalidation::claim(&self.space, range);
        if !invalidation.hits_nothing(range)
            && let Err(error) = of_those_hit(&mut invalidation, &self.space, range, cause, mode)
        {
            return Err(failed(invalidation, error));
        }
        let this = ExternalInvalidation {
            invalidation,
            _leave: Leave,
        };
        // Exit may have detached everybody before this walked the index, with a device that does not answer. Then the walk has seen that,
        // and the mark was set before.
        if self.space.exit_has_begun() {
            return Err(too_late(this, range));
        }
        Ok(this)
    }
}
