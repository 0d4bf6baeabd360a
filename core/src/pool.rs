//! Lists for the shootdown path, from memory that registration has set aside.
//!
//! A [`Chain`] grows by whole chunks that it takes from its [`Pool`], and gives all but the first back when it is cleared: nothing is
//! allocated or freed between the two. There is a chain for each slot that an invalidation can claim: so short lists, which are most,
//! touch nothing that another invalidation touches.

use std::marker::PhantomData;
use std::ptr::NonNull;

use arrayvec::ArrayVec;

use crate::active::SLOTS;
use crate::primitive::Mutex;
use crate::primitive::atomic::{AtomicUsize, Ordering};

/// In lines of the cache of its own, entries and all: chunks are made side by side, for slots that different threads claim.
#[repr(align(128))]
struct Chunk<T, const N: usize> {
    next: Option<Owned<T, N>>,
    entries: ArrayVec<T, N>,
}

/// A chunk that this is the only way to, from `Box::leak`.
struct Owned<T, const N: usize>(NonNull<Chunk<T, N>>);

impl<T, const N: usize> Owned<T, N> {
    fn new() -> Self {
        Self(NonNull::from(Box::leak(Box::new(Chunk {
            next: None,
            entries: ArrayVec::new(),
        }))))
    }

    fn get(&self) -> &Chunk<T, N> {
        // SAFETY: alive, and borrowed as this is, which is the only way to it but for a chain's own short cuts; those are used with the chain
        // borrowed exclusively.
        unsafe { self.0.as_ref() }
    }

    fn get_mut(&mut self) -> &mut Chunk<T, N> {
        // SAFETY: as above.
        unsafe { self.0.as_mut() }
    }

    fn free(self) -> Option<Self> {
        // SAFETY: from `Box::leak`, once, as this is the only way to it.
        unsafe { Box::from_raw(self.0.as_ptr()) }.next
    }
}

/// Frees one after the other: each would else free the next from within, and a space that had 100 000 registrations would overflow the
/// stack.
fn free_all<T, const N: usize>(mut next: Option<Owned<T, N>>) {
    while let Some(chunk) = next {
        next = chunk.free();
    }
}

pub(crate) struct Pool<T, const N: usize> {
    free: Mutex<Option<Owned<T, N>>>,
    /// Chunks that were ever made, in use or not.
    made: AtomicUsize,
}

// SAFETY: a pool has chunks without entries, and is otherwise a mutex and a count.
unsafe impl<T: Send, const N: usize> Send for Pool<T, N> {}
// SAFETY: as above; chunks are taken and given under the mutex.
unsafe impl<T: Send, const N: usize> Sync for Pool<T, N> {}

impl<T, const N: usize> Pool<T, N> {
    /// With chunks of `N` entries, of which it has none yet.
    pub(crate) fn new() -> Self {
        Self {
            free: Mutex::new(None),
            made: AtomicUsize::new(0),
        }
    }

    /// Makes sure that `entries` fit in one chain, beside a chunk for each of the others. Allocates: not in the shootdown path, and not
    /// under the lock, which that path takes.
    pub(crate) fn reserve(&self, entries: usize) {
        let wanted = entries + SLOTS * N;
        // Counted when it is there, with Release, so that nobody relies on what another thread has yet to make. Several that make
        // some at once may make a few too many.
        while self.made.load(Ordering::Acquire) * N < wanted {
            self.give(Owned::new());
            self.made.fetch_add(1, Ordering::AcqRel);
        }
    }

    fn take(&self) -> Option<Owned<T, N>> {
        if planted!("r18") {
            return Some(Owned::new());
        }
        let mut free = self.free.lock();
        let mut chunk = free.take()?;
        *free = chunk.get_mut().next.take();
        Some(chunk)
    }

    /// With all that follow it. They have no entries.
    fn give(&self, chunk: Owned<T, N>) {
        let mut free = self.free.lock();
        let mut next = Some(chunk);
        while let Some(mut chunk) = next {
            next = std::mem::replace(&mut chunk.get_mut().next, free.take());
            *free = Some(chunk);
        }
    }
}

impl<T, const N: usize> Drop for Pool<T, N> {
    fn drop(&mut self) {
        free_all(self.free.lock().take());
    }
}

/// A list of `T`, in the order of its making, over chunks of a pool, which is told each time.
pub(crate) struct Chain<T, const N: usize> {
    first: Option<Owned<T, N>>,
    /// A short cut to where entries are added: the chunk, of those from `first` on.
    last: Option<NonNull<Chunk<T, N>>>,
    /// Another, to the chunk where an entry was last looked for, and how many entries there are before it.
    near: Option<(NonNull<Chunk<T, N>>, usize)>,
    len: usize,
    entries: PhantomData<T>,
}

// SAFETY: a chain is its entries; nobody else has a way to its chunks.
unsafe impl<T: Send, const N: usize> Send for Chain<T, N> {}

impl<T, const N: usize> Default for Chain<T, N> {
    fn default() -> Self {
        Self::new()
    }
}

/// Room for one more entry.
pub(crate) struct Room<'c, T, const N: usize> {
    /// Not full.
    entries: &'c mut ArrayVec<T, N>,
    len: &'c mut usize,
}

impl<'c, T, const N: usize> Room<'c, T, N> {
    /// Makes the entry where it stays: some are large.
    #[inline]
    pub(crate) fn fill_with(self, make: impl FnOnce() -> T) -> &'c mut T {
        let entries = self.entries;
        let at = entries.len();
        debug_assert!(!entries.is_full());
        // SAFETY: there is room behind the last one; and it is written before it counts.
        unsafe {
            entries.as_mut_ptr().add(at).write(make());
            entries.set_len(at + 1);
        }
        *self.len += 1;
        &mut entries[at]
    }
}

impl<T, const N: usize> Chain<T, N> {
    pub(crate) const fn new() -> Self {
        Self {
            first: None,
            last: None,
            near: None,
            len: 0,
            entries: PhantomData,
        }
    }

    /// Room for an entry; `None` when the pool is exhausted.
    #[inline]
    pub(crate) fn room(&mut self, pool: &Pool<T, N>) -> Option<Room<'_, T, N>> {
        // SAFETY: a chunk of this chain's, which is borrowed exclusively for as long as the reference is used.
        let mut chunk = self.last.map(|mut last| unsafe { last.as_mut() });
        if chunk.as_deref().is_none_or(|chunk| chunk.entries.is_full()) {
            let more = pool.take()?;
            let at = more.0;
            match chunk {
                Some(last) => last.next = Some(more),
                None => self.first = Some(more),
            }
            self.last = Some(at);
            // SAFETY: as above; it was put there just now.
            chunk = self.last.map(|mut last| unsafe { last.as_mut() });
        }
        Some(Room {
            entries: &mut chunk?.entries,
            len: &mut self.len,
        })
    }

    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn chunks(&self) -> impl Iterator<Item = &Chunk<T, N>> {
        std::iter::successors(self.first.as_ref(), |chunk| chunk.get().next.as_ref())
            .map(Owned::get)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.chunks().flat_map(|chunk| chunk.entries.iter())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    #[inline]
    pub(crate) fn first_mut(&mut self) -> Option<&mut T> {
        self.first.as_mut()?.get_mut().entries.first_mut()
    }

    /// The `nth`. Quick where they are looked for in their order.
    pub(crate) fn get_mut(&mut self, nth: usize) -> Option<&mut T> {
        let (mut at, mut before) = match self.near {
            Some((at, before)) if before <= nth => (at, before),
            _ => (self.first.as_ref()?.0, 0),
        };
        loop {
            // SAFETY: a chunk of this chain's, which is borrowed exclusively; the reference to one is over before that to the next is made.
            let chunk = unsafe { at.as_mut() };
            if nth - before < chunk.entries.len() {
                self.near = Some((at, before));
                return chunk.entries.get_mut(nth - before);
            }
            before += chunk.entries.len();
            at = chunk.next.as_ref()?.0;
        }
    }

    /// Which is the first that `is`.
    pub(crate) fn position(&self, is: impl FnMut(&T) -> bool) -> Option<usize> {
        self.iter().position(is)
    }

    /// Shows each entry, in their order.
    #[inline]
    pub(crate) fn for_each(&mut self, mut visit: impl FnMut(&mut T)) {
        let mut next = self.first.as_mut();
        while let Some(chunk) = next {
            let chunk = chunk.get_mut();
            // A loop: handed on by reference, `visit` would be called for each.
            for entry in &mut chunk.entries {
                visit(entry);
            }
            next = chunk.next.as_mut();
        }
    }

    /// Empties it. It keeps a chunk.
    #[inline]
    pub(crate) fn clear(&mut self, pool: &Pool<T, N>) {
        if self.len == 0 {
            return;
        }
        let Some(first) = &mut self.first else { return };
        (self.len, self.near, self.last) = (0, None, Some(first.0));
        let first = first.get_mut();
        first.entries.clear();
        if let Some(mut more) = first.next.take() {
            // Before the pool's lock is taken: what is dropped may be a driver's.
            let mut next = Some(&mut more);
            while let Some(chunk) = next {
                let chunk = chunk.get_mut();
                chunk.entries.clear();
                next = chunk.next.as_mut();
            }
            pool.give(more);
        }
    }

    /// Empties it, and gives all of it back.
    pub(crate) fn give(mut self, pool: &Pool<T, N>) {
        self.clear(pool);
        if let Some(chunk) = self.first.take() {
            pool.give(chunk);
        }
    }
}

impl<T, const N: usize> Drop for Chain<T, N> {
    fn drop(&mut self) {
        free_all(self.first.take());
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    const CHUNK: usize = 8;

    fn push(chain: &mut Chain<usize, CHUNK>, pool: &Pool<usize, CHUNK>, entry: usize) {
        chain.room(pool).expect("room").fill_with(|| entry);
    }

    #[test]
    fn a_chain_takes_what_was_reserved_and_gives_it_back() {
        let pool = Pool::<_, CHUNK>::new();
        pool.reserve(CHUNK + 1);
        for _ in 0..3 {
            let mut chain = Chain::new();
            let room = (SLOTS + 2) * CHUNK;
            (0..room).for_each(|n| push(&mut chain, &pool, n));
            assert!(chain.room(&pool).is_none());
            assert_eq!(chain.iter().sum::<usize>(), (0..room).sum());
            assert!(chain.iter().copied().eq(0..room), "in their order");
            for nth in [0, CHUNK - 1, CHUNK, room - 1, 0, room - 1, CHUNK] {
                assert_eq!(chain.get_mut(nth).copied(), Some(nth));
                assert_eq!(chain.position(|n| *n == nth), Some(nth));
            }
            assert_eq!(chain.get_mut(room), None);
            chain.give(&pool);
        }
    }

    #[test]
    fn a_chain_that_was_emptied_looks_at_no_chunk_of_another() {
        let pool = Pool::<_, CHUNK>::new();
        pool.reserve(4 * CHUNK);
        let [mut one, mut other] = [Chain::new(), Chain::new()];
        (0..2 * CHUNK).for_each(|n| push(&mut one, &pool, n));
        assert_eq!(one.get_mut(CHUNK).copied(), Some(CHUNK));
        one.clear(&pool);
        // It gets what the first gave back.
        (0..2 * CHUNK).for_each(|n| push(&mut other, &pool, 100 + n));
        (0..2 * CHUNK).for_each(|n| push(&mut one, &pool, n));
        assert_eq!(one.get_mut(CHUNK).copied(), Some(CHUNK));
    }

    #[test]
    fn what_the_others_keep_leaves_room_for_everything() {
        let pool = Pool::<_, CHUNK>::new();
        pool.reserve(100);
        let mut all: Vec<_> = (0..SLOTS).map(|_| Chain::new()).collect();
        for chain in &mut all {
            push(chain, &pool, 7);
            chain.clear(&pool);
            assert!(chain.is_empty());
        }
        (0..100).for_each(|n| push(&mut all[3], &pool, n));
    }
}
