//! How far a space is in its life, and how many registrations it has to release before it is over: one word, so that of an exit and
//! an insertion one is first. (R7)

use crate::primitive::atomic::{AtomicU64, Ordering};

const EXITING: u64 = 1;
const EXITED: u64 = 2;
/// A device may still have reached its memory when it had exited.
const REACHED: u64 = 4;
/// Inserted and not yet released.
const REGISTERED: u64 = 8;

/// Every step is a read-modify-write of this word, so they are totally ordered; AcqRel, so that whoever sees one sees what was done
/// before it.
#[derive(Debug)]
pub(super) struct Lifecycle(AtomicU64);

impl Lifecycle {
    pub(super) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    fn has(&self, mark: u64) -> bool {
        self.0.load(Ordering::Acquire) & mark != 0
    }

    /// Counts so many as inserted, unless the space is exiting: an exit that comes later waits for them.
    pub(super) fn admit(&self, more: usize) -> bool {
        let counted = |word: u64| {
            let admits = word & EXITING == 0 || planted!("r7");
            admits.then_some(word + more as u64 * REGISTERED)
        };
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, counted)
            .is_ok()
    }

    /// So many of them are released, and have left the index.
    pub(super) fn released(&self, these: usize) {
        self.0
            .fetch_sub(these as u64 * REGISTERED, Ordering::AcqRel);
    }

    /// Inserted and not yet released.
    pub(super) fn registered(&self) -> usize {
        (self.0.load(Ordering::Acquire) / REGISTERED) as usize
    }

    /// From here on nobody is admitted. Whether this is the first exit.
    pub(super) fn exit(&self) -> bool {
        self.0.fetch_or(EXITING, Ordering::AcqRel) & EXITING == 0
    }

    pub(super) fn is_exiting(&self) -> bool {
        self.has(EXITING)
    }

    /// The first exit is over.
    pub(super) fn exited(&self, reached: bool) {
        let reached = if reached { REACHED } else { 0 };
        self.0.fetch_or(EXITED | reached, Ordering::AcqRel);
    }

    pub(super) fn has_exited(&self) -> bool {
        self.has(EXITED)
    }

    /// A device may still have reached its memory when it had exited.
    pub(super) fn was_reached(&self) -> bool {
        self.has(REACHED)
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p shootdown --release --lib model`
#[cfg(all(test, loom))]
mod model {
    use loom::cell::UnsafeCell;
    use loom::thread;

    use super::*;
    use crate::primitive::Arc;

    /// What each step is done after: the checker objects to an access that is not ordered.
    struct Done(UnsafeCell<u32>);

    // SAFETY: the checker's cell verifies that no access races.
    unsafe impl Sync for Done {}
    // SAFETY: as above.
    unsafe impl Send for Done {}

    /// R4: who finds all released, or the exit over, sees what was done before.
    #[test]
    fn who_sees_a_step_sees_what_was_before_it() {
        let steps: [fn(&Lifecycle); 2] = [|one| one.released(1), |one| one.exited(true)];
        for step in steps {
            loom::model(move || {
                let shared = Arc::new((Lifecycle::new(), Done(UnsafeCell::new(0))));
                assert!(shared.0.admit(1));
                let ending = {
                    let shared = shared.clone();
                    thread::spawn(move || {
                        shared.1.0.with_mut(|_| ());
                        step(&shared.0);
                    })
                };
                if shared.0.registered() == 0 || shared.0.has_exited() {
                    shared.1.0.with(|_| ());
                }
                ending.join().unwrap();
            });
        }
    }
}
