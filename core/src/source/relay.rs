//! Threads that take turns at receiving: one does, and serves what it has received itself; another takes over when that lasts.
//!
//! Whoever is woken for each call is dear: on another processor it costs more than the call. So one thread receives and serves, and the
//! kernel wakes it where its caller is. Those that *stand by* sleep while nothing happens. The first thing that is received calls one
//! of them to *watch*: it looks now and then whether the receiver has been busy with one thing since it looked last. A handler may
//! block, or make a call that has to be received; then the watcher relieves it. When nothing has been received for some time
//! it stands by again. What is received costs one atomic operation and a fence, and nobody is woken for it.

use crate::primitive::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use crate::primitive::{Condvar, Duration, Mutex};

/// Who receives.
#[derive(Debug, Default)]
pub(super) struct Relay {
    /// Even while the receiver receives, odd while it is busy with what it has received.
    turn: AtomicU64,
    /// Somebody watches, or was called to. Set under the lock.
    watched: AtomicBool,
    idle: Mutex<Idle>,
    called: Condvar,
}

#[derive(Debug, Default)]
struct Idle {
    /// One of those who stand by shall watch.
    call: bool,
    closed: bool,
}

/// What the receiver is busy with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Turn(u64);

/// Between two looks: a receiver that is stuck is relieved after one to two of these.
const LOOK: Duration = Duration::from_millis(1);
/// Looks without anything received, after which nobody watches: a tenth of a second.
const QUIET: u32 = if cfg!(loom) { 1 } else { 100 };

impl Relay {
    /// The receiver has received something, and may be relieved from here on.
    #[inline]
    pub(super) fn busy(&self) -> Turn {
        // Nobody but the receiver changes an even turn. Release: whoever relieves it receives when it has received.
        let turn = self.turn.load(Ordering::Relaxed) + 1;
        self.turn.store(turn, Ordering::Release);
        if !planted!("r18-relay") {
            // SeqCst, with the one in `watch`: either this sees that nobody watches, or who has just stopped to sees this turn.
            fence(Ordering::SeqCst);
        }
        if !self.watched.load(Ordering::Relaxed) {
            self.call();
        }
        Turn(turn)
    }

    /// Has one of those who stand by watch, now or as soon as there is one.
    #[cold]
    fn call(&self) {
        let mut idle = self.idle.lock();
        idle.call = true;
        self.watched.store(true, Ordering::Relaxed);
        drop(idle);
        self.called.notify_all();
    }

    /// It is done. False: another receives by now, and this thread stands by.
    #[inline]
    #[must_use]
    pub(super) fn done(&self, turn: Turn) -> bool {
        self.next(turn.0)
    }

    /// From an odd turn to the even one behind it, for who does that first: he receives. Acquire, with the Release of `busy`.
    fn next(&self, turn: u64) -> bool {
        let next = turn + 1;
        self.turn
            .compare_exchange(turn, next, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    /// Waits until this thread has relieved the receiver, and receives. False: nobody does any more.
    #[must_use]
    pub(super) fn stand_by(&self) -> bool {
        loop {
            let mut idle = self.idle.lock();
            while !idle.call && !idle.closed {
                idle = self.called.wait(idle);
            }
            if idle.closed {
                return false;
            }
            idle.call = false;
            drop(idle);
            if self.watch() {
                return true;
            }
        }
    }

    /// Watches until nothing has happened for some time, or this thread has relieved the receiver: true.
    fn watch(&self) -> bool {
        let (mut last, mut quiet) = (self.turn.load(Ordering::Relaxed), 0);
        loop {
            let closed = self.idle.lock().closed;
            if closed {
                return false;
            }
            nap();
            let turn = self.turn.load(Ordering::Relaxed);
            let moved = std::mem::replace(&mut last, turn) != turn;
            let busy = turn % 2 == 1;
            if !moved && busy && self.next(turn) {
                // What it receives calls the next one to watch.
                self.watched.store(false, Ordering::Relaxed);
                return true;
            }
            quiet = if moved || busy { 0 } else { quiet + 1 };
            if quiet == QUIET && self.stops_watching(turn) {
                return false;
            }
        }
    }

    /// True unless something has been received since `turn`, and nobody else was called.
    fn stops_watching(&self, turn: u64) -> bool {
        self.watched.store(false, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.turn.load(Ordering::Relaxed) == turn {
            return true;
        }
        // It may have seen that this thread watches.
        let _idle = self.idle.lock();
        let another = self.watched.load(Ordering::Relaxed);
        self.watched.store(true, Ordering::Relaxed);
        another
    }

    /// Nobody receives any more: the receiver says so, and goes.
    pub(super) fn close(&self) {
        self.idle.lock().closed = true;
        self.called.notify_all();
    }
}

/// Under the checker it takes no time: whatever may happen meanwhile it tries in any case.
fn nap() {
    if cfg!(not(loom)) {
        shootdown_primitive::thread::sleep(LOOK);
    }
}

#[cfg(all(test, loom))]
mod tests;
