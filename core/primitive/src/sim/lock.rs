//! Locks: the standard library's, for which nobody ever waits; who would is not run. None is ever poisoned.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::panic::Location;
use std::sync::{self, LockResult, TryLockError, TryLockResult};

use super::time::{Duration, nanoseconds};
use super::{block, step, wake, with};

/// What stands for a lock in the scheduler: its address, as it does not move while somebody waits for it.
fn key<T>(lock: &T) -> usize {
    std::ptr::from_ref(lock).addr()
}

/// `None` if it is held in a way that excludes this one.
fn attempt<G>(result: TryLockResult<G>) -> Option<G> {
    match result {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Tries until it succeeds, and waits between.
fn acquire<G>(
    what: &'static str,
    key: usize,
    at: &'static Location<'static>,
    attempt: impl Fn() -> Option<G>,
) -> G {
    step();
    loop {
        match attempt() {
            Some(guard) => return guard,
            None => block(what, key, None, at),
        };
    }
}

/// A guard that tells the scheduler when it goes.
macro_rules! guard {
    ($(#[$doc:meta])* $name:ident of $lock:ident) => {
        $(#[$doc])*
        pub struct $name<'a, T> {
            lock: &'a $lock<T>,
            /// Taken when it goes.
            inner: Option<sync::$name<'a, T>>,
        }

        impl<T> Drop for $name<'_, T> {
            fn drop(&mut self) {
                self.inner = None;
                wake(key(self.lock));
            }
        }

        impl<T> Deref for $name<'_, T> {
            type Target = T;

            fn deref(&self) -> &T {
                self.inner.as_ref().expect("taken by drop only")
            }
        }

        impl<T: fmt::Debug> fmt::Debug for $name<'_, T> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                (**self).fmt(f)
            }
        }
    };
    ($(#[$doc:meta])* mut $name:ident of $lock:ident) => {
        guard!($(#[$doc])* $name of $lock);

        impl<T> DerefMut for $name<'_, T> {
            fn deref_mut(&mut self) -> &mut T {
                self.inner.as_mut().expect("taken by drop only")
            }
        }
    };
}

guard!(
    /// A mutex is held for as long as this lives.
    mut MutexGuard of Mutex
);
guard!(
    /// A lock is held for reading for as long as this lives.
    RwLockReadGuard of RwLock
);
guard!(
    /// A lock is held for writing for as long as this lives.
    mut RwLockWriteGuard of RwLock
);

/// As `std::sync::Mutex`.
#[derive(Debug, Default)]
pub struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    /// Not held.
    pub const fn new(value: T) -> Self {
        Self(sync::Mutex::new(value))
    }

    /// Waits for the holder.
    ///
    /// # Errors
    /// None.
    #[track_caller]
    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        Ok(self.lock_at(Location::caller()))
    }

    fn lock_at(&self, at: &'static Location<'static>) -> MutexGuard<'_, T> {
        let inner = acquire("a mutex", key(self), at, || attempt(self.0.try_lock()));
        MutexGuard {
            lock: self,
            inner: Some(inner),
        }
    }

    /// Does not wait.
    ///
    /// # Errors
    /// It is held.
    pub fn try_lock(&self) -> TryLockResult<MutexGuard<'_, T>> {
        step();
        let inner = attempt(self.0.try_lock()).ok_or(TryLockError::WouldBlock)?;
        Ok(MutexGuard {
            lock: self,
            inner: Some(inner),
        })
    }
}

/// As `std::sync::RwLock`. Who comes first is the scheduler's choice.
#[derive(Debug, Default)]
pub struct RwLock<T>(sync::RwLock<T>);

impl<T> RwLock<T> {
    /// Not held.
    pub const fn new(value: T) -> Self {
        Self(sync::RwLock::new(value))
    }

    /// Waits for the writer.
    ///
    /// # Errors
    /// None.
    #[track_caller]
    pub fn read(&self) -> LockResult<RwLockReadGuard<'_, T>> {
        let at = Location::caller();
        let inner = acquire("a lock to read", key(self), at, || {
            attempt(self.0.try_read())
        });
        Ok(RwLockReadGuard {
            lock: self,
            inner: Some(inner),
        })
    }

    /// Waits for all holders.
    ///
    /// # Errors
    /// None.
    #[track_caller]
    pub fn write(&self) -> LockResult<RwLockWriteGuard<'_, T>> {
        let at = Location::caller();
        let inner = acquire("a lock to write", key(self), at, || {
            attempt(self.0.try_write())
        });
        Ok(RwLockWriteGuard {
            lock: self,
            inner: Some(inner),
        })
    }
}

/// Whether a wait ended because of its time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// Whether it did.
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

/// As `std::sync::Condvar`.
#[derive(Debug, Default)]
pub struct Condvar(
    /// Not zero bytes: its address stands for it.
    u8,
);

impl Condvar {
    /// Nobody waits.
    pub const fn new() -> Self {
        Self(0)
    }

    /// Lets the lock go, waits until it is notified, and takes the lock again.
    ///
    /// # Errors
    /// None.
    #[track_caller]
    pub fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> LockResult<MutexGuard<'a, T>> {
        Ok(self.wait_until(guard, None, Location::caller()).0)
    }

    /// As [`Condvar::wait`], for `timeout` at most.
    ///
    /// # Errors
    /// None.
    #[track_caller]
    pub fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let (guard, woken) = self.wait_until(guard, Some(after(timeout)), Location::caller());
        Ok((guard, WaitTimeoutResult(!woken)))
    }

    /// As [`Condvar::wait_timeout`], while `condition` holds.
    ///
    /// # Errors
    /// None.
    #[track_caller]
    pub fn wait_timeout_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        timeout: Duration,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> LockResult<(MutexGuard<'a, T>, WaitTimeoutResult)> {
        let until = after(timeout);
        while condition(&mut guard) {
            if after(Duration::ZERO) >= until {
                return Ok((guard, WaitTimeoutResult(true)));
            }
            guard = self.wait_until(guard, Some(until), Location::caller()).0;
        }
        Ok((guard, WaitTimeoutResult(false)))
    }

    fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        until: Option<u64>,
        at: &'static Location<'static>,
    ) -> (MutexGuard<'a, T>, bool) {
        let mutex = guard.lock;
        // No step between the two: nobody can notify before this one waits.
        drop(guard);
        let woken = block("a condition", key(&self.0), until, at);
        (mutex.lock_at(at), woken)
    }

    /// Wakes every waiter.
    pub fn notify_all(&self) {
        step();
        wake(key(&self.0));
    }

    /// Wakes one waiter.
    pub fn notify_one(&self) {
        step();
        with(|world| world.wake_one(key(&self.0)));
    }
}

/// The time in so much.
fn after(timeout: Duration) -> u64 {
    let now = with(|world| world.now()).unwrap_or_default();
    now.saturating_add(nanoseconds(timeout))
}
