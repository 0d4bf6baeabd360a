//! Lists whose links lie in the elements, so that putting one on allocates nothing: legal everywhere, in the shootdown path too.

use crate::primitive::atomic::{AtomicBool, Ordering};
use crate::primitive::{Arc, Mutex};

/// An element: it is on one list at most, and in it once.
pub(crate) trait Linked: Sized {
    /// The next of its list. Locked under the list's lock only.
    fn next(&self) -> &Mutex<Option<Arc<Self>>>;
}

/// Last in, first out.
pub(crate) struct List<T> {
    head: Mutex<Option<Arc<T>>>,
    /// Only a hint for waiters and for the quick way past; the mutex orders the list.
    some: AtomicBool,
}

impl<T: Linked> List<T> {
    pub(crate) fn new() -> Self {
        Self {
            head: Mutex::new(None),
            some: AtomicBool::new(false),
        }
    }

    pub(crate) fn push(&self, element: Arc<T>) {
        let mut head = self.head.lock();
        *element.next().lock() = head.take();
        *head = Some(element);
        self.some.store(true, Ordering::Release);
    }

    pub(crate) fn pop(&self) -> Option<Arc<T>> {
        if !self.has_some() {
            return None;
        }
        let mut head = self.head.lock();
        let first = head.take()?;
        *head = first.next().lock().take();
        self.some.store(head.is_some(), Ordering::Release);
        Some(first)
    }

    pub(crate) fn has_some(&self) -> bool {
        self.some.load(Ordering::Acquire)
    }
}
