//! Lists for the shootdown path, from memory that registration has set aside.
//!
//! A [`Chain`] grows by whole chunks that it takes from its [`Pool`], and gives all but the first back when it is cleared: nothing is
//! allocated or freed between the two. There is a chain for each slot that an invalidation can claim: so short lists, which are most,
//! touch nothing that another invalidation touches.

use crate::active::SLOTS;
use crate::primitive::Mutex;
use crate::primitive::atomic::{AtomicUsize, Ordering};

struct Chunk<T> {
    entries: Vec<T>,
    next: Option<Box<Chunk<T>>>,
}

pub(crate) struct Pool<T> {
    /// Entries of a chunk.
    chunk: usize,
    free: Mutex<Option<Box<Chunk<T>>>>,
    /// Chunks that were ever made, in use or not.
    made: AtomicUsize,
}

impl<T> Pool<T> {
    /// With chunks of so many entries, and one for each invalidation that can be in progress.
    pub(crate) fn new(chunk: usize) -> Self {
        let pool = Self {
            chunk,
            free: Mutex::new(None),
            made: AtomicUsize::new(0),
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
        // Counted when it is there, with Release, so that nobody relies on what another thread has yet to make. Several that make
        // some at once may make a few too many.
        while self.made.load(Ordering::Acquire) < wanted {
            let chunk = self.fresh();
            self.give(chunk);
            self.made.fetch_add(1, Ordering::AcqRel);
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
        // One after the other: each would else drop the next from within its own drop, and a space that had 100 000
        // registrations would overflow the stack.
        let mut next = self.free.lock().take();
        while let Some(mut chunk) = next {
            next = chunk.next.take();
        }
    }
}

/// A list of `T` over chunks of a pool, which is told each time.
pub(crate) struct Chain<T> {
    /// The newest.
    head: Option<Box<Chunk<T>>>,
    len: usize,
}

impl<T> Default for Chain<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> Chain<T> {
    pub(crate) const fn new() -> Self {
        Self { head: None, len: 0 }
    }

    /// Adds an entry; gives it back when the pool is exhausted.
    pub(crate) fn push(&mut self, pool: &Pool<T>, entry: T) -> Result<(), T> {
        let full = |chunk: &Chunk<T>| chunk.entries.len() == pool.chunk;
        if self.head.as_deref().is_none_or(full) {
            let Some(mut chunk) = pool.take() else {
                return Err(entry);
            };
            chunk.next = self.head.take();
            self.head = Some(chunk);
        }
        if let Some(chunk) = &mut self.head {
            chunk.entries.push(entry);
            self.len += 1;
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        std::iter::successors(self.head.as_deref(), |chunk| chunk.next.as_deref())
            .flat_map(|chunk| chunk.entries.iter())
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn last_mut(&mut self) -> Option<&mut T> {
        self.head.as_mut()?.entries.last_mut()
    }

    /// The `nth` that was pushed.
    pub(crate) fn get_mut(&mut self, nth: usize) -> Option<&mut T> {
        let mut before = self.len;
        let mut next = self.head.as_deref_mut();
        while let Some(chunk) = next {
            before -= chunk.entries.len();
            if nth >= before {
                return chunk.entries.get_mut(nth - before);
            }
            next = chunk.next.as_deref_mut();
        }
        None
    }

    /// Which it is that was pushed, of the one that `is`.
    pub(crate) fn position(&self, mut is: impl FnMut(&T) -> bool) -> Option<usize> {
        let mut before = self.len;
        let mut next = self.head.as_deref();
        while let Some(chunk) = next {
            before -= chunk.entries.len();
            if let Some(at) = chunk.entries.iter().position(&mut is) {
                return Some(before + at);
            }
            next = chunk.next.as_deref();
        }
        None
    }

    /// Shows each entry, newest chunk first.
    pub(crate) fn for_each(&mut self, mut visit: impl FnMut(&mut T)) {
        let mut next = self.head.as_deref_mut();
        while let Some(chunk) = next {
            chunk.entries.iter_mut().for_each(&mut visit);
            next = chunk.next.as_deref_mut();
        }
    }

    /// Empties it. It keeps a chunk.
    pub(crate) fn clear(&mut self, pool: &Pool<T>) {
        if self.len == 0 {
            return;
        }
        let Some(head) = &mut self.head else { return };
        self.len = 0;
        head.entries.clear();
        while let Some(mut chunk) = head.next.take() {
            head.next = chunk.next.take();
            chunk.entries.clear();
            pool.give(chunk);
        }
    }

    /// Empties it, and gives all of it back.
    pub(crate) fn give(mut self, pool: &Pool<T>) {
        self.clear(pool);
        if let Some(chunk) = self.head.take() {
            pool.give(chunk);
        }
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
            let mut chain = Chain::new();
            let room = (SLOTS + 2) * CHUNK;
            (0..room).for_each(|n| chain.push(&pool, n).unwrap());
            assert_eq!(chain.push(&pool, 0), Err(0));
            assert_eq!(chain.iter().sum::<usize>(), (0..room).sum());
            for nth in [0, CHUNK - 1, CHUNK, room - 1] {
                assert_eq!(chain.get_mut(nth).copied(), Some(nth));
                assert_eq!(chain.position(|n| *n == nth), Some(nth));
            }
            assert_eq!(chain.get_mut(room), None);
            chain.give(&pool);
        }
    }

    #[test]
    fn what_the_others_keep_leaves_room_for_everything() {
        let pool = Pool::new(CHUNK);
        pool.reserve(100);
        let mut all: Vec<_> = (0..SLOTS).map(|_| Chain::new()).collect();
        for chain in &mut all {
            chain.push(&pool, 7).unwrap();
            chain.clear(&pool);
            assert!(chain.is_empty());
        }
        (0..100).for_each(|n| all[3].push(&pool, n).unwrap());
    }
}
