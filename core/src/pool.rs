//! Lists for the shootdown path, from memory that registration has set aside.
//!
//! A [`Chain`] grows by whole chunks that it takes from its [`Pool`] and gives back when it is dropped: nothing is
//! allocated or freed between the two. The first chunk lies ready in the slot that the invalidation has claimed, which is its own: so
//! short lists, which are most, touch nothing that another invalidation touches.

use crate::active::SLOTS;
use crate::primitive::Mutex;
use crate::primitive::atomic::{AtomicPtr, AtomicUsize, Ordering};

struct Chunk<T> {
    entries: Vec<T>,
    next: Option<Box<Chunk<T>>>,
}

/// A chunk that lies ready for whoever has claimed a slot, from `Box::into_raw`; or null. Only the owner of the slot looks at it, and
/// one owner's end is ordered before the next one's claim; so relaxed accesses do.
#[repr(align(64))]
struct Ready<T>(AtomicPtr<Chunk<T>>);

impl<T> Ready<T> {
    fn take(&self) -> Option<Box<Chunk<T>>> {
        let chunk = self.0.load(Ordering::Relaxed);
        self.0.store(std::ptr::null_mut(), Ordering::Relaxed);
        // SAFETY: not null, so from `Box::into_raw` in `put`; taken away just now, by the only one who looks at it.
        (!chunk.is_null()).then(|| unsafe { Box::from_raw(chunk) })
    }

    /// Gives it back if one lies there already.
    fn put(&self, chunk: Box<Chunk<T>>) -> Option<Box<Chunk<T>>> {
        if !self.0.load(Ordering::Relaxed).is_null() {
            return Some(chunk);
        }
        self.0.store(Box::into_raw(chunk), Ordering::Relaxed);
        None
    }
}

pub(crate) struct Pool<T> {
    /// Entries of a chunk.
    chunk: usize,
    free: Mutex<Option<Box<Chunk<T>>>>,
    /// Chunks that were ever made, in use or not.
    made: AtomicUsize,
    ready: Box<[Ready<T>]>,
}

impl<T> Pool<T> {
    /// With chunks of so many entries, and one for each invalidation that can be in progress.
    pub(crate) fn new(chunk: usize) -> Self {
        let none = |_| Ready(AtomicPtr::new(std::ptr::null_mut()));
        let pool = Self {
            chunk,
            free: Mutex::new(None),
            made: AtomicUsize::new(0),
            ready: (0..SLOTS).map(none).collect(),
        };
        pool.reserve(0);
        pool
    }

    fn fresh(&self) -> Box<Chunk<T>> {
        Box::new(Chunk {
            entries: Vec::with_capacity(self.chunk),
            next: None,
        })
    }

    /// Makes sure that `entries` fit in one chain, beside a chunk for each of the others. Allocates: not in the shootdown path, and not
    /// under the lock, which that path takes.
    pub(crate) fn reserve(&self, entries: usize) {
        let wanted = entries.div_ceil(self.chunk) + SLOTS;
        // Relaxed: each makes what it has counted, and sees its own.
        let made = self.made.load(Ordering::Relaxed);
        if made >= wanted {
            return;
        }
        let made = self.made.fetch_max(wanted, Ordering::Relaxed);
        for _ in made..wanted {
            let chunk = self.fresh();
            self.give(chunk);
        }
    }

    fn take(&self) -> Option<Box<Chunk<T>>> {
        if planted!("r18") {
            return Some(self.fresh());
        }
        let mut free = self.free.lock();
        let mut chunk = free.take()?;
        *free = chunk.next.take();
        Some(chunk)
    }

    fn give(&self, mut chunk: Box<Chunk<T>>) {
        let mut free = self.free.lock();
        chunk.next = free.take();
        *free = Some(chunk);
    }
}

impl<T> Drop for Pool<T> {
    fn drop(&mut self) {
        self.ready.iter().for_each(|ready| drop(ready.take()));
        // One after the other: each would else drop the next from within its own drop, and a space that had 100 000
        // registrations would overflow the stack.
        let mut next = self.free.lock().take();
        while let Some(mut chunk) = next {
            next = chunk.next.take();
        }
    }
}

/// A list of `T` over chunks of a pool.
pub(crate) struct Chain<'p, T> {
    pool: &'p Pool<T>,
    /// Where its first chunk comes from and goes to, while the invalidation has the slot.
    slot: Option<usize>,
    head: Option<Box<Chunk<T>>>,
}

impl<'p, T> Chain<'p, T> {
    /// For the invalidation that has claimed `slot`. It is cleared, or left ([`Chain::leave_slot`]), before that ends.
    pub(crate) fn new(pool: &'p Pool<T>, slot: usize) -> Self {
        Self {
            pool,
            slot: Some(slot),
            head: None,
        }
    }

    /// One for nobody.
    pub(crate) fn empty(pool: &'p Pool<T>) -> Self {
        Self {
            pool,
            slot: None,
            head: None,
        }
    }

    /// The slot is about to be given up, and the chain kept.
    pub(crate) fn leave_slot(&mut self) {
        self.slot = None;
    }

    fn ready(&self) -> Option<&'p Ready<T>> {
        self.slot.map(|slot| &self.pool.ready[slot])
    }

    /// Adds an entry; gives it back when the pool is exhausted.
    pub(crate) fn push(&mut self, entry: T) -> Result<(), T> {
        let full = |chunk: &Chunk<T>| chunk.entries.len() == self.pool.chunk;
        if self.head.as_deref().is_none_or(full) {
            let ready = self.ready().and_then(Ready::take);
            let Some(mut chunk) = ready.or_else(|| self.pool.take()) else {
                return Err(entry);
            };
            chunk.next = self.head.take();
            self.head = Some(chunk);
        }
        if let Some(chunk) = &mut self.head {
            chunk.entries.push(entry);
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_none()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        std::iter::successors(self.head.as_deref(), |chunk| chunk.next.as_deref())
            .flat_map(|chunk| chunk.entries.iter())
    }

    /// Shows each entry, newest chunk first.
    pub(crate) fn for_each(&mut self, mut visit: impl FnMut(&mut T)) {
        let mut next = self.head.as_deref_mut();
        while let Some(chunk) = next {
            chunk.entries.iter_mut().for_each(&mut visit);
            next = chunk.next.as_deref_mut();
        }
    }

    pub(crate) fn clear(&mut self) {
        while let Some(mut chunk) = self.head.take() {
            self.head = chunk.next.take();
            chunk.entries.clear();
            let rest = match self.ready() {
                Some(ready) => ready.put(chunk),
                None => Some(chunk),
            };
            if let Some(chunk) = rest {
                self.pool.give(chunk);
            }
        }
    }
}

impl<T> Drop for Chain<'_, T> {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const CHUNK: usize = 8;

    #[test]
    fn a_chain_takes_what_was_reserved_and_gives_it_back() {
        let pool = Pool::new(CHUNK);
        pool.reserve(CHUNK + 1);
        for _ in 0..3 {
            let mut chain = Chain::new(&pool, 1);
            let room = (SLOTS + 2) * CHUNK;
            (0..room).for_each(|n| chain.push(n).unwrap());
            assert_eq!(chain.push(0), Err(0));
            assert_eq!(chain.iter().sum::<usize>(), (0..room).sum());
        }
    }

    #[test]
    fn what_lies_ready_in_the_other_slots_leaves_room_for_everything() {
        let pool = Pool::new(CHUNK);
        pool.reserve(100);
        // One entry at once in each slot, given back there.
        let mut all: Vec<_> = (0..SLOTS).map(|slot| Chain::new(&pool, slot)).collect();
        all.iter_mut().for_each(|chain| chain.push(7).unwrap());
        drop(all);
        let mut chain = Chain::new(&pool, 0);
        (0..100).for_each(|n| chain.push(n).unwrap());
    }
}
