//! Waiting for something of an address space to end: uses of a registration, an invalidation, a span, a release.
//!
//! Rare, so the ones who end things pay a fence and a load as long as nobody waits. The pair is Dekker's: a waiter raises its
//! count, fences, checks; an ender changes the state, fences, looks at the count. One of them sees the other; the mutex
//! closes the gap between a waiter's check and its sleep.

use crate::primitive::atomic::{AtomicUsize, Ordering, fence};
use crate::primitive::{Condvar, Instant, Mutex, fence_after_rmw, now};

#[derive(Debug)]
pub(crate) struct Events {
    waiting: AtomicUsize,
    lock: Mutex<()>,
    ended: Condvar,
}

impl Events {
    pub(crate) fn new() -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            lock: Mutex::new(()),
            ended: Condvar::new(),
        }
    }

    /// Something has ended: the caller has already changed the state.
    #[inline]
    pub(crate) fn ended(&self) {
        if !planted!("r4-event") {
            fence(Ordering::SeqCst);
        }
        self.ended_and_fenced();
    }

    /// The same, for a caller whose last step was a read-modify-write, of what has ended.
    #[inline]
    pub(crate) fn ended_by_rmw(&self) {
        fence_after_rmw();
        self.ended_and_fenced();
    }

    /// The same, for a caller that has fenced since.
    #[inline]
    pub(crate) fn ended_and_fenced(&self) {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        drop(self.lock.lock());
        self.ended.notify_all();
    }

    /// Waits until `done` says true; false when `deadline` was first. `done` may take locks, but none that is held
    /// while [`Events::ended`] is called.
    #[inline]
    pub(crate) fn wait(&self, deadline: Option<Instant>, mut done: impl FnMut() -> bool) -> bool {
        done() || self.sleep(deadline, done)
    }

    #[cold]
    fn sleep(&self, deadline: Option<Instant>, mut done: impl FnMut() -> bool) -> bool {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let mut guard = self.lock.lock();
        let result = loop {
            if done() {
                break true;
            }
            guard = match deadline {
                // Whatever woke it, a signal or the end of something else, `done` decides (R21).
                None if planted!("r21") => {
                    drop(self.ended.wait(guard));
                    self.waiting.fetch_sub(1, Ordering::Relaxed);
                    return true;
                }
                None => self.ended.wait(guard),
                Some(deadline) => match deadline.checked_duration_since(now()) {
                    Some(left) if !left.is_zero() => self.ended.wait_timeout(guard, left),
                    _ => break false,
                },
            };
        };
        drop(guard);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        result
    }
}
