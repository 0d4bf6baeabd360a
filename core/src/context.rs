//! What this thread holds and where it is: the rules of "what may be called where" are decided here.
//!
//! Four facts a thread: the callbacks on its stack, the invalidations it has begun and not ended, the [`NotifierLock`]s
//! it holds, and the map lock it holds. From them follows whether a call may wait ([`wait_refusal`]), whether the
//! map lock may be taken ([`map_lock_refusal`]), and what an unregister counts as ([`place`]). When a thread is out of its
//! callbacks ([`leave`]) the insertions run that it had to put off, and when it has left the last of the four, completions.
//!
//! [`NotifierLock`]: crate::NotifierLock

use std::cell::Cell;
use std::marker::PhantomData;

use thiserror::Error;

use crate::list::{Handed, LocalList};
use crate::primitive::{Arc, thread_local};
use crate::registration::Inner;
use crate::segment::SegmentInner;
use crate::space::Space;

/// Why a call is refused where it stands. Nothing has happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum Refused {
    /// Inside a notifier callback, or between begin and end of an invalidation.
    #[error(
        "{call} inside a callback or an open invalidation: it could wait for itself; do it after `end`"
    )]
    InCallback {
        /// The call.
        call: &'static str,
    },
    /// With a `NotifierLock` held.
    #[error(
        "{call} with a NotifierLock held: a callback may be waiting for that lock; drop its guard first"
    )]
    NotifierLockHeld {
        /// The call.
        call: &'static str,
    },
    /// With the map lock held.
    #[error("{call} with the map lock held: use the method of the guard, or drop it first")]
    MapLockHeld {
        /// The call.
        call: &'static str,
    },
}

/// Where an unregister was called from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Place {
    /// An ordinary thread that holds nothing.
    Plain,
    /// With the map lock held.
    MapLockHeld,
    /// Inside a callback of the registration that is given up.
    InsideOwnCallback,
    /// Inside a callback of another registration.
    InsideOtherCallback,
    /// Inside a `release`.
    DuringRelease,
}

impl Place {
    /// All places, in the order of their numbers.
    pub const ALL: [Place; 5] = [
        Self::Plain,
        Self::MapLockHeld,
        Self::InsideOwnCallback,
        Self::InsideOtherCallback,
        Self::DuringRelease,
    ];
}

/// A callback on this thread's stack: a handler's of the registration with this key, or a release.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Frame(usize);

impl Frame {
    /// The key of no registration.
    const RELEASE: Self = Self(0);
}

/// Callbacks nest at most this deep: a handler cannot begin an invalidation, and a release that runs a release runs it
/// from the completed list, not from inside.
const DEPTH: usize = 4;

struct Context {
    frames: [Cell<Frame>; DEPTH],
    depth: Cell<usize>,
    open: Cell<u32>,
    notifier_locks: Cell<u32>,
    map_lock: Cell<bool>,
    /// What was put off is being run further up on this stack.
    leaving: Cell<bool>,
    /// Registrations that this thread has yet to make visible.
    inserts: LocalList<Inner>,
    /// Registrations that this thread has completed: they wait for their release, on their space's list.
    completed: LocalList<Inner>,
    /// Segments whose handles were dropped.
    segments: LocalList<SegmentInner>,
    /// Spaces that are to be ended, or whose flight recorder is to be dumped.
    spaces: LocalList<Space>,
}

impl Context {
    const fn new() -> Self {
        Self {
            frames: [const { Cell::new(Frame::RELEASE) }; DEPTH],
            depth: Cell::new(0),
            open: Cell::new(0),
            notifier_locks: Cell::new(0),
            map_lock: Cell::new(false),
            leaving: Cell::new(false),
            inserts: LocalList::new(),
            completed: LocalList::new(),
            segments: LocalList::new(),
            spaces: LocalList::new(),
        }
    }

    #[inline]
    fn has_put_off(&self) -> bool {
        !(self.inserts.is_empty()
            && self.completed.is_empty()
            && self.segments.is_empty()
            && self.spaces.is_empty())
    }
}

#[cfg(not(loom))]
thread_local! {
    static CONTEXT: Context = const { Context::new() };
}

// The checker's have no constant form.
#[cfg(loom)]
thread_local! {
    static CONTEXT: Context = Context::new();
}

/// Inside a callback or an open invalidation.
#[inline]
fn in_callback(context: &Context) -> bool {
    context.depth.get() > 0 || context.open.get() > 0
}

/// Whether a wait for a callback is legal: not inside one, and no `NotifierLock` held that it may want.
#[inline]
pub(crate) fn wait_refusal(call: &'static str) -> Result<(), Refused> {
    CONTEXT.with(|context| {
        if in_callback(context) {
            Err(Refused::InCallback { call })
        } else if context.notifier_locks.get() > 0 && !planted!("r32") {
            Err(Refused::NotifierLockHeld { call })
        } else {
            Ok(())
        }
    })
}

/// The same, by itself.
#[inline]
pub(crate) fn may_wait() -> bool {
    CONTEXT.with(|context| !in_callback(context) && context.notifier_locks.get() == 0)
}

/// Whether memory may be allocated: not inside a callback, as whoever holds the allocator's lock may be waiting for it (R18).
pub(crate) fn callback_refusal(call: &'static str) -> Result<(), Refused> {
    if inside_callback() {
        return Err(Refused::InCallback { call });
    }
    Ok(())
}

/// Whether a source may begin a change: anywhere but inside a handler. Several changes may be open on its thread.
pub(crate) fn callback_refusal_of_handlers(call: &'static str) -> Result<(), Refused> {
    if CONTEXT.with(|context| context.depth.get() > 0) {
        return Err(Refused::InCallback { call });
    }
    Ok(())
}

/// Whether the map lock may be taken.
pub(crate) fn map_lock_refusal(call: &'static str) -> Result<(), Refused> {
    // Nameless: nobody takes it, completions ask.
    if !(planted!("r17") && !call.is_empty() && inside_callback()) {
        wait_refusal(call)?;
    }
    CONTEXT.with(|context| {
        if context.map_lock.get() {
            Err(Refused::MapLockHeld { call })
        } else {
            Ok(())
        }
    })
}

/// Whether completions may run: release may take any lock, so none may be held.
pub(crate) fn is_outermost() -> bool {
    map_lock_refusal("").is_ok()
}

/// Whether this thread is inside a callback or an open invalidation.
#[inline]
pub(crate) fn inside_callback() -> bool {
    CONTEXT.with(in_callback)
}

/// Where the unregister of the registration `own` is called from.
pub(crate) fn place(own: usize) -> Place {
    CONTEXT.with(|context| {
        let depth = context.depth.get();
        match context.frames[..depth].last().map(Cell::get) {
            Some(Frame::RELEASE) => Place::DuringRelease,
            Some(Frame(one)) if one == own => Place::InsideOwnCallback,
            Some(_) => Place::InsideOtherCallback,
            None if context.open.get() > 0 => Place::InsideOtherCallback,
            None if context.map_lock.get() => Place::MapLockHeld,
            None => Place::Plain,
        }
    })
}

/// A callback runs for as long as this lives.
#[derive(Debug)]
pub(crate) struct InCallback(PhantomData<*const ()>);

impl InCallback {
    #[inline]
    fn push(frame: Frame) -> Self {
        CONTEXT.with(|context| {
            let depth = context.depth.get();
            assert!(depth < DEPTH, "callbacks nest at most {DEPTH} deep");
            context.frames[depth].set(frame);
            context.depth.set(depth + 1);
        });
        Self(PhantomData)
    }

    /// A handler's of the registration with this key.
    #[inline]
    pub(crate) fn handler(registration: usize) -> Self {
        Self::push(Frame(registration))
    }

    pub(crate) fn release() -> Self {
        Self::push(Frame::RELEASE)
    }
}

impl Drop for InCallback {
    #[inline]
    fn drop(&mut self) {
        CONTEXT.with(|context| context.depth.set(context.depth.get() - 1));
    }
}

/// An invalidation is open on this thread for as long as this lives.
#[derive(Debug)]
pub(crate) struct OpenInvalidation(PhantomData<*const ()>);

impl OpenInvalidation {
    #[inline]
    pub(crate) fn enter() -> Self {
        CONTEXT.with(|context| context.open.set(context.open.get() + 1));
        Self(PhantomData)
    }
}

impl Drop for OpenInvalidation {
    #[inline]
    fn drop(&mut self) {
        CONTEXT.with(|context| context.open.set(context.open.get() - 1));
    }
}

/// A `NotifierLock` is held for as long as this lives.
#[derive(Debug)]
pub(crate) struct HoldsNotifierLock(PhantomData<*const ()>);

impl HoldsNotifierLock {
    #[inline]
    pub(crate) fn enter() -> Self {
        CONTEXT.with(|context| context.notifier_locks.set(context.notifier_locks.get() + 1));
        Self(PhantomData)
    }
}

impl Drop for HoldsNotifierLock {
    #[inline]
    fn drop(&mut self) {
        CONTEXT.with(|context| context.notifier_locks.set(context.notifier_locks.get() - 1));
    }
}

/// The map lock of a space is held for as long as this lives.
#[derive(Debug)]
pub(crate) struct HoldsMapLock(PhantomData<*const ()>);

impl HoldsMapLock {
    #[inline]
    pub(crate) fn enter() -> Self {
        CONTEXT.with(|context| context.map_lock.set(true));
        Self(PhantomData)
    }
}

impl Drop for HoldsMapLock {
    fn drop(&mut self) {
        CONTEXT.with(|context| context.map_lock.set(false));
    }
}

/// Remembers that `inner` is to be made visible, as soon as this thread is outside of callbacks: on return from its outermost call
/// it is visible.
pub(crate) fn insert_later(inner: Arc<Inner>) {
    CONTEXT.with(|context| context.inserts.push(inner));
}

/// Whether this thread has yet to make something visible.
pub(crate) fn has_inserts() -> bool {
    CONTEXT.with(|context| !context.inserts.is_empty())
}

/// Remembers that `inner` waits for its release, until this thread is outermost. It may have been released by another thread then.
pub(crate) fn completed(inner: Arc<Inner>) {
    CONTEXT.with(|context| context.completed.push(inner));
}

/// Whether it remembers that already of one of this space, which stands for all: what a space has completed is run to its end.
pub(crate) fn has_completed(space: &Arc<Space>) -> bool {
    let of_it = |first: &Inner| Arc::ptr_eq(&first.space, space);
    CONTEXT.with(|context| context.completed.begins_with(of_it))
}

/// Remembers that the handle of `segment` was dropped, until this thread is outermost.
pub(crate) fn unmap_later(segment: Arc<SegmentInner>) {
    CONTEXT.with(|context| context.segments.push(segment));
}

/// Remembers that `space` is to be ended, or to dump its flight recorder; unless a thread does already.
pub(crate) fn put_off(space: &Arc<Space>) {
    if space.queue() {
        CONTEXT.with(|context| context.spaces.push(space.clone()));
    }
}

/// While it lives, what was put off is being run by this thread.
struct Leaving;

impl Drop for Leaving {
    fn drop(&mut self) {
        CONTEXT.with(|context| context.leaving.set(false));
    }
}

/// What a thread has put off, on its way to another that runs it.
#[derive(Debug)]
pub(crate) struct PutOff {
    inserts: Handed<Inner>,
    completed: Handed<Inner>,
    segments: Handed<SegmentInner>,
    spaces: Handed<Space>,
}

impl PutOff {
    pub(crate) const fn none() -> Self {
        Self {
            inserts: Handed::none(),
            completed: Handed::none(),
            segments: Handed::none(),
            spaces: Handed::none(),
        }
    }

    pub(crate) fn is_none(&self) -> bool {
        self.inserts.is_none()
            && self.completed.is_none()
            && self.segments.is_none()
            && self.spaces.is_none()
    }

    /// Runs it on this thread, which is outermost and has put off nothing.
    pub(crate) fn run(self) {
        CONTEXT.with(|context| {
            context.inserts.take_over(self.inserts);
            context.completed.take_over(self.completed);
            context.segments.take_over(self.segments);
            context.spaces.take_over(self.spaces);
        });
        leave();
    }
}

/// Whether this thread has put something off.
#[inline]
pub(crate) fn has_put_off() -> bool {
    CONTEXT.with(Context::has_put_off)
}

/// Puts what this thread has put off in front of what is in `to`. Neither allocates nor frees.
pub(crate) fn hand_over(to: &mut PutOff) {
    CONTEXT.with(|context| {
        context.inserts.hand_over(&mut to.inserts);
        context.completed.hand_over(&mut to.completed);
        context.segments.hand_over(&mut to.segments);
        context.spaces.hand_over(&mut to.spaces);
    });
}

/// Runs what was put off on this thread, as far as it is legal now. Called wherever something is left.
#[inline]
pub(crate) fn leave() {
    if CONTEXT.with(Context::has_put_off) {
        run_put_off();
    }
}

#[cold]
fn run_put_off() {
    while CONTEXT.with(Context::has_put_off) {
        if wait_refusal("").is_err() {
            return;
        }
        // Legal with the map lock held. What was put off together becomes visible together.
        let next = || CONTEXT.with(|context| context.inserts.pop());
        let inserts: Vec<_> = std::iter::from_fn(next).collect();
        let together = inserts.chunk_by(|one, next| Arc::ptr_eq(&one.space, &next.space));
        let publish = |these: &[Arc<Inner>]| Inner::publish(&these[0].space, these.iter());
        // Dropped when all are visible: what goes with it may wait for one of them.
        drop(together.map(publish).collect::<Vec<_>>());
        // Whoever is at it further up on this stack goes on with the rest.
        if !is_outermost() || CONTEXT.with(|context| context.leaving.replace(true)) {
            return;
        }
        let _leaving = Leaving;
        if let Some(inner) = CONTEXT.with(|context| context.completed.pop()) {
            Space::run_completed(&inner.space);
        } else if let Some(segment) = CONTEXT.with(|context| context.segments.pop()) {
            SegmentInner::unmap_dropped(&segment);
        } else if let Some(space) = CONTEXT.with(|context| context.spaces.pop()) {
            Space::run_put_off(&space);
        }
    }
}
