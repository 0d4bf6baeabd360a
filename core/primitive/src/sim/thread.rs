//! Threads.

use std::io;
use std::panic::Location;
use std::sync::{Arc, Mutex};

use super::time::{Duration, nanoseconds};
use super::{NOBODY, block, leave, pass, step, wake, watched, with};

pub use std::thread::panicking;

/// How long whoever gives way lets others run when nobody else wants to.
const YIELD: u64 = 500;

// Keys of what is waited for: odd, as no address of a lock is.
fn end_of(thread: usize) -> usize {
    thread << 2 | 1
}

fn token_of(thread: usize) -> usize {
    thread << 2 | 3
}

/// Tells threads apart.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ThreadId(usize);

/// A handle of a thread.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Thread {
    id: usize,
    name: String,
}

impl Thread {
    /// What tells it apart.
    pub fn id(&self) -> ThreadId {
        ThreadId(self.id)
    }

    /// Its name.
    pub fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    /// Lets it go through its park, or its next one.
    pub fn unpark(&self) {
        step();
        with(|world| world.give_token(self.id));
        wake(token_of(self.id));
    }
}

/// The thread that runs.
pub fn current() -> Thread {
    let current = with(|world| (world.current(), world.name(world.current()).to_owned()));
    let (id, name) = current.unwrap_or_default();
    Thread { id, name }
}

/// Waits until it is unparked.
#[track_caller]
pub fn park() {
    park_until(None, Location::caller());
}

/// Waits until it is unparked, for `timeout` at most.
#[track_caller]
pub fn park_timeout(timeout: Duration) {
    let now = with(|world| world.now()).unwrap_or_default();
    let until = now.saturating_add(nanoseconds(timeout));
    park_until(Some(until), Location::caller());
}

fn park_until(until: Option<u64>, at: &'static Location<'static>) {
    step();
    let taken = with(|world| (world.take_token(), world.current()));
    if let Some((false, current)) = taken {
        block("unpark", token_of(current), until, at);
        with(|world| world.take_token());
    }
}

/// Waits for `time`.
#[track_caller]
pub fn sleep(time: Duration) {
    pass("the time", nanoseconds(time));
}

/// Lets others run.
#[track_caller]
pub fn yield_now() {
    pass("others", YIELD);
}

/// Starts a thread.
pub fn spawn<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    Builder::new().start(run)
}

/// How a thread is to be.
#[derive(Debug, Default)]
pub struct Builder {
    name: Option<String>,
}

impl Builder {
    /// A thread without a name.
    pub fn new() -> Self {
        Self::default()
    }

    /// Names it.
    pub fn name(mut self, name: String) -> Self {
        self.name = Some(name);
        self
    }

    /// Starts it.
    ///
    /// # Errors
    /// None: as `std::thread::Builder`.
    pub fn spawn<T: Send + 'static>(
        self,
        run: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        Ok(self.start(run))
    }

    fn start<T: Send + 'static>(self, run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        step();
        let result = Arc::new(Mutex::new(None));
        let to = Arc::clone(&result);
        let body = move || {
            let value = watched(run);
            if let Ok(mut to) = to.lock() {
                *to = Some(value);
            }
            wake(end_of(with(|world| world.current()).unwrap_or_default()));
            leave();
        };
        let shuttle = shuttle::thread::spawn(body);
        let name = self.name.unwrap_or_else(|| "a thread".to_owned());
        let id = with(|world| world.add(name.clone())).unwrap_or_default();
        // Both count from the first thread on.
        assert_eq!(usize::from(shuttle.thread().id()), id);
        JoinHandle {
            thread: Thread { id, name },
            result,
        }
    }
}

/// A thread that can be waited for. Dropping it lets the thread go on.
#[derive(Debug)]
pub struct JoinHandle<T> {
    thread: Thread,
    result: Arc<Mutex<Option<T>>>,
}

impl<T> JoinHandle<T> {
    /// The thread.
    pub fn thread(&self) -> &Thread {
        &self.thread
    }

    /// Whether it has ended.
    pub fn is_finished(&self) -> bool {
        step();
        with(|world| world.has_ended(self.thread.id)).unwrap_or(true)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// None: a thread that panics ends the simulation.
    #[track_caller]
    pub fn join(self) -> std::thread::Result<T> {
        let at = Location::caller();
        while !self.is_finished() {
            block("the end of a thread", end_of(self.thread.id), None, at);
        }
        let value = self.result.lock().ok().and_then(|mut value| value.take());
        value.ok_or_else(|| Box::new("the thread has left nothing") as _)
    }
}

const _: () = assert!(NOBODY.is_multiple_of(2));
