//! The simulation: one thread at a time, chosen by a seeded scheduler, under a clock that only the simulation moves.
//!
//! Threads are coroutines of one thread of the operating system (shuttle's; which of them runs is decided here). Before every
//! operation that another thread could notice, an atomic, a lock, a wait, a look at the clock, there is a *step*: the scheduler may
//! go on with this thread or with any other that can run. So a [schedule](Settings::schedule) and what the body does fix
//! every interleaving, and the same two give the same run, to the last step; [`so_far`] has a hash of all of it.
//!
//! # Time
//! Every step takes 20 ns. When nobody can run but threads that wait for a time, the clock goes to the first of these times:
//! deadlines, latencies, naps and timeouts are simulated, and take no time. Whoever spins or gives way lets some time pass, so that
//! it ends.
//!
//! # What it explores
//! Sequential consistency only: every load sees the last store, whatever the orderings say. Fences and orderings are for a model
//! checker. What is not an operation of this crate is not interleaved: it takes place in one piece.
//!
//! # The end
//! The process ends with the simulation: threads that would go on for ever are left where they are. A process can have one.

mod atomic;
mod lock;
pub mod thread;
pub mod time;
mod world;

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::sync::Mutex;

use shuttle::scheduler::{Schedule, Scheduler, Task, TaskId};
use shuttle::{Config, FailurePersistence, MaxSteps, Runner};

use world::{Stuck, World};

/// What spins.
pub mod hint {
    /// Lets a moment pass, in which others run.
    #[track_caller]
    pub fn spin_loop() {
        super::pass("a spin", super::world::TICK);
    }
}

/// What threads share and wait with.
pub mod sync {
    pub use super::lock::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult,
    };
    // Nothing of these is waited for: what initialises them takes no step.
    pub use std::sync::{Arc, LazyLock, LockResult, OnceLock, PoisonError, TryLockError, Weak};

    /// Atomics.
    pub mod atomic {
        pub use super::super::atomic::*;
        pub use std::sync::atomic::Ordering;
    }
}

/// What fixes a simulation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Seeds the scheduler.
    pub schedule: u64,
    /// After so many steps it is over ([`End::StepLimit`]).
    pub steps: u64,
    /// After so much time of the simulation those who wait, wait for each other ([`End::Deadlock`]), whoever else looks at his
    /// watch now and then.
    pub time: time::Duration,
}

/// A thread that waits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Waiting {
    /// The thread's name.
    pub thread: String,
    /// What it waits for: a word.
    pub what: &'static str,
    /// Where, in the source.
    pub at: String,
}

/// How a simulation ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum End {
    /// The body has returned.
    Done,
    /// Every thread waits for another one, but those that only look at the clock now and then. All that wait, and for no time.
    Deadlock(Vec<Waiting>),
    /// It would not end. All that wait, and for no time.
    StepLimit(Vec<Waiting>),
    /// A thread panicked.
    Panicked {
        /// The thread's name.
        thread: String,
        /// What it said, and where.
        message: String,
    },
}

/// How far a simulation has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SoFar {
    /// Steps.
    pub steps: u64,
    /// Time that has passed, in nanoseconds of the simulation.
    pub nanoseconds: u64,
    /// Of every step, who took it and when, and of every value that an atomic gave or took.
    pub trace: u64,
}

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What is called at the end, and gives the exit status.
type AtEnd = Box<dyn FnOnce(End) -> i32 + Send>;

/// Of the one simulation; taken when it is over.
static AT_END: Mutex<Option<AtEnd>> = Mutex::new(None);

/// Room for a thread's stack, in bytes, of which what is not used costs nothing.
const STACK: usize = 1 << 20;

/// Runs `body` as the first thread of a simulation, then `end`, whatever the end is, and ends the process with the status that
/// `end` gives. In `end` nobody else runs, and nothing can be waited for.
pub fn run(
    settings: Settings,
    body: impl FnOnce() + Send + 'static,
    end: impl FnOnce(End) -> i32 + Send + 'static,
) -> ! {
    WORLD.set(Some(World::new(settings)));
    *AT_END
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(Box::new(end));
    std::panic::set_hook(Box::new(|panic| PANIC.set(panic.to_string())));
    let body = Mutex::new(Some(body));
    let mut config = Config::new();
    config.stack_size = STACK;
    config.failure_persistence = FailurePersistence::None;
    config.max_steps = MaxSteps::None;
    config.silence_warnings = true;
    Runner::new(Seat { begun: false }, config).run(move || {
        let body = body.lock().ok().and_then(|mut body| body.take());
        watched(|| body.into_iter().for_each(|body| body()));
        over(End::Done);
    });
    unreachable!("`over` ends the process");
}

/// Runs what a thread does. A panic that it does not catch ends the simulation.
fn watched<T>(run: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        over(End::Panicked {
            thread: with(|world| world.name(world.current()).to_owned()).unwrap_or_default(),
            message: PANIC.take(),
        })
    })
}

/// Ends the simulation, and the process.
fn over(end: End) -> ! {
    with(World::stop);
    let at_end = AT_END.lock().ok().and_then(|mut at_end| at_end.take());
    std::process::exit(at_end.map_or(1, |at_end| at_end(end)))
}

/// How far this simulation has come.
pub fn so_far() -> SoFar {
    with(|world| world.so_far()).unwrap_or_default()
}

/// Addresses to ask for a mapping at, one after the other until one is free: where things are mapped is fixed as well, and what
/// was unmapped is used again. Nothing else of a process lies there.
pub fn places() -> impl Iterator<Item = Option<u64>> {
    (0..64).map(|nth| Some((1 << 44) + (nth << 32)))
}

/// `None` outside of a simulation, as in what runs before `main`, and when it is over.
fn with<R>(look: impl FnOnce(&mut World) -> R) -> Option<R> {
    WORLD.with_borrow_mut(|world| world.as_mut().map(look))
}

/// Whoever may run may run now: called before each operation that others can notice.
fn step() {
    let running = with(|world| world.is_running().then(|| world.choose()));
    if let Some(next) = running.flatten() {
        go_on(next);
    }
}

/// Goes on with whom the scheduler has chosen: another thread, if it says so.
fn go_on(next: Result<bool, Stuck>) {
    match next {
        Ok(false) => {}
        // To shuttle this is a point where it may switch, and it asks `Seat` to whom.
        Ok(true) => shuttle::thread::sleep(std::time::Duration::ZERO),
        Err(stuck) => give_up(stuck),
    }
}

fn give_up(stuck: Stuck) -> ! {
    let waiting = with(|world| world.waiting()).unwrap_or_default();
    over(match stuck {
        Stuck::StepLimit => End::StepLimit(waiting),
        Stuck::Deadlock => End::Deadlock(waiting),
    })
}

/// The thread that runs has ended. Whoever is next runs once shuttle has seen that.
fn leave() {
    let next = with(|world| {
        world.end();
        world.choose()
    });
    if let Some(Err(stuck)) = next {
        give_up(stuck);
    }
}

/// Waits until [`wake`] is called with `key`, or until `until`: whether it was woken.
fn block(
    what: &'static str,
    key: usize,
    until: Option<u64>,
    at: &'static Location<'static>,
) -> bool {
    let next = with(|world| {
        world.is_running().then(|| {
            world.wait(what, key, until, at);
            world.choose()
        })
    });
    match next.flatten() {
        Some(next) => go_on(next),
        None => panic!("{what} is waited for outside of a simulation, at {at}"),
    }
    with(|world| world.was_woken()).unwrap_or_default()
}

/// Lets whoever waits for `key` go on.
fn wake(key: usize) {
    with(|world| world.wake(key));
}

/// Lets `nanoseconds` pass.
#[track_caller]
fn pass(what: &'static str, nanoseconds: u64) {
    let until = with(|world| {
        world
            .is_running()
            .then(|| world.now().saturating_add(nanoseconds))
    });
    if let Some(until) = until.flatten() {
        block(what, NOBODY, Some(until), Location::caller());
    }
}

/// A key that nobody is woken by.
const NOBODY: usize = 0;

/// Where shuttle asks who is next: it is told what has been decided.
struct Seat {
    begun: bool,
}

impl Scheduler for Seat {
    fn new_execution(&mut self) -> Option<Schedule> {
        (!std::mem::replace(&mut self.begun, true)).then(|| Schedule::new(0))
    }

    fn next_task(
        &mut self,
        _runnable: &[&Task],
        current: Option<TaskId>,
        _is_yielding: bool,
    ) -> Option<TaskId> {
        let current = current.map_or(0, usize::from);
        with(|world| world.take_chosen(current)).map(TaskId::from)
    }

    fn next_u64(&mut self) -> u64 {
        // Nobody asks shuttle for random numbers.
        0
    }
}
