//! Lists whose links lie in the elements, so that putting one on allocates nothing: legal everywhere, in the shootdown path too.
//!
//! [`List`] is one that all threads share. [`LocalList`] belongs to one thread and is what that thread has put off.

use std::cell::Cell;

use crate::primitive::atomic::{AtomicBool, Ordering};
use crate::primitive::{Arc, Mutex};

/// Where the next of a list is kept.
pub(crate) type Link<T> = Mutex<Option<Arc<T>>>;

/// An element of a shared list: it is on one at most, and in it once.
pub(crate) trait Linked: Sized {
    /// Locked under the list's lock only.
    fn next(&self) -> &Link<Self>;
}

/// An element of a thread's own list: it is on one list of one thread at most, and in it once.
pub(crate) trait PutOff: Sized {
    /// Locked by that thread only.
    fn next_put_off(&self) -> &Link<Self>;
}

/// Last in, first out.
pub(crate) struct List<T> {
    head: Link<T>,
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

/// Null, or a strong count made by `Arc::into_raw`, and so on through the links. A plain pointer has no destructor, whose
/// registration would allocate on the thread's first shootdown.
pub(crate) struct LocalList<T>(Cell<*const T>);

impl<T> LocalList<T> {
    pub(crate) const fn new() -> Self {
        Self(Cell::new(std::ptr::null()))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.get().is_null()
    }

    /// Takes the head over, with the count that it holds.
    fn take(&self) -> Option<Arc<T>> {
        let head = self.0.replace(std::ptr::null());
        // SAFETY: not null, so from `Arc::into_raw` in `set`; it was taken away just now, so the count is taken over once.
        (!head.is_null()).then(|| unsafe { Arc::from_raw(head) })
    }

    fn set(&self, head: Option<Arc<T>>) {
        self.0.set(head.map_or(std::ptr::null(), Arc::into_raw));
    }
}

impl<T: PutOff> LocalList<T> {
    pub(crate) fn push(&self, element: Arc<T>) {
        *element.next_put_off().lock() = self.take();
        self.set(Some(element));
    }

    pub(crate) fn pop(&self) -> Option<Arc<T>> {
        let first = self.take()?;
        let rest = first.next_put_off().lock().take();
        self.set(rest);
        Some(first)
    }
}
