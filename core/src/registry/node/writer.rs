//! The writer's way through the nodes: copies of those from the root to the leaf that changes, and where they come from and go to.

use std::ptr::NonNull;

use super::super::Unlinked;
use super::super::granule::Scale;
use super::{Entry, FANOUT, Key, Link, Node, below, key};
use crate::primitive::Arc;

/// Nodes that are made together, at least.
const LEAST: usize = 8;

/// Where a writer's nodes come from and go to.
pub(in super::super) struct Nodes<T> {
    /// The batch that is being made.
    stamp: u64,
    /// All that were ever made, from `Box::leak`. As those of a pool they are kept for as long as there is an index.
    slabs: Vec<NonNull<[Node<T>]>>,
    made: usize,
    spare: Vec<Link<T>>,
    /// From the root to the leaf that changes: nodes, and where in them it goes on.
    way: Vec<(Link<T>, usize)>,
    /// Replaced or removed by this batch: linked still in what is published. Once nobody can see that any more, to be reused.
    pub(in super::super) unlinked: Unlinked<T>,
}

impl<T: Entry> Nodes<T> {
    pub(in super::super) fn new() -> Self {
        Self {
            stamp: 1,
            slabs: Vec::new(),
            made: 0,
            spare: Vec::new(),
            way: Vec::new(),
            unlinked: Unlinked::default(),
        }
    }

    /// The batch is about to be published: from here on its nodes do not change.
    pub(in super::super) fn seal(&mut self) {
        self.stamp += 1;
    }

    /// Takes back the nodes that were unlinked: no walk sees them any more.
    pub(in super::super) fn reuse(&mut self) {
        while let Some(node) = self.unlinked.nodes.pop() {
            self.spare.push(node);
        }
    }

    /// Makes nodes, a sixteenth of what there are, side by side: so they are in few pages, where those of a heap would lie between what
    /// they index.
    #[cold]
    fn make(&mut self) -> Link<T> {
        let count = (self.made / 16).max(LEAST);
        let blank = |_| Node::blank(0, true, Scale::PAGES);
        let slab = NonNull::from(Box::leak((0..count).map(blank).collect()));
        self.made += count;
        self.slabs.push(slab);
        let first = slab.cast::<Node<T>>();
        // SAFETY: inside of the slab.
        let others = (1..count).rev().map(|nth| unsafe { first.add(nth) });
        self.spare.extend(others);
        first
    }

    /// A node to be overwritten.
    fn spare<'a>(&mut self) -> &'a mut Node<T> {
        let mut spare = match self.spare.pop() {
            Some(spare) => spare,
            None => self.make(),
        };
        // SAFETY: spare, so nobody else's.
        unsafe { spare.as_mut() }
    }

    pub(in super::super) fn empty(&mut self) -> Link<T> {
        self.blank(true, Scale::PAGES)
    }

    fn blank(&mut self, leaf: bool, scale: Scale) -> Link<T> {
        let node = self.spare();
        *node = Node::blank(self.stamp, leaf, scale);
        NonNull::from(node)
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
        self.unlinked.nodes.push(node);
        let copy = self.spare();
        // It owns what is below from here on.
        copy.become_copy_of(self.read(node), self.stamp);
        NonNull::from(copy)
    }

    /// Nothing of this batch links to it any more.
    fn unlink(&mut self, node: Link<T>) {
        if self.read(node).stamp == self.stamp {
            self.spare.push(node);
        } else {
            self.unlinked.nodes.push(node);
        }
    }

    /// Puts `below` into the node of this batch; the upper part of it in a node of its own if there is no room.
    fn put(&mut self, link: Link<T>, at: usize, below: *const ()) -> Option<Link<T>> {
        let node = self.edit(link);
        if node.len() < FANOUT {
            node.insert(at, below);
            return None;
        }
        let right = self.blank(node.leaf, node.scale);
        let more = self.edit(right);
        // Where entries come in ascending order the left one stays full.
        let half = if at == FANOUT { FANOUT } else { FANOUT / 2 };
        more.take(node, half);
        if at > half || half == FANOUT {
            more.insert(at - half, below);
        } else {
            node.insert(at, below);
        }
        Some(right)
    }

    /// Goes from `root` to the leaf that `key` belongs to, and notes the way.
    fn descend(&mut self, root: Link<T>, key: Key) -> Link<T> {
        self.way.clear();
        let mut link = root;
        loop {
            let node = self.read(link);
            if node.leaf {
                return link;
            }
            let at = node.towards(key);
            self.way.push((link, at));
            link = node.link(at);
        }
    }

    fn relink(&mut self, link: Link<T>, at: usize, child: Link<T>) {
        self.edit(link).set(at, below(child));
    }

    /// A root with `value`, whose count it takes over.
    pub(in super::super) fn insert(&mut self, root: Link<T>, value: Arc<T>) -> Link<T> {
        let key = key(&*value);
        let leaf = self.descend(root, key);
        let mut link = self.own(leaf);
        let at = self.read(link).before(key);
        let mut right = self.put(link, at, Arc::into_raw(value).cast());
        while let Some((parent, at)) = self.way.pop() {
            let parent = self.own(parent);
            self.relink(parent, at, link);
            right = right.and_then(|right| self.put(parent, at + 1, below(right)));
            link = parent;
        }
        let Some(right) = right else { return link };
        let top = self.blank(false, self.read(link).scale);
        for (at, child) in [link, right].into_iter().enumerate() {
            self.edit(top).insert(at, below(child));
        }
        top
    }

    /// Joins the small child `at` with a neighbour, where both fit into one node.
    fn merge(&mut self, link: Link<T>, at: usize) {
        let node = self.read(link);
        let at = at.saturating_sub(1);
        if at + 1 >= node.len() {
            return;
        }
        let (left, right) = (node.link(at), node.link(at + 1));
        if self.read(left).len() + self.read(right).len() > FANOUT {
            return;
        }
        let (left, right) = (self.own(left), self.own(right));
        let (joined, gone) = (self.edit(left), self.edit(right));
        joined.take(gone, 0);
        self.unlink(right);
        self.edit(link).remove(at + 1);
        self.relink(link, at, left);
    }

    /// A root without the entry `key`, which is unlinked; the same if there is none.
    pub(in super::super) fn remove(&mut self, root: Link<T>, key: Key) -> Link<T> {
        let leaf = self.descend(root, key);
        let node = self.read(leaf);
        let at = node.before(key);
        if at == node.len() || node.key(at) != key {
            return root;
        }
        let mut link = self.own(leaf);
        let value = self.edit(link).remove(at).cast::<T>();
        // SAFETY: from `Arc::into_raw`, with the count that the tree held and does not any more.
        self.unlinked.values.push(unsafe { Arc::from_raw(value) });
        while let Some((parent, at)) = self.way.pop() {
            let parent = self.own(parent);
            if self.read(link).is_empty() {
                self.edit(parent).remove(at);
                self.unlink(link);
            } else {
                self.relink(parent, at, link);
                if self.read(link).len() <= FANOUT / 4 {
                    self.merge(parent, at);
                }
            }
            link = parent;
        }
        self.without_top(link)
    }

    /// Takes away what a root has above the only node that has something below it.
    fn without_top(&mut self, mut root: Link<T>) -> Link<T> {
        loop {
            let node = self.read(root);
            match (node.leaf, node.len) {
                (false, 0) => {
                    self.unlink(root);
                    root = self.empty();
                }
                (false, 1) => {
                    let only = node.link(0);
                    self.unlink(root);
                    root = only;
                }
                _ => return root,
            }
        }
    }
}

impl<T> Drop for Nodes<T> {
    fn drop(&mut self) {
        for slab in self.slabs.drain(..) {
            // SAFETY: from `Box::leak`, and the index is being dropped, so no walk sees anything. A node has nothing to drop.
            drop(unsafe { Box::from_raw(slab.as_ptr()) });
        }
    }
}

#[cfg(all(any(test, fuzzing), not(loom)))]
pub(in super::super) fn check<T: Entry>(root: Link<T>, nodes: &Nodes<T>) -> usize {
    use super::super::granule::PAGE_SHIFT;
    fn depth<T: Entry>(node: &Node<T>, batch: u64) -> usize {
        assert!(node.stamp < batch, "what is published does not change");
        let keys: Vec<_> = (0..node.len()).map(|at| node.key(at)).collect();
        assert!(keys.is_sorted(), "entries are in order");
        let unused = |at: usize| (node.first[at], node.last[at]) == (i32::MAX, -1);
        assert!(
            (node.len()..FANOUT).all(unused),
            "nothing is where nothing is"
        );
        assert_eq!(Some(node.most), node.last.into_iter().max());
        for at in 0..node.len() {
            let hull = node.hull_below(at);
            assert!(node.scale.holds(hull), "everything has granules");
            assert_eq!(
                hull.0,
                node.key(at).0 >> PAGE_SHIFT,
                "the first page is exact"
            );
            let noted = (node.first[at], node.last[at]);
            let granules = [hull.0, hull.1].map(|page| node.scale.granule(page));
            assert_eq!(noted, granules.into(), "hulls are as what is below says");
        }
        if node.leaf {
            return 1;
        }
        assert!(!node.is_empty(), "an inner node has children");
        let depths = (0..node.len()).map(|at| depth(node.child(at), batch));
        let depths: Vec<_> = depths.collect();
        assert!(
            depths.iter().all(|one| *one == depths[0]),
            "leaves are level"
        );
        depths[0] + 1
    }
    // SAFETY: the caller holds the writer's lock.
    depth(unsafe { root.as_ref() }, nodes.stamp)
}
