//! The index of registrations: overlapping ranges, walked without a lock.
//!
//! An immutable B+ tree, sorted by start and then by number, with the largest last address of each subtree, so that a walk
//! skips what ends before its range and stops where starts lie behind it. A writer copies the path from the root to
//! the leaf that changes, publishes the new root by one store, and retires the old root through the [`Srcu`]; versions
//! share what did not change. So a walk sees one consistent version (R10), is never blocked by a writer, and writes to
//! nothing that another walk reads. Writers take turns on a mutex; only they allocate and free.
//!
//! Every version that holds an entry holds a strong count of its value, and a version outlives the sections that may see
//! it: a walker may turn the `&T` that it is shown into a use of its own (R5).
//!
//! The root's hull is looked at first. A summary of occupied regions would go beside it, in [`Tree`], and be published with it.

#[cfg(all(any(test, fuzzing), not(loom)))]
pub(crate) mod fuzz;
mod node;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;

use self::node::{Entry, Node};
use crate::addr::Range;
use crate::primitive::atomic::{AtomicPtr, Ordering};
use crate::primitive::{Arc, Mutex};
use crate::srcu::Srcu;

/// One version.
struct Tree<T> {
    hull: Option<Range>,
    root: Arc<Node<T>>,
}

/// Overlapping ranges, each with a number and a value.
pub(crate) struct Registry<T> {
    /// Made by `Box::into_raw`; never null.
    tree: AtomicPtr<Tree<T>>,
    writer: Mutex<()>,
    srcu: Srcu<Box<Tree<T>>>,
}

// SAFETY: a registry is its trees, whose values are shared by reference between threads and dropped on any of them,
// which `T: Send + Sync` allows; the raw pointer is only a way to publish a `Box<Tree<T>>`.
unsafe impl<T: Send + Sync> Send for Registry<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for Registry<T> {}

impl<T> Registry<T> {
    pub(crate) fn new() -> Self {
        Self {
            tree: AtomicPtr::new(Box::into_raw(Self::tree(Arc::new(Node::empty())))),
            writer: Mutex::new(()),
            srcu: Srcu::new(),
        }
    }

    fn tree(root: Arc<Node<T>>) -> Box<Tree<T>> {
        Box::new(Tree {
            hull: root.hull(),
            root,
        })
    }

    /// Shows every entry that overlaps `range`, by start and then number, until `visit` breaks. One read section: `visit`
    /// must be short and may not wait.
    pub(crate) fn walk(&self, range: Range, mut visit: impl FnMut(Range, &T) -> ControlFlow<()>) {
        let _section = self.srcu.read();
        // Acquire, with the Release in `publish`: the nodes are complete.
        let tree = self.tree.load(Ordering::Acquire);
        // SAFETY: the pointer came from `Box::into_raw`. It was current after the section began, so `retire` keeps it
        // until the section is over.
        let tree = unsafe { &*tree };
        if tree.hull.is_some_and(|hull| hull.overlaps(range)) {
            let _ = tree.root.walk(range, &mut visit);
        }
    }

    /// Adds an entry. `id` is unique.
    pub(crate) fn insert(&self, range: Range, id: u64, value: Arc<T>) {
        let writer = self.writer.lock();
        let root = self.current().insert(&Entry { range, id, value });
        let free = self.publish(Arc::new(root));
        // The last count of a value may be among it, and with it whatever a driver drops.
        drop(writer);
        drop(free);
    }

    /// Takes an entry away; whether it was there.
    pub(crate) fn remove(&self, range: Range, id: u64) -> bool {
        let writer = self.writer.lock();
        let Some(root) = self.current().remove((range.start(), id)) else {
            return false;
        };
        let free = self.publish(root);
        drop(writer);
        drop(free);
        true
    }

    /// The current version; the writer's lock must be held, or a section be open.
    fn current(&self) -> &Node<T> {
        // Relaxed: only writers store, and they take turns on the lock.
        let tree = self.tree.load(Ordering::Relaxed);
        // SAFETY: from `Box::into_raw`; only `publish` retires it, and the caller holds the writer's lock.
        unsafe { &(*tree).root }
    }

    /// Drops all old versions, and with them the values that were removed; waits for the walks that may still see them.
    pub(crate) fn reclaim(&self) {
        self.srcu.reclaim();
    }

    /// Gives back old versions that nobody sees any more.
    fn publish(&self, root: Arc<Node<T>>) -> Vec<(u64, Box<Tree<T>>)> {
        if planted!("r10") {
            // In two steps, as whoever changes an index in place.
            drop(self.replace(Arc::new(Node::empty())));
        }
        self.replace(root)
    }

    fn replace(&self, root: Arc<Node<T>>) -> Vec<(u64, Box<Tree<T>>)> {
        let new = Box::into_raw(Self::tree(root));
        // Release, with the Acquire in `walk`.
        let old = self.tree.swap(new, Ordering::Release);
        // SAFETY: `old` came from `Box::into_raw` and was unlinked by this swap, once. Readers may still see it:
        // `retire` gives it back when none can.
        self.srcu.retire([unsafe { Box::from_raw(old) }])
    }
}

impl<T> Drop for Registry<T> {
    fn drop(&mut self) {
        let tree = self.tree.load(Ordering::Relaxed);
        // SAFETY: from `Box::into_raw`, and `&mut self` means that no section is open.
        drop(unsafe { Box::from_raw(tree) });
    }
}
