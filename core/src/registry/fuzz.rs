//! The registry against a list: a program of insertions, removals and walks, changes in the middle of walks among them.

use std::ops::ControlFlow;
use std::sync::{Arc, Weak};

use arbitrary::{Result, Unstructured};

use super::{Entry, Registry};
use crate::addr::Range;

/// Walks inside of walks.
const DEPTH: u32 = 2;

struct One {
    range: Range,
    number: u64,
}

impl Entry for One {
    fn range(&self) -> Range {
        self.range
    }

    fn number(&self) -> u64 {
        self.number
    }
}

struct Pair {
    registry: Registry<One>,
    /// What is in it, in no order, with what shows whether the value is alive.
    list: Vec<(Range, u64, Weak<One>)>,
    removed: Vec<Weak<One>>,
    next: u64,
}

/// Often where others are, in few pages or many, across the borders of large ones; sometimes at the end, or everything.
fn range(bytes: &mut Unstructured<'_>) -> Result<Range> {
    let start = u64::from(bytes.arbitrary::<u16>()?) % 4000;
    let range = match bytes.int_in_range(0..=15)? {
        0 => Range::inclusive(start, u64::MAX),
        1 => Ok(Range::ALL),
        2 => Range::inclusive(u64::MAX - start, u64::MAX - start / 2),
        3 => Range::new(start, 1),
        4 => Range::new(0_u64, start + 1),
        5 => Range::new(start << 12, 1_u64 << (12 + bytes.int_in_range(0..=39)?)),
        6..=7 => {
            let border = (start % 9) << bytes.int_in_range(15..=48)?;
            let before = border.min(u64::from(bytes.arbitrary::<u8>()? % 4) << 12);
            Range::new(
                border - before,
                u64::from(1 + bytes.arbitrary::<u8>()? % 4) << 12,
            )
        }
        8..=11 => Range::new(
            (start % 600) << 12,
            u64::from(1 + bytes.arbitrary::<u8>()? % 20) << 12,
        ),
        _ => Range::new(start, 1 + u64::from(bytes.arbitrary::<u8>()?)),
    };
    Ok(range.expect("neither empty nor too long"))
}

/// How many changes one version makes.
fn batch(bytes: &mut Unstructured<'_>) -> Result<usize> {
    Ok(bytes.int_in_range(0..=15)?.clamp(8, 15) - 7)
}

impl Pair {
    fn insert(&mut self, ranges: &[Range]) {
        let new: Vec<_> = ranges
            .iter()
            .map(|&range| {
                let number = self.next;
                self.next += 1;
                Arc::new(One { range, number })
            })
            .collect();
        let shown = new
            .iter()
            .map(|one| (one.range, one.number, Arc::downgrade(one)));
        self.list.extend(shown);
        self.registry.insert(new);
    }

    fn remove(&mut self, count: usize, bytes: &mut Unstructured<'_>) -> Result<()> {
        let stranger = |range, number| One { range, number };
        let (mut gone, mut others) = (Vec::new(), vec![stranger(Range::ALL, self.next)]);
        for _ in 0..count.min(self.list.len()) {
            let nth = usize::from(bytes.arbitrary::<u16>()?);
            let (range, number, value) = self.list.swap_remove(nth % self.list.len());
            others.push(stranger(range, self.next));
            gone.push(stranger(range, number));
            self.removed.push(value);
        }
        assert_eq!(self.registry.remove(&others).0, 0, "others' numbers");
        assert_eq!(self.registry.remove(&gone).0, gone.len());
        assert_eq!(self.registry.remove(&gone).0, 0, "a second removal");
        Ok(())
    }

    /// What a walk shows: by start, then number.
    fn expected(&self, range: Range) -> Vec<(Range, u64)> {
        let overlapping = self.list.iter().filter(|one| one.0.overlaps(range));
        let mut expected: Vec<_> = overlapping.map(|one| (one.0, one.1)).collect();
        expected.sort_by_key(|one| (one.0.start(), one.1));
        expected
    }

    /// A walk sees what was there when it began, whatever changes meanwhile, and nothing that is dropped.
    fn walk(&mut self, range: Range, bytes: &mut Unstructured<'_>, depth: u32) -> Result<()> {
        let expected = self.expected(range);
        // Breaks after so many.
        let most = match bytes.int_in_range(0..=3)? {
            0 => usize::from(bytes.arbitrary::<u8>()?) % 8,
            _ => usize::MAX,
        };
        let (mut seen, mut result) = (Vec::new(), Ok(()));
        // The walk borrows the registry, and the steps in it the rest.
        let registry = std::ptr::from_ref(&self.registry);
        // SAFETY: nothing in a step moves or replaces the registry, whose methods take `&self`.
        let registry = unsafe { &*registry };
        let claim = registry.active().claim(range).expect("a free slot");
        registry.walk(claim, range, |found| {
            seen.push((found.range, found.number));
            if seen.len() > most {
                return ControlFlow::Break(());
            }
            if depth < DEPTH && bytes.ratio(1, 8).unwrap_or(false) {
                result = self.step(bytes, depth + 1);
            }
            ControlFlow::Continue(())
        });
        registry.active().end(claim);
        let expected = &expected[..expected.len().min(most.saturating_add(1))];
        assert_eq!(seen, expected, "overlapping {range}");
        result
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>, depth: u32) -> Result<()> {
        match bytes.int_in_range(0..=15)? {
            0..=6 => {
                let ranges: Result<Vec<_>> = (0..batch(bytes)?).map(|_| range(bytes)).collect();
                self.insert(&ranges?);
            }
            7..=10 => {
                let count = batch(bytes)?;
                self.remove(count, bytes)?;
            }
            // The same range again, with another number.
            11 if !self.list.is_empty() => {
                let nth = usize::from(bytes.arbitrary::<u8>()?) % self.list.len();
                self.insert(&[self.list[nth].0]);
            }
            // Waits for the walks that are open.
            12 if depth == 0 => {
                self.registry.reclaim();
                let alive = |value: &Weak<One>| value.upgrade().is_some();
                assert!(!self.removed.drain(..).any(|value| alive(&value)), "kept");
            }
            _ => {
                let range = range(bytes)?;
                self.walk(range, bytes, depth)?;
            }
        }
        self.registry.check();
        Ok(())
    }
}

/// Runs the program that the bytes spell.
pub fn registry(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let mut pair = Pair {
        registry: Registry::new(),
        list: Vec::new(),
        removed: Vec::new(),
        next: 0,
    };
    pair.registry.check();
    while !bytes.is_empty() && pair.step(&mut bytes, 0).is_ok() {}
    let mut all = Vec::new();
    pair.registry
        .each(|found| all.push((found.range, found.number)));
    assert_eq!(all, pair.expected(Range::ALL));
    let alive = |values: &[Weak<One>]| values.iter().any(|value| value.upgrade().is_some());
    let values: Vec<_> = pair.list.into_iter().map(|one| one.2).collect();
    assert!(
        values.iter().all(|value| value.upgrade().is_some()),
        "dropped while in it"
    );
    drop(pair.registry);
    assert!(!alive(&values) && !alive(&pair.removed), "kept");
}
