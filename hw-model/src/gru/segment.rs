//! The memory of a chiplet: control blocks, data segment, extended control blocks, and which context sees what.
//!
//! Everything here is atomic, so that a thread that polls a control block neither takes a lock nor writes to memory.
//! A context's view is published as a pair of maps by ALLOCATE and withdrawn by DEALLOCATE, both under the chiplet's lock.
//!
//! A *write* by a user passes the context's gate: it enters, looks at the view, stores, and leaves. Whoever changes the
//! view afterwards waits until the gate is empty, so that no write lands in a control block that belongs to another
//! context by then. A *read* looks at the view again afterwards instead, and reads 0 if it has changed.
//!
//! A control block is owned by its user while it is IDLE or ended, and by the chiplet from the store that starts it to the
//! store of its final status; the status is what hands it over.

use shootdown_primitive::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use shootdown_primitive::thread;

use super::layout::{
    ACTIVE, CALL_OS, CB_UNIT, CB_WORDS, COMMAND, CONTEXTS, DSR_BYTES, DSR_UNIT, SLOTS, STATUS, cb,
    cbe,
};

/// Where the `n`-th set bit of `map` is; `None` if it has fewer.
fn nth_set_bit(map: u64, n: usize) -> Option<usize> {
    let mut left = map;
    for _ in 0..n {
        left &= left.wrapping_sub(1);
    }
    (left != 0).then(|| left.trailing_zeros() as usize)
}

/// The control-block slots of `cb_map`, in the order of the context's own numbers.
pub(super) fn slots(cb_map: u64) -> impl Iterator<Item = usize> {
    (0..u64::BITS as usize)
        .filter(move |unit| cb_map & (1 << unit) != 0)
        .flat_map(|unit| [unit * CB_UNIT, unit * CB_UNIT + 1])
}

/// What a write to a control block did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CbWrite {
    /// A word was stored, or the write was ignored.
    Done,
    /// The control block in this slot became ACTIVE.
    Started(usize),
}

/// A context's part of the chiplet's memory. Aligned so that contexts share no cache line.
#[repr(align(128))]
#[derive(Default)]
struct View {
    cb_map: AtomicU64,
    dsr_map: AtomicU32,
    /// Whether the context is ACTIVE: its running control blocks then cannot be written.
    running: AtomicU32,
    /// Writes that have entered and not left.
    gate: AtomicU32,
}

/// A control block. Aligned so that control blocks share no cache line: one is polled while the next is at work.
#[repr(align(128))]
#[derive(Default)]
struct Cb([AtomicU64; CB_WORDS]);

/// Control blocks, data segment and extended control blocks.
pub(super) struct Segment {
    views: [View; CONTEXTS],
    cbs: Box<[Cb]>,
    dsr: Box<[AtomicU64]>,
    cbes: Box<[[AtomicU64; cbe::WORDS]]>,
}

impl Segment {
    pub(super) fn new() -> Self {
        Self {
            views: Default::default(),
            cbs: (0..SLOTS).map(|_| Cb::default()).collect(),
            dsr: (0..DSR_BYTES / 8).map(|_| AtomicU64::new(0)).collect(),
            cbes: (0..SLOTS).map(|_| Default::default()).collect(),
        }
    }

    /// A control block's word, as the context sees it; 0 where it has none.
    pub(super) fn read_cb(&self, context: usize, number: usize, word: usize) -> u64 {
        self.seen(&self.views[context].cb_map, |map| {
            let unit = nth_set_bit(map, number / CB_UNIT)?;
            let slot = unit * CB_UNIT + number % CB_UNIT;
            // Acquire: pairs with the release of `set_status`, so that who sees a final status sees the results.
            Some(self.cbs[slot].0.get(word)?.load(Ordering::Acquire))
        })
    }

    /// A word of the data segment, as the context sees it; 0 where it has none.
    pub(super) fn read_dsr(&self, context: usize, offset: u64) -> u64 {
        let view = &self.views[context];
        self.seen(&view.cb_map, |_| {
            // Acquire: pairs with the stores of `publish`.
            let map = view.dsr_map.load(Ordering::Acquire);
            // Acquire: keeps the second look at the map after it.
            Some(self.dsr[dsr_word(map, offset)?].load(Ordering::Acquire))
        })
    }

    /// `read` of the map, or 0 if the map has changed meanwhile.
    fn seen(&self, map: &AtomicU64, read: impl FnOnce(u64) -> Option<u64>) -> u64 {
        // Acquire: pairs with the stores of `publish`; and keeps the read after it.
        let before = map.load(Ordering::Acquire);
        let value = read(before).unwrap_or(0);
        // Relaxed: the acquire loads of `read` keep this one after them.
        if map.load(Ordering::Relaxed) == before {
            value
        } else {
            0
        }
    }

    /// Writes a control block's word.
    pub(super) fn write_cb(
        &self,
        context: usize,
        number: usize,
        word: usize,
        value: u64,
    ) -> CbWrite {
        self.gated(context, |view| {
            // SeqCst: see `gated`.
            let map = view.cb_map.load(Ordering::SeqCst);
            let Some(unit) = nth_set_bit(map, number / CB_UNIT) else {
                return CbWrite::Done;
            };
            let slot = unit * CB_UNIT + number % CB_UNIT;
            let Some(target) = self.cbs[slot].0.get(word) else {
                return CbWrite::Done;
            };
            let status = &self.cbs[slot].0[0];
            // Acquire: what the chiplet did with the block is done before the next start.
            let now = status.load(Ordering::Acquire);
            // Acquire: pairs with the release in `set_running`.
            let running = view.running.load(Ordering::Acquire) != 0;
            if running && matches!(STATUS.get(now), ACTIVE | CALL_OS) {
                return CbWrite::Done;
            }
            if word != 0 {
                // Relaxed: ordered by the store that starts the block.
                target.store(value, Ordering::Relaxed);
                return CbWrite::Done;
            }
            // Release: pairs with the acquire load of `status`, the operands come before. A failed exchange means that
            // two users start one block at a time; one of them wins.
            let swapped = status
                .compare_exchange(now, value, Ordering::Release, Ordering::Relaxed)
                .is_ok();
            if swapped && COMMAND.get(value) == 1 && STATUS.get(value) == ACTIVE {
                CbWrite::Started(slot)
            } else {
                CbWrite::Done
            }
        })
    }

    /// Writes a word of the data segment.
    pub(super) fn write_dsr(&self, context: usize, offset: u64, value: u64) {
        self.gated(context, |view| {
            // SeqCst: see `gated`.
            let map = view.dsr_map.load(Ordering::SeqCst);
            if let Some(word) = dsr_word(map, offset) {
                // Relaxed: the status of the control block orders the data.
                self.dsr[word].store(value, Ordering::Relaxed);
            }
        });
    }

    /// Runs `write` inside the context's gate.
    fn gated<R>(&self, context: usize, write: impl FnOnce(&View) -> R) -> R {
        let view = &self.views[context];
        // SeqCst, as the loads of the maps in `write`: either this entry is seen by `publish`, which then waits, or the
        // maps that `publish` has stored are seen by `write`.
        view.gate.fetch_add(1, Ordering::SeqCst);
        let result = write(view);
        // Release: pairs with the acquire in `publish`: the write is over.
        view.gate.fetch_sub(1, Ordering::Release);
        result
    }

    /// Publishes the maps of a context, both 0 to withdraw it, and waits until no write still uses the ones before. Called
    /// under the chiplet's lock; a writer in the gate waits for nothing.
    pub(super) fn publish(&self, context: usize, cb_map: u64, dsr_map: u32) {
        let view = &self.views[context];
        // SeqCst: see `gated`; the data map first, as readers look at the other one for changes.
        view.dsr_map.store(dsr_map, Ordering::SeqCst);
        view.cb_map.store(cb_map, Ordering::SeqCst);
        // SeqCst: see `gated`.
        while view.gate.load(Ordering::SeqCst) != 0 {
            thread::yield_now();
        }
    }

    /// Says whether the context is ACTIVE.
    pub(super) fn set_running(&self, context: usize, running: bool) {
        // Release: pairs with the acquire in `write_cb`.
        self.views[context]
            .running
            .store(running.into(), Ordering::Release);
    }

    /// DW0 of a control block.
    pub(super) fn status(&self, slot: usize) -> u64 {
        // Acquire: pairs with the release of the start, so that the operands are seen.
        self.cbs[slot].0[0].load(Ordering::Acquire)
    }

    /// All words of a control block that the chiplet owns.
    pub(super) fn words(&self, slot: usize) -> [u64; CB_WORDS] {
        let status = self.status(slot);
        // Relaxed: ordered by the acquire of the status.
        let mut words = std::array::from_fn(|i| self.cbs[slot].0[i].load(Ordering::Relaxed));
        words[0] = status;
        words
    }

    /// Stores what an atomic returned; before [`Segment::set_status`].
    pub(super) fn set_result(&self, slot: usize, value: u64) {
        // Relaxed: ordered by the release of the status.
        self.cbs[slot].0[cb::RESULT].store(value, Ordering::Relaxed);
    }

    /// Changes the status of a control block that the chiplet owns; a final one hands it back to its user.
    pub(super) fn set_status(&self, slot: usize, status: u64, substatus: u64) {
        // Relaxed: nobody else writes it meanwhile.
        let old = self.cbs[slot].0[0].load(Ordering::Relaxed);
        let running = status == ACTIVE || status == CALL_OS;
        let new = STATUS.put(COMMAND.put(old, running.into()), status);
        let new = cb::SUBSTATUS.put(new, substatus);
        // Release: pairs with the acquire in `read_cb`; results and data come before the status.
        self.cbs[slot].0[0].store(new, Ordering::Release);
    }

    /// A word of an extended control block; 0 where there is none.
    pub(super) fn extended(&self, slot: usize, word: usize) -> u64 {
        // Relaxed: used under the chiplet's lock.
        self.cbes[slot]
            .get(word)
            .map_or(0, |word| word.load(Ordering::Relaxed))
    }

    /// Writes a word of an extended control block.
    pub(super) fn set_extended(&self, slot: usize, word: usize, value: u64) {
        if let Some(word) = self.cbes[slot].get(word) {
            // Relaxed: used under the chiplet's lock.
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Copies `into.len()` bytes from `offset` of the data segment that `map` describes, and which holds them all.
    pub(super) fn load(&self, map: u32, offset: u64, into: &mut [u8]) {
        let mut at = offset;
        let mut left = into;
        while !left.is_empty() {
            let skip = (at % 8) as usize;
            let (part, rest) = left.split_at_mut(left.len().min(8 - skip));
            if let Some(word) = dsr_word(map, at) {
                // Relaxed: users that write while the block is ACTIVE race by their own choice.
                let bytes = self.dsr[word].load(Ordering::Relaxed).to_le_bytes();
                part.copy_from_slice(&bytes[skip..skip + part.len()]);
            }
            at += part.len() as u64;
            left = rest;
        }
    }

    /// Copies `from` to `offset` of the data segment that `map` describes, and which holds it all.
    pub(super) fn store(&self, map: u32, offset: u64, from: &[u8]) {
        let mut at = offset;
        let mut left = from;
        while !left.is_empty() {
            let skip = (at % 8) as usize;
            let (part, rest) = left.split_at(left.len().min(8 - skip));
            if let Some(word) = dsr_word(map, at) {
                let merge = |old: u64| {
                    let mut bytes = old.to_le_bytes();
                    bytes[skip..skip + part.len()].copy_from_slice(part);
                    u64::from_le_bytes(bytes)
                };
                // Relaxed: ordered by the release of the status.
                if part.len() == 8 {
                    self.dsr[word].store(merge(0), Ordering::Relaxed);
                } else {
                    // The other bytes of the word may be written by the user meanwhile: exchange it.
                    let merged = |old| Some(merge(old));
                    let exchanged =
                        self.dsr[word].fetch_update(Ordering::Relaxed, Ordering::Relaxed, merged);
                    debug_assert!(exchanged.is_ok(), "a merge always has a result");
                }
            }
            at += part.len() as u64;
            left = rest;
        }
    }

    /// Clears everything; no context is published.
    pub(super) fn clear(&self) {
        let cbs = self.cbs.iter().flat_map(|cb| cb.0.iter());
        for word in cbs.chain(self.dsr.iter()).chain(self.cbes.iter().flatten()) {
            // Relaxed: unreachable until the next `publish`.
            word.store(0, Ordering::Relaxed);
        }
    }
}

/// The word of the chiplet's data segment at `offset` of a context with `map`.
fn dsr_word(map: u32, offset: u64) -> Option<usize> {
    let unit = nth_set_bit(map.into(), (offset / DSR_UNIT) as usize)? as u64;
    Some(((unit * DSR_UNIT + offset % DSR_UNIT) / 8) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_context_sees_the_units_of_its_maps_in_order_and_nothing_else() {
        let segment = Segment::new();
        segment.publish(1, 0b1010, 0b101);
        segment.publish(2, 0b0100, 0b010);
        segment.write_dsr(1, 1024, 7);
        segment.write_dsr(2, 0, 8);
        segment.write_dsr(2, 1024, 9);
        assert_eq!(segment.read_dsr(1, 1024), 7);
        assert_eq!(segment.read_dsr(2, 0), 8);
        assert_eq!(segment.read_dsr(1, 0), 0);
        assert_eq!(segment.read_dsr(2, 1024), 0);
        assert_eq!(
            segment.write_cb(1, 2, 0, 1 | ACTIVE << 16),
            CbWrite::Started(6)
        );
        assert_eq!(segment.write_cb(1, 4, 0, 1 | ACTIVE << 16), CbWrite::Done);
        assert_eq!(slots(0b1010).collect::<Vec<_>>(), [2, 3, 6, 7]);
    }

    #[test]
    fn a_copy_into_the_data_segment_changes_only_its_own_bytes() {
        let segment = Segment::new();
        segment.publish(0, 1, 0b11);
        for word in 0..256 {
            segment.write_dsr(0, word * 8, u64::MAX);
        }
        segment.store(0b11, 1019, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        let mut bytes = [0; 13];
        segment.load(0b11, 1018, &mut bytes);
        assert_eq!(bytes, [0xff, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0xff]);
    }

    #[test]
    fn a_running_control_block_of_a_running_context_cannot_be_written() {
        let segment = Segment::new();
        segment.publish(0, 1, 1);
        segment.set_running(0, true);
        segment.write_cb(0, 0, 3, 5);
        segment.write_cb(0, 0, 0, 1 | ACTIVE << 16);
        segment.write_cb(0, 0, 3, 6);
        segment.write_cb(0, 0, 0, 0);
        assert_eq!(segment.read_cb(0, 0, 3), 5);
        assert_eq!(STATUS.get(segment.read_cb(0, 0, 0)), ACTIVE);
        segment.set_running(0, false);
        segment.write_cb(0, 0, 3, 6);
        assert_eq!(segment.read_cb(0, 0, 3), 6);
    }
}
