//! Which frames are free: a binary buddy allocator over frame numbers.
//!
//! Blocks have 2^order frames, order 0 (4 KiB) to [`MAX_ORDER`] (2 MiB), and begin at multiples of their size. Free
//! lists are last in, first out: a frame that was freed is handed out again soon, so that a stale translation hits
//! somebody else's data instead of memory that nobody uses.
//!
//! All state lies in arrays made at the start: neither taking nor giving back allocates. Several blocks that belong
//! together are linked through the same arrays into a [`Chain`], for the same reason.
//!
//! Invariants: a frame is either used (its bit in `used` is set) or lies in exactly one free block; two free buddies
//! are never left unmerged below `MAX_ORDER`; `free` is the number of clear bits.

use std::ops::Range;

use thiserror::Error;

/// The largest block: 2^9 frames of 4 KiB are 2 MiB.
pub(crate) const MAX_ORDER: u32 = 9;

/// Ends a list.
const NONE: u32 = u32::MAX;

/// In `order`: the frame is the first of a free block.
const FREE: u8 = 0x80;

/// Frames that cannot be freed; none has been.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum FreeError {
    /// No such frames.
    #[error("frames {first:#x}..{end:#x} freed, but there are only {total:#x}")]
    OutOfRange { first: u64, end: u64, total: u64 },
    /// Freed twice.
    #[error("frame {frame:#x} freed twice")]
    Double { frame: u64 },
}

/// A list of blocks, linked through the allocator's own arrays, in the order in which they were taken.
#[derive(Debug)]
pub(crate) struct Chain {
    head: u32,
    tail: u32,
}

impl Chain {
    /// A list of no blocks.
    pub(crate) const EMPTY: Self = Self {
        head: NONE,
        tail: NONE,
    };

    /// The first block, to begin a walk with [`Buddy::step`].
    pub(crate) fn first(&self) -> Cursor {
        Cursor(self.head)
    }
}

/// A place in a [`Chain`].
#[derive(Clone, Copy)]
pub(crate) struct Cursor(u32);

/// The allocator.
pub(crate) struct Buddy {
    /// First free block of each order.
    heads: [u32; MAX_ORDER as usize + 1],
    /// Links of a block's first frame: to the next and last in a free list, or to the next in a chain.
    next: Vec<u32>,
    prev: Vec<u32>,
    /// Order of the block that begins here, with [`FREE`] when it is free; means nothing for other frames.
    order: Vec<u8>,
    /// One bit a frame.
    used: Vec<u64>,
    free: u64,
}

impl Buddy {
    /// `frames` free frames, from number 0.
    pub(crate) fn new(frames: u32) -> Self {
        let len = frames as usize;
        let mut buddy = Self {
            heads: [NONE; MAX_ORDER as usize + 1],
            next: vec![NONE; len],
            prev: vec![NONE; len],
            order: vec![0; len],
            used: vec![0; len.div_ceil(64)],
            free: u64::from(frames),
        };
        // The lowest block is pushed last, so that it is handed out first.
        let mut end = frames;
        while end > 0 {
            let order = end.trailing_zeros().min(MAX_ORDER);
            end -= 1 << order;
            buddy.push(end, order);
        }
        buddy
    }

    /// How many frames there are.
    pub(crate) fn total(&self) -> u64 {
        self.next.len() as u64
    }

    /// How many are free.
    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// Takes a block of 2^`order` frames: its first frame.
    pub(crate) fn take(&mut self, order: u32) -> Option<u32> {
        let mut found = (order..=MAX_ORDER).find(|o| self.heads[*o as usize] != NONE)?;
        let first = self.heads[found as usize];
        self.unlink(first, found);
        while found > order {
            found -= 1;
            self.push(first + (1 << found), found);
        }
        for frame in first..first + (1 << order) {
            self.used[frame as usize / 64] |= 1 << (frame % 64);
        }
        self.free -= 1 << order;
        Some(first)
    }

    /// Takes `frames` frames in blocks of at least 2^`least` frames, as large as may be, and appends them to `chain`.
    /// `frames` is a multiple of 2^`least`. False when there are not enough; what was appended by then stays.
    pub(crate) fn extend(&mut self, chain: &mut Chain, frames: u64, least: u32) -> bool {
        let mut missing = frames;
        let mut order = MAX_ORDER;
        while missing > 0 {
            order = order.min(missing.ilog2()).max(least);
            // A size that is used up is not tried again: nothing is freed meanwhile.
            let first = loop {
                match self.take(order) {
                    Some(first) => break first,
                    None if order > least => order -= 1,
                    None => return false,
                }
            };
            self.append(chain, first, order);
            missing -= 1 << order;
        }
        true
    }

    /// The block at `cursor`, as frames, and the place after it; `None` at the end of the chain.
    pub(crate) fn step(&self, cursor: Cursor) -> Option<(Range<u64>, Cursor)> {
        if cursor.0 == NONE {
            return None;
        }
        let first = cursor.0 as usize;
        let frames = first as u64..first as u64 + (1 << self.order[first]);
        Some((frames, Cursor(self.next[first])))
    }

    /// Frees every block of `chain`.
    pub(crate) fn give_back_chain(&mut self, chain: Chain) -> Result<(), FreeError> {
        let mut cursor = chain.first();
        while let Some((frames, next)) = self.step(cursor) {
            self.give_back(frames)?;
            cursor = next;
        }
        Ok(())
    }

    /// Frees `frames`, whatever blocks they were taken in; nothing when one of them is not used.
    pub(crate) fn give_back(&mut self, frames: Range<u64>) -> Result<(), FreeError> {
        let total = self.total();
        if frames.start > frames.end || frames.end > total {
            return Err(FreeError::OutOfRange {
                first: frames.start,
                end: frames.end,
                total,
            });
        }
        if let Some(frame) = frames.clone().find(|frame| !self.is_used(*frame)) {
            return Err(FreeError::Double { frame });
        }
        for frame in frames.clone() {
            self.used[frame as usize / 64] &= !(1 << (frame % 64));
        }
        self.free += frames.end - frames.start;
        let mut first = frames.start as u32;
        let end = frames.end as u32;
        while first < end {
            let order = first
                .trailing_zeros()
                .min((end - first).ilog2())
                .min(MAX_ORDER);
            self.merge(first, order);
            first += 1 << order;
        }
        Ok(())
    }

    /// Makes the block free, together with its buddy and that one's buddy for as long as they are free.
    fn merge(&mut self, mut first: u32, mut order: u32) {
        while order < MAX_ORDER {
            let buddy = first ^ (1 << order);
            if self.order.get(buddy as usize) != Some(&(FREE | order as u8)) {
                break;
            }
            self.unlink(buddy, order);
            first = first.min(buddy);
            order += 1;
        }
        self.push(first, order);
    }

    /// Whether the frame, which exists, has an owner.
    pub(crate) fn is_used(&self, frame: u64) -> bool {
        self.used[frame as usize / 64] & (1 << (frame % 64)) != 0
    }

    fn append(&mut self, chain: &mut Chain, first: u32, order: u32) {
        self.order[first as usize] = order as u8;
        self.next[first as usize] = NONE;
        if chain.tail == NONE {
            chain.head = first;
        } else {
            self.next[chain.tail as usize] = first;
        }
        chain.tail = first;
    }

    fn push(&mut self, first: u32, order: u32) {
        let head = self.heads[order as usize];
        self.order[first as usize] = FREE | order as u8;
        self.next[first as usize] = head;
        self.prev[first as usize] = NONE;
        if head != NONE {
            self.prev[head as usize] = first;
        }
        self.heads[order as usize] = first;
    }

    fn unlink(&mut self, first: u32, order: u32) {
        let (next, prev) = (self.next[first as usize], self.prev[first as usize]);
        if prev == NONE {
            self.heads[order as usize] = next;
        } else {
            self.next[prev as usize] = next;
        }
        if next != NONE {
            self.prev[next as usize] = prev;
        }
        self.order[first as usize] = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Walks the free lists: every free frame once, and the invariants that can be seen from outside.
    fn free_frames(buddy: &Buddy) -> BTreeSet<u64> {
        let mut free = BTreeSet::new();
        for order in 0..=MAX_ORDER {
            let mut first = buddy.heads[order as usize];
            while first != NONE {
                assert_eq!(first % (1 << order), 0, "blocks are aligned");
                assert_eq!(buddy.order[first as usize], FREE | order as u8);
                for frame in first..first + (1 << order) {
                    assert!(!buddy.is_used(frame.into()));
                    assert!(free.insert(u64::from(frame)), "a frame is free once");
                }
                let other = first ^ (1 << order);
                assert!(
                    order == MAX_ORDER
                        || buddy.order.get(other as usize) != Some(&(FREE | order as u8)),
                    "free buddies are merged"
                );
                first = buddy.next[first as usize];
            }
        }
        free
    }

    #[test]
    fn a_freed_frame_is_the_next_to_be_taken() {
        let mut buddy = Buddy::new(1024);
        let held: Vec<u32> = (0..16).map(|_| buddy.take(0).unwrap()).collect();
        for frame in [held[3], held[8], held[5]] {
            buddy.give_back(frame.into()..u64::from(frame) + 1).unwrap();
        }
        assert_eq!(
            [buddy.take(0), buddy.take(0), buddy.take(0)],
            [Some(held[5]), Some(held[8]), Some(held[3])]
        );
    }

    #[test]
    fn a_double_free_frees_nothing() {
        let mut buddy = Buddy::new(64);
        let first = u64::from(buddy.take(2).unwrap());
        buddy.give_back(first + 1..first + 2).unwrap();
        assert_eq!(
            buddy.give_back(first..first + 4),
            Err(FreeError::Double { frame: first + 1 })
        );
        assert_eq!(buddy.free(), 61);
    }

    #[test]
    fn frames_that_do_not_exist_are_not_freed() {
        let mut buddy = Buddy::new(64);
        assert_eq!(
            buddy.give_back(63..65),
            Err(FreeError::OutOfRange {
                first: 63,
                end: 65,
                total: 64
            })
        );
    }

    #[test]
    fn a_chain_keeps_the_order_and_goes_back_whole() {
        let mut buddy = Buddy::new(2048);
        let mut chain = Chain::EMPTY;
        assert!(buddy.extend(&mut chain, 1027, 0));
        let mut blocks = Vec::new();
        let mut cursor = chain.first();
        while let Some((frames, next)) = buddy.step(cursor) {
            blocks.push(frames);
            cursor = next;
        }
        assert_eq!(blocks, [0..512, 512..1024, 1024..1026, 1026..1027]);
        buddy.give_back_chain(chain).unwrap();
        assert_eq!(free_frames(&buddy).len(), 2048);
    }

    #[test]
    fn blocks_smaller_than_asked_for_are_never_taken() {
        let mut buddy = Buddy::new(1024);
        let all: Vec<u32> = (0..1024).map(|_| buddy.take(0).unwrap()).collect();
        for frame in all.iter().step_by(2) {
            buddy
                .give_back((*frame).into()..u64::from(*frame) + 1)
                .unwrap();
        }
        let mut chain = Chain::EMPTY;
        assert_eq!(buddy.free(), 512);
        assert!(!buddy.extend(&mut chain, 16, 4));
        buddy.give_back_chain(chain).unwrap();
        assert_eq!(buddy.free(), 512);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take(u32),
        Chain {
            frames: u64,
            least: u32,
        },
        Give {
            which: prop::sample::Index,
            part: prop::sample::Index,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..=MAX_ORDER).prop_map(Step::Take),
            (1..200_u64, 0..3_u32).prop_map(|(units, least)| Step::Chain {
                frames: units << least,
                least
            }),
            any::<(prop::sample::Index, prop::sample::Index)>()
                .prop_map(|(which, part)| Step::Give { which, part }),
        ]
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_set_of_frames(
            frames in 1..3000_u32,
            steps in prop::collection::vec(step(), 1..60),
        ) {
            let mut buddy = Buddy::new(frames);
            let mut free: BTreeSet<u64> = (0..u64::from(frames)).collect();
            let mut held: Vec<Range<u64>> = Vec::new();
            for step in steps {
                match step {
                    Step::Take(order) => {
                        let possible = (0..u64::from(frames) >> order).any(|block| {
                            (block << order..(block + 1) << order).all(|frame| free.contains(&frame))
                        });
                        let taken = buddy.take(order);
                        prop_assert_eq!(taken.is_some(), possible);
                        if let Some(first) = taken {
                            held.push(first.into()..u64::from(first) + (1 << order));
                        }
                    }
                    Step::Chain { frames, least } => {
                        let mut chain = Chain::EMPTY;
                        let before = buddy.free();
                        if buddy.extend(&mut chain, frames, least) {
                            let mut cursor = chain.first();
                            let mut sum = 0;
                            while let Some((block, next)) = buddy.step(cursor) {
                                prop_assert!(block.end - block.start >= 1 << least);
                                sum += block.end - block.start;
                                held.push(block);
                                cursor = next;
                            }
                            prop_assert_eq!(sum, frames);
                        } else {
                            prop_assert!(least > 0 || before < frames);
                            buddy.give_back_chain(chain).unwrap();
                        }
                    }
                    Step::Give { which, part } => if !held.is_empty() {
                        let block = held.swap_remove(which.index(held.len()));
                        let cut = block.start + part.index((block.end - block.start) as usize) as u64;
                        buddy.give_back(cut..block.end).unwrap();
                        if cut > block.start {
                            held.push(block.start..cut);
                        }
                    }
                }
                free = (0..u64::from(frames)).collect();
                for frame in held.iter().cloned().flatten() {
                    prop_assert!(free.remove(&frame), "frame {} was handed out twice", frame);
                }
                prop_assert_eq!(buddy.free(), free.len() as u64);
                prop_assert_eq!(&free_frames(&buddy), &free);
            }
        }
    }
}
