//! One registration for all segments of a driver in one space: get and put.
//!
//! The first get makes and inserts it, each segment holds a share, the last put gives it up, wherever it is called. Whether a get
//! that meets the last put joins or makes a new one is decided by the state word alone (R31).

use std::ops::Deref;
use std::sync::Arc as StdArc;

use crate::AddressSpace;
use crate::addr::Range;
use crate::notifier::Notifier;
use crate::registration::state::StateWord;
use crate::registration::{
    self, InsertError, OnDrop, Registration, Target, UnregisterError, Unregistered,
};
use crate::space::Space;

/// A segment's share of a registration, which it derefs to. Dropping it is a put that does not wait.
#[derive(Debug)]
pub struct Share {
    registration: Registration,
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
                on_drop: OnDrop::Put,
            },
        })
    }
}

impl Share {
    /// Gives the share back. The last one gives the registration up, as [`Registration::unregister`] does and from the same
    /// places; for the others, and where somebody was first, it is [`Unregistered::AlreadyGone`] at once.
    ///
    /// # Errors
    /// As [`Registration::unregister`]; the share is then given back without a wait.
    pub fn put(mut self) -> Result<Unregistered, UnregisterError> {
        let result = registration::give_up(&self.registration.inner, StateWord::put);
        if result.is_ok() {
            self.registration.on_drop = OnDrop::Nothing;
        }
        result
    }
}

impl Deref for Share {
    type Target = Registration;
    fn deref(&self) -> &Registration {
        &self.registration
    }
}
