//! Registrations: a handler on a range, from prepare to release.
//!
//! [`AddressSpace::prepare`](crate::AddressSpace::prepare) allocates everything, [`Prepared::insert`] makes it visible, and it ends
//! by [`Registration::unregister`], by dropping the handle, or by the exit of the space, whichever comes first; `release` runs
//! exactly once. The edges are in the state word's module; here is what is done on them.
//!
//! A *use* pins a registration from an invalidation's `start` to the return of `end`. A registration leaves the index only
//! after its last use, and the index owns a strong count: so a use needs no count of its own, and giving one back never
//! frees, which the shootdown path may not do.

mod disturbed;
mod giving_up;
mod prepared;
pub(crate) mod state;

use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;

use thiserror::Error;

pub(crate) use self::giving_up::give_up;
use self::giving_up::{Begun, begin_giving_up};
pub use self::prepared::Prepared;
use self::state::{Detach, Snapshot, State, StateWord};
use crate::addr::Range;
use crate::context::{self, Refused};
use crate::list::{Link, Linked, PutOff};
use crate::notifier::Notifier;
use crate::primitive::{Arc, Contained, Direct};
use crate::registry::{Entry, Found, Free};
use crate::source::Shortfall;
use crate::space::Space;
use crate::tlb::Device;
use crate::watch::Who;

/// A device TLB that a registration names, and the tag that its flush commands carry.
#[derive(Clone, Debug)]
pub struct Target {
    /// The device.
    pub device: Device,
    /// An ASID, a PASID, an index: whatever the driver's [`DeviceTlb`](crate::DeviceTlb) makes of it.
    pub tag: u64,
}

/// Why a registration could not be inserted. It was not, and its handler was not called.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InsertError {
    /// The space is exiting, or has exited.
    #[error("the address space is exiting: {range} can no longer be registered")]
    Exiting {
        /// What was to be registered.
        range: Range,
    },
    /// It was prepared by another space than the one that was to insert it.
    #[error("the registration of {range} was prepared by another address space: insert it there")]
    AnotherSpace {
        /// What was to be registered.
        range: Range,
    },
    /// What watches the space tells the driver too little of what others do.
    #[error(transparent)]
    Uncovered(#[from] Shortfall),
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// What an unregister came to. In each case no callback runs or will run on return, except
/// [`Unregistered::Deferred`]: there it is so once the callbacks on this thread's stack, and those that other threads are in, have
/// returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unregistered {
    /// Released.
    Released,
    /// No callback runs or will run; `release` runs when the map lock is dropped.
    Quiet,
    /// Called inside a callback or an open invalidation: the last to leave completes it.
    Deferred,
    /// The exit of the space, or a last put, was first: nothing to do.
    AlreadyGone,
}

/// What a synchronize came to.
#[must_use = "a deferred synchronize has not waited"]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Synchronized {
    /// No callback that had begun runs any more.
    Quiet,
    /// Called inside a callback or an open invalidation: it is so once those on this thread's stack, and those that other threads
    /// are in, have returned.
    Deferred,
}

/// Why an unregister was refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UnregisterError {
    /// It was unregistered before.
    #[error("the registration of {range} was unregistered before")]
    AlreadyUnregistered {
        /// Its range.
        range: Range,
    },
    /// Not where it was called.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// What an invalidation looks at first lies first: one that hits few of many finds none of it in a cache.
#[repr(C)]
pub(crate) struct Inner {
    pub(crate) range: Range,
    pub(crate) word: StateWord,
    /// Its number, and what the watchdog and errors call the handler.
    pub(crate) who: Who,
    pub(crate) notifier: Contained<Direct<dyn Notifier>>,
    targets: Targets,
    pub(crate) space: Arc<Space>,
    /// The next on the space's completed list.
    next: Link<Inner>,
    /// The next of those that a thread has yet to insert; later, of those that it has completed.
    next_put_off: Link<Inner>,
}

/// Mostly there is one, which then needs no memory of its own.
enum Targets {
    None,
    One(Target),
    Many(Box<[Target]>),
}

impl Targets {
    fn new(targets: &[Target]) -> Self {
        match targets {
            [] => Self::None,
            [one] => Self::One(one.clone()),
            many => Self::Many(many.into()),
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("id", &self.id())
            .field("range", &self.range)
            .field("state", &self.word.load().state())
            .finish_non_exhaustive()
    }
}

impl Inner {
    /// Tells this registration from others on a thread's stack of callbacks.
    pub(crate) fn key(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }

    /// A number of its own in its space.
    #[inline]
    pub(crate) fn id(&self) -> u64 {
        self.who.number()
    }

    #[inline]
    pub(crate) fn targets(&self) -> &[Target] {
        match &self.targets {
            Targets::None => &[],
            Targets::One(one) => std::slice::from_ref(one),
            Targets::Many(many) => many,
        }
    }

    /// A count of its own for who completes: the index's is still there.
    ///
    /// # Safety
    /// `this` came out of a walk, and the index still has it.
    unsafe fn count(this: NonNull<Inner>) -> Arc<Inner> {
        // SAFETY: what a walk shows is from `Arc::into_raw`, and by the caller's promise that count is still held.
        unsafe {
            Arc::increment_strong_count(this.as_ptr());
            Arc::from_raw(this.as_ptr())
        }
    }

    /// Detaches for exit: no handle asked.
    pub(crate) fn detach_for_exit(found: &Found<'_, Self>) {
        if found.word.detach(false) == Detach::Complete || planted!("r3") {
            // SAFETY: shown by the index just now, and it is taken away only after completion.
            Space::complete(unsafe { Self::count(found.as_ptr()) });
        }
    }

    /// The second half of an insertion: makes them visible, all of one space and at once. They were counted by [`Space::admit`] and are in
    /// use by the insertion, so that an exit which came meanwhile waits for this, and whoever gave one up leaves the completion to this.
    /// Allocates.
    pub(crate) fn publish<'i>(
        space: &Space,
        these: impl Iterator<Item = &'i Arc<Self>> + Clone,
    ) -> Free<Self> {
        let free = space.index(these.clone());
        for this in these.clone() {
            if space.registry.active().may_have_missed(this.range) {
                this.word.note_missed();
            }
            // Exit sets its mark, fences, and walks the index; above is a fence too: either it finds this registration, or this the mark.
            if space.exit_has_begun() && !planted!("r7-late") {
                this.word.detach(false);
            }
            if this.word.go_live() {
                Space::complete(this.clone());
            }
        }
        // Those who wait for them to be live.
        space.events.ended_by_rmw();
        free
    }
}

impl Entry for Inner {
    fn range(&self) -> Range {
        self.range
    }

    fn number(&self) -> u64 {
        self.id()
    }
}

impl Linked for Inner {
    fn next(&self) -> &Link<Self> {
        &self.next
    }
}

impl PutOff for Inner {
    fn next_put_off(&self) -> &Link<Self> {
        &self.next_put_off
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.space.unreserve(self.targets());
    }
}

/// A registration in use: no `release`, and no reclamation, before it is given back.
#[derive(Debug)]
pub(crate) struct Use(NonNull<Inner>);

// SAFETY: a use is a shared reference to an `Inner`, which is Sync, that the count in its state word keeps alive.
unsafe impl Send for Use {}

impl Use {
    /// Inside a walk: a use of what it has met, unless that is detached; and its word since.
    #[inline]
    pub(crate) fn enter(found: &Found<'_, Inner>) -> Option<(Self, Snapshot)> {
        let word = found.word.enter()?;
        Some((Self(found.as_ptr()), word))
    }

    /// A count for whoever has to keep it longer.
    pub(crate) fn count(&self) -> Arc<Inner> {
        // SAFETY: met by a walk; a use keeps the registration in the index.
        unsafe { Inner::count(self.0) }
    }

    /// Gives it back; completes a detached registration if this was the last.
    #[inline]
    pub(crate) fn leave(self) {
        // SAFETY: the use keeps it alive until the word says otherwise.
        if unsafe { self.0.as_ref() }.word.leave() {
            self.complete();
        }
    }

    #[cold]
    fn complete(self) {
        // SAFETY: this was the last use of a detached registration: only this caller can complete it, and the index has it until then.
        // Where `leave` says false nothing is touched any more.
        Space::complete(unsafe { Inner::count(self.0) });
    }
}

impl Deref for Use {
    type Target = Inner;
    fn deref(&self) -> &Inner {
        // SAFETY: a use keeps the registration in the index, and with it the index's strong count.
        unsafe { self.0.as_ref() }
    }
}

/// A registration that is live, held by its owner. Dropping it detaches it and never waits: callbacks that are running go on
/// to their end, then `release` runs.
#[derive(Debug)]
pub struct Registration {
    pub(crate) inner: Arc<Inner>,
    /// Dropping it detaches; one that a share holds ends by the share's put.
    pub(crate) owned: bool,
}

impl Registration {
    /// The range.
    pub fn range(&self) -> Range {
        self.inner.range
    }

    /// The one step after which no new callback begins. Never waits for a callback; legal everywhere. `release` runs after the
    /// last callback that is running: here and now, with whatever else this thread has put off, if none is and nothing is held.
    pub fn detach(&self) {
        self.drop_by(|word| word.detach(false));
    }

    pub(crate) fn drop_by(&self, detach: impl FnOnce(&StateWord) -> Detach) {
        if detach(&self.inner.word) == Detach::Complete {
            Space::complete(self.inner.clone());
            context::leave();
        }
    }

    /// Waits until no callback of this registration runs that had begun: for those of this one, and for nothing else, and if it is
    /// detached for all. With the map lock held it is legal: no callback can need that lock. Inside a callback or an open
    /// invalidation it cannot wait, and says so.
    ///
    /// # Errors
    /// [`Refused`] with a `NotifierLock` held (outside a callback), as a callback may be waiting for it.
    pub fn synchronize(&self) -> Result<Synchronized, Refused> {
        if !planted!("r24") {
            if context::inside_callback() {
                return Ok(Synchronized::Deferred);
            }
            context::wait_refusal("synchronize")?;
        }
        let (inner, events) = (&self.inner, &self.inner.space.events);
        // What began before it is inserted, or is detached, cannot be overtaken: then no more begin.
        events.wait(None, || inner.word.load().state() != State::Inserting);
        let begun = inner.in_use_by();
        let active = inner.space.registry.active();
        events.wait(None, || {
            let word = inner.word.load();
            let mut begun = begun.iter().flatten();
            word.uses() == 0 || !word.is_detached() && !begun.any(|claim| active.is_active(*claim))
        });
        Ok(Synchronized::Quiet)
    }

    /// Gives the registration up: detaches, and waits until no callback runs, where waiting is legal. Inside any callback it
    /// returns at once and the last to leave completes; with the map lock held it waits and `release` runs when
    /// that lock is dropped; else `release` has run on return.
    ///
    /// # Errors
    /// [`UnregisterError::AlreadyUnregistered`] the second time; [`Refused`] with a `NotifierLock` held (outside a
    /// callback), as a callback may be waiting for it.
    pub fn unregister(&self) -> Result<Unregistered, UnregisterError> {
        give_up(&self.inner, |word| word.detach(true))
    }

    /// Gives many up, each as by [`Registration::unregister`]: first all are detached, then all are waited for, and they leave the index
    /// together, so that it costs less than one after the other. What each came to, in their order; one that is refused keeps none of the
    /// others back.
    pub fn unregister_all(registrations: &[Self]) -> Vec<Result<Unregistered, UnregisterError>> {
        let together = registrations.len() > 1;
        let begin = |one: &Self| begin_giving_up(&one.inner, |word| word.detach(true), together);
        let begun: Vec<_> = registrations.iter().map(begin).collect();
        let finish = |(one, begun): (&Self, Result<Begun, UnregisterError>)| {
            begun.map(|begun| begun.finish(&one.inner))
        };
        registrations.iter().zip(begun).map(finish).collect()
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        if self.owned {
            self.detach();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::ops::ControlFlow;
    use std::sync::{Arc, Mutex, mpsc};
    use std::time::Duration;

    use crate::{
        AddressSpace, Deadlines, Notifier, Range, Registration, Share, Synchronized, Unregistered,
    };

    struct Plain;
    impl Notifier for Plain {}

    /// Owns something that ends with it.
    struct Owner<T>(#[allow(dead_code, reason = "it is dropped")] Mutex<Option<T>>);
    impl<T: Send + 'static> Notifier for Owner<T> {}

    fn owner<T: Send + 'static>(owned: T) -> Arc<Owner<T>> {
        Arc::new(Owner(Mutex::new(Some(owned))))
    }

    fn space() -> AddressSpace {
        AddressSpace::without_memory(Deadlines::default())
    }

    fn page(nth: u64) -> Range {
        Range::new(nth << 12, 4096).unwrap()
    }

    /// Fails where `f` hangs.
    fn in_time(f: impl FnOnce() + Send + 'static) {
        let (done, over) = mpsc::channel();
        std::thread::spawn(move || {
            f();
            done.send(()).unwrap();
        });
        let waited = over.recv_timeout(Duration::from_secs(5));
        waited.expect("a deadlock");
    }

    /// Gives up a registration with this handler while somebody walks: then the last count of both is the index's, which the next change
    /// of the index drops.
    fn leaves_to_the_index(space: &AddressSpace, handler: Arc<dyn Notifier>) {
        let registration = space.register(page(2), handler, &[]).unwrap();
        let (go, gone) = mpsc::channel::<()>();
        let (walks, walking) = mpsc::channel::<()>();
        let walker = {
            let space = space.clone();
            std::thread::spawn(move || {
                let registry = &space.space.registry;
                let claim = registry.active().claim(Range::ALL).unwrap();
                registry.walk(claim, Range::ALL, |_| {
                    let _ = walks.send(());
                    let _ = gone.recv();
                    ControlFlow::Break(())
                });
                registry.active().end(claim);
            })
        };
        walking.recv().unwrap();
        registration.unregister().unwrap();
        drop(registration);
        go.send(()).unwrap();
        walker.join().unwrap();
    }

    #[test]
    fn the_last_reference_to_a_notifier_is_not_dropped_under_the_lock_of_the_index() {
        in_time(|| {
            let space = space();
            let owned: Registration = space.register(page(1), Arc::new(Plain), &[]).unwrap();
            leaves_to_the_index(&space, owner(owned));
            let _next = space.register(page(3), Arc::new(Plain), &[]).unwrap();
        });
    }

    #[test]
    fn nor_under_the_lock_of_the_shares() {
        in_time(|| {
            let space = space();
            let plain = || (page(1), Arc::new(Plain) as Arc<dyn Notifier>, Vec::new());
            let owned: Share = space.share(1, plain).unwrap();
            leaves_to_the_index(&space, owner(owned));
            let _next = space.share(2, plain).unwrap();
        });
    }

    /// Gives up what it owns when it is dropped, and waits for that.
    struct Tidy(Registration);
    impl Notifier for Tidy {}
    impl Drop for Tidy {
        fn drop(&mut self) {
            let _ = self.0.unregister();
        }
    }

    #[test]
    fn what_is_dropped_by_the_way_may_wait_for_what_is_released_just_then() {
        in_time(|| {
            let space = space();
            let [first, second] = [1, 3].map(|nth| {
                let registration = space.register(page(nth), Arc::new(Plain), &[]);
                registration.unwrap()
            });
            leaves_to_the_index(&space, Arc::new(Tidy(first)));
            leaves_to_the_index(&space, Arc::new(Tidy(second)));
            space.exit().unwrap();
            assert_eq!(space.stats().releases, 4);
        });
    }

    /// Panics when it is dropped.
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("planned: a driver that panics when it is dropped");
        }
    }

    #[test]
    fn a_driver_that_panics_when_it_is_dropped_keeps_nobody_from_being_released() {
        in_time(|| {
            let space = space();
            let another = space.register(page(1), Arc::new(Plain), &[]).unwrap();
            leaves_to_the_index(&space, owner(Bomb));
            assert_eq!(another.unregister(), Ok(Unregistered::Released));
            leaves_to_the_index(&space, owner(Bomb));
            let next = space.register(page(3), Arc::new(Plain), &[]).unwrap();
            assert_eq!(next.synchronize(), Ok(Synchronized::Quiet));
            leaves_to_the_index(&space, owner(Bomb));
            space.exit().unwrap();
            assert_eq!(space.stats().releases, 5);
        });
    }
}
