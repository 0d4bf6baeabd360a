//! Interrupt vectors: counters that can be waited for.

use std::time::Duration;

use shootdown_primitive::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::layout::TFMS;

/// One vector a fault map. Leaf locks: fired under the chiplet's lock.
#[derive(Default)]
pub(super) struct Vectors([Vector; TFMS]);

#[derive(Default)]
struct Vector {
    pending: Mutex<u64>,
    fired: Condvar,
}

impl Vector {
    fn pending(&self) -> MutexGuard<'_, u64> {
        // A number is whole at any time.
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vectors {
    /// Whether none was pending.
    pub(super) fn fire(&self, vector: usize) -> bool {
        let vector = &self.0[vector];
        let mut pending = vector.pending();
        *pending += 1;
        vector.fired.notify_all();
        *pending == 1
    }

    /// Takes what is pending, after waiting for something to be for at most `timeout`. `None`: no such vector.
    pub(super) fn wait(&self, vector: u32, timeout: Duration) -> Option<u64> {
        let vector = self.0.get(vector as usize)?;
        let pending = vector.pending();
        let (mut pending, _) = (vector.fired)
            .wait_timeout_while(pending, timeout, |pending| *pending == 0)
            .unwrap_or_else(PoisonError::into_inner);
        Some(std::mem::take(&mut *pending))
    }
}
