//! ASIDs: who has which on a chiplet, and that none is handed out while the TLB may hold entries of its last owner (R15).
//!
//! # Words
//! What one address space (by its tag) has on one chiplet is one atomic word: the ASID, its generation, and the contexts that
//! are loaded with it. The shootdown path reads it and may only do one thing to it: take the ASID away while no context is
//! loaded. Then nothing can use the entries that are left, and they need no flush: they go with the next wrap.
//!
//! # Generations
//! ASIDs are handed out in order. At the end the generation goes up and the whole TLB is flushed *before* the first is
//! handed out again. ASIDs of contexts that were loaded when the flush began can be refilled after it, so that they are
//! left out of the new generation altogether, even if their contexts go meanwhile. An ASID of an older generation is not taken
//! up again by a space without a loaded context.

use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};

use std::ops::RangeInclusive;

/// From one ASID to the next.
const STEP: u32 = 8;
const ASID: u64 = 0xff_ffff;

/// What a space has on a chiplet.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Word(u64);

impl Word {
    fn new(asid: u32, generation: u32, contexts: u16) -> Self {
        let (asid, generation) = (u64::from(asid) & ASID, u64::from(generation) & ASID);
        Self(asid | (u64::from(contexts) << 24) | (generation << 40))
    }

    /// The ASID; none if it has none.
    pub(crate) fn asid(self) -> Option<u32> {
        let asid = (self.0 & ASID) as u32;
        (asid != 0).then_some(asid)
    }

    /// The contexts that are loaded, a bit each.
    pub(crate) fn contexts(self) -> u16 {
        (self.0 >> 24) as u16
    }

    fn generation(self) -> u32 {
        (self.0 >> 40) as u32
    }
}

/// The words of all tags on one chiplet.
#[derive(Debug)]
pub(crate) struct Words(Box<[AtomicU64]>);

impl Words {
    pub(crate) fn new(tags: usize) -> Self {
        Self((0..tags).map(|_| AtomicU64::new(0)).collect())
    }

    /// What `tag` has.
    pub(crate) fn load(&self, tag: u64) -> Word {
        let word = usize::try_from(tag).ok().and_then(|tag| self.0.get(tag));
        // Acquire, with the AcqRel of `bind`: who sees an ASID sees what was handed out with it. That a binding which
        // this load misses cannot have filled an entry is what the driver lock, or the pair of fences, between `quiesce` and
        // the fill is for.
        word.map_or(Word(0), |word| Word(word.load(Ordering::Acquire)))
    }

    /// Takes the ASID away if no context is loaded: the space's word afterwards. Lock-free.
    pub(crate) fn retire(&self, tag: u64) -> Word {
        let before = self.load(tag);
        if before.contexts() != 0 || before.asid().is_none() {
            return before;
        }
        // AcqRel, with `bind`: either the binding sees that the ASID is gone, or this sees its context.
        match self.0[tag as usize].compare_exchange(
            before.0,
            0,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => Word(0),
            Err(now) => Word(now),
        }
    }

    /// Adds `context` to what `tag` has, with an ASID from `asids` if it has none, or only an old one: its ASID. Not by two
    /// threads at once for one chiplet. `flush` empties the whole TLB.
    pub(crate) fn bind<E>(
        &self,
        tag: u64,
        context: usize,
        asids: &mut Asids,
        mut flush: impl FnMut() -> Result<(), E>,
    ) -> Result<Option<u32>, E> {
        let word = &self.0[tag as usize];
        loop {
            let before = self.load(tag);
            let old = before.contexts() == 0 && before.generation() != asids.generation;
            let (asid, generation) = match before.asid().filter(|_| !old) {
                Some(asid) => (asid, before.generation()),
                None => match asids.take(self, &mut flush)? {
                    Some(asid) => (asid, asids.generation),
                    None => return Ok(None),
                },
            };
            let after = Word::new(asid, generation, before.contexts() | (1 << context));
            // AcqRel: see `retire`. An ASID that was taken for nothing is passed over until the next wrap.
            if word
                .compare_exchange(before.0, after.0, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
            {
                return Ok(Some(asid));
            }
        }
    }

    /// Takes `context` away from what `tag` has.
    pub(crate) fn unbind(&self, tag: u64, context: usize) {
        // Release, with the loads of the shootdown path: who does not see the context sees that it has stopped.
        self.0[tag as usize].fetch_and(!(1 << (24 + context)), Ordering::AcqRel);
    }

    /// The tag has no address space any more.
    pub(crate) fn clear(&self, tag: u64) {
        // Release, with the next `bind`'s acquire.
        self.0[tag as usize].store(0, Ordering::Release);
    }

    /// How many tags have an ASID.
    pub(crate) fn in_use(&self) -> u64 {
        let words = (0..self.0.len() as u64).map(|tag| self.load(tag));
        words.filter(|word| word.asid().is_some()).count() as u64
    }
}

/// The ASIDs of a chiplet that are left in this generation. Protected by the chiplet's lock.
#[derive(Debug)]
pub(crate) struct Asids {
    all: RangeInclusive<u32>,
    next: u32,
    generation: u32,
    /// ASIDs of contexts that were loaded at the last wrap.
    reserved: Vec<u32>,
    /// Plant: no flush at a wrap.
    reuse: bool,
    wraps: u64,
}

impl Asids {
    pub(crate) fn new(all: RangeInclusive<u32>, start: Option<u32>, reuse: bool) -> Self {
        let first = (*all.start()).next_multiple_of(STEP).max(STEP);
        let all = first..=(*all.end()).min(0xff_fff0);
        let start = start.map_or(first, |start| start.next_multiple_of(STEP));
        Self {
            next: start.clamp(first, *all.end()),
            all,
            generation: 0,
            reserved: Vec::new(),
            reuse,
            wraps: 0,
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        let (first, last) = (*self.all.start(), *self.all.end());
        last.checked_sub(first)
            .map_or(0, |span| (span / STEP) as usize + 1)
    }

    /// The generation, and the next one to be handed out in it.
    pub(crate) fn position(&self) -> (u32, u32) {
        (self.generation, self.next)
    }

    /// How often they were used up.
    pub(crate) fn wraps(&self) -> u64 {
        self.wraps
    }

    /// The next one. None if all are in use.
    fn take<E>(
        &mut self,
        words: &Words,
        flush: &mut impl FnMut() -> Result<(), E>,
    ) -> Result<Option<u32>, E> {
        if let Some(asid) = self.step() {
            return Ok(Some(asid));
        }
        // First who is loaded, then the flush: whoever stops in between is reserved for nothing, whoever stopped before is
        // flushed. Nobody starts in between, as that needs the chiplet's lock.
        self.reserved = (0..words.0.len() as u64)
            .map(|tag| words.load(tag))
            .filter(|word| word.contexts() != 0)
            .filter_map(Word::asid)
            .collect();
        if !self.reuse {
            flush()?;
        }
        self.wraps += 1;
        // 24 bits are compared; a space that sleeps through 2^24 wraps has had its ASID taken by its first invalidation.
        self.generation = (self.generation + 1) & ASID as u32;
        self.next = *self.all.start();
        Ok(self.step())
    }

    fn step(&mut self) -> Option<u32> {
        while self.all.contains(&self.next) {
            let asid = self.next;
            self.next += STEP;
            if !self.reserved.contains(&asid) {
                return Some(asid);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    fn bind(words: &Words, asids: &mut Asids, tag: u64, flushes: &mut u32) -> Option<u32> {
        let result: Result<_, Infallible> = words.bind(tag, 0, asids, || {
            *flushes += 1;
            Ok(())
        });
        result.unwrap()
    }

    #[test]
    fn an_asid_comes_back_only_after_a_flush() {
        let (words, mut flushes) = (Words::new(8), 0);
        let mut asids = Asids::new(8..=16, None, false);
        assert_eq!(bind(&words, &mut asids, 0, &mut flushes), Some(8));
        words.unbind(0, 0);
        assert_eq!(bind(&words, &mut asids, 1, &mut flushes), Some(16));
        words.unbind(1, 0);
        assert_eq!(flushes, 0);
        assert_eq!(bind(&words, &mut asids, 2, &mut flushes), Some(8));
        assert_eq!((flushes, asids.wraps()), (1, 1));
        words.unbind(2, 0);
        assert_eq!(
            bind(&words, &mut asids, 0, &mut flushes),
            Some(16),
            "an ASID of an older generation is not taken up again"
        );
    }

    #[test]
    fn an_asid_that_was_loaded_at_the_wrap_is_left_out_even_when_it_is_free_later() {
        let (words, mut flushes) = (Words::new(8), 0);
        let mut asids = Asids::new(8..=24, None, false);
        for tag in 0..3 {
            bind(&words, &mut asids, tag, &mut flushes);
        }
        words.unbind(0, 0);
        assert_eq!(bind(&words, &mut asids, 3, &mut flushes), Some(8));
        words.unbind(1, 0);
        assert_eq!(flushes, 1);
        assert_eq!(
            bind(&words, &mut asids, 4, &mut flushes),
            Some(16),
            "only after one more flush"
        );
        assert_eq!(flushes, 2);
    }

    #[test]
    fn nothing_is_left_when_every_asid_is_loaded() {
        let (words, mut flushes) = (Words::new(8), 0);
        let mut asids = Asids::new(8..=16, None, false);
        bind(&words, &mut asids, 0, &mut flushes);
        bind(&words, &mut asids, 1, &mut flushes);
        assert_eq!(bind(&words, &mut asids, 2, &mut flushes), None);
    }

    #[test]
    fn a_loaded_context_keeps_its_asid_from_being_retired() {
        let (words, mut flushes) = (Words::new(8), 0);
        let mut asids = Asids::new(8..=16, None, false);
        bind(&words, &mut asids, 0, &mut flushes);
        assert_eq!(words.retire(0).asid(), Some(8));
        words.unbind(0, 0);
        assert_eq!(words.retire(0).asid(), None);
        assert_eq!(words.in_use(), 0);
    }
}
