//! The service thread: runs what callbacks on other threads have put off.
//!
//! A thread that serves foreign calls may not run a `release`, which may allocate, while somebody waits for it who holds the
//! allocator's lock. It hands the lists that it has put off, linked through their members, over to this thread; nothing is
//! allocated on the way. The thread is one for the process and lives as long as that does.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::{Sink, Source, SourceError};
use crate::context::{self, PutOff};

struct Queue {
    put_off: PutOff,
    /// Sources whose owners could not wait.
    stops: Vec<(Arc<dyn Source>, Arc<Sink>)>,
    /// The process that the thread belongs to: a child by fork has none.
    process: u32,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue {
    put_off: PutOff::none(),
    stops: Vec::new(),
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
pub(super) fn hand_over(_: Service) {
    if !context::has_put_off() {
        return;
    }
    let mut queue = queue();
    context::hand_over(&mut queue.put_off);
    drop(queue);
    CHANGED.notify_all();
}

pub(super) fn stop_later(source: Arc<dyn Source>, sink: Arc<Sink>) {
    queue().stops.push((source, sink));
    CHANGED.notify_all();
}

fn run() {
    let mut queue = queue();
    loop {
        let put_off = std::mem::replace(&mut queue.put_off, PutOff::none());
        let stops = std::mem::take(&mut queue.stops);
        if put_off.is_none() && stops.is_empty() {
            queue = CHANGED.wait(queue).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        drop(queue);
        put_off.run();
        for (source, sink) in stops {
            source.stop(&sink);
        }
        queue = self::queue();
    }
}
