// Part of a driver for the kit's accelerator, as an author would write it, and as the kit's own tests break it. No inner documentation:
// the crate's documentation includes this file as it is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use conformance::{Accelerator, Access, Failure, WorkId, WorkState};
use shootdown::{
    Addr, AddressSpace, Device, NotifierLock, PageSize, Range, Rights, Segment, Share, Target,
};

use super::handler::{Context, Handler, LONG};
use super::tlb::{Bug, Core, Tlb};

/// The driver.
pub(crate) struct MyAccelerator {
    core: Arc<Core>,
    device: Device,
}

impl MyAccelerator {
    /// The driver for the device behind `hardware`.
    pub(crate) fn probe(hardware: Arc<Accelerator>) -> Result<Self, Failure> {
        Self::with(hardware, Bug::None)
    }

    pub(crate) fn with(hardware: Arc<Accelerator>, bug: Bug) -> Result<Self, Failure> {
        let core = Arc::new(Core::new(hardware, bug));
        let device = Device::new("my accelerator", Tlb(Arc::clone(&core)));
        Ok(Self { core, device })
    }
}

/// What a process has of it: a segment with a context.
pub(crate) struct MySession {
    context: Arc<Context>,
    share: Arc<Share>,
    space: shootdown::SpacePin,
    segment: Mutex<Option<Segment>>,
    range: Range,
    started: Mutex<Vec<WorkId>>,
}

/// What became of a miss.
enum Miss {
    Installed,
    NotAllowed,
}

impl MySession {
    fn resolve(&self, at: Addr) -> Result<Miss, Failure> {
        let Context {
            core, number, lock, ..
        } = &*self.context;
        let Some(space) = self.space.upgrade() else {
            return Ok(Miss::NotAllowed);
        };
        let small = Range::page(at, PageSize::FourKiB);
        let bug = core.bug;
        loop {
            let whole = space.translate(at).map_or(small, |found| found.page);
            let entry = if bug == Bug::BeginTooSmall {
                small
            } else {
                whole
            };
            let fault = match bug {
                Bug::NotBegun => self.share.begin(entry, Duration::ZERO).ok(),
                _ => match self.share.begin(entry, LONG) {
                    Ok(fault) => Some(fault),
                    Err(shootdown::FaultError::Gone { .. }) => return Ok(Miss::NotAllowed),
                    Err(error) => return Err(error.into()),
                },
            };
            let Some(found) = space
                .translate(at)
                .filter(|found| found.rights.contains(Rights::WRITE))
            else {
                return Ok(Miss::NotAllowed);
            };
            let guard = lock.lock();
            let disturbed = fault.as_ref().is_some_and(|fault| fault.retry(&guard))
                && bug != Bug::RetryNotChecked;
            // The page may have become another size: then the sequence is that of another entry.
            let other = found.page != whole;
            if !disturbed && !other {
                core.hardware.install(*number, &found);
                return Ok(Miss::Installed);
            }
        }
    }

    /// Moves the work on; what came of it once it is over.
    fn poll(&self, work: WorkId) -> Result<Option<Access>, Failure> {
        let hardware = &self.context.core.hardware;
        Ok(match hardware.state(work) {
            WorkState::Running => None,
            WorkState::Done => Some(Access::Done),
            WorkState::Aborted => Some(Access::Fault),
            WorkState::Gone => Some(Access::Lost),
            WorkState::Miss(at) => {
                match self.resolve(at)? {
                    Miss::Installed => hardware.restart(work),
                    Miss::NotAllowed => hardware.abort(work),
                }
                None
            }
        })
    }

    fn wait(&self, work: WorkId) -> Result<Access, Failure> {
        let begun = Instant::now();
        loop {
            if let Some(said) = self.poll(work)? {
                return Ok(said);
            }
            if begun.elapsed() >= LONG {
                return Err("the device is not done with its work after 3 s".into());
            }
            std::thread::sleep(Duration::from_micros(10));
        }
    }
}

impl Drop for MySession {
    fn drop(&mut self) {
        if self.context.core.bug == Bug::NeverGivenUp {
            std::mem::forget(Arc::clone(&self.share));
            std::mem::forget(
                self.segment
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take(),
            );
            self.context.unload();
        }
    }
}

impl conformance::Driver for MyAccelerator {
    type Hardware = Accelerator;
    type Session = MySession;

    fn open(&self, space: &AddressSpace, _: Range) -> Result<MySession, Failure> {
        let core = Arc::clone(&self.core);
        let number = core.contexts.fetch_add(1, Ordering::Relaxed);
        let context = Arc::new(Context {
            core,
            device: self.device.clone(),
            number,
            lock: NotifierLock::new(()),
            give_up: Mutex::new(None),
            gives_up: AtomicBool::new(false),
        });
        let targets = || {
            let device = self.device.clone();
            vec![Target {
                device,
                tag: number,
            }]
        };
        let handler = Arc::new(Handler(Arc::clone(&context)));
        let share = Arc::new(space.share(number, || (Range::ALL, handler, targets()))?);
        if !self.core.hardware.load(number, space.id()) {
            return Err("the device takes no context".into());
        }
        let segment = space.map_segment(4 << 12, None, context.clone(), Arc::clone(&share))?;
        Ok(MySession {
            context,
            share,
            space: space.pin(),
            range: segment.range(),
            segment: Mutex::new(Some(segment)),
            started: Mutex::new(Vec::new()),
        })
    }

    fn devices(&self) -> Vec<Device> {
        vec![self.device.clone()]
    }
}

impl conformance::Session for MySession {
    fn write(&self, at: Addr, value: u64) -> Result<Access, Failure> {
        let Context { core, number, .. } = &*self.context;
        match core.hardware.submit(*number, Range::new(at, 8)?, value) {
            Some(work) => self.wait(work),
            None => Ok(Access::Lost),
        }
    }

    fn start(&self, part: Range) -> Result<(), Failure> {
        let Context { core, number, .. } = &*self.context;
        let work = core.hardware.submit(*number, part, 0x5a5a);
        let work = work.ok_or("the device takes no work")?;
        self.started
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(work);
        Ok(())
    }

    fn settle(&self) -> Result<(), Failure> {
        let started =
            std::mem::take(&mut *self.started.lock().unwrap_or_else(PoisonError::into_inner));
        for work in started {
            self.wait(work)?;
        }
        Ok(())
    }

    fn segment(&self) -> Option<Range> {
        Some(self.range)
    }

    fn give_up_in_callback(&self) -> bool {
        let segment = self
            .segment
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        *self
            .context
            .give_up
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = segment;
        self.context.gives_up.store(true, Ordering::Release);
        true
    }
}
