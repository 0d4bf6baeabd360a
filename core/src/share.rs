//! One registration for all segments of a driver in one space: get and put.
//!
//! The first get makes and inserts it, each segment holds a share, the last put gives it up, wherever it is called. Whether a get
//! that meets the last put joins or makes a new one is decided by the state word alone (R31).

use std::ops::Deref;
use std::sync::Arc as StdArc;

use crate::AddressSpace;
use crate::addr::Range;
use crate::notifier::Notifier;
use crate::primitive::atomic::{AtomicBool, Ordering};
use crate::registration::state::{Detach, StateWord};
use crate::registration::{self, InsertError, Registration, Target, UnregisterError, Unregistered};
use crate::space::Space;

/// A segment's share of a registration, which it derefs to. Dropping it is a put that does not wait.
#[derive(Debug)]
pub struct Share {
    registration: Registration,
    /// It has been given back.
    given: AtomicBool,
}

impl AddressSpace {
    /// A share of the registration that is known under `key` in this space; made by `make` (range, handler, devices) if there is
    /// none. `make` runs with the table of shared registrations locked: it may not call this again.
    ///
    /// # Errors
    /// As [`Prepared::insert`](crate::Prepared::insert).
    pub fn share(
        &self,
        key: u64,
        make: impl FnOnce() -> (Range, StdArc<dyn Notifier>, Vec<Target>),
    ) -> Result<Share, InsertError> {
        let inner = Space::share(&self.space, key, make)?;
        Ok(Share {
            registration: Registration {
                inner,
                owned: false,
            },
            given: AtomicBool::new(false),
        })
    }
}

impl Share {
    /// Gives the share back. The last one gives the registration up, as [`Registration::unregister`] does and from the same
    /// places; for the others, and the second time, it is [`Unregistered::AlreadyGone`] at once. Where exit was first that
    /// is the answer too, once no callback runs.
    ///
    /// # Errors
    /// As [`Registration::unregister`]; nothing has changed then.
    pub fn put(&self) -> Result<Unregistered, UnregisterError> {
        registration::give_up(&self.registration.inner, |word| {
            // AcqRel: of two puts at once one counts.
            if self.given.swap(true, Ordering::AcqRel) {
                Detach::Shared
            } else {
                word.put()
            }
        })
    }
}

impl Share {
    /// Gives it back without a wait, once.
    pub(crate) fn give(&self) {
        if !self.given.swap(true, Ordering::AcqRel) {
            self.registration.drop_by(StateWord::put);
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give();
    }
}

impl Deref for Share {
    type Target = Registration;
    fn deref(&self) -> &Registration {
        &self.registration
    }
}
