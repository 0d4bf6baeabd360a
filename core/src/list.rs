//! Lists whose links lie in the elements, so that putting one on allocates nothing: legal everywhere, in the shootdown path too.
//!
//! [`List`] is one that all threads share. [`LocalList`] belongs to one thread and is what that thread has put off.

use std::cell::Cell;

use crate::primitive::atomic::{AtomicBool, AtomicPtr, Ordering};
use crate::primitive::{Arc, Mutex};

/// Where the next of a list is kept: null, or a strong count made by `Arc::into_raw`. Only whoever holds the list looks at it, by its
/// lock or because it is the thread's own, which is what orders it; so relaxed accesses do.
pub(crate) struct Link<T>(AtomicPtr<T>);

impl<T> Link<T> {
    pub(crate) fn new() -> Self {
        Self(AtomicPtr::new(std::ptr::null_mut()))
    }

    fn take(&self) -> Option<Arc<T>> {
        let next = self.0.load(Ordering::Relaxed);
        self.0.store(std::ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: not null, so from `Arc::into_raw` in `set`; taken away just now, by the only one who looks at it.
        (!next.is_null()).then(|| unsafe { Arc::from_raw(next) })
    }

    /// It is empty.
    fn set(&self, next: Option<Arc<T>>) {
        let next = next.map_or(std::ptr::null(), Arc::into_raw);
        self.0.store(next.cast_mut(), Ordering::Relaxed);
    }
}

impl<T> Drop for Link<T> {
    fn drop(&mut self) {
        drop(self.take());
    }
}

/// An element of a shared list: it is on one at most, and in it once.
pub(crate) trait Linked: Sized {
    /// Looked at under the list's lock only.
    fn next(&self) -> &Link<Self>;
}

/// An element of a thread's own list: it is on one list of one thread at most, and in it once.
pub(crate) trait PutOff: Sized {
    /// Looked at by that thread only.
    fn next_put_off(&self) -> &Link<Self>;
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
        element.next().set(head.take());
        *head = Some(element);
        self.some.store(true, Ordering::Release);
    }

    pub(crate) fn pop(&self) -> Option<Arc<T>> {
        if !self.has_some() {
            return None;
        }
        let mut head = self.head.lock();
        let first = head.take()?;
        *head = first.next().take();
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

impl<T> Drop for Handed<T> {
    fn drop(&mut self) {
        debug_assert!(self.0.is_null(), "what was handed over is run");
    }
}

/// A thread's list on its way to another thread.
#[derive(Debug)]
pub(crate) struct Handed<T>(*const T);

// SAFETY: it owns strong counts of values that are shared between threads anyway.
unsafe impl<T: Send + Sync> Send for Handed<T> {}

impl<T> Handed<T> {
    pub(crate) const fn none() -> Self {
        Self(std::ptr::null())
    }

    pub(crate) fn is_none(&self) -> bool {
        self.0.is_null()
    }
}

impl<T: PutOff> LocalList<T> {
    /// Puts all of it in front of what is in `to`. Neither allocates nor frees.
    pub(crate) fn hand_over(&self, to: &mut Handed<T>) {
        let rest = Self(Cell::new(std::mem::replace(&mut to.0, std::ptr::null())));
        while let Some(element) = self.pop() {
            rest.push(element);
        }
        to.0 = rest.0.get();
    }

    /// Takes over what another thread has handed over; this one's list is empty.
    pub(crate) fn take_over(&self, mut from: Handed<T>) {
        debug_assert!(self.is_empty());
        self.0.set(std::mem::replace(&mut from.0, std::ptr::null()));
    }

    /// Whether the first of it is such a one.
    pub(crate) fn begins_with(&self, is: impl FnOnce(&T) -> bool) -> bool {
        // SAFETY: null, or alive by the count that this list holds; `is` only looks, so that nothing is taken from the list meanwhile.
        unsafe { self.0.get().as_ref() }.is_some_and(is)
    }

    pub(crate) fn push(&self, element: Arc<T>) {
        element.next_put_off().set(self.take());
        self.set(Some(element));
    }

    pub(crate) fn pop(&self) -> Option<Arc<T>> {
        let first = self.take()?;
        let rest = first.next_put_off().take();
        self.set(rest);
        Some(first)
    }
}
