//! The supervisors: one receives a call, shoots down, performs it, and answers.
//!
//! The others [stand by](Relay), and take over when a call lasts. All but one of them run handlers at a time. The one that is left goes
//! on receiving: a call may be a handler's of the others, which would wait for itself, and is told so. What else it
//! receives waits for a supervisor.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use arrayvec::ArrayVec;

use super::call::{CHANGES, Call, Changes};
use super::caller::{Caller, Known, StandIn, own_thread};
use super::filter::RANGES;
use super::listener::{self, Notification};
use super::maps::Maps;
use super::perform::Arenas;
use super::{LISTENER, NONE_COMES, SUPERVISOR, SUPERVISORS, lock};
use crate::addr::Range;
use crate::context::OpenInvalidation;
use crate::engine::SinkError;
use crate::notifier::{Cause, Outcome};
use crate::source::relay::Relay;
use crate::source::service::{self, Service};
use crate::source::{ExternalChange, Sink, SourceError};

static THREADS: [AtomicU32; SUPERVISORS] = [const { AtomicU32::new(0) }; SUPERVISORS];

/// Calls that can have been received and wait for a supervisor; one more fails with EAGAIN.
const WAITING: usize = 1024;

/// A sink in the list, and how many calls are being served for it.
#[derive(Debug)]
struct Route {
    sink: Arc<Sink>,
    uses: usize,
    stopping: bool,
}

/// A sink that is in use, and where it is in the list.
struct InUse {
    place: usize,
    sink: Arc<Sink>,
}

type Sinks = ArrayVec<InUse, RANGES>;

/// What a call has begun.
type Open<'s> = ArrayVec<ExternalChange<'s>, CHANGES>;

/// What is being served, and what waits to be.
#[derive(Debug)]
struct Calls {
    serving: usize,
    /// Never grows: it has room for [`WAITING`].
    waiting: VecDeque<(Notification, Caller)>,
}

/// The list of all supervisors.
#[derive(Debug)]
pub(super) struct Supervisor {
    routes: Mutex<[Option<Route>; RANGES]>,
    left: Condvar,
    relay: Relay,
    calls: Mutex<Calls>,
    service: Service,
}

/// A supervisor thread: receives and answers for as long as the process lives.
pub(super) fn supervise(nth: usize, maps: &Maps) {
    // Handlers of the application's signals do not run here: they could make a call that waits for this thread.
    // SAFETY: the set is filled before it is used.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
    }
    THREADS[nth].store(own_thread(), Ordering::Relaxed);
    let listener = {
        let mut listener = lock(&LISTENER.0);
        listener.ready += 1;
        LISTENER.1.notify_all();
        loop {
            match listener.fd {
                Some(listener) => break listener,
                None => {
                    listener = LISTENER
                        .1
                        .wait(listener)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    };
    let Some(supervisor) = SUPERVISOR.get().filter(|_| listener != NONE_COMES) else {
        return;
    };
    let seat = Seat {
        listener,
        maps,
        known: Known::default(),
    };
    let relay = &supervisor.relay;
    // The first receives.
    if nth > 0 && !relay.stand_by() {
        return;
    }
    loop {
        match listener::receive(listener) {
            Ok(notification) => {
                let turn = relay.busy();
                supervisor.take(&seat, notification);
                if !relay.done(turn) && !relay.stand_by() {
                    return;
                }
            }
            Err(error) if is_passing(&error) => {}
            // Somebody has closed it: what the filter stops fails from here on.
            Err(_) => return relay.close(),
        }
    }
}

/// What a supervisor has for itself.
struct Seat<'m> {
    listener: i32,
    maps: &'m Maps,
    known: Known,
}

/// A signal, or a caller that was gone by then.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT))
}

/// One range of one route, to be invalidated.
struct Part<'s> {
    sink: &'s Sink,
    range: Range,
    cause: Cause,
}

impl Supervisor {
    pub(super) fn new(service: Service) -> Self {
        Self {
            routes: Mutex::new([const { None }; RANGES]),
            left: Condvar::new(),
            relay: Relay::default(),
            calls: Mutex::new(Calls {
                serving: 0,
                waiting: VecDeque::with_capacity(WAITING),
            }),
            service,
        }
    }

    /// Serves calls for these as well.
    pub(super) fn add(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError> {
        let mut routes = lock(&self.routes);
        if routes.iter().filter(|one| one.is_none()).count() < sinks.len() {
            return Err(SourceError::NoRoom { limit: RANGES });
        }
        for sink in sinks {
            let free = routes.iter_mut().find(|one| one.is_none());
            *free.expect("counted") = Some(Route {
                sink: sink.clone(),
                uses: 0,
                stopping: false,
            });
        }
        Ok(())
    }

    /// No longer; waits for the calls that are being served for it.
    pub(super) fn remove(&self, sink: &Arc<Sink>) {
        let mut routes = lock(&self.routes);
        loop {
            let own = routes.iter_mut().find(|one| {
                one.as_ref()
                    .is_some_and(|route| Arc::ptr_eq(&route.sink, sink))
            });
            let Some(own) = own else { return };
            match own {
                Some(route) if route.uses > 0 => route.stopping = true,
                _ => {
                    let route = own.take();
                    drop(routes);
                    // Freed with the lock given back: a supervisor may want it.
                    drop(route);
                    return;
                }
            }
            routes = self
                .left
                .wait(routes)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Serves a call that was received, then those that wait, unless all but this one are at it.
    fn take(&self, seat: &Seat<'_>, notification: Notification) {
        let listener = seat.listener;
        let mut is_supervisor = THREADS.iter().map(|one| one.load(Ordering::Relaxed));
        if is_supervisor.any(|one| one == notification.pid) {
            // Its handler waits for this very call.
            return listener::answer(listener, notification.id, Err(libc::EDEADLK));
        }
        let caller = seat.known.caller(notification.pid);
        if caller == Caller::Other {
            return listener::let_go_on(listener, notification.id);
        }
        {
            let mut calls = lock(&self.calls);
            if calls.serving == SUPERVISORS - 1 {
                if calls.waiting.len() < WAITING {
                    calls.waiting.push_back((notification, caller));
                } else {
                    listener::answer(listener, notification.id, Err(libc::EAGAIN));
                }
                return;
            }
            calls.serving += 1;
        }
        let mut next = Some((notification, caller));
        while let Some((notification, caller)) = next {
            self.serve(seat, &notification, caller);
            let mut calls = lock(&self.calls);
            next = calls.waiting.pop_front();
            calls.serving -= usize::from(next.is_none());
        }
    }

    /// Serves one call. From its receipt to its answer nothing is allocated or freed.
    fn serve(&self, seat: &Seat<'_>, notification: &Notification, caller: Caller) {
        let (id, listener, maps) = (notification.id, seat.listener, seat.maps);
        {
            // As if inside a callback: what the handlers put off stays put off until the caller has its answer.
            let _open = OpenInvalidation::enter();
            let mut call = Call::new(&notification.data);
            let stand_in = StandIn::find(&call, notification.pid);
            let changes = call.changes(&stand_in, maps);
            let perform = |arenas: &Arenas| {
                // A caller that was killed is gone, and what it wanted to unmap may be somebody else's by the time that this is made.
                // Whoever waits still is also who was looked at above: his number was not given to another.
                if caller != Caller::Own && !listener::is_waited_for(listener, id) {
                    return (Some(Err(libc::EINTR)), Outcome::Unchanged);
                }
                if matches!(stand_in, StandIn::Not) {
                    return (None, Outcome::Changed);
                }
                let result = call.perform(&changes, arenas);
                (Some(result), call.outcome(result, maps))
            };
            match self.shoot_down(&changes, notification.pid, perform) {
                Some(result) => listener::answer(listener, id, result),
                None => listener::let_go_on(listener, id),
            }
        }
        service::hand_over(self.service);
    }

    /// Invalidates, performs, ends. `None`: the caller shall make the call.
    fn shoot_down(
        &self,
        changes: &Changes,
        thread: u32,
        perform: impl FnOnce(&Arenas) -> (Option<Result<usize, i32>>, Outcome),
    ) -> Option<Result<usize, i32>> {
        let sinks = self.enter();
        let result = {
            let mut open = ArrayVec::new();
            match begin(&sinks, changes, thread, &mut open) {
                Err(errno) => Some(Err(errno)),
                Ok(()) => {
                    let arenas = sinks.iter().filter_map(|one| one.sink.arena()).collect();
                    let (result, outcome) = perform(&arenas);
                    for change in open {
                        // A handler's panic is known to the space; the pages have changed.
                        let _ = change.end(outcome);
                    }
                    result
                }
            }
        };
        self.leave(sinks);
        result
    }

    /// The sinks there are, in use.
    fn enter(&self) -> Sinks {
        let mut routes = lock(&self.routes);
        let mut sinks = ArrayVec::new();
        for (place, route) in routes.iter_mut().enumerate() {
            if let Some(route) = route.as_mut().filter(|route| !route.stopping) {
                route.uses += 1;
                let sink = route.sink.clone();
                sinks.push(InUse { place, sink });
            }
        }
        sinks
    }

    fn leave(&self, sinks: Sinks) {
        let mut routes = lock(&self.routes);
        let mut waited_for = false;
        for InUse { place, sink } in sinks {
            if let Some(route) = &mut routes[place] {
                // Not the last: the route has one.
                drop(sink);
                route.uses -= 1;
                waited_for |= route.stopping;
            }
        }
        drop(routes);
        // A system call, also where nobody waits.
        if waited_for {
            self.left.notify_all();
        }
    }
}

/// Begins all of it; on an error what was begun has ended, and nothing has changed.
fn begin<'s>(
    sinks: &'s Sinks,
    changes: &Changes,
    thread: u32,
    open: &mut Open<'s>,
) -> Result<(), i32> {
    let sinks = || sinks.iter().map(|one| &*one.sink);
    let parts = || {
        changes.iter().flat_map(move |(range, cause)| {
            let touched = sinks().filter(move |sink| sink.range().overlaps(range));
            // The space's own operation has shot it down, and comes here only if its memory does not use the gate.
            let foreign = touched.filter(move |sink| !sink.is_own(range, thread));
            foreign.map(move |sink| Part { sink, range, cause })
        })
    };
    let at_most = changes.len() * sinks().len();
    if changes.everything || at_most > CHANGES && parts().count() > CHANGES {
        let all = sinks().map(|sink| Part {
            sink,
            range: sink.range(),
            cause: Cause::External,
        });
        begin_each(all, open)
    } else {
        begin_each(parts(), open)
    }
}

fn begin_each<'s>(parts: impl Iterator<Item = Part<'s>>, open: &mut Open<'s>) -> Result<(), i32> {
    for part in parts {
        match part.sink.begin(part.range, part.cause) {
            Ok(change) => open.extend(change),
            Err(error) => {
                for change in open.drain(..) {
                    let _ = change.end(Outcome::Unchanged);
                }
                return Err(errno(&error));
            }
        }
    }
    Ok(())
}

/// What the caller is told: the pages stay as they are.
fn errno(error: &SinkError) -> i32 {
    match error {
        // Its devices may still reach the pages.
        SinkError::Reached { .. }
        | SinkError::NotDrained { .. }
        | SinkError::HandlerPanicked { .. } => libc::EBUSY,
        _ => libc::EAGAIN,
    }
}
