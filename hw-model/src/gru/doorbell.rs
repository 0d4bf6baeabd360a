//! Which control blocks want the executor, and how it sleeps and is woken.
//!
//! Whoever starts a control block sets its bit and then looks whether the executor sleeps; the executor says that it sleeps
//! and then looks for bits. Both in this order and sequentially consistent: one of the two sees the other, so no start is
//! missed, and starting a block costs no system call while the executor is awake.

use std::time::Duration;

use shootdown_primitive::sync::OnceLock;
use shootdown_primitive::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use shootdown_primitive::thread::{self, Thread};

use super::layout::SLOTS;

const WORDS: usize = SLOTS / 64;

/// How often an idle executor gives its processor away before it sleeps: a few turns of everybody else, so that a user
/// who polls and starts the next instruction at once need not wake it.
const YIELDS: u32 = 16;

/// Set bits, a sleeper, and a request to stop.
#[derive(Default)]
pub(super) struct Doorbell {
    wanted: [AtomicU64; WORDS],
    asleep: AtomicBool,
    poked: AtomicBool,
    stop: AtomicBool,
    /// The executor, once it runs.
    thread: OnceLock<Thread>,
}

impl Doorbell {
    /// Asks for the executor's attention to `slot`.
    pub(super) fn ring(&self, slot: usize) {
        // SeqCst: before the load in `rouse`; also a release of the status that was stored before.
        self.wanted[slot / 64].fetch_or(1 << (slot % 64), Ordering::SeqCst);
        self.rouse();
    }

    /// Takes the request back: before the final status is stored, so that a restart is not lost.
    pub(super) fn clear(&self, slot: usize) {
        // SeqCst: ordered with `ring`.
        self.wanted[slot / 64].fetch_and(!(1 << (slot % 64)), Ordering::SeqCst);
    }

    /// Takes all requests back.
    pub(super) fn clear_all(&self) {
        for word in &self.wanted {
            // SeqCst: ordered with `ring`.
            word.store(0, Ordering::SeqCst);
        }
    }

    /// Has the executor look again at what is due, and when, before it sleeps, or wakes it.
    pub(super) fn poke(&self) {
        // SeqCst: before the load in `rouse`.
        self.poked.store(true, Ordering::SeqCst);
        self.rouse();
    }

    /// The executor is about to look at what is due.
    pub(super) fn take_poke(&self) {
        // SeqCst: a poke that comes later keeps the executor from sleeping.
        self.poked.store(false, Ordering::SeqCst);
    }

    fn rouse(&self) {
        // SeqCst: pairs with the store in `sleep`.
        if self.asleep.load(Ordering::SeqCst) {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// The slots that want attention.
    pub(super) fn wanted(&self) -> u128 {
        // SeqCst: see the module; an acquire of what `ring` released.
        let [low, high] = [0, 1].map(|i| self.wanted[i].load(Ordering::SeqCst));
        u128::from(low) | u128::from(high) << 64
    }

    /// Tells the executor to end.
    pub(super) fn stop(&self) {
        // SeqCst: before the token of `wake`.
        self.stop.store(true, Ordering::SeqCst);
        self.wake();
    }

    /// Whether the executor has to end.
    pub(super) fn stopped(&self) -> bool {
        // SeqCst: see `stop`.
        self.stop.load(Ordering::SeqCst)
    }

    /// The calling thread is the executor.
    pub(super) fn attach(&self) {
        // A chiplet has one executor; a second one never attaches.
        let _first = self.thread.set(thread::current());
    }

    /// Whether there is anything to do beside the slots in `ignored`.
    fn is_wanted(&self, ignored: u128) -> bool {
        // SeqCst: see the module.
        self.wanted() & !ignored != 0 || self.poked.load(Ordering::SeqCst) || self.stopped()
    }

    /// Called by the executor when it found nothing to do but to look at the slots in `ignored` now and then: gives way for a
    /// while, then sleeps, for at most `timeout`, until it is wanted or poked.
    pub(super) fn sleep(&self, timeout: Option<Duration>, ignored: u128) {
        for _ in 0..YIELDS {
            thread::yield_now();
            if self.is_wanted(ignored) {
                return;
            }
        }
        // SeqCst: before the loads; pairs with the load in `rouse`.
        self.asleep.store(true, Ordering::SeqCst);
        if !self.is_wanted(ignored) {
            match timeout {
                Some(timeout) => thread::park_timeout(timeout),
                None => thread::park(),
            }
        }
        // SeqCst: not needed for its order, but the same variable.
        self.asleep.store(false, Ordering::SeqCst);
    }
}
