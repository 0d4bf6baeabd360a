//! The space itself: its parts, its completions, its exit.

use std::fmt;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc as StdArc;

use super::{Deadlines, MapLock};
use crate::active::{Active, SLOTS};
use crate::addr::{PageSizes, Range};
use crate::context::{self, InCallback};
use crate::engine::{self, DeviceOp, Hit, InvalidateError};
use crate::events::Events;
use crate::list::List;
use crate::managed::Table;
use crate::memory::Memory;
use crate::notifier::{Cause, Notifier};
use crate::pool::{CHUNK, Pool};
use crate::primitive::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::primitive::{Arc, Mutex};
use crate::recorder::{Kind, Recorder};
use crate::registration::state::StateWord;
use crate::registration::{Inner, Prepared, Target};
use crate::registry::Registry;
use crate::segment::SegmentInner;
use crate::source::Sources;
use crate::stats::{Counter, Counters};
use crate::watch::Watch;

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
    pub(crate) watch: StdArc<Watch>,
    pub(crate) sources: Sources,
    shared: Mutex<Vec<(u64, Arc<Inner>)>>,
    lifecycle: Mutex<Lifecycle>,
    pub(super) owners: AtomicUsize,
    numbers: AtomicU64,
    completed: List<Inner>,
    /// Segments whose handles were dropped where they could not be unmapped.
    dropped: List<SegmentInner>,
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
    pub(super) fn new(memory: Option<StdArc<dyn Memory>>, deadlines: Deadlines) -> Self {
        use std::sync::atomic::{AtomicU64 as StdAtomicU64, Ordering as StdOrdering};
        static NEXT: StdAtomicU64 = StdAtomicU64::new(1 << 32);
        let id = memory.as_ref().map_or_else(
            || NEXT.fetch_add(1, StdOrdering::Relaxed),
            |memory| memory.id(),
        );
        let space = Self {
            id,
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
            watch: Watch::new(id, deadlines.callback),
            sources: Sources::new(),
            shared: Mutex::new(Vec::new()),
            lifecycle: Mutex::new(Lifecycle::default()),
            owners: AtomicUsize::new(1),
            numbers: AtomicU64::new(1),
            completed: List::new(),
            dropped: List::new(),
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

    /// Inserted and not yet released.
    pub(crate) fn registered(&self) -> usize {
        self.lifecycle.lock().registered
    }

    /// Sets aside what invalidations of one more registration, with `targets` devices, can need.
    pub(crate) fn reserve(&self, targets: usize) {
        let lifecycle = self.lifecycle.lock();
        let (registered, named) = (lifecycle.registered + 1, lifecycle.targets + targets);
        drop(lifecycle);
        self.hits.reserve(2 * registered + SPARE);
        self.device_ops.reserve(2 * named + SPARE);
    }

    /// Counts a registration as inserted, and takes the insertion's use of it, unless the space is exiting. The lock is what exit
    /// and insertion exclude each other by; nothing is allocated under it, as callbacks take it too.
    pub(crate) fn admit(&self, inner: &Inner) -> bool {
        let mut lifecycle = self.lifecycle.lock();
        if lifecycle.exiting && !planted!("r7") {
            return false;
        }
        inner.word.begin_insert();
        lifecycle.registered += 1;
        lifecycle.targets += inner.targets.len();
        drop(lifecycle);
        self.stats.add(Counter::Inserts, 1);
        true
    }

    /// Puts what was admitted into the index.
    pub(crate) fn index(&self, range: Range, id: u64, inner: Arc<Inner>) {
        self.registry.insert(range, id, inner);
        self.recorder
            .record(Kind::Insert, id, range.start().get(), range.last().get());
    }

    /// A registration is detached and out of use: it waits for its release. Allocates nothing; legal everywhere.
    pub(crate) fn complete(inner: Arc<Inner>) {
        let space = inner.space.clone();
        space.completed.push(inner);
        space.events.ended();
        context::put_off(&space);
    }

    pub(crate) fn has_completed(&self) -> bool {
        self.completed.has_some()
    }

    /// Releases what is complete. Only where [`context::is_outermost`].
    pub(crate) fn run_completed(this: &Arc<Self>) {
        while let Some(inner) = this.completed.pop() {
            this.release(inner);
        }
    }

    /// A segment's handle was dropped: it is unmapped here and now, or when this thread is outermost.
    pub(crate) fn drop_segment(this: &Arc<Self>, segment: &Arc<SegmentInner>) {
        this.dropped.push(segment.clone());
        context::put_off(this);
        context::leave();
    }

    fn release(&self, inner: Arc<Inner>) {
        self.registry.remove(inner.range, inner.id);
        {
            let _watched = self.watch.enter_release(inner.id, inner.name);
            let _callback = InCallback::release();
            let notifier = &inner.notifier;
            if catch_unwind(AssertUnwindSafe(|| notifier.release())).is_err() {
                self.note_panic(&inner, 0);
            }
        }
        self.recorder.record(Kind::Release, inner.id, 0, 0);
        self.stats.add(Counter::Releases, 1);
        inner.word.released();
        // A shared one is not known under its key any more, or its handler would live on.
        self.shared
            .lock()
            .retain(|(_, one)| !Arc::ptr_eq(one, &inner));
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

    /// Puts `rest` behind the space, in the place of what was there, which is returned: it goes from one list to another.
    pub(crate) fn relink(&self, rest: Option<Arc<Space>>) -> Option<Arc<Space>> {
        std::mem::replace(&mut *self.put_off_next.lock(), rest)
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
        while let Some(segment) = this.dropped.pop() {
            SegmentInner::unmap_dropped(&segment, this);
        }
        this.recorder.dump_if_wanted(this.id);
        if this.exit_wanted.swap(false, Ordering::AcqRel) {
            // Whoever is at it already may be further up on this stack.
            if !this.is_exiting() {
                Self::exit(this);
            }
        }
    }

    /// Ends the space; the second time it waits for the first.
    pub(super) fn exit(this: &Arc<Self>) {
        if !context::is_outermost() {
            this.exit_wanted.store(true, Ordering::Release);
            context::put_off(this);
            return;
        }
        let first = !std::mem::replace(&mut this.lifecycle.lock().exiting, true);
        let mut reached = false;
        if first {
            // From here on no operation claims a span, and those that had are over: the segments are this thread's.
            let segments = this.table.close(&this.events);
            for segment in &segments {
                reached |= !SegmentInner::end_at_exit(segment, this);
            }
            reached |= !Self::shoot_down(this, Range::ALL, &[]);
            this.registry.walk(Range::ALL, |_, inner| {
                if planted!("r3") {
                    inner.word.detach(false);
                    Space::complete(inner.count());
                } else {
                    inner.detach_for_exit();
                }
                ControlFlow::Continue(())
            });
        }
        loop {
            context::leave();
            Self::run_completed(this);
            let released = || planted!("r4") || this.lifecycle.lock().registered == 0;
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

    /// A shootdown for exit; false if a device may still reach the range. A panic in `end` came after every device had
    /// acknowledged.
    pub(crate) fn shoot_down(
        this: &Arc<Self>,
        range: Range,
        segments: &[Arc<SegmentInner>],
    ) -> bool {
        let what = engine::What {
            range,
            sizes: PageSizes::all(),
            cause: Cause::Exit,
            segments,
        };
        matches!(
            engine::run(this, what, engine::Mode::Blocking, || Ok(())),
            Ok(()) | Err(InvalidateError::HandlerPanicked { changed: true, .. })
        )
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
        prepared.admit()?;
        let inner = prepared.inner().clone();
        shared.push((key, inner.clone()));
        drop(shared);
        context::leave();
        Ok(inner)
    }
}
