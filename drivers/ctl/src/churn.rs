//! Registrations that come and go, given up in every legal place while other threads' invalidations hit them.

use hdrhistogram::Histogram;
use shootdown::{
    AddressSpace, Drain, InsertError, MapError, Notifier, Op, Operations, Range, Refused,
    Registration, UnregisterError, WouldBlock,
};
use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};
use shootdown_primitive::sync::{Arc, Mutex};
use shootdown_primitive::time::Instant;
use thiserror::Error;

/// Releases that were seen by the handlers themselves.
pub(crate) type Releases = Arc<AtomicU64>;

#[derive(Debug, Error)]
pub(crate) enum ChurnError {
    #[error(transparent)]
    Insert(#[from] InsertError),
    #[error(transparent)]
    Unregister(#[from] UnregisterError),
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Map(#[from] MapError),
}

/// Gives up what it holds, at the first callback of the kind.
#[derive(Default)]
struct Handler {
    in_callback: Mutex<Option<Registration>>,
    in_release: Mutex<Option<Registration>>,
    failed: Mutex<Option<UnregisterError>>,
    releases: Releases,
}

impl Handler {
    fn give_up(&self, slot: &Mutex<Option<Registration>>) {
        let held = slot.lock().ok().and_then(|mut slot| slot.take());
        if let Some(Err(error)) = held.map(|held| held.unregister())
            && let Ok(mut failed) = self.failed.lock()
        {
            *failed = Some(error);
        }
    }
}

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.give_up(&self.in_callback);
        Ok(op.idle())
    }

    /// Without a device nothing goes wrong of which it is not told.
    fn operations(&self) -> Operations {
        Operations::empty()
    }

    fn release(&self) {
        self.give_up(&self.in_release);
        self.releases.fetch_add(1, Ordering::Relaxed);
    }
}

/// Registers `range`, and gives it up in the `nth` place. `touch` is mapped, in `range`, and its contents do not matter.
pub(crate) fn turn(
    space: &AddressSpace,
    range: Range,
    touch: Range,
    nth: u64,
    releases: &Releases,
    latency: &mut Histogram<u64>,
) -> Result<(), ChurnError> {
    let handler = || {
        Arc::new(Handler {
            releases: releases.clone(),
            ..Handler::default()
        })
    };
    let (first, second) = (handler(), handler());
    let one = space.register(range, first.clone(), &[])?;
    let keep = |slot: &Mutex<Option<Registration>>, registration| {
        if let Ok(mut slot) = slot.lock() {
            *slot = Some(registration);
        }
    };
    match nth % 5 {
        0 => {
            let begun = Instant::now();
            one.unregister()?;
            latency.saturating_record(begun.elapsed().as_nanos() as u64);
        }
        1 => {
            let guard = space.lock_write()?;
            one.unregister()?;
            drop(guard);
        }
        2 => {
            keep(&first.in_callback, one);
            space.discard(touch)?;
        }
        3 => {
            let two = space.register(range, second.clone(), &[])?;
            keep(&second.in_callback, one);
            space.discard(touch)?;
            two.unregister()?;
        }
        _ => {
            let two = space.register(range, second.clone(), &[])?;
            keep(&second.in_release, one);
            two.unregister()?;
        }
    }
    for handler in [first, second] {
        if let Some(error) = handler
            .failed
            .lock()
            .ok()
            .and_then(|mut failed| failed.take())
        {
            return Err(error.into());
        }
    }
    Ok(())
}
