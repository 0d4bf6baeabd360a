//! Giving a registration up, from anywhere: what may wait waits, what may not is completed by the last to leave.

use super::state::{Detach, State, StateWord};
use super::{Inner, UnregisterError, Unregistered};
use crate::context::{self, Place};
use crate::primitive::Arc;
use crate::recorder::Kind;
use crate::space::Space;

/// The one way of giving a registration up: by unregister and by put.
pub(crate) fn give_up(
    inner: &Arc<Inner>,
    detach: impl FnOnce(&StateWord) -> Detach,
) -> Result<Unregistered, UnregisterError> {
    Ok(begin_giving_up(inner, detach, false)?.finish(inner))
}

/// What giving a registration up has begun.
pub(super) enum Begun {
    /// There is no more to it.
    Over(Unregistered),
    /// It is detached, by this call or before, and to be waited for.
    Detached { first: bool },
    /// It is detached by this call, out of use, and this thread's to release.
    Mine,
}

/// `together` with others, so that they leave the index at once: then what is out of use waits for its release with them.
pub(super) fn begin_giving_up(
    inner: &Arc<Inner>,
    detach: impl FnOnce(&StateWord) -> Detach,
    together: bool,
) -> Result<Begun, UnregisterError> {
    let space = &inner.space;
    let place = context::place(inner.key());
    let inside = !matches!(place, Place::Plain | Place::MapLockHeld);
    // Whoever waits inside a callback may wait for itself (R11), or for one that waits for it (R12).
    let defers = inside
        && !(planted!("r11") && place == Place::InsideOwnCallback)
        && !(planted!("r12") && place == Place::InsideOtherCallback);
    if !inside {
        context::wait_refusal("unregister")?;
    }
    let detached = detach(&inner.word);
    match detached {
        Detach::AlreadyUnregistered => {
            return Err(UnregisterError::AlreadyUnregistered { range: inner.range });
        }
        Detach::NotInserted | Detach::Shared => {
            return Ok(Begun::Over(Unregistered::AlreadyGone));
        }
        Detach::Complete | Detach::InUse | Detach::Already => {}
    }
    let mine = detached == Detach::Complete && !together && place == Place::Plain;
    if mine {
        // Those who wait for its callbacks.
        space.events.ended_by_rmw();
    } else if detached == Detach::Complete {
        Space::complete_one_of_many(inner);
    }
    let first = detached != Detach::Already;
    if first {
        space.stats.unregister(place);
        space
            .recorder
            .record(Kind::Unregister, inner.id(), place as u64, 0);
    }
    if mine {
        return Ok(Begun::Mine);
    }
    Ok(match (defers, first) {
        (false, first) => Begun::Detached { first },
        (true, true) => Begun::Over(Unregistered::Deferred),
        (true, false) => Begun::Over(Unregistered::AlreadyGone),
    })
}

impl Begun {
    pub(super) fn finish(self, inner: &Arc<Inner>) -> Unregistered {
        let space = &inner.space;
        let first = match self {
            Self::Over(unregistered) => return unregistered,
            Self::Mine => {
                space.release(inner);
                return Unregistered::Released;
            }
            Self::Detached { first } => first,
        };
        let what = |done| {
            if first {
                done
            } else {
                Unregistered::AlreadyGone
            }
        };
        space.events.wait(None, || inner.word.load().is_quiet());
        if !context::is_outermost() {
            return what(Unregistered::Quiet);
        }
        loop {
            context::leave();
            Space::run_completed(space);
            let released = || inner.word.load().state() == State::Released;
            if released() {
                return what(Unregistered::Released);
            }
            space
                .events
                .wait(None, || released() || space.has_completed());
        }
    }
}
