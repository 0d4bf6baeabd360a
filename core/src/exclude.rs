//! Exclusive access: pages that the CPU does not reach until it touches one.
//!
//! What a device does to them meanwhile no CPU sees half done, though the device knows no atomics that the CPU's agree with. A touch is not
//! refused but waits: first every device is shot down, as for any other change, and whoever had the pages learns that they are
//! no longer theirs alone; then the CPU goes on. That takes a [`Memory`](crate::Memory) that is told of touches; others refuse.

use std::sync::Arc as StdArc;
use std::time::Duration;

use thiserror::Error;

use crate::addr::Range;
use crate::fault::FaultError;
use crate::lock::NotifierLock;
use crate::memory::{Exclusion, MemoryError};
use crate::notifier::{Cause, Drain, Notifier, Op, Outcome, WouldBlock};
use crate::registration::{InsertError, Registration};
use crate::space::AddressSpace;

/// Why the CPU was not kept away. Nothing has changed then.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum ExcludeError {
    /// The memory is not told of touches, or the pages are not all there.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The space exits, or it is not a place to register.
    #[error(transparent)]
    Insert(#[from] InsertError),
    /// The pages went on changing.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// There is no memory behind the space.
    #[error("no memory is behind the address space: nothing tells of touches")]
    NoMemory,
}

/// Whether nothing has happened to the pages.
struct Holder(NotifierLock<bool>);

impl Notifier for Holder {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        *self.0.lock_for(op)? = false;
        Ok(op.idle())
    }
}

/// Pages that the CPU is kept away from. Dropping it lets the CPU go on.
pub struct Excluded {
    // In this order: nobody is told any more, then nobody is registered.
    _exclusion: Box<dyn Exclusion>,
    holder: StdArc<Holder>,
    registration: Registration,
}

impl std::fmt::Debug for Excluded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Excluded")
            .field("range", &self.range())
            .field("is_held", &self.is_held())
            .finish_non_exhaustive()
    }
}

impl Excluded {
    /// The pages.
    pub fn range(&self) -> Range {
        self.registration.range()
    }

    /// Whether no CPU has touched any of them since, and nothing has changed them: what the device has done until now it has done
    /// alone. Once false it stays so.
    pub fn is_held(&self) -> bool {
        *self.holder.0.lock()
    }
}

impl AddressSpace {
    /// Keeps the CPU away from `range`, whole pages that are mapped, until it touches one of them. Devices reach them as before. Waits
    /// for invalidations of the range, for `time` at most.
    ///
    /// Legal with the map lock held; inside a callback, and with a `NotifierLock` held, it is a typed error. May allocate.
    ///
    /// Only touches through the mappings of this space count: those of other processes, and of system calls on the file behind it, are
    /// not seen. A touch on whose behalf a device cannot be shot down goes on all the same, once the escalation is over; that is logged.
    ///
    /// # Errors
    /// [`MemoryError::TouchNotSeen`] in [`ExcludeError::Memory`] where the memory is not told of touches; the others of
    /// [`ExcludeError`].
    pub fn exclude(&self, range: Range, time: Duration) -> Result<Excluded, ExcludeError> {
        let memory = self.space.memory.as_ref().ok_or(ExcludeError::NoMemory)?;
        let holder = StdArc::new(Holder(NotifierLock::new(false)));
        let registration = self.register(range, holder.clone(), &[])?;
        let pin = self.pin();
        let touched = StdArc::new(move |page: Range| {
            // At its exit a space has shot everything down.
            let Some(space) = pin.upgrade() else { return };
            let shot_down = space
                .begin_invalidation(page, Cause::External)
                .and_then(|invalidation| invalidation.end(Outcome::Changed));
            if let Err(error) = shot_down {
                tracing::error!(%page, %error, "the CPU touches a page that a device may still reach");
            }
        });
        let exclusion = {
            let mut fault = registration.begin(range, time)?;
            loop {
                let exclusion = memory.exclude(range, touched.clone())?;
                let mut held = holder.0.lock();
                if !fault.retry(&held) {
                    *held = true;
                    break exclusion;
                }
                drop(held);
                drop(exclusion);
                fault.again()?;
            }
        };
        Ok(Excluded {
            _exclusion: exclusion,
            holder,
            registration,
        })
    }
}
