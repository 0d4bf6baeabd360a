//! The supervisors: one receives a call, shoots down, performs it, and answers.
//!
//! The others [stand by](Relay), and take over when a call lasts. All but one of them run handlers at a time. The one that is left goes
//! on receiving: a call may be a handler's of the others, which would wait for itself, and is told so. What else it
//! receives waits for a supervisor.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use arrayvec::ArrayVec;

use super::call::{CHANGES, Call, Changes};
use super::caller::{self, Caller, Known, StandIn};
use super::filter::RANGES;
use super::listener::{self, Notification};
use super::maps::Maps;
use super::{LISTENER, NONE_COMES, SUPERVISOR, SUPERVISORS, lock};
use crate::addr::Range;
use crate::context::OpenInvalidation;
use crate::engine::SinkError;
use crate::notifier::{Cause, Outcome};
use crate::source::relay::Relay;
use crate::source::service::{self, Service};
use crate::source::{ExternalChange, Sink, SourceError};

/// Calls that can have been received and wait for a supervisor; one more fails with EAGAIN.
const WAITING: usize = 1024;

/// A place for a sink. Whoever serves a call holds it for reading meanwhile, and passes by where somebody waits to write.
type Route = RwLock<Option<Arc<Sink>>>;

/// A place, in use.
type InUse<'s> = RwLockReadGuard<'s, Option<Arc<Sink>>>;

/// What a call has begun.
type Open<'s> = ArrayVec<ExternalChange<'s>, CHANGES>;

/// The list of all supervisors.
#[derive(Debug)]
pub(super) struct Supervisor {
    relay: Relay,
    /// Supervisors that were relieved and serve still. Lowered with `waiting` locked.
    relieved: AtomicIsize,
    /// The routes in use, a bit each.
    used: AtomicUsize,
    routes: [Route; RANGES],
    /// What is to be served by those. Never grows: it has room for [`WAITING`].
    waiting: Mutex<VecDeque<(Notification, Caller)>>,
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
    caller::supervises(nth);
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
        known: Known::new(),
    };
    let relay = &supervisor.relay;
    // The first receives.
    if nth > 0 && !supervisor.stand_by() {
        return;
    }
    // SAFETY: integers only.
    let mut notification: Notification = unsafe { std::mem::zeroed() };
    loop {
        match listener::receive(listener, &mut notification) {
            Ok(()) => {
                let turn = relay.busy();
                supervisor.take(&seat, &notification);
                if !relay.done(turn) && !supervisor.relieved(&seat) {
                    return;
                }
            }
            // A signal, or a caller that was gone by then.
            Err(libc::EINTR | libc::ENOENT) => {}
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

fn write(route: &Route) -> RwLockWriteGuard<'_, Option<Arc<Sink>>> {
    route.write().unwrap_or_else(PoisonError::into_inner)
}

impl Supervisor {
    pub(super) fn new(service: Service) -> Self {
        Self {
            relay: Relay::default(),
            relieved: AtomicIsize::new(0),
            used: AtomicUsize::new(0),
            routes: [const { RwLock::new(None) }; RANGES],
            waiting: Mutex::new(VecDeque::with_capacity(WAITING)),
            service,
        }
    }

    /// Serves calls for these as well. One thread at a time: sources are started and tested one after the other.
    pub(super) fn add(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError> {
        let used = self.used.load(Ordering::Relaxed);
        let free = (0..RANGES).filter(|place| used & 1 << place == 0);
        if free.clone().count() < sinks.len() {
            return Err(SourceError::NoRoom { limit: RANGES });
        }
        for (place, sink) in free.zip(sinks) {
            *write(&self.routes[place]) = Some(sink.clone());
            // Relaxed: whoever makes a call that is to be told orders it behind this himself.
            self.used.fetch_or(1 << place, Ordering::Relaxed);
        }
        Ok(())
    }

    /// No longer; waits for the calls that are being served for it.
    pub(super) fn remove(&self, sink: &Arc<Sink>) {
        let is_own = |one: InUse<'_>| one.as_ref().is_some_and(|one| Arc::ptr_eq(one, sink));
        let mut routes = self.routes.iter();
        // What somebody else writes is his.
        let own = routes.position(|route| route.try_read().is_ok_and(is_own));
        let Some(place) = own else { return };
        let sink = write(&self.routes[place]).take();
        self.used.fetch_and(!(1 << place), Ordering::Relaxed);
        // Freed with the lock given back: a supervisor may want it.
        drop(sink);
    }

    /// Waits until this thread receives. False: nobody does any more.
    fn stand_by(&self) -> bool {
        let receives = self.relay.stand_by();
        // Relaxed: who receives is this thread. The other may have served by now, and lowered it before.
        self.relieved.fetch_add(receives.into(), Ordering::Relaxed);
        receives
    }

    /// Another receives by now: serves what that left, then stands by.
    #[cold]
    fn relieved(&self, seat: &Seat<'_>) -> bool {
        loop {
            let mut waiting = lock(&self.waiting);
            let Some((notification, caller)) = waiting.pop_front() else {
                self.relieved.fetch_sub(1, Ordering::Relaxed);
                break;
            };
            drop(waiting);
            self.serve(seat, &notification, caller);
        }
        self.stand_by()
    }

    /// Serves a call that was received, unless all but this one are at it.
    fn take(&self, seat: &Seat<'_>, notification: &Notification) {
        let caller = seat.known.caller(notification.pid);
        match caller {
            // Its handler waits for this very call.
            Caller::Supervisor => {
                return listener::answer(seat.listener, notification.id, Err(libc::EDEADLK));
            }
            Caller::Other => return listener::let_go_on(seat.listener, notification.id),
            Caller::Own | Caller::InThisMemory => {}
        }
        // Relaxed: only this thread raises it, or did so to receive.
        let last = self.relieved.load(Ordering::Relaxed) == SUPERVISORS as isize - 1;
        if !last || !self.leave_to_others(seat, notification, caller) {
            self.serve(seat, notification, caller);
        }
    }

    /// Those that were relieved serve it, unless one is done by now: false.
    #[cold]
    fn leave_to_others(
        &self,
        seat: &Seat<'_>,
        notification: &Notification,
        caller: Caller,
    ) -> bool {
        let mut waiting = lock(&self.waiting);
        if self.relieved.load(Ordering::Relaxed) < SUPERVISORS as isize - 1 {
            return false;
        }
        if waiting.len() < WAITING {
            waiting.push_back((*notification, caller));
        } else {
            listener::answer(seat.listener, notification.id, Err(libc::EAGAIN));
        }
        true
    }

    /// Serves one call. From its receipt to its answer nothing is allocated or freed.
    fn serve(&self, seat: &Seat<'_>, notification: &Notification, caller: Caller) {
        let (id, thread, listener) = (notification.id, notification.pid, seat.listener);
        {
            // As if inside a callback: what the handlers put off stays put off until the caller has its answer.
            let _open = OpenInvalidation::enter();
            let mut call = Call::new(&notification.data);
            let stand_in = StandIn::find(&call, thread);
            let mut changes = Changes::default();
            call.changes(&stand_in, seat.maps, &mut changes);
            // Filled where it lies, as what follows.
            let mut routes = ArrayVec::<InUse<'_>, RANGES>::new();
            let mut used = self.used.load(Ordering::Relaxed);
            while used != 0 {
                let place = used.trailing_zeros() as usize;
                used &= used - 1;
                let route = self.routes[place % RANGES].try_read();
                routes.extend(route.ok().filter(|route| route.is_some()));
            }
            let sinks = routes.iter().filter_map(|one| one.as_deref());
            let make = || {
                // A caller that was killed is gone, and what it wanted to unmap may be somebody else's by the time that this is made.
                // Whoever waits still is also who was looked at above: his number was not given to another.
                if caller != Caller::Own && !listener::is_waited_for(listener, id) {
                    return (Some(Err(libc::EINTR)), Outcome::Unchanged);
                }
                // The caller shall make it.
                if matches!(stand_in, StandIn::Not) {
                    return (None, Outcome::Changed);
                }
                let result = call.perform(&changes, sinks.clone().filter_map(Sink::arena));
                (Some(result), call.outcome(result, seat.maps))
            };
            let mut open = Open::new();
            let result = match begin(sinks.clone(), &changes, thread, &mut open) {
                Err(errno) => Some(Err(errno)),
                Ok(()) => {
                    let (result, outcome) = make();
                    end(&mut open, outcome);
                    result
                }
            };
            match result {
                Some(result) => listener::answer(listener, id, result),
                None => listener::let_go_on(listener, id),
            }
        }
        service::hand_over(self.service);
    }
}

/// Begins all of it; on an error what was begun has ended, and nothing has changed.
fn begin<'s>(
    sinks: impl Iterator<Item = &'s Sink> + Clone,
    changes: &Changes,
    thread: u32,
    open: &mut Open<'s>,
) -> Result<(), i32> {
    if changes.everything {
        return begin_everything(sinks, open);
    }
    for (range, cause) in changes.iter() {
        for sink in sinks.clone() {
            // The space's own operation has shot it down, and comes here only if its memory does not use the gate.
            if !sink.range().overlaps(range) || sink.is_own(range, thread) {
                continue;
            }
            if open.is_full() {
                return begin_everything(sinks, open);
            }
            begin_one(sink, range, cause, open)?;
        }
    }
    Ok(())
}

/// Instead of what was begun.
#[cold]
fn begin_everything<'s>(
    mut sinks: impl Iterator<Item = &'s Sink>,
    open: &mut Open<'s>,
) -> Result<(), i32> {
    end(open, Outcome::Unchanged);
    sinks.try_for_each(|sink| begin_one(sink, sink.range(), Cause::External, open))
}

fn begin_one<'s>(
    sink: &'s Sink,
    range: Range,
    cause: Cause,
    open: &mut Open<'s>,
) -> Result<(), i32> {
    let change = sink.begin(range, cause);
    let change = change.map_err(|error| failed(error, open))?;
    if let Some(change) = change {
        open.push(change);
    }
    Ok(())
}

#[cold]
fn failed(error: SinkError, open: &mut Open<'_>) -> i32 {
    end(open, Outcome::Unchanged);
    errno(&error)
}

/// Ends what has begun, the last first.
#[inline]
fn end(open: &mut Open<'_>, outcome: Outcome) {
    while let Some(change) = open.pop() {
        // A handler's panic is known to the space; the pages have changed, or not.
        let _ = change.end(outcome);
    }
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

#[cfg(all(test, not(loom)))]
mod tests;
