//! What the driver has for one address space: a tag, a lock, and the one handler for all of its segments.
//!
//! `quiesce` only takes the driver lock: a fault that holds it has installed its entry before the flush, one that takes it
//! later sees the invalidation in its retry. With [`LateDropIns::IgnoredByHardware`] it does not even do that. Everything
//! that can be cached is flushed. `release` retires the ASIDs: by then the segments are over, by unmap or by the exit of the
//! space.

use shootdown::{Drain, Notifier, NotifierLock, Op, Operations, SpacePin, WouldBlock};
use shootdown_primitive::sync::atomic::{Ordering, fence};
use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::chiplet::Chiplet;
use crate::config::LateDropIns;
use crate::error::GruError;

/// Address spaces that can have segments at a time.
pub(crate) const TAGS: usize = 1024;

/// The chiplets, and the tags that are free.
pub(crate) struct Fabric {
    pub(crate) chiplets: Vec<Arc<Chiplet>>,
    late_drop_ins: LateDropIns,
    foreign: Operations,
    free: Mutex<Vec<u64>>,
}

impl Fabric {
    pub(crate) fn new(
        chiplets: Vec<Arc<Chiplet>>,
        late_drop_ins: LateDropIns,
        foreign: Operations,
    ) -> Self {
        Self {
            chiplets,
            late_drop_ins,
            foreign,
            free: Mutex::new((0..TAGS as u64).rev().collect()),
        }
    }

    fn tags(&self) -> MutexGuard<'_, Vec<u64>> {
        // Changed by push and pop only.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An address space with segments.
pub(crate) struct Binding {
    fabric: Arc<Fabric>,
    /// What flush commands carry.
    pub(crate) tag: u64,
    /// The space's number.
    pub(crate) space: u64,
    pub(crate) pin: SpacePin,
    /// Held while a retry is checked and the entry installed, and taken by `quiesce` unless the hardware excludes what it is
    /// taken for.
    pub(crate) lock: NotifierLock<()>,
}

impl Binding {
    /// # Errors
    /// All tags are in use.
    pub(crate) fn new(fabric: &Arc<Fabric>, space: u64, pin: SpacePin) -> Result<Self, GruError> {
        let tag = fabric.tags().pop();
        Ok(Self {
            tag: tag.ok_or(GruError::NoTag { limit: TAGS })?,
            fabric: Arc::clone(fabric),
            space,
            pin,
            lock: NotifierLock::new(()),
        })
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        // No context is loaded: each holds the binding. What its ASIDs have in the TLBs goes with the next wrap.
        for chiplet in &self.fabric.chiplets {
            chiplet.words.clear(self.tag);
        }
        self.fabric.tags().push(self.tag);
    }
}

/// The handler of one binding.
pub(crate) struct Handler(pub(crate) Arc<Binding>);

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        match self.0.fabric.late_drop_ins {
            LateDropIns::Excluded => drop(self.0.lock.lock_for(op)?),
            // With the fence before the retry is checked: either that check sees this invalidation, or the flush that follows
            // sees the faulting context.
            LateDropIns::IgnoredByHardware => fence(Ordering::SeqCst),
        }
        Ok(op.idle())
    }

    fn operations(&self) -> Operations {
        self.0.fabric.foreign
    }

    fn release(&self) {
        // The segments are over: the ASIDs go where no context is left. One that was leaked keeps its own.
        for chiplet in &self.0.fabric.chiplets {
            chiplet.words.retire(self.0.tag);
        }
    }
}
