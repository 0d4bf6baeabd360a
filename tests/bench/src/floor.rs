//! What an operation cannot do without, bare: what is left of a ratio when everything else is gone.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU64, fence};

use shootdown::Range;

use crate::case::Case;
use crate::ground::Ground;

/// A word of the summary has so many pages.
const WORD_SHIFT: u32 = 18;
const PAGE_SHIFT: u32 = 12;

/// As quick a hash as there is.
#[derive(Default)]
struct Multiply(u64);

impl Hasher for Multiply {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("only numbers are hashed");
    }
    fn write_u64(&mut self, key: u64) {
        self.0 = key.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }
}

/// One bit for each page that is registered, in words found by their address.
struct Pages(HashMap<u64, u64, BuildHasherDefault<Multiply>>);

impl Pages {
    fn new(ranges: &[Range]) -> Self {
        let mut words = HashMap::default();
        let pages = |range: &Range| {
            let page = |addr: shootdown::Addr| addr.get() >> PAGE_SHIFT;
            page(range.start())..=page(range.last())
        };
        for page in ranges.iter().flat_map(pages) {
            *words.entry(page >> (WORD_SHIFT - PAGE_SHIFT)).or_insert(0) |= 1 << (page % 64);
        }
        Self(words)
    }

    fn has(&self, range: Range) -> bool {
        let page = range.start().get() >> PAGE_SHIFT;
        let word = self.0.get(&(page >> (WORD_SHIFT - PAGE_SHIFT)));
        word.is_some_and(|word| word & 1 << (page % 64) != 0)
    }
}

/// A slot that says which range is being invalidated.
#[repr(align(128))]
#[derive(Default)]
struct Slot {
    turn: AtomicU64,
    range: [AtomicU64; 2],
}

impl Slot {
    /// Newcomers and writers see the claim, or the walk that follows sees what they did.
    fn claim(&self, range: Range) -> u64 {
        let turn = self.turn.load(Relaxed);
        let claimed = self.turn.compare_exchange(turn, turn + 1, SeqCst, Relaxed);
        assert!(claimed.is_ok(), "nobody else has it");
        self.range[0].store(range.start().get(), Relaxed);
        self.range[1].store(range.last().get(), Release);
        turn
    }

    /// Those who wait see that it is over, or the look for them that follows sees them.
    fn end(&self, turn: u64) {
        self.turn.swap(turn + 2, SeqCst);
    }
}

/// The ranges that are short, as all but a few are: a bare summary and a bare search know nothing else.
fn short(ground: &Ground) -> Vec<Range> {
    let len = |range: &&Range| range.len() == 64 << 10;
    ground.ranges.iter().filter(len).copied().collect()
}

/// An invalidation that hits nothing: a claim, one look at a summary of pages, an end.
pub fn nothing(count: usize) -> Case {
    nothing_by(count, "0 hits", |_| 0)
}

/// The same, each when the one before has seen its word: so short an operation is otherwise begun several times at once.
pub fn nothing_in_turn(count: usize) -> Case {
    nothing_by(count, "0 hits, in turn", usize::from)
}

/// With what was seen, which is nothing, made a number that the next one starts from.
fn nothing_by(count: usize, name: &str, seen: impl Fn(bool) -> usize + 'static) -> Case {
    let ground = Ground::new(count);
    let (queries, pages) = (ground.queries(0), Pages::new(&short(&ground)));
    let slot = Slot::default();
    let mut behind = 0;
    Case::new(format!("least/{name}/{count}"), move |nth| {
        let range = queries[(nth + behind) % queries.len()];
        let turn = slot.claim(range);
        behind += seen(black_box(pages.has(range)));
        slot.end(turn);
    })
}

/// The methods of a handler that an invalidation calls.
trait Handler {
    fn call(&self, range: Range) -> bool;
}

struct Nothing;

impl Handler for Nothing {
    fn call(&self, range: Range) -> bool {
        black_box(range);
        true
    }
}

struct Registered {
    range: Range,
    word: AtomicU64,
    handler: Arc<dyn Handler>,
}

/// An invalidation that hits one: besides, a search among ranges that are sorted and disjoint, a use that is taken and given back, three
/// calls before the change and one after it, each side contained.
pub fn one_hit(count: usize) -> Case {
    let ground = Ground::new(count);
    let mut ranges = short(&ground);
    ranges.sort_by_key(|range| range.start());
    let handler: Arc<dyn Handler> = Arc::new(Nothing);
    let starts: Vec<u64> = ranges.iter().map(|range| range.start().get()).collect();
    // Each in memory of its own, as registrations are.
    let registered: Vec<Box<Registered>> = ranges
        .iter()
        .map(|range| {
            Box::new(Registered {
                range: *range,
                word: AtomicU64::new(0),
                handler: handler.clone(),
            })
        })
        .collect();
    let (queries, pages) = (ground.queries(1), Pages::new(&ranges));
    let slot = Slot::default();
    Case::new(format!("least/1 hit/{count}"), move |nth| {
        let range = queries[nth % queries.len()];
        let turn = slot.claim(range);
        black_box(pages.has(range));
        let behind = starts.partition_point(|start| *start <= range.start().get());
        if let Some(hit) = registered.get(behind.wrapping_sub(1))
            && hit.range.overlaps(range)
        {
            hit.word.fetch_add(1 << 8, AcqRel);
            let calls = |times: usize| {
                let calls = || (0..times).all(|_| hit.handler.call(black_box(range)));
                catch_unwind(AssertUnwindSafe(calls)).is_ok()
            };
            black_box(calls(3));
            fence(Release);
            black_box(calls(1));
            hit.word.fetch_sub(1 << 8, AcqRel);
        }
        slot.end(turn);
    })
}
