//! The driver's lock.
//!
//! A handler and the driver's fault path need a lock in common: `quiesce` takes it, and
//! [`retry`](crate::Fault::retry) is checked while it is held. If its holder could take the map lock, or wait for a
//! registration, three threads could wait for each other in a ring: one holds the map lock and waits for the callback, the callback
//! waits for this lock, its holder waits for the map lock. So while a [`NotifierLock`] is held both are typed errors.
//!
//! Lock order: map lock → span → `NotifierLock` → device.

use std::ops::{Deref, DerefMut};

use crate::context::{self, HoldsNotifierLock};
use crate::notifier::{Op, WouldBlock};
use crate::primitive::{Mutex, MutexGuard};

/// A mutex that callbacks may take. While one is held, taking the map lock, mapping, unmapping, unregistering and
/// beginning an invalidation or a fault are typed errors.
///
/// Never wait for another driver's hardware, allocate from a heap that a hook watches, or sleep while holding it: a
/// shootdown of the range may be waiting for it.
#[derive(Debug, Default)]
pub struct NotifierLock<T> {
    inner: Mutex<T>,
}

impl<T> NotifierLock<T> {
    /// A lock round `value`.
    pub fn new(value: T) -> Self {
        Self {
            inner: Mutex::new(value),
        }
    }

    /// Takes the lock; waits for its holder. A panic of an earlier holder is ignored: the handler that panicked has
    /// quarantined its device.
    #[inline]
    pub fn lock(&self) -> NotifierGuard<'_, T> {
        NotifierGuard::new(self.inner.lock())
    }

    /// Takes the lock if nobody holds it.
    pub fn try_lock(&self) -> Option<NotifierGuard<'_, T>> {
        self.inner.try_lock().map(NotifierGuard::new)
    }

    /// Takes the lock as the operation allows it: waits in an ordinary one, only tries in a non-blocking one.
    ///
    /// # Errors
    /// [`WouldBlock`], in a non-blocking operation, when it is held.
    pub fn lock_for(&self, op: &Op<'_>) -> Result<NotifierGuard<'_, T>, WouldBlock> {
        if op.may_block() {
            Ok(self.lock())
        } else {
            self.try_lock().ok_or(WouldBlock)
        }
    }
}

/// Proof that a [`NotifierLock`] is held by this thread.
#[derive(Debug)]
pub struct NotifierGuard<'a, T> {
    // In this order: the lock is let go, the mark is taken away, what was put off runs.
    inner: MutexGuard<'a, T>,
    _held: HoldsNotifierLock,
    _leave: Leave,
}

impl<'a, T> NotifierGuard<'a, T> {
    #[inline]
    fn new(inner: MutexGuard<'a, T>) -> Self {
        Self {
            inner,
            _held: HoldsNotifierLock::enter(),
            _leave: Leave,
        }
    }
}

impl<T> Deref for NotifierGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for NotifierGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Runs what was put off when it is dropped, if nothing is held any more.
#[derive(Debug)]
pub(crate) struct Leave;

impl Drop for Leave {
    #[inline]
    fn drop(&mut self) {
        context::leave();
    }
}
