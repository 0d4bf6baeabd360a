//! Nodes of the index: never changed once a walk can see them.
//!
//! A node holds, for each thing below it, where that starts and ends, side by side, so that all are compared without a branch. What
//! is below is an entry's value in a leaf, else a node. Nodes are owned by the one version of the tree that they are linked in;
//! [`Nodes`] is where a writer gets new ones, and where those go that it has replaced.
//!
//! The unsafe code of the index is here and in the parent module. It rests on two facts. A node or value that can be reached from a
//! published root is alive for as long as a walk that began before it was unlinked: the parent retires it. And a node
//! is written only while its stamp is that of the batch that is not published yet, by the one writer that made it.

use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::ptr::NonNull;

use crate::addr::Range;
use crate::primitive::Arc;

/// What is below a node at most.
#[cfg(not(loom))]
pub(crate) const FANOUT: usize = 16;
#[cfg(loom)]
pub(crate) const FANOUT: usize = 2;

/// Nodes kept for reuse.
const SPARE: usize = 64;

/// What an index is made of.
pub(crate) trait Entry {
    /// Never changes.
    fn range(&self) -> Range;
    /// Unique in one index, never changes.
    fn number(&self) -> u64;
}

/// Start, then number: the order of the entries.
pub(super) type Key = (u64, u64);

pub(super) fn key<T: Entry>(entry: &T) -> Key {
    (entry.range().start().get(), entry.number())
}

/// An entry that a walk has met.
#[derive(Debug)]
pub(crate) struct Found<'a, T> {
    value: NonNull<T>,
    walk: PhantomData<&'a T>,
}

impl<T> Found<'_, T> {
    /// The pointer of `Arc::into_raw` whose count the index holds.
    pub(crate) fn as_ptr(&self) -> NonNull<T> {
        self.value
    }
}

impl<T> std::ops::Deref for Found<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: met by a walk, for as long as which the index keeps its count of it.
        unsafe { self.value.as_ref() }
    }
}

/// A linked node.
pub(super) type Link<T> = NonNull<Node<T>>;

pub(super) struct Node<T> {
    /// The batch that made it.
    stamp: u64,
    len: usize,
    leaf: bool,
    first: [u64; FANOUT],
    last: [u64; FANOUT],
    /// In a leaf from `Arc::into_raw`, with its count; else a [`Link`].
    below: [*const (); FANOUT],
    values: PhantomData<Arc<T>>,
}

impl<T: Entry> Node<T> {
    fn blank(stamp: u64, leaf: bool) -> Self {
        Self {
            stamp,
            len: 0,
            leaf,
            first: [0; FANOUT],
            last: [0; FANOUT],
            below: [std::ptr::null(); FANOUT],
            values: PhantomData,
        }
    }

    pub(super) fn leaf() -> Link<T> {
        NonNull::from(Box::leak(Box::new(Self::blank(0, true))))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn value(&self, at: usize) -> &T {
        debug_assert!(self.leaf && at < self.len);
        // SAFETY: a leaf's, so from `Arc::into_raw`; alive as this node is.
        unsafe { &*self.below[at].cast::<T>() }
    }

    fn child(&self, at: usize) -> &Self {
        debug_assert!(!self.leaf && at < self.len);
        // SAFETY: no leaf's, so a `Link`; alive as this node is.
        unsafe { &*self.below[at].cast::<Self>() }
    }

    fn link(&self, at: usize) -> Link<T> {
        debug_assert!(!self.leaf && at < self.len);
        NonNull::new(self.below[at].cast::<Self>().cast_mut()).expect("a link is never null")
    }

    /// The number of the first entry.
    fn first_number(&self) -> u64 {
        if self.leaf {
            self.value(0).number()
        } else {
            self.child(0).first_number()
        }
    }

    fn key(&self, at: usize) -> Key {
        let number = if self.leaf {
            self.value(at).number()
        } else {
            self.child(at).first_number()
        };
        (self.first[at], number)
    }

    /// How many are before `key`. Numbers are looked at only where starts are equal.
    fn before(&self, key: Key) -> usize {
        let first = &self.first[..self.len];
        let mut at = first.iter().map(|one| usize::from(*one < key.0)).sum();
        while at < self.len && first[at] == key.0 && self.key(at).1 < key.1 {
            at += 1;
        }
        at
    }

    /// The child that `key` belongs to.
    fn towards(&self, key: Key) -> usize {
        let before = self.before(key);
        let own = before < self.len && self.first[before] == key.0 && self.key(before) == key;
        if own {
            before
        } else {
            before.saturating_sub(1)
        }
    }

    /// Shows every entry that overlaps [first, last], by start, then number.
    pub(super) fn walk(
        &self,
        (first, last): (u64, u64),
        visit: &mut impl FnMut(Found<'_, T>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        // Two instructions a comparison, and no branch to be guessed wrong.
        let (mut starts, mut ends) = (0u32, 0u32);
        for at in (0..FANOUT).rev() {
            starts = starts + starts + u32::from(self.first[at] <= last);
            ends = ends + ends + u32::from(self.last[at] >= first);
        }
        let mut hits = starts & ends & ((1 << self.len) - 1);
        while hits != 0 {
            let at = hits.trailing_zeros() as usize;
            hits &= hits - 1;
            if self.leaf {
                let value = self.below[at].cast::<T>().cast_mut();
                visit(Found {
                    value: NonNull::new(value).expect("a value is never null"),
                    walk: PhantomData,
                })?;
            } else {
                self.child(at).walk((first, last), visit)?;
            }
        }
        ControlFlow::Continue(())
    }

    fn hull(&self) -> (u64, u64) {
        let last = self.last[..self.len].iter().copied().max();
        (self.first[0], last.unwrap_or(0))
    }

    fn set(&mut self, at: usize, (first, last): (u64, u64), below: *const ()) {
        (self.first[at], self.last[at], self.below[at]) = (first, last, below);
    }

    fn insert(&mut self, at: usize, (first, last): (u64, u64), below: *const ()) {
        let len = self.len;
        self.first.copy_within(at..len, at + 1);
        self.last.copy_within(at..len, at + 1);
        self.below.copy_within(at..len, at + 1);
        self.len += 1;
        self.set(at, (first, last), below);
    }

    fn remove(&mut self, at: usize) -> *const () {
        let (below, len) = (self.below[at], self.len);
        self.first.copy_within(at + 1..len, at);
        self.last.copy_within(at + 1..len, at);
        self.below.copy_within(at + 1..len, at);
        self.len -= 1;
        below
    }

    /// Appends what `other` has from `from` on.
    fn take(&mut self, other: &mut Self, from: usize) {
        let (len, more) = (self.len, other.len - from);
        self.first[len..len + more].copy_from_slice(&other.first[from..other.len]);
        self.last[len..len + more].copy_from_slice(&other.last[from..other.len]);
        self.below[len..len + more].copy_from_slice(&other.below[from..other.len]);
        self.len += more;
        other.len = from;
    }

    /// Frees it and all below it.
    ///
    /// # Safety
    /// No walk sees `root`, and the caller owns it.
    pub(super) unsafe fn free(root: Link<T>) {
        // SAFETY: every link is from `Box::leak`; the caller's to free, by its promise.
        let node = unsafe { Box::from_raw(root.as_ptr()) };
        for below in &node.below[..node.len] {
            if node.leaf {
                // SAFETY: from `Arc::into_raw`, with the count that the tree holds.
                drop(unsafe { Arc::from_raw(below.cast::<T>()) });
            } else {
                // SAFETY: owned by this node alone.
                unsafe { Self::free(NonNull::new_unchecked(below.cast::<Self>().cast_mut())) };
            }
        }
    }
}

/// Where a writer's nodes come from and go to.
pub(super) struct Nodes<T> {
    /// The batch that is being made.
    stamp: u64,
    spare: Vec<Link<T>>,
    /// Replaced by this batch: linked still in what is published.
    pub(super) unlinked: Vec<Link<T>>,
}

impl<T: Entry> Nodes<T> {
    pub(super) fn new() -> Self {
        Self {
            stamp: 1,
            spare: Vec::new(),
            unlinked: Vec::new(),
        }
    }

    /// The batch is about to be published: from here on its nodes do not change.
    pub(super) fn seal(&mut self) {
        self.stamp += 1;
    }

    /// Takes back nodes that no walk sees, and that are linked nowhere.
    pub(super) fn reuse(&mut self, nodes: &mut Vec<Link<T>>) {
        let room = SPARE.saturating_sub(self.spare.len());
        let kept = nodes.len() - room.min(nodes.len());
        self.spare.extend(nodes.drain(kept..));
        for node in nodes.drain(..) {
            // SAFETY: from `Box::leak`, and linked nowhere any more. What is below is linked elsewhere, or has gone before.
            drop(unsafe { Box::from_raw(node.as_ptr()) });
        }
    }

    fn blank(&mut self, leaf: bool) -> Link<T> {
        let blank = Node::blank(self.stamp, leaf);
        let Some(node) = self.spare.pop() else {
            return NonNull::from(Box::leak(Box::new(blank)));
        };
        // SAFETY: spare, so nobody else's. A node has nothing to drop.
        unsafe { node.as_ptr().write(blank) };
        node
    }

    /// A node of this batch, to be written to.
    fn edit<'a>(&self, mut node: Link<T>) -> &'a mut Node<T> {
        // SAFETY: alive, as it is linked in the writer's tree or was made just now; and of this batch, so that no walk can see
        // it, and only this writer holds it. The callers keep no two references to one node.
        let node = unsafe { node.as_mut() };
        debug_assert_eq!(node.stamp, self.stamp, "published nodes do not change");
        node
    }

    fn read<'a>(&self, node: Link<T>) -> &'a Node<T> {
        // SAFETY: linked in the writer's tree.
        unsafe { node.as_ref() }
    }

    /// This node if it is of this batch, else a copy of it that is.
    fn own(&mut self, node: Link<T>) -> Link<T> {
        if self.read(node).stamp == self.stamp {
            return node;
        }
        let spare = self.spare.pop();
        let copy =
            spare.unwrap_or_else(|| NonNull::from(Box::leak(Box::<Node<T>>::new_uninit())).cast());
        // SAFETY: two nodes, the second nobody else's; both plain data, and the copy owns what is below from here on.
        unsafe { std::ptr::copy_nonoverlapping(node.as_ptr(), copy.as_ptr(), 1) };
        // SAFETY: made just now.
        unsafe { (*copy.as_ptr()).stamp = self.stamp };
        self.unlinked.push(node);
        copy
    }

    /// Nothing of this batch links to it any more.
    fn unlink(&mut self, node: Link<T>) {
        if self.read(node).stamp == self.stamp {
            self.spare.push(node);
        } else {
            self.unlinked.push(node);
        }
    }

    /// Puts `below` into the node of this batch; the upper part of it in a node of its own if there is no room.
    fn put(
        &mut self,
        link: Link<T>,
        at: usize,
        hull: (u64, u64),
        below: *const (),
    ) -> Option<Link<T>> {
        let node = self.edit(link);
        if node.len < FANOUT {
            node.insert(at, hull, below);
            return None;
        }
        let right = self.blank(node.leaf);
        let more = self.edit(right);
        // Where entries come in ascending order the left one stays full.
        let half = if at == FANOUT { FANOUT } else { FANOUT / 2 };
        more.take(node, half);
        if at > half || half == FANOUT {
            more.insert(at - half, hull, below);
        } else {
            node.insert(at, hull, below);
        }
        Some(right)
    }

    fn with(&mut self, link: Link<T>, entry: &T, value: *const T) -> (Link<T>, Option<Link<T>>) {
        let link = self.own(link);
        let node = self.read(link);
        let range = entry.range();
        if node.leaf {
            let at = node.before(key(entry));
            let hull = (range.start().get(), range.last().get());
            return (link, self.put(link, at, hull, value.cast()));
        }
        let at = node.towards(key(entry));
        let (child, more) = self.with(node.link(at), entry, value);
        self.relink(link, at, child);
        let more = more.and_then(|more| {
            let hull = self.read(more).hull();
            self.put(link, at + 1, hull, more.as_ptr().cast_const().cast())
        });
        (link, more)
    }

    fn relink(&mut self, link: Link<T>, at: usize, child: Link<T>) {
        let hull = self.read(child).hull();
        let below = child.as_ptr().cast_const().cast();
        self.edit(link).set(at, hull, below);
    }

    /// A root with `value`, whose count it takes over.
    pub(super) fn insert(&mut self, root: Link<T>, value: Arc<T>) -> Link<T> {
        let value = Arc::into_raw(value);
        // SAFETY: from a count that is held.
        let entry = unsafe { &*value };
        let (left, right) = self.with(root, entry, value);
        let Some(right) = right else { return left };
        let top = self.blank(false);
        for (at, child) in [left, right].into_iter().enumerate() {
            let hull = self.read(child).hull();
            let below = child.as_ptr().cast_const().cast();
            self.edit(top).insert(at, hull, below);
        }
        top
    }

    fn without(&mut self, link: Link<T>, key: Key) -> Option<(Link<T>, Arc<T>)> {
        let node = self.read(link);
        if node.leaf {
            let at = node.before(key);
            if at == node.len || node.key(at) != key {
                return None;
            }
            let link = self.own(link);
            let value = self.edit(link).remove(at).cast::<T>();
            // SAFETY: from `Arc::into_raw`, with the count that the tree held and does not any more.
            return Some((link, unsafe { Arc::from_raw(value) }));
        }
        if node.is_empty() {
            return None;
        }
        let at = node.towards(key);
        let (child, value) = self.without(node.link(at), key)?;
        let link = self.own(link);
        if self.read(child).is_empty() {
            self.edit(link).remove(at);
            self.unlink(child);
        } else {
            self.relink(link, at, child);
            if self.read(child).len <= FANOUT / 4 {
                self.merge(link, at);
            }
        }
        Some((link, value))
    }

    /// Joins the small child `at` with a neighbour, where both fit into one node.
    fn merge(&mut self, link: Link<T>, at: usize) {
        let node = self.read(link);
        let at = at.saturating_sub(1);
        if at + 1 >= node.len {
            return;
        }
        let (left, right) = (node.link(at), node.link(at + 1));
        if self.read(left).len + self.read(right).len > FANOUT {
            return;
        }
        let (left, right) = (self.own(left), self.own(right));
        let (joined, gone) = (self.edit(left), self.edit(right));
        joined.take(gone, 0);
        self.unlink(right);
        self.edit(link).remove(at + 1);
        self.relink(link, at, left);
    }

    /// A root without the entry `key`, and that entry; `None` if there is none.
    pub(super) fn remove(&mut self, root: Link<T>, key: Key) -> Option<(Link<T>, Arc<T>)> {
        let (mut root, value) = self.without(root, key)?;
        loop {
            let node = self.read(root);
            match (node.leaf, node.len) {
                (false, 0) => {
                    self.unlink(root);
                    root = self.blank(true);
                }
                (false, 1) => {
                    let only = node.link(0);
                    self.unlink(root);
                    root = only;
                }
                _ => return Some((root, value)),
            }
        }
    }
}

impl<T> Drop for Nodes<T> {
    fn drop(&mut self) {
        for node in self.spare.drain(..).chain(self.unlinked.drain(..)) {
            // SAFETY: as in `reuse`; the index is being dropped, so no walk sees anything.
            drop(unsafe { Box::from_raw(node.as_ptr()) });
        }
    }
}

#[cfg(all(any(test, fuzzing), not(loom)))]
pub(super) fn check<T: Entry>(root: Link<T>) -> usize {
    fn depth<T: Entry>(node: &Node<T>) -> usize {
        let keys: Vec<_> = (0..node.len).map(|at| node.key(at)).collect();
        assert!(keys.is_sorted(), "entries are in order");
        if node.leaf {
            return 1;
        }
        assert!(!node.is_empty(), "an inner node has children");
        let depths = (0..node.len).map(|at| {
            let child = node.child(at);
            assert_eq!(
                child.hull(),
                (node.first[at], node.last[at]),
                "hulls are exact"
            );
            depth(child)
        });
        let depths: Vec<_> = depths.collect();
        assert!(
            depths.iter().all(|one| *one == depths[0]),
            "leaves are level"
        );
        depths[0] + 1
    }
    // SAFETY: the caller holds the writer's lock.
    depth(unsafe { root.as_ref() })
}
