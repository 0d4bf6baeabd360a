//! What is left of registrations that ended while a device of theirs was in quarantine.
//!
//! As long as they are registered, every invalidation of their range meets the device and fails. When they are over nobody would ask
//! any more, but the device may still hold entries, or run: so the space remembers the range with the device, until that has been
//! recovered.

use crate::addr::Range;
use crate::primitive::Mutex;
use crate::primitive::atomic::{AtomicBool, Ordering, fence};
use crate::registration::Target;
use crate::tlb::{Device, Health};

pub(crate) struct Ghosts {
    /// There are some, or have been.
    some: AtomicBool,
    all: Mutex<Vec<(Range, Device)>>,
}

impl Ghosts {
    pub(crate) fn new() -> Self {
        Self {
            some: AtomicBool::new(false),
            all: Mutex::new(Vec::new()),
        }
    }

    /// A registration of `range` is about to leave the index. Allocates if a device is in quarantine, and forgets the ghosts of
    /// those that are not any more.
    pub(crate) fn add(&self, range: Range, targets: &[Target]) {
        let sick = |device: &Device| device.health() == Health::Quarantined;
        let fresh: Vec<_> = targets
            .iter()
            .filter(|target| sick(&target.device))
            .map(|target| (range, target.device.clone()))
            .collect();
        if fresh.is_empty() {
            return;
        }
        // Made before the lock is taken, and dropped after it: the shootdown path takes it.
        let (mut all, mut over) = (Vec::with_capacity(fresh.len()), Vec::new());
        loop {
            let mut now = self.all.lock();
            let needed = now.len() + fresh.len();
            if all.capacity() >= needed && over.capacity() >= now.len() {
                // Of a device that has recovered this may be the last count, and its driver's drop may do anything.
                for ghost in now.drain(..) {
                    let list = if sick(&ghost.1) { &mut all } else { &mut over };
                    list.push(ghost);
                }
                all.extend(fresh);
                std::mem::swap(&mut *now, &mut all);
                break;
            }
            drop(now);
            all = Vec::with_capacity(needed);
            over = Vec::with_capacity(needed);
        }
        self.some.store(true, Ordering::Relaxed);
        // An invalidation that does not find the registration in the index finds this: by the Release of the index's new version,
        // which comes after it, and the Acquire of the walk that sees that version. The fence, with the one in the walk's
        // section, makes it so whatever the index does.
        fence(Ordering::SeqCst);
    }

    /// Whether there are some, or have been.
    #[inline]
    pub(crate) fn are_there(&self) -> bool {
        self.some.load(Ordering::Relaxed)
    }

    /// Shows a device in quarantine that may still reach something of `range`, if there is one. Allocates nothing, and takes no count
    /// of it, which could come to be the last.
    pub(crate) fn find(&self, range: Range, see: impl FnOnce(&Device)) {
        if !self.are_there() {
            return;
        }
        let all = self.all.lock();
        let found = all.iter().find(|(ghost, device)| {
            ghost.overlaps(range) && device.health() == Health::Quarantined
        });
        if let Some((_, device)) = found {
            see(device);
        }
    }
}
