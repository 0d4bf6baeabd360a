//! Nodes of the index: never changed once a walk can see them.
//!
//! A node holds, for each thing below it, where that starts and ends, side by side, so that all are compared at once. Half a word is
//! enough for that: they are counted in granules, from a base of the node's own. A granule is a page, or as many pages as it takes where
//! what is below lies that far apart. So a node can say that something overlaps a range which does not, to the granule, and never the
//! other way; whoever is shown an entry has been told by the entry itself. What is below is an entry's value in a leaf, else a node. Nodes are owned by the one version of the tree that they are linked in;
//! [`Nodes`] is where a writer gets new ones, and where those go that it has replaced.
//!
//! The unsafe code of the tree is here, in [`writer`] and in the parent module. It rests on two facts. A node or value that can be reached from a
//! published root is alive for as long as a walk that began before it was unlinked: the parent retires it. And a node
//! is written only while its stamp is that of the batch that is not published yet, by the one writer that made it.

mod writer;

use std::marker::PhantomData;
use std::ops::ControlFlow;
use std::ptr::NonNull;

pub(super) use self::writer::Nodes;
#[cfg(all(any(test, fuzzing), not(loom)))]
pub(super) use self::writer::check;
use super::granule::{PAGE_SHIFT, Pages, Scale, above, pages};
use crate::addr::Range;
use crate::primitive::{Arc, prefetch};

/// What is below a node at most.
#[cfg(not(loom))]
pub(crate) const FANOUT: usize = 16;
#[cfg(loom)]
pub(crate) const FANOUT: usize = 2;

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

fn below<T>(link: Link<T>) -> *const () {
    link.as_ptr().cast_const().cast()
}

#[repr(C)] // What walks read of it lies side by side.
pub(super) struct Node<T> {
    /// The batch that made it.
    stamp: u64,
    scale: Scale,
    /// The most of `last`.
    most: i32,
    len: u16,
    leaf: bool,
    /// Where nothing is below: as if it were behind everything, and ended before everything.
    first: [i32; FANOUT],
    last: [i32; FANOUT],
    /// In a leaf from `Arc::into_raw`, with its count; else a [`Link`].
    below: [*const (); FANOUT],
    values: PhantomData<Arc<T>>,
}

impl<T: Entry> Node<T> {
    fn blank(stamp: u64, leaf: bool, scale: Scale) -> Self {
        Self {
            stamp,
            scale,
            most: -1,
            len: 0,
            leaf,
            first: [i32::MAX; FANOUT],
            last: [-1; FANOUT],
            below: [std::ptr::null(); FANOUT],
            values: PhantomData,
        }
    }

    /// Field by field, so that the compiler needs neither a call nor a third place for it.
    fn become_copy_of(&mut self, other: &Self, stamp: u64) {
        (self.stamp, self.scale, self.most) = (stamp, other.scale, other.most);
        (self.len, self.leaf) = (other.len, other.leaf);
        self.first = other.first;
        self.last = other.last;
        self.below = other.below;
    }

    /// A walk is going to begin at `root`, most likely, which need not be alive: what is below it is asked for at once. Where a writer is at
    /// work it has written them just now, on another processor, and a walk would wait for where it goes on when it has seen where.
    #[inline]
    pub(super) fn expect(root: *const Self) {
        for line in (std::mem::offset_of!(Self, below)..size_of::<Self>()).step_by(64) {
            prefetch(root.wrapping_byte_add(line));
        }
    }

    fn len(&self) -> usize {
        usize::from(self.len)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn value(&self, at: usize) -> &T {
        debug_assert!(self.leaf && at < self.len());
        // SAFETY: a leaf's, so from `Arc::into_raw`; alive as this node is.
        unsafe { &*self.below[at].cast::<T>() }
    }

    fn child(&self, at: usize) -> &Self {
        debug_assert!(!self.leaf && at < self.len());
        // SAFETY: no leaf's, so a `Link`; alive as this node is.
        unsafe { &*self.below[at].cast::<Self>() }
    }

    fn link(&self, at: usize) -> Link<T> {
        debug_assert!(!self.leaf && at < self.len());
        NonNull::new(self.below[at].cast::<Self>().cast_mut()).expect("a link is never null")
    }

    /// The key of the first entry at or below `at`.
    fn key(&self, at: usize) -> Key {
        if self.leaf {
            key(self.value(at))
        } else {
            self.child(at).key(0)
        }
    }

    /// How many are before `key`. Entries are looked at only where granules are equal.
    fn before(&self, key: Key) -> usize {
        let granule = self.scale.granule(key.0 >> PAGE_SHIFT);
        let from = above(&self.first, granule - 1).trailing_zeros() as usize;
        let mut at = from.min(self.len());
        while at < self.len() && self.first[at] == granule && self.key(at) < key {
            at += 1;
        }
        at
    }

    /// The child that `key` belongs to: the last that does not begin behind it.
    fn towards(&self, key: Key) -> usize {
        let granule = self.scale.granule(key.0 >> PAGE_SHIFT);
        let behind = above(&self.first, granule).trailing_zeros() as usize;
        let mut at = behind.min(self.len()).saturating_sub(1);
        while at > 0 && self.first[at] == granule && self.key(at) > key {
            at -= 1;
        }
        at
    }

    /// What may overlap these granules, a bit each.
    #[inline]
    fn overlapping(&self, (first, last): (i32, i32)) -> u32 {
        above(&self.last, first - 1) & !above(&self.first, last)
    }

    /// Shows every entry that overlaps `range`, by start, then number.
    pub(super) fn walk(
        &self,
        range: Range,
        visit: &mut impl FnMut(Found<'_, T>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        let pages = pages(range);
        let mut node = self;
        let mut granules = node.scale.granules(pages);
        loop {
            let mut hits = node.overlapping(granules);
            if node.leaf {
                return node.show(hits, range, visit);
            }
            if hits == 0 {
                return ControlFlow::Continue(());
            }
            // Mostly there is but one.
            while hits & (hits - 1) != 0 {
                node.child(hits.trailing_zeros() as usize)
                    .walk(range, visit)?;
                hits &= hits - 1;
            }
            let next = node.child(hits.trailing_zeros() as usize);
            // Mostly it counts as its parent does.
            if next.scale != node.scale {
                granules = next.scale.granules(pages);
            }
            node = next;
        }
    }

    /// Shows those of a leaf that do overlap.
    #[inline]
    fn show(
        &self,
        mut hits: u32,
        range: Range,
        visit: &mut impl FnMut(Found<'_, T>) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        while hits != 0 {
            let at = hits.trailing_zeros() as usize;
            hits &= hits - 1;
            if self.value(at).range().overlaps(range) {
                let value = self.below[at].cast::<T>().cast_mut();
                visit(Found {
                    value: NonNull::new(value).expect("a value is never null"),
                    walk: PhantomData,
                })?;
            }
        }
        ControlFlow::Continue(())
    }

    /// The pages that it says it has something in. The first is exact, as it is what nodes are sorted by.
    fn hull(&self) -> Pages {
        let (first, last) = self.scale.pages(self.first[0], self.most);
        if self.scale.shift == 0 {
            (first, last)
        } else {
            (self.key(0).0 >> PAGE_SHIFT, last)
        }
    }

    /// What `at` says of itself.
    fn hull_below(&self, at: usize) -> Pages {
        if self.leaf {
            pages(self.value(at).range())
        } else {
            self.child(at).hull()
        }
    }

    /// The granules of what `at` says of itself, if the scale has any for that.
    fn granules_below(&self, at: usize) -> Option<(i32, i32)> {
        if !self.leaf {
            let child = self.child(at);
            // Mostly.
            if child.scale == self.scale {
                return Some((child.first[0], child.most));
            }
        }
        let (first, last) = self.hull_below(at);
        let holds = self.scale.holds((first, last));
        let within = |page| self.scale.granule_within(page);
        holds.then(|| (within(first), within(last)))
    }

    fn find_most(&mut self) {
        self.most = self.last.iter().fold(-1, |most, one| most.max(*one));
    }

    /// Notes anew where everything is, in the finest granules that do.
    fn rescale(&mut self) {
        let mut hulls = [(0, 0); FANOUT];
        let hulls = &mut hulls[..self.len()];
        for (at, hull) in hulls.iter_mut().enumerate() {
            *hull = self.hull_below(at);
        }
        let first = hulls.iter().map(|hull| hull.0).min();
        let last = hulls.iter().map(|hull| hull.1).max();
        let all = first.zip(last);
        self.scale = all.map_or(Scale::PAGES, Scale::of);
        for (at, &(first, last)) in hulls.iter().enumerate() {
            self.first[at] = self.scale.granule_within(first);
            self.last[at] = self.scale.granule_within(last);
        }
        self.find_most();
    }

    /// Notes where `at` is now.
    fn set(&mut self, at: usize, below: *const ()) {
        self.below[at] = below;
        let Some((first, last)) = self.granules_below(at) else {
            return self.rescale();
        };
        let old = self.last[at];
        (self.first[at], self.last[at]) = (first, last);
        if last >= self.most {
            self.most = last;
        } else if old == self.most {
            self.find_most();
        }
    }

    fn insert(&mut self, at: usize, below: *const ()) {
        // There are few, so that calls to move them would be most of it.
        for to in (at + 1..=self.len()).rev() {
            self.first[to] = self.first[to - 1];
            self.last[to] = self.last[to - 1];
            self.below[to] = self.below[to - 1];
        }
        self.len += 1;
        self.set(at, below);
    }

    fn remove(&mut self, at: usize) -> *const () {
        let (below, last) = (self.below[at], self.last[at]);
        let len = self.len() - 1;
        for to in at..len {
            self.first[to] = self.first[to + 1];
            self.last[to] = self.last[to + 1];
            self.below[to] = self.below[to + 1];
        }
        self.len -= 1;
        (self.first[len], self.last[len]) = (i32::MAX, -1);
        if self.scale.shift > 0 {
            // It may have been what made them so coarse.
            self.rescale();
        } else if last == self.most {
            self.find_most();
        }
        below
    }

    /// Appends what `other` has from `from` on.
    fn take(&mut self, other: &mut Self, from: usize) {
        let (len, more) = (self.len(), other.len() - from);
        self.first[len..len + more].copy_from_slice(&other.first[from..other.len()]);
        self.last[len..len + more].copy_from_slice(&other.last[from..other.len()]);
        self.below[len..len + more].copy_from_slice(&other.below[from..other.len()]);
        other.first[from..].fill(i32::MAX);
        other.last[from..].fill(-1);
        self.len += more as u16;
        other.len = from as u16;
        other.find_most();
        if self.scale == other.scale {
            self.find_most();
        } else {
            self.rescale();
        }
    }

    /// Drops the values below it.
    ///
    /// # Safety
    /// No walk sees `root`, and the caller owns it and does not look at it again.
    pub(super) unsafe fn drop_values(root: Link<T>) {
        // SAFETY: the caller's, by its promise.
        let node = unsafe { root.as_ref() };
        for below in &node.below[..node.len()] {
            if node.leaf {
                // SAFETY: from `Arc::into_raw`, with the count that the tree holds.
                drop(unsafe { Arc::from_raw(below.cast::<T>()) });
            } else {
                // SAFETY: owned by this node alone.
                unsafe {
                    Self::drop_values(NonNull::new_unchecked(below.cast::<Self>().cast_mut()))
                };
            }
        }
    }
}
