//! An SRCU that protects nothing: what a read section and a grace period cost bare.

use std::sync::atomic::{AtomicU64, Ordering, fence};

const SLOTS: usize = 64;

#[repr(align(128))]
#[derive(Debug)]
struct Slot(AtomicU64);

/// 64 slots, one a reader.
#[derive(Debug)]
pub struct Srcu {
    epoch: AtomicU64,
    slots: Box<[Slot]>,
}

impl Default for Srcu {
    fn default() -> Self {
        Self {
            epoch: AtomicU64::new(1),
            slots: (0..SLOTS).map(|_| Slot(AtomicU64::new(0))).collect(),
        }
    }
}

impl Srcu {
    /// One read section of the reader that owns the first slot.
    pub fn section(&self) {
        let slot = &self.slots[0].0;
        slot.store(self.epoch.load(Ordering::Relaxed), Ordering::Relaxed);
        // With the one in `grace`: either that sees the slot, or the section sees what was unlinked before.
        fence(Ordering::SeqCst);
        slot.store(0, Ordering::Release);
    }

    /// Waits for the sections that had begun.
    pub fn grace(&self) {
        fence(Ordering::SeqCst);
        let tag = self.epoch.fetch_add(1, Ordering::Relaxed);
        for slot in &self.slots {
            // Acquire, with the Release at a section's end.
            while (1..=tag).contains(&slot.0.load(Ordering::Acquire)) {
                std::hint::spin_loop();
            }
        }
    }
}
