//! The space itself: its parts, its completions, its exit.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc as StdArc;

use super::lifecycle::Lifecycle;
use super::{Deadlines, ExitError, MapLock};
use crate::addr::Range;
use crate::context::{self, InCallback};
use crate::engine::{self, DEVICES, Desks, DeviceOp, HITS, Hit, InvalidateError};
use crate::events::Events;
use crate::ghosts::Ghosts;
use crate::list::{Link, List, PutOff};
use crate::managed::Table;
use crate::memory::Memory;
use crate::notifier::{Cause, Notifier};
use crate::plan::Pieces;
use crate::pool::Pool;
use crate::primitive::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use crate::primitive::{Arc, Line, Mutex, contain};
use crate::recorder::{Kind, Recorder};
use crate::registration::state::StateWord;
use crate::registration::{Inner, Prepared, Target};
use crate::registry::{Free, Registry};
use crate::segment::SegmentInner;
use crate::source::Sources;
use crate::stats::{Counter, Counters};
use crate::watch::Watch;

pub(crate) struct Space {
    pub(crate) id: u64,
    pub(crate) memory: Option<StdArc<dyn Memory>>,
    pub(crate) table: Table,
    pub(crate) map_lock: MapLock,
    pub(crate) deadlines: Deadlines,
    pub(crate) registry: Registry<Inner>,
    pub(crate) events: Events,
    pub(crate) desks: Desks,
    pub(crate) hits: Pool<Hit, HITS>,
    pub(crate) device_ops: Pool<DeviceOp, DEVICES>,
    pub(crate) stats: Counters,
    pub(crate) recorder: Recorder,
    pub(crate) watch: StdArc<Watch>,
    pub(crate) sources: Sources,
    shared: Mutex<Vec<(u64, Arc<Inner>)>>,
    lifecycle: Line<Lifecycle>,
    /// That it is exiting, for those who need no more than a hint: every invalidation reads it, and no insertion writes to it.
    exit_begun: AtomicBool,
    pub(super) owners: AtomicUsize,
    numbers: Line<AtomicU64>,
    /// Registrations that were made and not dropped: an invalidation may hit all of them.
    made: Line<AtomicUsize>,
    /// The devices that those name, by their keys, and how often: an invalidation may have to flush each of them.
    devices: Mutex<HashMap<usize, usize>>,
    /// Complete, and not released yet.
    completed: List<Inner>,
    /// What devices that are in quarantine may still reach through registrations that are over.
    pub(crate) ghosts: Ghosts,
    exit_wanted: AtomicBool,
    /// On some thread's list of spaces with something put off, and the next of that list.
    put_off: AtomicBool,
    next_put_off: Link<Space>,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl PutOff for Space {
    fn next_put_off(&self) -> &Link<Self> {
        &self.next_put_off
    }
}

impl Space {
    pub(super) fn new(memory: Option<StdArc<dyn Memory>>, deadlines: Deadlines) -> Self {
        use std::sync::atomic::{AtomicU64 as StdAtomicU64, Ordering as StdOrdering};
        static NEXT: StdAtomicU64 = StdAtomicU64::new(1 << 32);
        let id = memory.as_ref().map_or_else(
            || NEXT.fetch_add(1, StdOrdering::Relaxed),
            |memory| memory.id(),
        );
        // A space is made to have registrations; that they name devices is not sure.
        let hits = Pool::new();
        hits.reserve(0);
        Self {
            id,
            table: Table::new(memory.as_ref().map(|memory| memory.arena())),
            memory,
            map_lock: MapLock::new(),
            deadlines,
            registry: Registry::new(),
            events: Events::new(),
            desks: Desks::new(&deadlines),
            hits,
            device_ops: Pool::new(),
            stats: Counters::new(),
            recorder: Recorder::new(),
            watch: Watch::new(id, deadlines.callback),
            sources: Sources::new(),
            shared: Mutex::new(Vec::new()),
            lifecycle: Line(Lifecycle::new()),
            exit_begun: AtomicBool::new(false),
            owners: AtomicUsize::new(1),
            numbers: Line(AtomicU64::new(1)),
            made: Line(AtomicUsize::new(0)),
            devices: Mutex::new(HashMap::new()),
            completed: List::new(),
            ghosts: Ghosts::new(),
            exit_wanted: AtomicBool::new(false),
            put_off: AtomicBool::new(false),
            next_put_off: Link::new(),
        }
    }

    pub(crate) fn next_registration(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn is_exiting(&self) -> bool {
        self.lifecycle.is_exiting()
    }

    /// The same as a hint: what follows may still meet an exit that begins, unless it is ordered otherwise.
    pub(crate) fn exit_has_begun(&self) -> bool {
        // Relaxed: who has seen anything that exit did, as that a registration is detached, sees this, which was before.
        self.exit_begun.load(Ordering::Relaxed)
    }

    /// Inserted and not yet released.
    pub(crate) fn registered(&self) -> usize {
        self.lifecycle.registered()
    }

    /// Sets aside what invalidations of one more registration can need, until [`Space::unreserve`]: room for one that hits everything,
    /// beside the chunk that each can have.
    pub(crate) fn reserve(&self, targets: &[Target]) {
        // Relaxed: each sees its own share counted, which is all that it relies on.
        let made = self.made.fetch_add(1, Ordering::Relaxed) + 1;
        self.hits.reserve(made);
        if targets.is_empty() {
            return;
        }
        self.desks.reserve_devices();
        let mut devices = self.devices.lock();
        for target in targets {
            *devices.entry(target.device.key()).or_default() += 1;
        }
        let named = devices.len();
        drop(devices);
        self.device_ops.reserve(named);
    }

    pub(crate) fn unreserve(&self, targets: &[Target]) {
        self.made.fetch_sub(1, Ordering::Relaxed);
        if targets.is_empty() {
            return;
        }
        let mut devices = self.devices.lock();
        for target in targets {
            let key = target.device.key();
            if let Some(count) = devices.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    devices.remove(&key);
                }
            }
        }
    }

    /// Counts registrations as inserted, and takes the insertion's use of each, unless the space is exiting.
    pub(crate) fn admit<'i>(&self, inners: impl ExactSizeIterator<Item = &'i Arc<Inner>>) -> bool {
        let admitted = inners.len();
        if !self.lifecycle.admit(admitted) {
            return false;
        }
        // Nobody else sees them yet: an exit that comes now waits for what they come to.
        for inner in inners {
            inner.word.begin_insert();
        }
        self.stats.add(Counter::Inserts, admitted as u64);
        true
    }

    /// Puts what was admitted into the index, all of it at once.
    pub(crate) fn index<'i>(
        &self,
        inners: impl Iterator<Item = &'i Arc<Inner>> + Clone,
    ) -> Free<Inner> {
        let free = self.registry.insert(inners.clone().cloned());
        for inner in inners {
            let (id, range) = (inner.id(), inner.range);
            self.recorder
                .record(Kind::Insert, id, range.start().get(), range.last().get());
        }
        free
    }

    /// A registration is detached and out of use: it waits for its release, by this thread when it is outermost, or by another
    /// one before. Allocates nothing; legal everywhere.
    pub(crate) fn complete(inner: Arc<Inner>) {
        inner.space.put_to_completed(inner.clone());
        if !planted!("r3-put-off") {
            context::completed(inner);
        }
    }

    /// The same, where the caller keeps a count: what is given up together is remembered by one of it.
    pub(crate) fn complete_one_of_many(inner: &Arc<Inner>) {
        if context::has_completed(&inner.space) {
            inner.space.put_to_completed(inner.clone());
        } else {
            Self::complete(inner.clone());
        }
    }

    fn put_to_completed(&self, inner: Arc<Inner>) {
        self.completed.push(inner);
        self.events.ended();
    }

    pub(crate) fn has_completed(&self) -> bool {
        self.completed.has_some()
    }

    /// Releases what is complete. Only where [`context::is_outermost`]. What is released leaves the index together, so many at once.
    pub(crate) fn run_completed(this: &Arc<Self>) {
        // So many that the way down to them is copied once for several, and so few that the copies are of memory in the cache.
        const AT_ONCE: usize = 64;
        while let Some(first) = this.completed.pop() {
            if !this.has_completed() {
                // One needs no list.
                this.release(&first);
                continue;
            }
            let mut released = Vec::new();
            let mut next = Some(first);
            while let Some(inner) = next {
                this.call_release(&inner);
                released.push(inner);
                // What it has inserted does not wait for the releases of others.
                let more = released.len() < AT_ONCE && !context::has_inserts();
                next = more.then(|| this.completed.pop()).flatten();
            }
            let free = this.remove(&released);
            drop(released);
            // What goes with it may have waited for just these.
            drop(free);
            context::leave();
        }
    }

    /// Releases one that is this thread's to release, and on no list. Only where [`context::is_outermost`].
    pub(crate) fn release(&self, inner: &Arc<Inner>) {
        self.call_release(inner);
        drop(self.remove(std::slice::from_ref(inner)));
        context::leave();
    }

    /// What it puts off itself, as the exit of this space, may wait for its removal: the caller leaves after that.
    fn call_release(&self, inner: &Arc<Inner>) {
        {
            let _watched = self.watch.enter_release(inner.who);
            let _callback = InCallback::release();
            let notifier = &inner.notifier;
            if contain(|| notifier.release()).is_none() {
                self.note_panic(inner, 0);
            }
        }
        self.recorder.record(Kind::Release, inner.id(), 0, 0);
        self.stats.add(Counter::Releases, 1);
        inner.word.released();
        // A shared one is not known under its key any more, or its handler would live on.
        if inner.word.load().is_shared() {
            let mut shared = self.shared.lock();
            shared.retain(|(_, one)| !Arc::ptr_eq(one, inner));
        }
        self.events.ended_by_rmw();
    }

    /// Takes what is released out of the index. Not before: an invalidation that meets it there asks whether its devices are in quarantine,
    /// where a release may have put them.
    fn remove(&self, released: &[Arc<Inner>]) -> Free<Inner> {
        // Before it leaves the index: a device that does not answer any more may hold entries of its range for ever.
        for inner in released.iter().filter(|_| !planted!("r20-ghost")) {
            self.ghosts.add(inner.range, inner.targets());
        }
        let (_, free) = self.registry.remove(released.iter().map(|inner| &**inner));
        self.lifecycle.released(released.len());
        self.events.ended_by_rmw();
        free
    }

    /// A callback of `inner` panicked: its devices are in quarantine from here on.
    #[cold]
    pub(crate) fn note_panic(&self, inner: &Inner, op: u64) {
        self.stats.add(Counter::Panics, 1);
        self.recorder.record(Kind::Panicked, op, inner.id(), 0);
        for target in inner.targets() {
            target.device.quarantine();
        }
    }

    /// Whether the caller is to put it on its thread's list: it is on one list at most.
    pub(crate) fn queue(&self) -> bool {
        // AcqRel: one thread queues it.
        !self.put_off.swap(true, Ordering::AcqRel)
    }

    /// What was put off, now that the thread is outermost.
    pub(crate) fn run_put_off(this: &Arc<Self>) {
        // AcqRel, not a plain store: it reads the swap of whoever found the space queued already, so that what was wanted before is
        // seen below.
        this.put_off.swap(false, Ordering::AcqRel);
        this.recorder.dump_if_wanted(this.id);
        if this.exit_wanted.swap(false, Ordering::AcqRel) {
            // Whoever is at it already may be further up on this stack.
            if !this.is_exiting() {
                // Nobody is here to be told.
                let _ = Self::exit(this);
            }
        }
    }

    /// Ends the space; the second time it waits for the first. Whether no device reaches its memory.
    pub(super) fn exit(this: &Arc<Self>) -> Result<(), ExitError> {
        if !context::is_outermost() {
            this.exit_wanted.store(true, Ordering::Release);
            context::put_off(this);
            return Ok(());
        }
        let first = this.lifecycle.exit();
        this.exit_begun.store(true, Ordering::Relaxed);
        let mut reached = false;
        if first {
            // From here on no operation claims a span, and those that had are over: the segments are this thread's.
            let segments = this.table.close(&this.events);
            for segment in &segments {
                reached |= !SegmentInner::end_at_exit(segment, this);
            }
            reached |= !Self::shoot_down(this, Range::ALL, &[]);
            // With the one of a newcomer, between its insertion and its look at the mark.
            fence(Ordering::SeqCst);
            this.registry.each(|found| Inner::detach_for_exit(&found));
        }
        loop {
            context::leave();
            Self::run_completed(this);
            let released = || planted!("r4") || this.lifecycle.registered() == 0;
            if released() {
                break;
            }
            this.events
                .wait(None, || released() || this.has_completed());
        }
        // Dropped unlocked: what it drops may be a driver's.
        let shared = std::mem::take(&mut *this.shared.lock());
        drop(shared);
        this.registry.reclaim();
        if first {
            // A release may have given its device up.
            this.ghosts.find(Range::ALL, |_| reached = true);
            if let Some(memory) = &this.memory {
                reached |= !this.table.clear(&**memory, reached);
                if reached && !planted!("r20-exit") {
                    // A device that did not acknowledge may reach these pages for as long as the process lives: so long they stay.
                    std::mem::forget(memory.clone());
                }
            }
            this.lifecycle.exited(reached);
            this.events.ended_by_rmw();
        } else {
            this.events.wait(None, || this.lifecycle.has_exited());
        }
        if this.lifecycle.was_reached() {
            return Err(ExitError::Reached { space: this.id });
        }
        Ok(())
    }

    /// A shootdown for exit; false if a device may still reach the range. A panic in `end` came after every device had
    /// acknowledged.
    pub(crate) fn shoot_down(
        this: &Arc<Self>,
        range: Range,
        segments: &[Arc<SegmentInner>],
    ) -> bool {
        let what = engine::What {
            pieces: Pieces::UNKNOWN,
            cause: Cause::Exit,
            segments,
        };
        let result = engine::run(this, range, what, engine::Mode::Blocking, || Ok(()));
        matches!(
            result.map_err(|failed| failed.error),
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
        let admitted = Prepared::admit(std::slice::from_ref(&prepared));
        let inner = prepared.inner().clone();
        if admitted.is_ok() {
            shared.push((key, inner.clone()));
        }
        // Unlocked: with what follows go handlers, whose drop may be anything.
        drop(shared);
        drop(admitted?);
        context::leave();
        Ok(inner)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;
    use crate::AddressSpace;

    /// Cannot say what it needs.
    struct Speechless;

    impl Notifier for Speechless {
        fn needs(&self) -> crate::Needs {
            panic!("planned");
        }
    }

    #[test]
    fn a_handler_that_panics_before_its_registration_is_made_has_no_room_set_aside() {
        let space = AddressSpace::without_memory(Deadlines::default());
        let prepare = || {
            let page = Range::new(0u64, 4096).expect("a page");
            space.prepare(page, StdArc::new(Speechless), &[])
        };
        assert!(catch_unwind(AssertUnwindSafe(prepare)).is_err());
        assert_eq!(space.space.made.load(Ordering::Relaxed), 0);
    }
}
