// Part of a driver for the kit's accelerator, as an author would write it, and as the kit's own tests break it. No inner documentation:
// the crate's documentation includes this file as it is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shootdown::{
    Addr, Cause, Device, DeviceContext, Drain, Gather, Issued, Notifier, NotifierLock, Op, Outcome,
    PageSize, Range, Segment, UnloadFailed, WouldBlock,
};

use super::tlb::{Bug, Core};

/// For anything that the device does.
pub(crate) const LONG: Duration = Duration::from_secs(3);

/// A context of the device, for one session.
pub(crate) struct Context {
    pub(crate) core: Arc<Core>,
    pub(crate) device: Device,
    pub(crate) number: u64,
    /// Taken by `quiesce`, and to install.
    pub(crate) lock: NotifierLock<()>,
    /// Given up by the next callback.
    pub(crate) give_up: Mutex<Option<Segment>>,
    pub(crate) gives_up: AtomicBool,
}

impl Context {
    pub(crate) fn unload(&self) -> bool {
        let hardware = &self.core.hardware;
        hardware.unload(self.number);
        let begun = Instant::now();
        while hardware.is_loaded(self.number) {
            if begun.elapsed() >= LONG {
                return false;
            }
            std::thread::sleep(Duration::from_micros(20));
        }
        true
    }
}

/// The handler of one session.
pub(crate) struct Handler(pub(crate) Arc<Context>);

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let Context {
            core, number, lock, ..
        } = &*self.0;
        let bug = core.bug;
        if bug == Bug::BlockedAfterRefusal {
            core.hardware.block(*number, op.range(), op.id());
        }
        match bug {
            Bug::QuiesceWithoutTheLock => {}
            Bug::WaitsInATry => drop(lock.lock()),
            _ => drop(lock.lock_for(op)?),
        }
        if self.0.gives_up.load(Ordering::Acquire) {
            self.0.gives_up.store(false, Ordering::Release);
            let segment = self
                .0
                .give_up
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            drop(segment);
        }
        if bug != Bug::BlockedAfterRefusal {
            core.hardware.block(*number, op.range(), op.id());
        }
        match bug {
            Bug::AllocatesInQuiesce => drop(std::hint::black_box(vec![op.id(); 3])),
            Bug::WaitsForAllWork => {
                while !core.hardware.is_idle(*number, Range::ALL) {
                    std::thread::sleep(Duration::from_micros(50));
                }
            }
            Bug::NeverReturns if op.cause() == Cause::Discard => loop {
                std::thread::sleep(LONG);
            },
            Bug::Panics if op.cause() == Cause::Discard => panic!("planned"),
            _ => {}
        }
        Ok(op.drain())
    }

    fn drained(&self, op: &Op<'_>) -> bool {
        let Context { core, number, .. } = &*self.0;
        core.bug == Bug::DrainedLies || core.hardware.is_idle(*number, op.range())
    }

    fn flush<'o>(&self, op: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        match self.0.core.bug {
            Bug::ClaimsNothingCached => gather.nothing_cached(),
            Bug::NarrowsTooFar => {
                let last = op.range().last().get();
                gather.only(Range::page(Addr::new(last), PageSize::FourKiB))
            }
            _ => gather.all(),
        }
    }

    fn end(&self, op: &Op<'_>, outcome: Outcome) {
        let Context { core, number, .. } = &*self.0;
        if core.bug == Bug::BlockedAfterRefusal && outcome == Outcome::Unchanged {
            return;
        }
        core.hardware.unblock(*number, op.id());
    }

    fn release(&self) {
        // The context is over with its segment; if that could not be, it ends here.
        if self.0.core.bug != Bug::ContextNotUnloaded {
            self.0.unload();
        }
    }
}

impl DeviceContext for Context {
    fn device(&self) -> &Device {
        &self.device
    }

    fn unload(&self, _: &Op<'_>) -> Result<(), UnloadFailed> {
        if self.core.bug == Bug::ContextNotUnloaded || Context::unload(self) {
            return Ok(());
        }
        Err(UnloadFailed {
            reason: "the context stays loaded",
        })
    }
}
