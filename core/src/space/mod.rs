//! Address spaces: what is registered on one, who owns it, and how it ends.
//!
//! Two counts, as in the kernel. *Owners* ([`AddressSpace`], mm_users): the last one out runs exit. *Pins* ([`SpacePin`],
//! mm_count): the memory of the space itself; every registration is one, so a driver may unregister long after the
//! exit, and finds nothing left to do (R6).
//!
//! **Exit** excludes insertion by a real lock (R7), invalidates everything, detaches every registration, and waits until every
//! `release` that any thread has begun has returned (R4); then the memory goes.
//!
//! **Completion.** Who completes a registration puts it on the space's completed list. The list is run (index entry away,
//! `release`, Released) by any thread that is outermost: it holds no lock of ours and is inside no callback. Who completes where
//! that is not so remembers the space ([`context::put_off`]) and runs the list when it has left the last of them.

mod map_lock;

use std::fmt;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc as StdArc;
use std::time::Duration;

pub(crate) use self::map_lock::{Held, MapLock};
use crate::active::{Active, SLOTS};
use crate::addr::Range;
use crate::context::{self, InCallback, Refused};
use crate::engine::{self, DeviceOp, Hit, InvalidateError};
use crate::events::Events;
use crate::lock::Leave;
use crate::managed::Table;
use crate::memory::Memory;
use crate::notifier::{Cause, Notifier};
use crate::pool::{CHUNK, Pool};
use crate::primitive::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::primitive::{Arc, Mutex};
use crate::recorder::{Kind, Record, Recorder};
use crate::registration::state::StateWord;
use crate::registration::{Inner, Prepared, Target};
use crate::registry::Registry;
use crate::stats::{Counter, Counters, Stats};

/// How long hardware may take before the next step of the escalation: wider flush, reset, quarantine.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// For work in flight to end, after `quiesce`.
    pub drain: Duration,
    /// For a flush to be acknowledged; then the device is flushed as a whole.
    pub flush: Duration,
    /// For the whole flush; then the device is reset.
    pub full_flush: Duration,
    /// For the reset; then the device goes into quarantine.
    pub reset: Duration,
    /// For room in the pools, when more invalidations are in progress than they were made for.
    pub room: Duration,
}

impl Default for Deadlines {
    fn default() -> Self {
        Self {
            drain: Duration::from_secs(1),
            flush: Duration::from_millis(100),
            full_flush: Duration::from_millis(500),
            reset: Duration::from_secs(2),
            room: Duration::from_secs(10),
        }
    }
}

#[derive(Debug, Default)]
struct Lifecycle {
    exiting: bool,
    exited: bool,
    /// Inserted and not yet released.
    registered: usize,
    /// Device targets of those; sizes the pools.
    targets: usize,
}

pub(crate) struct Space {
    pub(crate) id: u64,
    pub(crate) memory: Option<StdArc<dyn Memory>>,
    pub(crate) table: Table,
    pub(crate) map_lock: MapLock,
    pub(crate) deadlines: Deadlines,
    pub(crate) registry: Registry<Inner>,
    pub(crate) active: Active,
    pub(crate) events: Events,
    pub(crate) hits: Arc<Pool<Hit>>,
    pub(crate) device_ops: Arc<Pool<DeviceOp>>,
    pub(crate) stats: Counters,
    pub(crate) recorder: Recorder,
    shared: Mutex<Vec<(u64, Arc<Inner>)>>,
    lifecycle: Mutex<Lifecycle>,
    owners: AtomicUsize,
    numbers: AtomicU64,
    completed: Mutex<Option<Arc<Inner>>>,
    has_completed: AtomicBool,
    exit_wanted: AtomicBool,
    /// On some thread's list of spaces with something put off, and the next of that list.
    put_off: AtomicBool,
    put_off_next: Mutex<Option<Arc<Space>>>,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// Entries of the pools beyond twice what is registered: a chunk for each invalidation that can be in progress.
const SPARE: usize = SLOTS * CHUNK;

impl Space {
    fn new(memory: Option<StdArc<dyn Memory>>, deadlines: Deadlines) -> Self {
        use std::sync::atomic::{AtomicU64 as StdAtomicU64, Ordering as StdOrdering};
        static NEXT: StdAtomicU64 = StdAtomicU64::new(1 << 32);
        let space = Self {
            id: memory.as_ref().map_or_else(
                || NEXT.fetch_add(1, StdOrdering::Relaxed),
                |memory| memory.id(),
            ),
            table: Table::new(memory.as_ref().map(|memory| memory.arena())),
            memory,
            map_lock: MapLock::new(),
            deadlines,
            registry: Registry::new(),
            active: Active::new(),
            events: Events::new(),
            hits: Arc::new(Pool::new()),
            device_ops: Arc::new(Pool::new()),
            stats: Counters::new(),
            recorder: Recorder::new(),
            shared: Mutex::new(Vec::new()),
            lifecycle: Mutex::new(Lifecycle::default()),
            owners: AtomicUsize::new(1),
            numbers: AtomicU64::new(1),
            completed: Mutex::new(None),
            has_completed: AtomicBool::new(false),
            exit_wanted: AtomicBool::new(false),
            put_off: AtomicBool::new(false),
            put_off_next: Mutex::new(None),
        };
        space.hits.reserve(SPARE);
        space.device_ops.reserve(SPARE);
        space
    }

    pub(crate) fn next_registration(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn is_exiting(&self) -> bool {
        self.lifecycle.lock().exiting
    }

    /// Sets aside what invalidations of one more registration, with `targets` devices, can need.
    pub(crate) fn reserve(&self, targets: usize) {
        let lifecycle = self.lifecycle.lock();
        let (registered, named) = (lifecycle.registered + 1, lifecycle.targets + targets);
        drop(lifecycle);
        self.hits.reserve(2 * registered + SPARE);
        self.device_ops.reserve(2 * named + SPARE);
    }

    /// Publishes a registration in the index, unless the space is exiting. The lock is what exit and insertion exclude each
    /// other by.
    pub(crate) fn admit(&self, inner: Arc<Inner>) -> bool {
        let mut lifecycle = self.lifecycle.lock();
        if lifecycle.exiting && !cfg!(planted = "r7") {
            return false;
        }
        lifecycle.registered += 1;
        lifecycle.targets += inner.targets.len();
        let (range, id) = (inner.range, inner.id);
        self.registry.insert(range, id, inner);
        drop(lifecycle);
        self.stats.add(Counter::Inserts, 1);
        self.recorder
            .record(Kind::Insert, id, range.start().get(), range.last().get());
        true
    }

    /// A registration is detached and out of use: it waits for its release. Allocates nothing; legal everywhere.
    pub(crate) fn complete(inner: Arc<Inner>) {
        let space = inner.space.clone();
        {
            let mut head = space.completed.lock();
            *inner.next.lock() = head.take();
            *head = Some(inner);
            // Only a hint for waiters and for the quick way past; the mutex orders the list.
            space.has_completed.store(true, Ordering::Release);
        }
        space.events.ended();
        context::put_off(&space);
    }

    pub(crate) fn has_completed(&self) -> bool {
        self.has_completed.load(Ordering::Acquire)
    }

    /// Releases what is complete. Only where [`context::is_outermost`].
    pub(crate) fn run_completed(this: &Arc<Self>) {
        while this.has_completed() {
            let inner = {
                let mut head = this.completed.lock();
                let first = head.take();
                if let Some(first) = &first {
                    *head = first.next.lock().take();
                }
                this.has_completed.store(head.is_some(), Ordering::Release);
                first
            };
            if let Some(inner) = inner {
                this.release(inner);
            }
        }
    }

    fn release(&self, inner: Arc<Inner>) {
        self.registry.remove(inner.range, inner.id);
        {
            let _callback = InCallback::release();
            let notifier = &inner.notifier;
            if catch_unwind(AssertUnwindSafe(|| notifier.release())).is_err() {
                self.note_panic(&inner, 0);
            }
        }
        self.recorder.record(Kind::Release, inner.id, 0, 0);
        self.stats.add(Counter::Releases, 1);
        inner.word.released();
        {
            let mut lifecycle = self.lifecycle.lock();
            lifecycle.registered -= 1;
            lifecycle.targets -= inner.targets.len();
        }
        self.events.ended();
    }

    /// A callback of `inner` panicked: its devices are in quarantine from here on.
    pub(crate) fn note_panic(&self, inner: &Inner, op: u64) {
        self.stats.add(Counter::Panics, 1);
        self.recorder.record(Kind::Panicked, op, inner.id, 0);
        for target in &inner.targets {
            target.device.quarantine();
        }
    }

    /// Puts the space before `head` in a thread's list; it is in one list at most, and then the list stays as it is.
    pub(crate) fn queue_before(this: &Arc<Self>, head: Option<Arc<Space>>) -> Option<Arc<Space>> {
        // AcqRel: one thread queues it; the list itself belongs to that thread.
        if this.put_off.swap(true, Ordering::AcqRel) {
            return head;
        }
        *this.put_off_next.lock() = head;
        Some(this.clone())
    }

    pub(crate) fn unqueue(&self) -> Option<Arc<Space>> {
        let next = self.put_off_next.lock().take();
        // AcqRel, not a plain store: it reads the swap of whoever completed something and found the space queued already, so that
        // what was put on the completed list before is seen by the run that follows.
        self.put_off.swap(false, Ordering::AcqRel);
        next
    }

    /// What was put off, now that the thread is outermost.
    pub(crate) fn run_put_off(this: &Arc<Self>) {
        Self::run_completed(this);
        this.recorder.dump_if_wanted(this.id);
        if this.exit_wanted.swap(false, Ordering::AcqRel) {
            // Whoever is at it already may be further up on this stack.
            if !this.is_exiting() {
                Self::exit(this);
            }
        }
    }

    /// Ends the space; the second time it waits for the first.
    fn exit(this: &Arc<Self>) {
        if !context::is_outermost() {
            this.exit_wanted.store(true, Ordering::Release);
            context::put_off(this);
            return;
        }
        let first = !std::mem::replace(&mut this.lifecycle.lock().exiting, true);
        let mut reached = false;
        if first {
            // A panic in `end` came after every device had acknowledged.
            let result = engine::run(
                this,
                Range::ALL,
                Cause::Exit,
                engine::Mode::Blocking,
                || Ok(()),
            );
            let changed = matches!(
                result,
                Err(InvalidateError::HandlerPanicked { changed: true, .. })
            );
            reached = result.is_err() && !changed;
            this.registry.walk(Range::ALL, |_, inner| {
                inner.detach_for_exit();
                ControlFlow::Continue(())
            });
        }
        loop {
            context::leave();
            Self::run_completed(this);
            let released = || this.lifecycle.lock().registered == 0;
            if released() {
                break;
            }
            this.events
                .wait(None, || released() || this.has_completed());
        }
        this.shared.lock().clear();
        this.registry.reclaim();
        if first
            && let Some(memory) = &this.memory
            && (reached || !this.table.clear(&**memory))
        {
            // A device that did not acknowledge may reach these pages for as long as the process lives: so long they stay.
            std::mem::forget(memory.clone());
        }
        if first {
            this.lifecycle.lock().exited = true;
            this.events.ended();
        } else {
            this.events.wait(None, || this.lifecycle.lock().exited);
        }
    }

    /// The registration that segments share under `key`, or a new one. The table is locked throughout, so of two newcomers one
    /// makes it and the other joins.
    pub(crate) fn share(
        this: &Arc<Self>,
        key: u64,
        make: impl FnOnce() -> (Range, StdArc<dyn Notifier>, Vec<Target>),
    ) -> Result<Arc<Inner>, crate::InsertError> {
        context::wait_refusal("share")?;
        let mut shared = this.shared.lock();
        if let Some((_, inner)) = shared.iter().find(|(one, _)| *one == key)
            && inner.word.get()
        {
            return Ok(inner.clone());
        }
        shared.retain(|(one, _)| *one != key);
        let (range, notifier, targets) = make();
        let prepared = Prepared::new(this, range, notifier, &targets, StateWord::shared());
        prepared.publish()?;
        let inner = prepared.inner().clone();
        shared.push((key, inner.clone()));
        Ok(inner)
    }
}

/// An owner of an address space. Cloning makes another; the last one to be dropped runs [`AddressSpace::exit`].
pub struct AddressSpace {
    pub(crate) space: Arc<Space>,
}

impl fmt::Debug for AddressSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.space, f)
    }
}

impl Clone for AddressSpace {
    fn clone(&self) -> Self {
        // Relaxed: made from an owner, which is there.
        self.space.owners.fetch_add(1, Ordering::Relaxed);
        Self {
            space: self.space.clone(),
        }
    }
}

impl Drop for AddressSpace {
    fn drop(&mut self) {
        // AcqRel: the last one has seen what the others did.
        if self.space.owners.fetch_sub(1, Ordering::AcqRel) == 1 {
            Space::exit(&self.space);
        }
    }
}

/// Keeps an address space's own memory past its exit, not the space alive: a driver holds one to unregister later.
#[derive(Clone, Debug)]
pub struct SpacePin {
    space: Arc<Space>,
}

impl SpacePin {
    /// Becomes an owner, unless the space is exiting or has no owner left.
    pub fn upgrade(&self) -> Option<AddressSpace> {
        let mut owners = self.space.owners.load(Ordering::Relaxed);
        while owners > 0 && !self.space.is_exiting() {
            match self.space.owners.compare_exchange_weak(
                owners,
                owners + 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    return Some(AddressSpace {
                        space: self.space.clone(),
                    });
                }
                Err(now) => owners = now,
            }
        }
        None
    }

    /// Whether exit has begun.
    pub fn is_exiting(&self) -> bool {
        self.space.is_exiting()
    }
}

impl AddressSpace {
    /// A space with memory behind it, managed by its own map, unmap, protect, discard and remap.
    pub fn managed(memory: StdArc<dyn Memory>, deadlines: Deadlines) -> Self {
        Self {
            space: Arc::new(Space::new(Some(memory), deadlines)),
        }
    }

    /// A space without process memory: guest-physical addresses, IOVAs. Only
    /// [`AddressSpace::begin_invalidation`] tells of changes.
    pub fn without_memory(deadlines: Deadlines) -> Self {
        Self {
            space: Arc::new(Space::new(None, deadlines)),
        }
    }

    /// The number that dumps, and device models, know it by.
    pub fn id(&self) -> u64 {
        self.space.id
    }

    /// A pin.
    pub fn pin(&self) -> SpacePin {
        SpacePin {
            space: self.space.clone(),
        }
    }

    /// Prepares a registration of `notifier` on `range`, which may outlive mappings; the TLBs of `targets` are flushed
    /// for it. Allocates all that invalidations will need.
    pub fn prepare(
        &self,
        range: Range,
        notifier: StdArc<dyn Notifier>,
        targets: &[Target],
    ) -> Prepared {
        Prepared::new(&self.space, range, notifier, targets, StateWord::new())
    }

    /// Prepares and inserts.
    ///
    /// # Errors
    /// As [`Prepared::insert`].
    pub fn register(
        &self,
        range: Range,
        notifier: StdArc<dyn Notifier>,
        targets: &[Target],
    ) -> Result<crate::Registration, crate::InsertError> {
        self.prepare(range, notifier, targets).insert()
    }

    /// Ends the space, whoever else owns it: every registration is released, then the memory goes. Waits for callbacks that are
    /// running; the second call waits for the first. Afterwards registering and mapping are typed errors, and unregistering
    /// finds nothing to do.
    ///
    /// # Errors
    /// [`Refused`] where waiting is not legal. Dropping the last owner there puts the exit off.
    pub fn exit(&self) -> Result<(), Refused> {
        context::map_lock_refusal("exit")?;
        Space::exit(&self.space);
        Ok(())
    }

    /// Runs what is put off: releases, quarantined memory whose devices have recovered, and `tracing` events (level debug) for
    /// what the flight recorder has seen since the last time.
    ///
    /// # Errors
    /// [`Refused`] inside a callback, and with a lock held.
    pub fn drain(&self) -> Result<(), Refused> {
        context::map_lock_refusal("drain")?;
        Space::run_completed(&self.space);
        if let Some(memory) = &self.space.memory {
            self.space.table.recover(&**memory);
        }
        self.space.recorder.dump_if_wanted(self.space.id);
        self.space.recorder.publish(self.space.id);
        Ok(())
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.space.stats.read()
    }

    /// How many registrations are inserted and not yet released.
    pub fn registrations(&self) -> usize {
        self.space.lifecycle.lock().registered
    }

    /// The flight recorder's records, the oldest first.
    pub fn records(&self) -> Vec<Record> {
        self.space.recorder.records()
    }

    /// Takes the map lock for write; waits for its holders.
    ///
    /// # Errors
    /// [`Refused`] inside a callback or an open invalidation, with a `NotifierLock` held, and with a map lock held.
    pub fn lock_write(&self) -> Result<MapWriteGuard<'_>, Refused> {
        let held = self.space.map_lock.write("lock_write")?;
        Ok(MapWriteGuard {
            space: &self.space,
            _held: held,
            _leave: Leave,
        })
    }

    /// Takes it if nobody holds it: `None` if somebody does.
    ///
    /// # Errors
    /// As [`AddressSpace::lock_write`].
    pub fn try_lock_write(&self) -> Result<Option<MapWriteGuard<'_>>, Refused> {
        let held = self.space.map_lock.try_write("try_lock_write")?;
        Ok(held.map(|held| MapWriteGuard {
            space: &self.space,
            _held: held,
            _leave: Leave,
        }))
    }

    /// Takes the map lock for read; waits for a writer.
    ///
    /// # Errors
    /// As [`AddressSpace::lock_write`].
    pub fn lock_read(&self) -> Result<MapReadGuard<'_>, Refused> {
        let held = self.space.map_lock.read("lock_read")?;
        Ok(MapReadGuard {
            _held: held,
            _leave: Leave,
        })
    }

    /// Takes it if no writer holds it or waits: what a fault path does.
    ///
    /// # Errors
    /// As [`AddressSpace::lock_write`].
    pub fn try_lock_read(&self) -> Result<Option<MapReadGuard<'_>>, Refused> {
        let held = self.space.map_lock.try_read("try_lock_read")?;
        Ok(held.map(|held| MapReadGuard {
            _held: held,
            _leave: Leave,
        }))
    }
}

/// Proof that this thread holds the map lock for write. Its methods are those of the space, with the lock kept throughout.
#[derive(Debug)]
pub struct MapWriteGuard<'a> {
    pub(crate) space: &'a Arc<Space>,
    // In this order: the lock is let go, then what was put off runs.
    _held: Held<'a>,
    _leave: Leave,
}

impl MapWriteGuard<'_> {
    /// Inserts a prepared registration.
    ///
    /// # Errors
    /// As [`Prepared::insert`].
    pub fn insert(&self, prepared: Prepared) -> Result<crate::Registration, crate::InsertError> {
        prepared.insert()
    }
}

/// Proof that this thread holds the map lock for read: nobody maps or unmaps.
#[derive(Debug)]
pub struct MapReadGuard<'a> {
    _held: Held<'a>,
    _leave: Leave,
}
