//! Begin and retry: installing a translation beside invalidations.
//!
//! ```text
//!   let mut fault = registration.begin(entry, deadline)?;
//!   loop {
//!       let translation = memory.translate(addr);          // may be stale already
//!       let guard = driver_lock.lock();                     // the one that `quiesce` takes
//!       if !fault.retry(&guard) { install; break }          // nothing overlapped since begin
//!       drop(guard);
//!       fault.again()?;                                     // waits for what overlaps
//!   }
//! ```
//! `begin` is given the *whole* entry that is to be installed: a 2 MiB entry beside an unmap of 4 KiB of it has to see that
//! unmap (R34). It waits for overlapping invalidations only, and blocks rather than spins.

use std::time::Duration;

use thiserror::Error;

use crate::addr::Range;
use crate::context::{self, Refused};
use crate::lock::NotifierGuard;
use crate::primitive::{Instant, now};
use crate::registration::state::State;
use crate::registration::{Inner, Registration, Target};
use crate::stats::Counter;
use crate::tlb::{Device, Health};

/// Why a fault cannot be resolved.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum FaultError {
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The entry reaches beyond the registration: invalidations out there would not be seen.
    #[error("the entry {entry} reaches beyond the registration {registration}: use a smaller page")]
    OutsideRegistration {
        /// What was to be installed.
        entry: Range,
        /// What is registered.
        registration: Range,
    },
    /// The registration was given up, or its space has exited.
    #[error("the registration of {registration} is over")]
    Gone {
        /// What was registered.
        registration: Range,
    },
    /// The device is in quarantine: nothing may be installed in it.
    #[error("device {} is in quarantine: recover it first", device.name())]
    DeviceQuarantined {
        /// The device.
        device: Device,
    },
    /// Invalidations of the range went on past the deadline.
    #[error("{entry} was being invalidated for all of {waited:?}")]
    Deadline {
        /// What was to be installed.
        entry: Range,
        /// How long was waited.
        waited: Duration,
    },
}

/// A fault between begin and installation.
#[derive(Debug)]
pub struct Fault<'r> {
    registration: &'r Registration,
    entry: Range,
    seen: u64,
    begun: Option<Instant>,
    time: Duration,
}

impl Registration {
    /// Begins to install `entry`, the whole of it. Waits for invalidations that overlap it, up to `time` over all rounds.
    /// With the map lock held it is legal: an invalidation between start and end never takes that lock.
    ///
    /// # Errors
    /// [`FaultError`].
    #[inline]
    pub fn begin(&self, entry: Range, time: Duration) -> Result<Fault<'_>, FaultError> {
        let inner = &*self.inner;
        inner.space.stats.add(Counter::Faults, 1);
        let word = inner.word.load();
        let calm = word.is_calm_and_asked() && inner.range.contains(entry);
        if calm && context::may_wait() && sick(inner).is_none() {
            return Ok(Fault {
                registration: self,
                entry,
                seen: word.started(),
                begun: None,
                time,
            });
        }
        self.begin_slowly(entry, time)
    }

    #[cold]
    fn begin_slowly(&self, entry: Range, time: Duration) -> Result<Fault<'_>, FaultError> {
        let mut fault = Fault {
            registration: self,
            entry,
            seen: 0,
            begun: None,
            time,
        };
        fault.round()?;
        Ok(fault)
    }
}

/// A device in which nothing may be installed.
#[inline]
fn sick(inner: &Inner) -> Option<&Target> {
    let mut targets = inner.targets().iter();
    let sick = targets.find(|one| one.device.health() == Health::Quarantined);
    sick.filter(|_| !planted!("r20-fault"))
}

impl Fault<'_> {
    fn round(&mut self) -> Result<(), FaultError> {
        context::wait_refusal("begin")?;
        let inner = &self.registration.inner;
        let range = inner.range;
        if !range.contains(self.entry) {
            return Err(FaultError::OutsideRegistration {
                entry: self.entry,
                registration: range,
            });
        }
        let gone = || !matches!(inner.word.load().state(), State::Inserting | State::Live);
        // One whose insertion was put off is not in the index yet: no invalidation would find it.
        let look = || match inner.word.load().state() {
            State::Inserting if !planted!("r8-put-off") => None,
            _ => inner.undisturbed(self.entry),
        };
        let mut seen = look();
        if seen.is_none() {
            // None: past what the clock can say, which is for ever.
            let deadline = self.begun.get_or_insert_with(now).checked_add(self.time);
            inner.space.events.wait(deadline, || {
                seen = look();
                seen.is_some() || gone()
            });
        }
        if gone() {
            return Err(FaultError::Gone {
                registration: range,
            });
        }
        if let Some(target) = sick(inner) {
            return Err(FaultError::DeviceQuarantined {
                device: target.device.clone(),
            });
        }
        self.seen = seen.ok_or(FaultError::Deadline {
            entry: self.entry,
            waited: self.time,
        })?;
        Ok(())
    }

    /// Whether an invalidation that may overlap the entry has started since begin: then nothing may be installed. Checked with
    /// the lock held that `quiesce` takes; its guard is the proof. False stays true until that lock is dropped. Inside a callback, and
    /// once the registration is over, it is true, and [`Fault::again`] says why.
    #[inline]
    pub fn retry<T>(&self, guard: &NotifierGuard<'_, T>) -> bool {
        let _ = guard;
        let inner = &self.registration.inner;
        let word = inner.word.load();
        let same = word.started() == self.seen && !word.is_detached();
        if same && !context::inside_callback() {
            return false;
        }
        let retry = context::inside_callback()
            || word.is_detached()
            || inner.disturbed(self.entry, self.seen);
        if retry {
            inner.space.stats.add(Counter::FaultRetries, 1);
        }
        retry && !planted!("r9")
    }

    /// Begins anew, for the next round.
    ///
    /// # Errors
    /// As [`Registration::begin`].
    pub fn again(&mut self) -> Result<(), FaultError> {
        self.begun.get_or_insert_with(now);
        self.round()
    }
}
