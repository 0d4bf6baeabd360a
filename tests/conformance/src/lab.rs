//! One scenario's rig: a bus, a space, the model, the driver over it, and the kit's own handlers before and after the driver's.

use std::cell::Cell;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use shootdown::{
    Addr, AddressSpace, Deadlines, Drain, ExitError, Map, Notifier, Op, Outcome, PageSize, Range,
    Registration, WouldBlock,
};
use shootdown_hw_model::{Bus, ModelMemory};

use crate::alloc;
use crate::author::{Access, Driver, Failure, Fault, Hardware, Session, Setup};
use crate::log::Log;
use crate::memory::{Watching, judge};
use crate::rule::Rule;

/// Frames of a bus: 64 MiB.
const FRAMES: u64 = 16 << 10;
/// The arena of a space.
const ARENA: u64 = 64 << 20;
/// 4 KiB.
pub(crate) const PAGE: u64 = 4096;
/// How long the kit waits for something that a good driver may or may not let happen.
pub(crate) const MOMENT: Duration = Duration::from_millis(50);

/// How a lab is made.
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) fault: Option<Fault>,
    pub(crate) deadlines: Deadlines,
}

/// Deadlines that a healthy device never misses, however busy the machine is.
pub(crate) fn patient() -> Deadlines {
    Deadlines {
        drain: Duration::from_secs(10),
        flush: Duration::from_secs(10),
        full_flush: Duration::from_secs(10),
        reset: Duration::from_secs(10),
        room: Duration::from_secs(10),
        callback: Duration::from_secs(3),
    }
}

/// Deadlines that a broken device misses soon.
pub(crate) fn impatient() -> Deadlines {
    Deadlines {
        drain: Duration::from_millis(100),
        flush: Duration::from_millis(15),
        full_flush: Duration::from_millis(30),
        reset: Duration::from_millis(100),
        ..patient()
    }
}

/// What makes a driver.
pub(crate) type Probe<'p, D> =
    &'p (dyn Fn(Arc<<D as Driver>::Hardware>) -> Result<D, Failure> + Sync);

pub(crate) struct Lab<D: Driver> {
    // Dropped in this order: the driver before its device.
    first: Option<Registration>,
    pub(crate) space: AddressSpace,
    /// What the device does wrong.
    fault: Option<Fault>,
    pub(crate) driver: D,
    pub(crate) memory: Arc<Watching<D::Hardware>>,
    pub(crate) hardware: Arc<D::Hardware>,
    pub(crate) bus: Bus,
    pub(crate) log: Arc<Log>,
    pub(crate) rng: Mutex<SmallRng>,
}

/// A session, and the kit's handler behind it.
pub(crate) struct Open<S> {
    // Dropped in this order.
    pub(crate) session: Arc<S>,
    data: Range,
    _last: Registration,
}

impl<D: Driver> Lab<D> {
    pub(crate) fn new(probe: Probe<'_, D>, log: &Arc<Log>, plan: &Plan) -> Result<Self, Failure> {
        let bus = Bus::new(FRAMES)?;
        let frames = ModelMemory::new(&bus, ARENA)?;
        let hardware = Arc::new(D::Hardware::build(&Setup {
            bus: bus.clone(),
            memory: Arc::clone(&frames),
            seed: plan.seed,
            fault: plan.fault,
            late_by: 2 * plan.deadlines.flush.min(Duration::from_millis(20)),
        })?);
        let memory = Arc::new(Watching::new(frames, Arc::clone(log), plan.fault));
        memory.look_at(&hardware);
        let driver = probe(Arc::clone(&hardware))?;
        let space = AddressSpace::managed(Arc::clone(&memory) as _, plan.deadlines);
        log.watch(Some(space.clone()));
        let witness = Arc::new(Witness {
            first: true,
            hardware: Arc::clone(&hardware),
        });
        let first = space.register(Range::ALL, witness, &[])?;
        Ok(Self {
            first: Some(first),
            space,
            fault: plan.fault,
            driver,
            memory,
            hardware,
            bus,
            log: Arc::clone(log),
            rng: Mutex::new(SmallRng::seed_from_u64(plan.seed)),
        })
    }

    pub(crate) fn map(&self, len: u64, page: PageSize) -> Result<Range, Failure> {
        Ok(self.space.map(Map::anonymous(len).page_size(page))?)
    }

    /// A session on `data`, with the kit's handler after the driver's.
    pub(crate) fn open(&self, data: Range) -> Result<Open<D::Session>, Failure> {
        let session = self.driver.open(&self.space, data)?;
        let witness = Arc::new(Witness {
            first: false,
            hardware: Arc::clone(&self.hardware),
        });
        let last = self.space.register(data, witness, &[])?;
        Ok(Open {
            session: Arc::new(session),
            data,
            _last: last,
        })
    }

    /// Gives a session up, after which nothing of it is left on the device.
    pub(crate) fn close(&self, open: Open<D::Session>) {
        let Open { data, .. } = open;
        let rule = left_over(&*open.session);
        drop(open);
        self.nothing_reaches(data, rule, "after the session had been given up");
    }

    /// Has the device write, and looks whether it was right to.
    pub(crate) fn expect(
        &self,
        session: &D::Session,
        at: Addr,
        value: u64,
        expected: Access,
        rule: Rule,
    ) {
        let said = session.write(at, value);
        match said {
            Ok(said) if said == expected => {
                // SAFETY: the page is mapped, readable, and stays so while this thread is here: it is the one that changes it.
                let found = || unsafe { (at.get() as *const u64).read_volatile() };
                if said == Access::Done && found() != value {
                    let found = found();
                    self.log.find(rule, || {
                        format!("the device had written {value:#x} to {at}, says the driver; {found:#x} is there")
                    });
                }
            }
            Ok(said) => self.log.find(rule, || {
                format!("a write to {at} came to {said:?}, and should have come to {expected:?}")
            }),
            Err(error) => self.log.find(rule, || {
                format!("a write to {at} should have come to {expected:?}: {error}")
            }),
        }
    }

    /// Has the device touch every page of `part`, all of which is mapped.
    pub(crate) fn touch(&self, session: &D::Session, part: Range) {
        for at in pages(part) {
            self.expect(session, at, at.get() | 1, Access::Done, Rule::Works);
        }
    }

    /// Nothing reaches `part` any more.
    pub(crate) fn nothing_reaches(&self, part: Range, rule: Rule, when: &str) {
        if let Some(reach) = self.memory.reach(part) {
            let (_, how) = judge(reach);
            self.log.find(rule, || format!("{when}, {how}"));
        }
    }

    /// Stale accesses so far break `rule`.
    pub(crate) fn judge(&self, rule: Rule) {
        let oracle = self.bus.oracle();
        if let Some(first) = oracle.findings().first() {
            self.log
                .stale(rule, oracle.stale_accesses(), &first.to_string());
        }
        if let Some(what) = alloc::found() {
            self.log
                .find(Rule::Allocation, || format!("in the shootdown path {what}"));
        }
    }

    /// The end of a scenario: the space exits, and nothing is left over.
    pub(crate) fn finish(mut self, rule: Rule) {
        self.judge(rule);
        self.first.take();
        match self.space.exit() {
            Ok(()) => {}
            // A broken device may be in quarantine, and exit has to say so.
            Err(ExitError::Reached { .. }) if self.fault.is_some() => {}
            Err(error) => self.log.find(Rule::Exit, || format!("exit: {error}")),
        }
        self.judge(Rule::Exit);
        let stats = self.space.stats();
        if stats.panics > 0 {
            self.log.find(Rule::Panics, || {
                format!("{} callbacks panicked", stats.panics)
            });
        }
        if stats.overdue > 0 {
            self.log.find(Rule::Blocks, || {
                format!(
                    "{} callbacks did not return in time: the watchdog named them",
                    stats.overdue
                )
            });
        }
        if self.space.registrations() > 0 || stats.releases != stats.inserts {
            self.log.find(Rule::Release, || {
                format!(
                    "{} registrations were inserted, {} released",
                    stats.inserts, stats.releases
                )
            });
        }
        self.log
            .count(self.bus.oracle().accesses(), stats.invalidations);
        self.log.watch(None);
    }
}

/// The rule that a session breaks of which something is left on the device.
pub(crate) fn left_over(session: &impl Session) -> Rule {
    match session.segment() {
        Some(_) => Rule::Unload,
        None => Rule::Release,
    }
}

/// The first address of each 4 KiB page.
pub(crate) fn pages(part: Range) -> impl Iterator<Item = Addr> {
    (0..part.pages(PageSize::FourKiB)).map(move |nth| Addr::new(part.start().get() + nth * PAGE))
}

/// Pages of 4 KiB, by number.
pub(crate) fn part(of: Range, pages: std::ops::Range<u64>) -> Range {
    let len = (pages.end - pages.start) * PAGE;
    Range::new(of.start().get() + pages.start * PAGE, len).expect("pages of a range")
}

/// Waits until `done`, at most so long; whether it is.
pub(crate) fn wait_for(time: Duration, mut done: impl FnMut() -> bool) -> bool {
    let begun = Instant::now();
    loop {
        if done() {
            return true;
        }
        if begun.elapsed() >= time {
            return false;
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Work on other threads that the kit began in the middle of something, and that may be held up until later.
#[derive(Default)]
pub(crate) struct Beside(Mutex<Vec<JoinHandle<()>>>);

impl Beside {
    /// Runs `f` beside the caller, and waits for it for `time` at most; whether it was over by then.
    pub(crate) fn run(&self, time: Duration, f: impl FnOnce() + Send + 'static) -> bool {
        let spawned = std::thread::Builder::new()
            .name("beside".to_owned())
            .spawn(f);
        let Ok(thread) = spawned else { return false };
        let over = wait_for(time, || thread.is_finished());
        self.threads().push(thread);
        over
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        // Changed by pushes only.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all of it is over.
    pub(crate) fn finished(&self) -> bool {
        self.threads().iter().all(JoinHandle::is_finished)
    }

    /// Waits for all of it.
    pub(crate) fn join(&self) {
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            // A panic has been printed by it.
            let _ = thread.join();
        }
    }
}

thread_local! {
    /// The handler after the driver's was called in this thread's operation.
    static BOTH: Cell<bool> = const { Cell::new(false) };
}

/// The kit's handlers: the first of an operation arms the thread, the last one's `end` disarms it. Where a handler between them
/// has refused, the first one's does.
struct Witness<H> {
    first: bool,
    hardware: Arc<H>,
}

impl<H: Hardware> Notifier for Witness<H> {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if self.first {
            self.hardware.operation();
            alloc::arm(true);
        }
        BOTH.set(!self.first);
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        if !self.first || !BOTH.get() {
            alloc::arm(false);
        }
    }
}
