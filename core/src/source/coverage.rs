//! What of foreign changes is seen on a space, and whether that is enough for a driver.
//!
//! The locks are the standard library's also under the model checker, which explores no sources. Under neither is anything
//! allocated or freed, as callbacks insert registrations and ask here (R18).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use thiserror::Error;

use super::operation::{Needs, Operation, Operations, Sees};
use super::{BUILT_IN, Observer, Source};
use crate::active::SLOTS;
use crate::addr::Range;
use crate::primitive::kernel_thread;

/// Sources that one space has at most.
pub(super) const SOURCES: usize = 4;

/// What a source sees, operation by operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Table([Sees; Operation::ALL.len()]);

impl Table {
    pub(crate) fn new(sees: impl Fn(Operation) -> Sees) -> Self {
        let mut table = [Sees::empty(); Operation::ALL.len()];
        for operation in Operation::ALL {
            table[*operation as usize] = sees(*operation);
        }
        Self(table)
    }

    pub(crate) fn get(&self, operation: Operation) -> Sees {
        self.0[operation as usize]
    }
}

/// Nothing that watches the space tells a driver enough of what others do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{range} is not watched well enough: of {operation} the driver needs {needs}, and what watches the space gives \"{sees}\"; {}",
    match would_do {
        Some(source) => format!("the source {source} would do, or `needs` that ask for less"),
        None => "no other source of this crate would do: leave the operation out of `operations`, let `needs` ask for less, or declare there that it tolerates faults".to_owned(),
    })]
pub struct Shortfall {
    /// What was to be registered.
    pub range: Range,
    /// The first operation that is not seen well enough.
    pub operation: Operation,
    /// What the driver needs.
    pub needs: Needs,
    /// What the sources of the space give, together.
    pub sees: Sees,
    /// The source of this crate that meets all the needs; none that watches the range already, and gives less on this machine than it
    /// declares.
    pub would_do: Option<&'static str>,
}

#[derive(Clone)]
struct Entry {
    key: usize,
    range: Range,
    table: Table,
    source: Arc<dyn Source>,
}

/// A range that an operation of the space itself changes, and on which thread.
#[derive(Clone, Copy, PartialEq, Eq)]
struct OwnRange {
    range: Range,
    thread: u32,
}

/// Those of a space.
struct OwnRanges {
    /// The first so many.
    used: usize,
    list: [Option<OwnRange>; SLOTS],
}

impl OwnRanges {
    fn iter(&self) -> impl Iterator<Item = OwnRange> {
        self.list[..self.used].iter().flatten().copied()
    }

    /// Operations have slots, which are as many.
    fn add(&mut self, range: OwnRange) {
        if let Some(free) = self.list.get_mut(self.used) {
            *free = Some(range);
            self.used += 1;
        }
    }

    fn remove(&mut self, range: Range) {
        let found = self.iter().position(|one| one.range == range);
        if let Some(nth) = found {
            self.used -= 1;
            self.list[nth] = self.list[self.used].take();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cold]
fn observed(observer: &Arc<dyn Observer>, range: Range) -> Change {
    observer.may_change(range);
    let observer = observer.clone();
    Change { observer, range }
}

/// What watches one space.
pub(crate) struct Sources {
    entries: Mutex<[Option<Entry>; SOURCES]>,
    /// Raised and lowered under the lock, so that the many spaces without a source pay one load.
    count: AtomicUsize,
    /// What the space's own operations are about to change: a source is told of it too, and has nothing to tell.
    own: Mutex<OwnRanges>,
    /// How many those are, most of the time none. Written under the lock.
    owned: AtomicUsize,
    observer: OnceLock<Arc<dyn Observer>>,
    /// Others change pages of the space, or have: large ones may be cut without the table's knowing. It stays so when they are no
    /// longer watched.
    others: AtomicBool,
}

impl Sources {
    pub(crate) fn new() -> Self {
        Self {
            entries: Mutex::new([const { None }; SOURCES]),
            count: AtomicUsize::new(0),
            own: Mutex::new(OwnRanges {
                used: 0,
                list: [None; SLOTS],
            }),
            owned: AtomicUsize::new(0),
            observer: OnceLock::new(),
            others: AtomicBool::new(false),
        }
    }

    /// Whether nothing watches the space.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        // Relaxed: whoever attaches a source while others register or change memory orders them himself.
        self.count.load(Ordering::Relaxed) == 0
    }

    /// Somebody else is about to change pages.
    pub(crate) fn others_change(&self) {
        // Relaxed: before the claim of that change, and read when a later one has quiesced the drivers that have installed what is cut.
        if !self.others.load(Ordering::Relaxed) {
            self.others.store(true, Ordering::Relaxed);
        }
    }

    /// Whether pages may be smaller than the table says.
    pub(crate) fn may_be_cut(&self) -> bool {
        self.others.load(Ordering::Relaxed)
    }

    /// False if there is no room.
    pub(super) fn add(
        &self,
        key: usize,
        range: Range,
        table: Table,
        source: Arc<dyn Source>,
    ) -> bool {
        let entry = Entry {
            key,
            range,
            table,
            source,
        };
        let mut entries = lock(&self.entries);
        let Some(free) = entries.iter_mut().find(|one| one.is_none()) else {
            return false;
        };
        *free = Some(entry);
        self.others_change();
        self.count.fetch_add(1, Ordering::Relaxed);
        true
    }

    pub(super) fn remove(&self, key: usize) {
        let mut entries = lock(&self.entries);
        let own = |one: &&mut Option<Entry>| one.as_ref().is_some_and(|entry| entry.key == key);
        let entry = entries.iter_mut().find(own).and_then(Option::take);
        if entry.is_some() {
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        drop(entries);
        // Freed with the lock given back: a callback may want it (R18).
        drop(entry);
    }

    /// Whether what watches `range` is enough.
    #[inline]
    pub(crate) fn check(
        &self,
        range: Range,
        needs: Needs,
        operations: Operations,
    ) -> Result<(), Shortfall> {
        if needs.contains(Needs::TOLERATES_FAULTS)
            || self.is_empty() && !needs.contains(Needs::FOREIGN)
        {
            return Ok(());
        }
        self.compare(range, needs, operations)
    }

    fn compare(&self, range: Range, needs: Needs, operations: Operations) -> Result<(), Shortfall> {
        let entries = lock(&self.entries);
        let sees = |operation| {
            let covering = entries.iter().flatten();
            let covering = covering.filter(|entry| entry.range.contains(range));
            let all = covering.map(|entry| entry.table.get(operation));
            // What one loses another may be told.
            let best = all.clone().find(|sees| !needs.lacks(*sees));
            best.unwrap_or_else(|| all.fold(Sees::empty(), Sees::union))
        };
        let Some(operation) = operations.each().find(|one| needs.lacks(sees(*one))) else {
            return Ok(());
        };
        let sees = sees(operation);
        let watches = |name: &str| {
            let mut covering = entries.iter().flatten();
            covering.any(|one| one.range.contains(range) && one.source.name() == name)
        };
        let would_do = BUILT_IN.iter().find(|(name, declares)| {
            let mut operations = operations.each();
            !watches(name) && operations.all(|operation| !needs.lacks(declares(operation)))
        });
        Err(Shortfall {
            range,
            operation,
            needs,
            sees,
            would_do: would_do.map(|(name, _)| *name),
        })
    }

    /// Waits until what happened before this call has been told, where a source is late (R29), and has what others may have mapped
    /// in `range` looked at. Not inside a callback.
    #[inline]
    pub(crate) fn settle(&self, range: Range) {
        if !self.is_empty() {
            self.settle_all(range);
        }
    }

    fn settle_all(&self, range: Range) {
        for nth in 0..SOURCES {
            let source = lock(&self.entries)[nth]
                .as_ref()
                .map(|entry| (entry.source.clone(), entry.range.intersect(range)));
            if let Some((source, part)) = source {
                source.settle();
                if let Some(part) = part {
                    source.renew(part);
                }
            }
        }
    }

    pub(super) fn observe(&self, observer: Arc<dyn Observer>) -> Result<(), Arc<dyn Observer>> {
        self.observer.set(observer)
    }

    /// Pages of `range` may change until the value is dropped. None where nobody observes it.
    #[inline]
    pub(crate) fn change(&self, range: Range) -> Option<Change> {
        self.observer.get().map(|one| observed(one, range))
    }

    /// The space's own operation is about to change these ranges; until the value is dropped. None where nobody looks.
    #[inline]
    pub(crate) fn own(&self, ranges: [Option<Range>; 2]) -> Option<Own<'_>> {
        let somebody = !self.is_empty() || self.observer.get().is_some();
        somebody.then(|| self.own_seen(ranges))
    }

    #[cold]
    fn own_seen(&self, ranges: [Option<Range>; 2]) -> Own<'_> {
        let changes = ranges.map(|range| range.and_then(|range| self.change(range)));
        if self.is_empty() {
            return Own {
                sources: self,
                ranges: [None; 2],
                _changes: changes,
            };
        }
        let thread = kernel_thread() as u32;
        let mut own = lock(&self.own);
        for range in ranges.into_iter().flatten() {
            own.add(OwnRange { range, thread });
        }
        self.owned.store(own.used, Ordering::Relaxed);
        drop(own);
        Own {
            sources: self,
            ranges,
            _changes: changes,
        }
    }

    /// Whether exactly this is being changed, on this thread, by an operation of the space itself, which has shot it down.
    #[inline]
    pub(crate) fn is_own(&self, range: Range, thread: u32) -> bool {
        // Relaxed: who asks was told of a call of that thread, which has written it before.
        self.owned.load(Ordering::Relaxed) != 0 && self.is_one_of_own(range, thread)
    }

    #[cold]
    fn is_one_of_own(&self, range: Range, thread: u32) -> bool {
        let asked = OwnRange { range, thread };
        lock(&self.own).iter().any(|one| one == asked)
    }

    /// What the space's own operations are changing, into a list that has room for [`SLOTS`].
    pub(super) fn owned(&self, into: &mut Vec<Range>) {
        into.extend(lock(&self.own).iter().map(|one| one.range));
    }
}

/// An operation of the space itself changes pages for as long as this lives.
pub(crate) struct Own<'s> {
    sources: &'s Sources,
    ranges: [Option<Range>; 2],
    _changes: [Option<Change>; 2],
}

/// Pages may change for as long as this lives, and the observer, if there is one, knows.
pub(crate) struct Change {
    observer: Arc<dyn Observer>,
    range: Range,
}

impl Drop for Change {
    fn drop(&mut self) {
        self.observer.changed(self.range);
    }
}

impl Own<'_> {
    /// It has put new mappings there: those sources look at them that lose sight of a range that is mapped anew.
    pub(crate) fn changed(&self) {
        for range in self.ranges.into_iter().flatten() {
            let entries = lock(&self.sources.entries);
            for entry in entries.iter().flatten() {
                if let Some(part) = entry.range.intersect(range) {
                    entry.source.renew(part);
                }
            }
        }
    }
}

impl Drop for Own<'_> {
    fn drop(&mut self) {
        if self.ranges == [None; 2] {
            return;
        }
        let mut own = lock(&self.sources.own);
        for range in self.ranges.into_iter().flatten() {
            own.remove(range);
        }
        self.sources.owned.store(own.used, Ordering::Relaxed);
    }
}
