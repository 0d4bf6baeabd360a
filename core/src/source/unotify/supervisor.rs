//! The supervisors: each receives a call, shoots down, performs it, and answers.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::call::{CHANGES, Call, Changes};
use super::filter::RANGES;
use super::{LISTENER, NONE_COMES, SUPERVISOR, SUPERVISORS, lock};
use crate::addr::Range;
use crate::context::OpenInvalidation;
use crate::engine::InvalidateError;
use crate::notifier::{Cause, Outcome};
use crate::source::service::{self, Service};
use crate::source::{ExternalChange, Sink, SourceError};

static THREADS: [AtomicU32; SUPERVISORS] = [const { AtomicU32::new(0) }; SUPERVISORS];

/// A sink in the list, and how many calls are being served for it.
#[derive(Debug)]
struct Route {
    sink: Arc<Sink>,
    uses: usize,
    stopping: bool,
}

/// The list of all supervisors.
#[derive(Debug)]
pub(super) struct Supervisor {
    routes: Mutex<[Option<Route>; RANGES]>,
    left: Condvar,
    service: Service,
}

/// A supervisor thread: receives and answers for as long as the process lives.
pub(super) fn supervise(nth: usize) {
    // Handlers of the application's signals do not run here: they could make a call that waits for this thread.
    // SAFETY: the set is filled before it is used.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
    }
    // SAFETY: no arguments.
    let own = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
    THREADS[nth].store(own, Ordering::Relaxed);
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
    if listener == NONE_COMES {
        return;
    }
    let (Some(supervisor), Some(wait)) = (SUPERVISOR.get(), Wait::new(listener)) else {
        return;
    };
    loop {
        wait.wait();
        if let Some(notification) = receive(listener) {
            supervisor.serve(listener, &notification);
        }
    }
}

/// Waits for calls, so that one supervisor wakes for each.
struct Wait(OwnedFd);

impl Wait {
    fn new(listener: i32) -> Option<Self> {
        // SAFETY: numbers only.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return None;
        }
        // SAFETY: opened just now.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut event = libc::epoll_event {
            events: (libc::EPOLLIN | libc::EPOLLEXCLUSIVE) as u32,
            u64: 0,
        };
        // SAFETY: both descriptors are open.
        let added = unsafe { libc::epoll_ctl(fd, libc::EPOLL_CTL_ADD, listener, &mut event) };
        (added == 0).then_some(this)
    }

    fn wait(&self) {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: there is room for one event.
        unsafe { libc::epoll_wait(self.0.as_raw_fd(), &mut event, 1, -1) };
    }
}

fn receive(listener: i32) -> Option<libc::seccomp_notif> {
    // SAFETY: integers only; the kernel wants it zeroed.
    let mut notification: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure.
    let said = unsafe {
        libc::ioctl(
            listener,
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut notification,
        )
    };
    (said == 0).then_some(notification)
}

fn answer(listener: i32, id: u64, result: Result<usize, i32>) {
    let response = match result {
        Ok(value) => libc::seccomp_notif_resp {
            id,
            val: value as i64,
            error: 0,
            flags: 0,
        },
        Err(errno) => libc::seccomp_notif_resp {
            id,
            val: 0,
            error: -errno,
            flags: 0,
        },
    };
    send(listener, response);
}

/// The caller makes the call itself.
fn let_go_on(listener: i32, id: u64) {
    send(
        listener,
        libc::seccomp_notif_resp {
            id,
            val: 0,
            error: 0,
            flags: libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        },
    );
}

fn send(listener: i32, response: libc::seccomp_notif_resp) {
    // ENOENT: the caller was killed meanwhile, and wants no answer.
    // SAFETY: the kernel reads the structure.
    unsafe {
        libc::ioctl(
            listener,
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw const response,
        )
    };
}

/// Who makes a call.
#[derive(PartialEq, Eq)]
enum Caller {
    Supervisor,
    Thread,
    /// Another process with this one's memory: between vfork and exec.
    SameMemory,
    Other,
}

fn caller(thread: u32) -> Caller {
    if THREADS
        .iter()
        .any(|one| one.load(Ordering::Relaxed) == thread)
    {
        return Caller::Supervisor;
    }
    let own = std::process::id();
    // SAFETY: signal 0 is none: this asks whether the thread is one of this process.
    if unsafe { libc::syscall(libc::SYS_tgkill, own, thread, 0) } == 0 {
        return Caller::Thread;
    }
    const KCMP_VM: i32 = 1;
    // SAFETY: numbers only.
    if unsafe { libc::syscall(libc::SYS_kcmp, own, thread, KCMP_VM, 0, 0) } == 0 {
        return Caller::SameMemory;
    }
    Caller::Other
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

    /// Serves one call. From its receipt to its answer nothing is allocated or freed.
    fn serve(&self, listener: i32, notification: &libc::seccomp_notif) {
        let id = notification.id;
        {
            // As if inside a callback: what the handlers put off stays put off until the caller has its answer.
            let _open = OpenInvalidation::enter();
            match caller(notification.pid) {
                // Its handler waits for this very call.
                Caller::Supervisor => answer(listener, id, Err(libc::EDEADLK)),
                Caller::Other => let_go_on(listener, id),
                who => {
                    let mut call = Call::new(&notification.data);
                    // Its descriptors are its own: it makes such a call itself, when the devices have been told.
                    let own_files = who == Caller::SameMemory && call.takes_descriptor();
                    let changes = call.changes();
                    match self.shoot_down(&mut call, &changes, own_files) {
                        Some(result) => answer(listener, id, result),
                        None => let_go_on(listener, id),
                    }
                }
            }
        }
        service::hand_over(self.service);
    }

    /// Invalidates, performs, ends. `None`: the caller shall make the call.
    fn shoot_down(
        &self,
        call: &mut Call,
        changes: &Changes,
        own_files: bool,
    ) -> Option<Result<usize, i32>> {
        let sinks = self.enter();
        let result = {
            let mut open: [Option<ExternalChange<'_>>; CHANGES] = [const { None }; CHANGES];
            match begin(&sinks, changes, &mut open) {
                Err(errno) => Some(Err(errno)),
                Ok(()) => {
                    let result = (!own_files).then(|| call.perform());
                    let outcome = call.outcome(result.unwrap_or(Ok(0)));
                    for change in open.iter_mut().filter_map(Option::take) {
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
    fn enter(&self) -> [Option<Arc<Sink>>; RANGES] {
        let mut routes = lock(&self.routes);
        let mut sinks = [const { None }; RANGES];
        for (route, sink) in routes.iter_mut().zip(&mut sinks) {
            if let Some(route) = route.as_mut().filter(|route| !route.stopping) {
                route.uses += 1;
                *sink = Some(route.sink.clone());
            }
        }
        sinks
    }

    fn leave(&self, sinks: [Option<Arc<Sink>>; RANGES]) {
        let mut routes = lock(&self.routes);
        for (route, sink) in routes.iter_mut().zip(sinks) {
            if let (Some(route), Some(sink)) = (route, sink) {
                // Not the last: the route has one.
                drop(sink);
                route.uses -= 1;
            }
        }
        drop(routes);
        self.left.notify_all();
    }
}

/// Begins all of it; on an error what was begun has ended, and nothing has changed.
fn begin<'s>(
    sinks: &'s [Option<Arc<Sink>>; RANGES],
    changes: &Changes,
    open: &mut [Option<ExternalChange<'s>>; CHANGES],
) -> Result<(), i32> {
    let sinks = || sinks.iter().flatten().map(|sink| &**sink);
    let parts = || {
        changes.iter().flat_map(move |(range, cause)| {
            let touched = sinks().filter(move |sink| sink.range().overlaps(range));
            // The space's own operation has shot it down, and comes here only if its memory does not use the gate.
            let foreign = touched.filter(move |sink| !sink.is_own(range));
            foreign.map(move |sink| Part { sink, range, cause })
        })
    };
    if changes.everything || parts().count() > CHANGES {
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

fn begin_each<'s>(
    parts: impl Iterator<Item = Part<'s>>,
    open: &mut [Option<ExternalChange<'s>>; CHANGES],
) -> Result<(), i32> {
    for (part, place) in parts.zip(open.iter_mut()) {
        match part.sink.begin(part.range, part.cause) {
            Ok(change) => *place = change,
            Err(error) => {
                for change in open.iter_mut().filter_map(Option::take) {
                    let _ = change.end(Outcome::Unchanged);
                }
                return Err(errno(&error));
            }
        }
    }
    Ok(())
}

/// What the caller is told: the pages stay as they are.
fn errno(error: &InvalidateError) -> i32 {
    match error {
        // Its devices may still reach the pages.
        InvalidateError::Quarantined { .. }
        | InvalidateError::NotDrained { .. }
        | InvalidateError::HandlerPanicked { .. } => libc::EBUSY,
        _ => libc::EAGAIN,
    }
}
