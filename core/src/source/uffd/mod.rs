//! uffd: a userfaultfd over what is watched tells of unmapped, moved and discarded pages. It needs no opt-in, and is late.
//!
//! The range is registered once, for asynchronous write protection: that delivers no faults, costs next to nothing at the first
//! touch, and needs no kernel mapping (VMA) for each range that a driver registers. Whoever unmaps or discards
//! waits until his event is *read*, not until anybody has acted on it. So it is declared late for what unmaps and moves (the pages are gone
//! when it is told). The event of a discard is made before the pages go, but to read it is to let them go: handlers
//! run beside the discard, sometimes before it and sometimes after, so neither before nor end is declared.
//!
//! What somebody else maps into a hole, without `MAP_FIXED` over a mapping that is watched, is watched from the next registration
//! there on.
//!
//! # Two threads
//! One reads, and makes the invalidation of what it has read itself: its caller is let go by the reading, and nobody else has to be woken,
//! on another processor, for each event. When that lasts the other [takes over](Relay): it reads and queues, and does nothing else, so that a
//! handler may block, take a lock of the application, or unmap what is watched, which waits to be read as well. The queue
//! has a fixed size; what does not fit means that everything is flushed (R19). Neither thread allocates; releases, which may unmap
//! what they like and take any lock, run on the service thread.
//!
//! # News of an earlier mapping (R29)
//! While an event is unread its range can be mapped and registered again. So an insertion waits ([`Source::settle`]) until what had
//! happened before is told: the kernel refuses to write-protect a page while any operation is between its change and the
//! reading of its event, which is asked of a page of the source's own; the turn is odd from before a read until what was read is
//! queued; and the queue counts what has been told.

#[cfg(all(any(test, fuzzing), not(loom)))]
pub(crate) mod fuzz;
pub(super) mod sys;

use std::cell::Cell;
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use self::sys::{Descriptor, Event};
use super::operation::{Operation, Sees};
use super::relay::Relay;
use super::service::{self, Service};
use super::{Sink, Source, SourceError, arena};
use crate::active::SLOTS;
use crate::addr::Range;
use crate::context::OpenInvalidation;
use crate::notifier::Cause;
use crate::primitive::Backoff;

/// Events that wait to be acted on; more are everything.
const QUEUE: usize = 1024;
/// Threads of a descriptor: one reads, the other stands by.
const THREADS: usize = 2;
/// Sinks of one descriptor: a space's, and the self-test's.
const SINKS: usize = 4;

/// A userfaultfd. One value watches for one space.
#[derive(Debug, Default)]
pub struct Uffd {
    running: Mutex<Option<Running>>,
}

pub(super) fn declares(operation: Operation) -> Sees {
    match operation {
        Operation::Munmap
        | Operation::MapFixed
        | Operation::MremapMove
        | Operation::MremapShrink
        | Operation::MremapOver
        | Operation::MremapDontunmap
        | Operation::Brk
        | Operation::Fork => Sees::TOLD | Sees::END,
        Operation::Dontneed
        | Operation::DontneedLocked
        | Operation::Free
        | Operation::Remove
        | Operation::ProcessMadvise
        | Operation::IoUringMadvise => Sees::TOLD,
        _ => Sees::empty(),
    }
}

#[derive(Debug)]
struct Running {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Queue {
    events: VecDeque<Event>,
    /// One did not fit, or a mapping could not be watched.
    lost: bool,
    /// One of the threads tells what there is.
    serving: bool,
    taken: u64,
    done: u64,
    /// Threads that wait until something is done.
    waiting: usize,
    /// Threads that have started.
    ready: usize,
    stopping: bool,
}

#[derive(Debug)]
struct Shared {
    descriptor: Descriptor,
    /// Written to where there is something to do that is no event.
    wake: OwnedFd,
    sinks: Mutex<[Option<Arc<Sink>>; SINKS]>,
    relay: Relay,
    /// Odd while what has been read may not be queued.
    turn: AtomicU64,
    queue: Mutex<Queue>,
    changed: Condvar,
    service: Service,
}

thread_local! {
    /// For whom this thread reads: an address.
    static READS: Cell<usize> = const { Cell::new(0) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Uffd {
    pub(super) const NAME: &'static str = "uffd";

    /// The source. Nothing is opened before it is started.
    pub fn new() -> Self {
        Self::default()
    }

    fn shared(&self) -> Option<Arc<Shared>> {
        let running = lock(&self.running);
        running.as_ref().map(|running| running.shared.clone())
    }
}

impl Source for Uffd {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn declares(&self, operation: Operation) -> Sees {
        let forks = || self.shared().is_none_or(|shared| shared.descriptor.forks);
        match operation {
            Operation::Fork if !forks() => Sees::empty(),
            other => declares(other),
        }
    }

    fn start(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError> {
        let mut running = lock(&self.running);
        if running.is_some() || sinks.len() > SINKS {
            return Err(SourceError::NoRoom { limit: 1 });
        }
        let descriptor = Descriptor::new()?;
        // SAFETY: numbers only.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(SourceError::last("eventfd"));
        }
        let mut list = [const { None }; SINKS];
        for (place, sink) in list.iter_mut().zip(sinks) {
            *place = Some(sink.clone());
        }
        let shared = Arc::new(Shared {
            descriptor,
            // SAFETY: opened just now.
            wake: unsafe { OwnedFd::from_raw_fd(wake) },
            sinks: Mutex::new(list),
            relay: Relay::default(),
            turn: AtomicU64::new(0),
            queue: Mutex::new(Queue {
                events: VecDeque::with_capacity(QUEUE),
                lost: false,
                serving: false,
                taken: 0,
                done: 0,
                waiting: 0,
                ready: 0,
                stopping: false,
            }),
            changed: Condvar::new(),
            service: service::start()?,
        });
        let mut threads = Vec::with_capacity(THREADS);
        for nth in 0..THREADS {
            let of_thread = shared.clone();
            let thread = std::thread::Builder::new().name("shootdown-uffd".to_owned());
            match thread.spawn(move || of_thread.run(nth)) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    shared.end(threads);
                    let call = "the start of a thread";
                    return Err(SourceError::System { call, error });
                }
            }
        }
        shared.are_ready();
        // From here on somebody who holds the allocator's lock may wait for the one that reads.
        for sink in sinks {
            if let Err(error) = shared.descriptor.register(sink.range()) {
                shared.end(threads);
                let call = "UFFDIO_REGISTER";
                return Err(SourceError::System { call, error });
            }
        }
        *running = Some(Running { shared, threads });
        Ok(())
    }

    fn stop(&self, sink: &Arc<Sink>) {
        let Some(shared) = self.shared() else { return };
        // What has happened is told first.
        shared.settle();
        let mut sinks = lock(&shared.sinks);
        let own = sinks
            .iter_mut()
            .find(|one| one.as_ref().is_some_and(|one| Arc::ptr_eq(one, sink)));
        if let Some(own) = own {
            *own = None;
        }
        let last = sinks.iter().all(Option::is_none);
        drop(sinks);
        shared.descriptor.unregister(sink.range());
        // What was begun meanwhile is over.
        shared.settle();
        if !last {
            return;
        }
        let running = lock(&self.running).take();
        if let Some(running) = running {
            shared.end(running.threads);
        }
    }

    fn settle(&self) {
        if let Some(shared) = self.shared().filter(|_| !planted!("r29")) {
            shared.settle();
        }
    }

    fn renew(&self, range: Range) {
        if let Some(shared) = self.shared() {
            shared.renew(range);
        }
    }
}

impl Shared {
    /// Watches again what was mapped anew. What is not mapped at all cannot be watched, and need not be.
    fn renew(&self, range: Range) {
        match self.descriptor.register(range) {
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                // Blind from here on, and nobody the wiser: at least what is there now goes.
                lock(&self.queue).lost = true;
                self.wake();
            }
            _ => {}
        }
    }

    fn settle(&self) {
        if READS.get() == std::ptr::from_ref(self) as usize {
            // It tells by itself.
            return;
        }
        let mut backoff = Backoff::new();
        while !self.descriptor.is_quiet() {
            backoff.wait();
        }
        // Acquire, with the reader's Release: what it has read is queued.
        let turn = self.turn.load(Ordering::Acquire);
        let mut backoff = Backoff::new();
        while turn % 2 == 1 && self.turn.load(Ordering::Acquire) == turn {
            backoff.wait();
        }
        let mut queue = lock(&self.queue);
        let taken = queue.taken;
        queue.waiting += 1;
        while queue.done < taken {
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.waiting -= 1;
    }

    /// Waits until the threads have started: that allocates.
    fn are_ready(&self) {
        let mut queue = lock(&self.queue);
        while queue.ready < THREADS {
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whoever reads looks at the queue.
    fn wake(&self) {
        let one = 1u64;
        // SAFETY: eight bytes, as the descriptor wants them.
        unsafe { libc::write(self.wake.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    fn end(&self, threads: Vec<JoinHandle<()>>) {
        lock(&self.queue).stopping = true;
        self.wake();
        for thread in threads {
            // A thread that panicked has nothing more to do.
            let _ = thread.join();
        }
    }

    /// One of the threads. Somebody waits for each event that there is: nothing here allocates.
    fn run(&self, nth: usize) {
        // Handlers of the application's signals could unmap what is watched.
        // SAFETY: the set is filled before it is used.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&mut all);
            libc::pthread_sigmask(libc::SIG_BLOCK, &all, std::ptr::null_mut());
        }
        READS.set(std::ptr::from_ref(self) as usize);
        let mut own = Vec::with_capacity(SLOTS);
        lock(&self.queue).ready += 1;
        self.changed.notify_all();
        // The first reads.
        if nth > 0 && !self.relay.stand_by() {
            return;
        }
        loop {
            let Some(serves) = self.read(&mut own) else {
                return self.relay.close();
            };
            if serves {
                let turn = self.relay.busy();
                self.serve();
                if !self.relay.done(turn) && !self.relay.stand_by() {
                    return;
                }
            }
        }
    }

    /// Waits for an event, and queues it. Whether it is this thread's to tell what is queued; `None`: it is to end.
    fn read(&self, own: &mut Vec<Range>) -> Option<bool> {
        let poll = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [poll(self.descriptor.raw()), poll(self.wake.as_raw_fd())];
        // SAFETY: two descriptors.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        // An operation of the space itself that waits to be read is still among these; afterwards it may be over.
        own.clear();
        if let Some(sink) = &lock(&self.sinks)[0] {
            // The self-test's space has no operations of its own.
            sink.owned(own);
        }
        self.turn.fetch_add(1, Ordering::AcqRel);
        let event = self.descriptor.read();
        let is_own = |event: &Event| event.range().is_some_and(|range| own.contains(&range));
        let mut queue = lock(&self.queue);
        if let Some(event) = event.filter(|event| !is_own(event)) {
            if queue.events.len() == QUEUE {
                queue.lost = true;
            } else {
                queue.events.push_back(event);
                queue.taken += 1;
            }
        }
        let serves = !queue.serving && (queue.lost || !queue.events.is_empty());
        queue.serving |= serves;
        let stopping = queue.stopping;
        // Not what is written when this is to stop: there may be events to be read first.
        if fds[1].revents != 0 && !stopping {
            let mut count = 0u64;
            // SAFETY: eight bytes, as the descriptor gives them.
            unsafe { libc::read(self.wake.as_raw_fd(), (&raw mut count).cast(), 8) };
        }
        drop(queue);
        // Release: whoever sees this even sees the queue.
        self.turn.fetch_add(1, Ordering::Release);
        let ends = stopping && event.is_none() && !serves;
        (!ends).then_some(serves)
    }

    fn sinks(&self) -> [Option<Arc<Sink>>; SINKS] {
        lock(&self.sinks).clone()
    }

    /// Tells what is queued, and what is queued meanwhile.
    fn serve(&self) {
        let mut queue = lock(&self.queue);
        loop {
            let lost = std::mem::take(&mut queue.lost);
            let event = queue.events.pop_front();
            if !lost && event.is_none() {
                queue.serving = false;
                return;
            }
            drop(queue);
            {
                // What the handlers put off is not waited for by those who wait until this is told.
                let _open = OpenInvalidation::enter();
                if lost {
                    self.tell(None, Cause::External);
                }
                if let Some(event) = event {
                    self.act(event);
                }
            }
            service::hand_over(self.service);
            queue = lock(&self.queue);
            queue.done += u64::from(event.is_some());
            // A system call, also where nobody waits.
            if queue.waiting > 0 {
                self.changed.notify_all();
            }
        }
    }

    fn act(&self, event: Event) {
        match event {
            Event::Unmap(range) => {
                self.tell(Some(range), Cause::Unmap);
                self.look_again(range);
            }
            Event::Remove(range) => self.tell(Some(range), Cause::Discard),
            Event::Remap(from, to) => {
                self.tell(Some(from), Cause::Remap);
                self.look_again(from);
                // Where it went is nobody's business here.
                let inside = |to: &Range| {
                    let sinks = self.sinks();
                    sinks
                        .iter()
                        .flatten()
                        .any(|sink| sink.range().overlaps(*to))
                };
                if let Some(to) = to.filter(|to| !inside(to)) {
                    self.descriptor.unregister(to);
                }
            }
            Event::Fork => self.tell(None, Cause::Protect),
            Event::Unknown => self.tell(None, Cause::External),
        }
    }

    /// Tells of a range, or of everything. A device that may still reach what is gone is known to its space.
    fn tell(&self, range: Option<Range>, cause: Cause) {
        for sink in self.sinks().iter().flatten() {
            if let Err(error) = sink.late(range.unwrap_or(sink.range()), cause) {
                tracing::error!(source = Uffd::NAME, %error, "late, and not shot down");
            }
        }
    }

    /// The addresses of an arena stay its own, if nobody was faster; what is mapped there now, by `MAP_FIXED` or later, is watched again.
    fn look_again(&self, range: Range) {
        let sinks = self.sinks();
        let arenas = sinks.iter().flatten().filter_map(|sink| sink.arena());
        if arena::reserve_hole(range, arenas) {
            return;
        }
        for sink in sinks.iter().flatten() {
            if let Some(part) = sink.range().intersect(range) {
                self.renew(part);
            }
        }
    }
}
