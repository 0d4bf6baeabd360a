//! The service thread: runs what callbacks on other threads have put off.
//!
//! A thread that serves foreign calls may not run a `release`, which may allocate, while somebody waits for it who holds the
//! allocator's lock. It hands the lists that it has put off, linked through their members, over to this thread; nothing is
//! allocated on the way. The thread is one for the process and lives as long as that does.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Sink, Source, SourceError, Tried};
use crate::context::{self, PutOff};

/// A source that is to be stopped by a thread that may wait. Made beforehand: whoever cannot wait may not allocate either.
pub(super) struct Stop {
    pub(super) source: Arc<dyn Source>,
    pub(super) sink: Arc<Sink>,
    /// Freed with it.
    pub(super) tried: Vec<Tried>,
    pub(super) next: Option<Box<Stop>>,
}

struct Queue {
    put_off: PutOff,
    /// Sources whose owners could not wait.
    stops: Option<Box<Stop>>,
    /// The process that the thread belongs to: a child by fork has none.
    process: u32,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    put_off: PutOff::none(),
    stops: None,
    process: 0,
});
static CHANGED: Condvar = Condvar::new();

/// Proof that the service thread runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Service(());

fn queue() -> MutexGuard<'static, Queue> {
    QUEUE.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn start() -> Result<Service, SourceError> {
    let mut queue = queue();
    if queue.process != std::process::id() {
        let thread = std::thread::Builder::new().name("shootdown-service".to_owned());
        thread.spawn(run).map_err(|error| SourceError::System {
            call: "the start of the service thread",
            error,
        })?;
        queue.process = std::process::id();
    }
    Ok(Service(()))
}

/// Takes over what this thread has put off. Neither allocates nor frees.
#[inline]
pub(super) fn hand_over(_: Service) {
    if context::has_put_off() {
        take_over();
    }
}

#[cold]
fn take_over() {
    let mut queue = queue();
    context::hand_over(&mut queue.put_off);
    drop(queue);
    CHANGED.notify_all();
}

/// Has it stopped. Neither allocates nor frees.
pub(super) fn stop_later(mut stop: Box<Stop>) {
    let mut queue = queue();
    stop.next = queue.stops.take();
    queue.stops = Some(stop);
    drop(queue);
    CHANGED.notify_all();
}

fn run() {
    let mut queue = queue();
    loop {
        let put_off = std::mem::replace(&mut queue.put_off, PutOff::none());
        let mut stops = queue.stops.take();
        if put_off.is_none() && stops.is_none() {
            queue = CHANGED.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        drop(queue);
        put_off.run();
        while let Some(mut stop) = stops {
            stop.source.stop(&stop.sink);
            stops = stop.next.take();
        }
        queue = self::queue();
    }
}
