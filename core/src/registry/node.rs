//! Nodes of the index: immutable, shared between versions.

use std::ops::ControlFlow;

use crate::addr::{Addr, Range};
use crate::primitive::Arc;

/// Entries or children of a node at most.
#[cfg(not(loom))]
pub(crate) const FANOUT: usize = 16;
#[cfg(loom)]
pub(crate) const FANOUT: usize = 2;

/// Start, then number: unique.
pub(crate) type Key = (Addr, u64);

pub(crate) struct Entry<T> {
    pub(crate) range: Range,
    pub(crate) id: u64,
    pub(crate) value: Arc<T>,
}

impl<T> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self {
            range: self.range,
            id: self.id,
            value: self.value.clone(),
        }
    }
}

impl<T> Entry<T> {
    fn key(&self) -> Key {
        (self.range.start(), self.id)
    }
}

pub(crate) struct Child<T> {
    first: Key,
    last: Addr,
    node: Arc<Node<T>>,
}

impl<T> Clone for Child<T> {
    fn clone(&self) -> Self {
        Self {
            first: self.first,
            last: self.last,
            node: self.node.clone(),
        }
    }
}

impl<T> Child<T> {
    fn new(node: Node<T>) -> Self {
        let (first, last) = match &node {
            Node::Leaf(entries) => (
                entries.first().map(Entry::key),
                entries.iter().map(|entry| entry.range.last()).max(),
            ),
            Node::Inner(children) => (
                children.first().map(|child| child.first),
                children.iter().map(|child| child.last).max(),
            ),
        };
        Self {
            first: first.expect("a child is not empty"),
            last: last.expect("a child is not empty"),
            node: Arc::new(node),
        }
    }
}

pub(crate) enum Node<T> {
    Leaf(Vec<Entry<T>>),
    Inner(Vec<Child<T>>),
}

impl<T> Node<T> {
    pub(crate) fn empty() -> Self {
        Self::Leaf(Vec::new())
    }

    fn len(&self) -> usize {
        match self {
            Self::Leaf(entries) => entries.len(),
            Self::Inner(children) => children.len(),
        }
    }

    /// The hull of everything below; `None` when there is nothing.
    pub(crate) fn hull(&self) -> Option<Range> {
        let (first, last) = match self {
            Self::Leaf(entries) => (
                entries.first()?.range.start(),
                entries.iter().map(|entry| entry.range.last()).max()?,
            ),
            Self::Inner(children) => (
                children.first()?.first.0,
                children.iter().map(|child| child.last).max()?,
            ),
        };
        Range::inclusive(first, last).ok()
    }

    /// Shows the values of all entries that overlap `range`, by start, then number.
    pub(crate) fn walk(
        &self,
        range: Range,
        visit: &mut impl FnMut(Range, &T) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        match self {
            Self::Leaf(entries) => {
                for entry in entries {
                    if entry.range.start() > range.last() {
                        break;
                    }
                    if entry.range.last() >= range.start() {
                        visit(entry.range, &entry.value)?;
                    }
                }
            }
            Self::Inner(children) => {
                for child in children {
                    if child.first.0 > range.last() {
                        break;
                    }
                    if child.last >= range.start() {
                        child.node.walk(range, visit)?;
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// This node with `entry`; in two halves where it would be too large.
    fn with(&self, entry: &Entry<T>) -> (Self, Option<Self>) {
        match self {
            Self::Leaf(entries) => {
                let mut entries = entries.clone();
                let at = entries.partition_point(|one| one.key() < entry.key());
                entries.insert(at, entry.clone());
                let more = (entries.len() > FANOUT).then(|| entries.split_off(entries.len() / 2));
                (Self::Leaf(entries), more.map(Self::Leaf))
            }
            Self::Inner(children) => {
                let mut children = children.clone();
                let at = children
                    .partition_point(|child| child.first <= entry.key())
                    .saturating_sub(1);
                let (node, more) = children[at].node.with(entry);
                children[at] = Child::new(node);
                if let Some(more) = more {
                    children.insert(at + 1, Child::new(more));
                }
                let more =
                    (children.len() > FANOUT).then(|| children.split_off(children.len() / 2));
                (Self::Inner(children), more.map(Self::Inner))
            }
        }
    }

    /// A root with `entry`.
    pub(crate) fn insert(&self, entry: &Entry<T>) -> Self {
        match self.with(entry) {
            (root, None) => root,
            (left, Some(right)) => Self::Inner(vec![Child::new(left), Child::new(right)]),
        }
    }

    /// This node without the entry `key`; `None` if it is not below.
    fn without(&self, key: Key) -> Option<Self> {
        match self {
            Self::Leaf(entries) => {
                let at = entries.binary_search_by_key(&key, Entry::key).ok()?;
                let mut entries = entries.clone();
                entries.remove(at);
                Some(Self::Leaf(entries))
            }
            Self::Inner(children) => {
                let at = children
                    .partition_point(|child| child.first <= key)
                    .checked_sub(1)?;
                let node = children[at].node.without(key)?;
                let mut children = children.clone();
                if node.len() == 0 {
                    children.remove(at);
                } else {
                    let small = node.len() <= FANOUT / 4;
                    children[at] = Child::new(node);
                    if small {
                        Self::merge(&mut children, at);
                    }
                }
                Some(Self::Inner(children))
            }
        }
    }

    /// Joins the small child `at` with a neighbour, where both fit into one node.
    fn merge(children: &mut Vec<Child<T>>, at: usize) {
        let left = at.saturating_sub(1);
        let Some(right) = children.get(left + 1) else {
            return;
        };
        let joined = match (&*children[left].node, &*right.node) {
            (Self::Leaf(a), Self::Leaf(b)) if a.len() + b.len() <= FANOUT => {
                Self::Leaf(a.iter().chain(b).cloned().collect())
            }
            (Self::Inner(a), Self::Inner(b)) if a.len() + b.len() <= FANOUT => {
                Self::Inner(a.iter().chain(b).cloned().collect())
            }
            _ => return,
        };
        children[left] = Child::new(joined);
        children.remove(left + 1);
    }

    /// A root without the entry `key`; `None` if there is none.
    pub(crate) fn remove(&self, key: Key) -> Option<Arc<Self>> {
        let root = match self.without(key)? {
            Self::Inner(children) if children.is_empty() => Self::empty(),
            Self::Inner(mut children) if children.len() == 1 => {
                return children.pop().map(|child| child.node);
            }
            root => root,
        };
        Some(Arc::new(root))
    }
}
