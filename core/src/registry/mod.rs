//! The index of registrations: overlapping ranges, walked without a lock.
//!
//! An immutable B+ tree ([`node`]), sorted by start and then by number, with the largest last address of each subtree, so that a walk
//! skips what ends before its range and what starts behind it; and beside it a [`summary`] that says for most ranges that hit nothing
//! that the tree need not be looked at. A writer copies the path from the root to the leaf that changes, once for all changes
//! of a batch, publishes the new root by one store, and retires what that has replaced ([`Retired`]); versions share what did
//! not change. So a walk sees one consistent version (R10), is never blocked by a writer, and writes to nothing that
//! another walk reads. Writers take turns on a mutex; only they allocate and free.
//!
//! The index holds a strong count of each value. It is retired with the nodes: a walker may turn the value that it is shown into a use
//! of its own (R5).
//!
//! A walk is the first part of a claim ([`Active`]), whose fence is the walk's own.

#[cfg(all(any(test, fuzzing), not(loom)))]
pub(crate) mod fuzz;
mod granule;
pub(crate) mod node;
mod summary;
#[cfg(test)]
mod tests;

use std::mem::take;
use std::ops::ControlFlow;

pub(crate) use self::node::{Entry, Found};
use self::node::{Link, Node, Nodes, key};
use self::summary::{Marks, Old, Summary};
use crate::active::{Active, Claim};
use crate::addr::Range;
use crate::primitive::atomic::{AtomicPtr, Ordering};
use crate::primitive::{Arc, Backoff, Line, Mutex};
use crate::srcu::{Garbage, Retired};

/// What a change has unlinked.
struct Unlinked<T> {
    nodes: Vec<Link<T>>,
    values: Vec<Arc<T>>,
    tables: Vec<Old>,
}

impl<T> Default for Unlinked<T> {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            values: Vec::new(),
            tables: Vec::new(),
        }
    }
}

impl<T> Garbage for Unlinked<T> {
    fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.values.is_empty() && self.tables.is_empty()
    }

    fn append(&mut self, more: &mut Self) {
        self.nodes.append(&mut more.nodes);
        self.values.append(&mut more.values);
        self.tables.append(&mut more.tables);
    }
}

/// Values and tables that nobody sees any more: to be dropped when the writer's lock is let go, as the last count of a value may be
/// among them, and with it whatever a driver drops. Mostly it is one value.
pub(crate) type Free<T> = (Option<Arc<T>>, Option<Box<(Vec<Arc<T>>, Vec<Old>)>>);

struct Writer<T> {
    nodes: Nodes<T>,
    marks: Marks,
    retired: Retired<Unlinked<T>>,
}

/// Overlapping ranges.
pub(crate) struct Registry<T: Entry> {
    /// A [`Link`].
    root: Line<AtomicPtr<Node<T>>>,
    summary: Summary,
    active: Active,
    writer: Line<Mutex<Writer<T>>>,
}

// SAFETY: a registry is its entries, which are shared by reference between threads and dropped on any of them, as `T: Send + Sync`
// allows; the raw pointers are ways to share nodes that are not changed, and that nobody else frees.
unsafe impl<T: Entry + Send + Sync> Send for Registry<T> {}
// SAFETY: as above.
unsafe impl<T: Entry + Send + Sync> Sync for Registry<T> {}

impl<T: Entry> Registry<T> {
    pub(crate) fn new() -> Self {
        let mut nodes = Nodes::new();
        let root = nodes.empty();
        nodes.seal();
        Self {
            root: Line(AtomicPtr::new(root.as_ptr())),
            summary: Summary::new(),
            active: Active::new(),
            writer: Line(Mutex::new(Writer {
                nodes,
                marks: Marks::default(),
                retired: Retired::new(),
            })),
        }
    }

    /// What is in progress over it.
    pub(crate) fn active(&self) -> &Active {
        &self.active
    }

    /// A walk for `range` is going to begin: what it reads first is on its way until then. The sooner this is said the better.
    #[inline]
    pub(crate) fn expect(&self, range: Range) {
        if !cfg!(loom) {
            self.summary.expect(range);
        }
    }

    /// Whether certainly no entry overlaps `range`, which `claim` was made for; then the walk of `claim` is over.
    #[inline]
    pub(crate) fn misses(&self, claim: Claim, range: Range) -> bool {
        let misses = !self.summary.may_hit(range);
        if misses {
            self.active.walked(claim);
        } else if !cfg!(loom) {
            // Relaxed: if it is another by the time of the walk, some lines come for nothing.
            Node::expect(self.root.load(Ordering::Relaxed));
        }
        misses
    }

    /// Shows every entry that overlaps `range`, which `claim` was made for, by start and then number, until `visit` breaks; and ends
    /// the walk of `claim`, unless that is over ([`Registry::misses`]). `visit` must be short and may not wait.
    pub(crate) fn walk(
        &self,
        claim: Claim,
        range: Range,
        mut visit: impl FnMut(Found<'_, T>) -> ControlFlow<()>,
    ) {
        if !self.active.is_walking(claim) {
            return;
        }
        // Acquire, with the Release in `publish`: the nodes are complete.
        let root = self.root.load(Ordering::Acquire);
        // SAFETY: a link that was current after the walk began, so that `publish` retires it only for later.
        let _ = unsafe { &*root }.walk(range, &mut visit);
        self.active.walked(claim);
    }

    /// Shows all entries to somebody who is no invalidation. Writers wait: `visit` may not write to the index.
    pub(crate) fn each(&self, mut visit: impl FnMut(Found<'_, T>)) {
        let writer = self.writer.lock();
        let root = self.root(&writer);
        // SAFETY: the current root, which only writers unlink.
        let root = unsafe { root.as_ref() };
        let _ = root.walk(Range::ALL, &mut |found| {
            visit(found);
            ControlFlow::Continue(())
        });
    }

    /// Adds entries, all in one version. What it gives back is to be dropped where no lock is held.
    pub(crate) fn insert(&self, values: impl IntoIterator<Item = Arc<T>>) -> Free<T> {
        let mut writer = self.writer.lock();
        let old = self.root(&writer);
        let mut root = old;
        for value in values {
            self.summary.mark(&mut writer.marks, value.range());
            root = writer.nodes.insert(root, value);
        }
        self.publish(&mut writer, root)
    }

    /// Takes entries away, all in one version; how many were there. What it gives back is to be dropped where no lock is held.
    pub(crate) fn remove<'a>(&self, entries: impl IntoIterator<Item = &'a T>) -> (usize, Free<T>)
    where
        T: 'a,
    {
        let mut writer = self.writer.lock();
        let mut root = self.root(&writer);
        for entry in entries {
            root = writer.nodes.remove(root, key(entry));
        }
        let removed = writer.nodes.unlinked.values.len();
        (removed, self.publish(&mut writer, root))
    }

    /// The current root, as only writers replace it.
    fn root(&self, _: &Writer<T>) -> Link<T> {
        let root = self.root.load(Ordering::Relaxed);
        Link::new(root).expect("a root is never null")
    }

    /// Makes `root` the version that walks see from here on. Gives back what nobody sees any more.
    fn publish(&self, writer: &mut Writer<T>, root: Link<T>) -> Free<T> {
        writer.nodes.seal();
        if planted!("r10") {
            // In two steps, as whoever changes an index in place.
            let nothing = writer.nodes.empty();
            self.root.store(nothing.as_ptr(), Ordering::Release);
            writer.nodes.unlinked.nodes.push(nothing);
        }
        // Release, with the Acquire in `walk`.
        self.root.store(root.as_ptr(), Ordering::Release);
        // Not before the tree is without them.
        for value in &writer.nodes.unlinked.values {
            self.summary.unmark(&mut writer.marks, value.range());
        }
        self.sweep(writer)
    }

    fn sweep(&self, writer: &mut Writer<T>) -> Free<T> {
        let Writer {
            nodes,
            marks,
            retired,
        } = writer;
        let garbage = &mut nodes.unlinked;
        if !marks.unlinked.is_empty() {
            garbage.tables.append(&mut marks.unlinked);
        }
        retired.retire(&self.active, garbage);
        let one = garbage.values.pop();
        let more = !(garbage.values.is_empty() && garbage.tables.is_empty());
        let more = more.then(|| Box::new((take(&mut garbage.values), take(&mut garbage.tables))));
        nodes.reuse();
        (one, more)
    }

    /// Drops the values that were removed; waits for the walks that may still see them.
    pub(crate) fn reclaim(&self) {
        let mut backoff = Backoff::new();
        loop {
            let mut writer = self.writer.lock();
            let free = self.sweep(&mut writer);
            let done = writer.retired.is_empty();
            drop(writer);
            drop(free);
            if done {
                return;
            }
            backoff.wait();
        }
    }

    #[cfg(all(any(test, fuzzing), not(loom)))]
    fn check(&self) -> usize {
        let writer = self.writer.lock();
        node::check(self.root(&writer), &writer.nodes)
    }
}

impl<T: Entry> Drop for Registry<T> {
    fn drop(&mut self) {
        let root = self.root.load(Ordering::Relaxed);
        let root = Link::new(root).expect("a root is never null");
        // SAFETY: `&mut self` means that no walk goes on. Older versions share what is below with this one, or have it among what they
        // retired.
        unsafe { Node::drop_values(root) };
        let mut writer = self.writer.lock();
        let _ = self.sweep(&mut writer);
    }
}
