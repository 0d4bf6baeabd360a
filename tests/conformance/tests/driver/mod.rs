// A driver for the kit's accelerator, as an author would write it, and as the kit's own tests break it. No inner documentation: the
// crate's documentation includes this file as it is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use conformance::{Accelerator, Access, Failure, WorkId, WorkState};
use shootdown::{
    Addr, AddressSpace, Cause, Completion, Device, DeviceContext, DeviceTlb, Drain, FlushCommand,
    Gather, Issue, Issued, Limits, Notifier, NotifierLock, Op, Outcome, PageSize, PageSizes, Range,
    ResetError, Rights, Scope, Segment, Share, Target, Ticket, UnloadFailed, WouldBlock,
};

/// What is wrong with the driver. A driver of one's own has none of this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(dead_code)]
pub(crate) enum Bug {
    None,
    ClaimsNothingCached,
    NarrowsTooFar,
    FlushNotAwaited,
    DrainedLies,
    RetryNotChecked,
    BeginTooSmall,
    NotBegun,
    QuiesceWithoutTheLock,
    BlockedAfterRefusal,
    WaitsInATry,
    ContextNotUnloaded,
    NeverGivenUp,
    AllocatesInQuiesce,
    WaitsForAllWork,
    Panics,
    NeverReturns,
    CountsCompletions,
    TakesTheLastCompletion,
    ResetNotAwaited,
}

/// Flushes under way at a time.
const DOORBELLS: usize = 32;
/// For anything that the device does.
const LONG: Duration = Duration::from_secs(3);
/// Commands of the whole device are remembered as such.
const WHOLE: u64 = 1 << 63;

/// The doorbells that have not been answered: 0 for none, else its number, and whether it flushes the whole device. A later one of
/// the whole device does what the earlier ones were asked for, so its answer counts for them.
struct Doorbells {
    last: AtomicU64,
    waiting: [AtomicU64; DOORBELLS],
    /// Commands are queued, doorbells rung and completions taken by one thread at a time. Held for register accesses only.
    queued: Mutex<Queued>,
    counted: AtomicU64,
}

/// What the next doorbell begins.
#[derive(Clone, Copy, Default)]
struct Queued {
    any: bool,
    /// A command for the whole device.
    whole: bool,
}

impl Doorbells {
    fn queued(&self) -> MutexGuard<'_, Queued> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self) -> impl Iterator<Item = &AtomicU64> {
        self.waiting
            .iter()
            .filter(|slot| slot.load(Ordering::Acquire) == 0)
    }
}

struct Core {
    hardware: Arc<Accelerator>,
    contexts: AtomicU64,
    doorbells: Doorbells,
    bug: Bug,
}

impl Core {
    fn take_completions(&self) {
        let _one = self.doorbells.queued();
        while let Some(number) = self.hardware.completion() {
            match self.bug {
                Bug::CountsCompletions => {
                    self.doorbells.counted.fetch_add(1, Ordering::AcqRel);
                }
                // Out of order they are not the sum of what came before.
                Bug::TakesTheLastCompletion
                    if number <= self.doorbells.last.load(Ordering::Acquire) =>
                {
                    self.doorbells.counted.fetch_max(number, Ordering::AcqRel);
                }
                _ => {}
            }
            let waiting = &self.doorbells.waiting;
            let of = |slot: &&AtomicU64| {
                let word = slot.load(Ordering::Acquire);
                number != 0 && word & !WHOLE == number
            };
            // A number that nobody waits for is a second answer, or an answer to nothing.
            let Some(slot) = waiting.iter().find(of) else {
                continue;
            };
            if slot.swap(0, Ordering::AcqRel) & WHOLE != 0 {
                self.forget(number);
            }
        }
    }

    /// Doorbells before `number` need no answer any more.
    fn forget(&self, number: u64) {
        for slot in &self.doorbells.waiting {
            let word = slot.load(Ordering::Acquire);
            if word & !WHOLE < number {
                let _ = slot.compare_exchange(word, 0, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }
}

struct Tlb(Arc<Core>);

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            pages_per_command: 512,
            commands_per_batch: 4,
            full_flush_cost: 4,
        }
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        let Core {
            hardware,
            doorbells,
            ..
        } = &*self.0;
        let mut queued = doorbells.queued();
        let whole = command.scope == Scope::Device;
        // The last free one is kept for a flush of the whole device.
        let needed = if whole { 1 } else { 2 };
        if doorbells.free().take(needed).count() < needed || !hardware.queue(command) {
            return Issue::Busy;
        }
        queued.any = true;
        queued.whole |= whole;
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        let Core {
            hardware,
            doorbells,
            ..
        } = &*self.0;
        let mut queued = doorbells.queued();
        let last = doorbells.last.load(Ordering::Acquire);
        // Somebody else has rung for what this thread had queued; or all are taken, and so nothing could be queued.
        let Some(slot) = doorbells.free().next().filter(|_| queued.any) else {
            return Ticket(last);
        };
        let number = last + 1;
        slot.store(
            number | if queued.whole { WHOLE } else { 0 },
            Ordering::Release,
        );
        doorbells.last.store(number, Ordering::Release);
        *queued = Queued::default();
        hardware.ring(number);
        Ticket(number)
    }

    fn poll(&self, ticket: Ticket) -> Completion {
        let Core { doorbells, bug, .. } = &*self.0;
        self.0.take_completions();
        let waits = |slot: &AtomicU64| {
            let number = slot.load(Ordering::Acquire) & !WHOLE;
            number != 0 && number <= ticket.0
        };
        let done = match bug {
            Bug::FlushNotAwaited => true,
            Bug::CountsCompletions | Bug::TakesTheLastCompletion => {
                doorbells.counted.load(Ordering::Acquire) >= ticket.0
            }
            _ => !doorbells.waiting.iter().any(waits),
        };
        if done {
            Completion::Done
        } else {
            Completion::Pending
        }
    }

    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        let Core {
            hardware,
            bug,
            doorbells,
            ..
        } = &*self.0;
        let before = doorbells.last.load(Ordering::Acquire);
        hardware.reset();
        *doorbells.queued() = Queued::default();
        let begun = Instant::now();
        while hardware.is_resetting() && *bug != Bug::ResetNotAwaited {
            if begun.elapsed() >= deadline {
                return Err(ResetError::Timeout { deadline });
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        self.0.forget(before + 1);
        Ok(())
    }
}

/// A context of the device, for one session.
struct Context {
    core: Arc<Core>,
    device: Device,
    number: u64,
    /// Taken by `quiesce`, and to install.
    lock: NotifierLock<()>,
    /// Given up by the next callback.
    give_up: Mutex<Option<Segment>>,
    gives_up: AtomicBool,
}

impl Context {
    fn unload(&self) -> bool {
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

struct Handler(Arc<Context>);

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
        let core = Arc::new(Core {
            hardware,
            contexts: AtomicU64::new(1),
            doorbells: Doorbells {
                last: AtomicU64::new(0),
                waiting: [const { AtomicU64::new(0) }; DOORBELLS],
                queued: Mutex::new(Queued::default()),
                counted: AtomicU64::new(0),
            },
            bug,
        });
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
