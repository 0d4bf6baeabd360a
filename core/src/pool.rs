//! Lists for the shootdown path, from memory that registration has set aside.
//!
//! A [`Chain`] grows by whole chunks that it takes from its [`Pool`] and gives back when it is dropped: nothing is
//! allocated or freed between the two.

use crate::primitive::Mutex;

/// Entries of a chunk.
pub(crate) const CHUNK: usize = 8;

struct Chunk<T> {
    entries: Vec<T>,
    next: Option<Box<Chunk<T>>>,
}

struct Free<T> {
    chunks: Option<Box<Chunk<T>>>,
    /// All that were ever made, in use or not.
    made: usize,
}

pub(crate) struct Pool<T>(Mutex<Free<T>>);

impl<T> Pool<T> {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Free {
            chunks: None,
            made: 0,
        }))
    }

    fn chunk() -> Box<Chunk<T>> {
        Box::new(Chunk {
            entries: Vec::with_capacity(CHUNK),
            next: None,
        })
    }

    /// Makes sure that `entries` fit in all chains together, if they fill their chunks. Allocates: not in the shootdown path,
    /// and not under the lock, which that path takes.
    pub(crate) fn reserve(&self, entries: usize) {
        let made = self.0.lock().made;
        for _ in made..entries.div_ceil(CHUNK) {
            let mut chunk = Self::chunk();
            let mut free = self.0.lock();
            chunk.next = free.chunks.take();
            free.chunks = Some(chunk);
            free.made += 1;
        }
    }

    fn take(&self) -> Option<Box<Chunk<T>>> {
        if planted!("r18") {
            return Some(Self::chunk());
        }
        let mut free = self.0.lock();
        let mut chunk = free.chunks.take()?;
        free.chunks = chunk.next.take();
        Some(chunk)
    }

    fn give(&self, mut chunk: Box<Chunk<T>>) {
        chunk.entries.clear();
        let mut free = self.0.lock();
        chunk.next = free.chunks.take();
        free.chunks = Some(chunk);
    }
}

/// A list of `T` over chunks of a pool.
pub(crate) struct Chain<'p, T> {
    pool: &'p Pool<T>,
    head: Option<Box<Chunk<T>>>,
}

impl<'p, T> Chain<'p, T> {
    pub(crate) fn new(pool: &'p Pool<T>) -> Self {
        Self { pool, head: None }
    }

    /// Adds an entry; gives it back when the pool is exhausted.
    pub(crate) fn push(&mut self, entry: T) -> Result<(), T> {
        if self
            .head
            .as_ref()
            .is_none_or(|chunk| chunk.entries.len() == CHUNK)
        {
            let Some(mut chunk) = self.pool.take() else {
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
            self.pool.give(chunk);
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

    #[test]
    fn a_chain_takes_what_was_reserved_and_gives_it_back() {
        let pool = Pool::new();
        pool.reserve(CHUNK + 1);
        for _ in 0..3 {
            let mut chain = Chain::new(&pool);
            (0..2 * CHUNK).for_each(|n| chain.push(n).unwrap());
            assert_eq!(chain.push(0), Err(0));
            assert_eq!(chain.iter().sum::<usize>(), (0..2 * CHUNK).sum());
        }
    }
}
