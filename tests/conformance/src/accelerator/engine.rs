//! The device's thread: it does the work.

use std::sync::PoisonError;

use shootdown_hw_model::Access;

use super::Core;

pub(super) fn run(core: &Core) {
    let mut state = core.lock();
    while !state.stopping {
        state.settle();
        let (ready, wake) = state.step();
        let Some(id) = ready else {
            let now = std::time::Instant::now();
            state = match wake {
                Some(wake) if wake <= now => state,
                Some(wake) => {
                    let waited = core.changed.wait_timeout(state, wake - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => core
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
            };
            continue;
        };
        let found = state.works.iter().find(|work| work.id == id);
        let access = found.and_then(|work| {
            let latch = work.latch?;
            let access = Access {
                device: 0,
                context: work.context as u32,
                space: work.space,
                addr: latch.at,
                len: 8,
                write: true,
                frame: latch.entry.frame_of(latch.at),
                stamp: latch.entry.stamp,
            };
            Some((access, work.value))
        });
        // With no lock held: it is an access of the bus, and takes its time.
        drop(state);
        if let Some((access, value)) = access {
            core.setup.bus.write(&access, &value.to_ne_bytes());
        }
        state = core.lock();
        state.written(id);
        core.changed.notify_all();
    }
}
