//! What is left of registrations that ended while a device of theirs was in quarantine.
//!
//! As long as they are registered, every invalidation of their range meets the device and fails. When they are over nobody would ask
//! any more, but the device may still hold entries, or run: so the space remembers the range with the device, until that has been
//! recovered.

use crate::addr::Range;
use crate::primitive::Mutex;
use crate::primitive::atomic::{AtomicBool, Ordering, fence};
use crate::registration::Target;
use crate::tlb::Device;

struct Ghost {
    range: Range,
    device: Device,
    /// Of the device, when the registration ended.
    sickness: u64,
}

impl Ghost {
    fn of(range: Range, device: &Device) -> Option<Self> {
        device.sickness().map(|sickness| Self {
            range,
            device: device.clone(),
            sickness,
        })
    }

    /// The device has not been recovered since; one that has, and is in quarantine again, holds nothing of this range.
    fn is_there(&self) -> bool {
        self.device.sickness() == Some(self.sickness)
    }

    /// Whether `other` says nothing new: without this, registrations that come and go over a device that is never recovered would
    /// make the list as long as they are many.
    fn covers(&self, other: &Self) -> bool {
        self.device.same(&other.device)
            && self.sickness == other.sickness
            && self.range.contains(other.range)
    }
}

pub(crate) struct Ghosts {
    /// There are some, or have been.
    some: AtomicBool,
    all: Mutex<Vec<Ghost>>,
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
        let ghost = |target: &Target| Ghost::of(range, &target.device);
        let mut fresh = targets.iter().filter_map(ghost).peekable();
        if fresh.peek().is_none() {
            return;
        }
        let fresh: Vec<_> = fresh.collect();
        // Made before the lock is taken, and dropped after it: the shootdown path takes it.
        let (mut all, mut over) = (Vec::with_capacity(fresh.len()), Vec::new());
        loop {
            let mut now = self.all.lock();
            let needed = now.len() + fresh.len();
            if all.capacity() >= needed && over.capacity() >= needed {
                // Of a device that has recovered this may be the last count, and its driver's drop may do anything.
                for ghost in now.drain(..) {
                    let list = if ghost.is_there() {
                        &mut all
                    } else {
                        &mut over
                    };
                    list.push(ghost);
                }
                for ghost in fresh {
                    let said = all.iter().any(|old| old.covers(&ghost));
                    let list = if said { &mut over } else { &mut all };
                    list.push(ghost);
                }
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
        let all = self.all.lock();
        let found = all
            .iter()
            .find(|ghost| ghost.range.overlaps(range) && ghost.is_there());
        if let Some(ghost) = found {
            see(&ghost.device);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::addr::PageSizes;
    use crate::tlb::{Completion, DeviceTlb, FlushCommand, Issue, Limits, Ticket};

    struct Well;

    impl DeviceTlb for Well {
        fn limits(&self) -> Limits {
            Limits {
                entry_sizes: PageSizes::FOUR_KIB,
                pages_per_command: 1,
                commands_per_batch: 1,
                full_flush_cost: 1,
            }
        }
        fn issue(&self, _: FlushCommand) -> Issue {
            Issue::Queued
        }
        fn dispatch(&self) -> Ticket {
            Ticket(0)
        }
        fn poll(&self, _: Ticket) -> Completion {
            Completion::Done
        }
    }

    #[test]
    fn what_a_device_held_before_it_was_recovered_it_does_not_hold_in_a_later_quarantine() {
        let ghosts = Ghosts::new();
        let device = Device::new("well", Well);
        let targets = [Target {
            device: device.clone(),
            tag: 0,
        }];
        let [old, new] = [0, 1].map(|page| Range::new(page << 12, 1 << 12).unwrap());
        let finds = |range| {
            let mut found = false;
            ghosts.find(range, |_| found = true);
            found
        };
        for _ in 0..100 {
            device.quarantine();
            ghosts.add(old, &targets);
            // Once more without a recovery: that is the same quarantine.
            device.quarantine();
            assert!(finds(old) && !finds(new));
            device.recover(Duration::from_secs(1)).unwrap();
            assert!(!finds(old));
            device.quarantine();
            assert!(!finds(old));
            (0..3).for_each(|_| ghosts.add(new, &targets));
            assert!(finds(new));
            device.recover(Duration::from_secs(1)).unwrap();
        }
        assert_eq!(ghosts.all.lock().len(), 1);
    }
}
