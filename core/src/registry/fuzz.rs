//! The registry against a list: a program of insertions, removals and walks, changes in the middle of walks among them.

use std::ops::ControlFlow;
use std::sync::{Arc, Weak};

use arbitrary::{Result, Unstructured};

use super::Registry;
use crate::addr::Range;

/// Walks inside of walks.
const DEPTH: u32 = 2;

struct Pair {
    registry: Registry<u64>,
    /// What is in it, in no order, with what shows whether the value is alive.
    list: Vec<(Range, u64, Weak<u64>)>,
    removed: Vec<Weak<u64>>,
    next: u64,
}

/// Often where others are; sometimes at the end, or everything.
fn range(bytes: &mut Unstructured<'_>) -> Result<Range> {
    let start = u64::from(bytes.arbitrary::<u16>()?) % 4000;
    let range = match bytes.int_in_range(0..=15)? {
        0 => Range::inclusive(start, u64::MAX),
        1 => Ok(Range::ALL),
        2 => Range::inclusive(u64::MAX - start, u64::MAX - start / 2),
        3 => Range::new(start, 1),
        4 => Range::new(0_u64, start + 1),
        _ => Range::new(start, 1 + u64::from(bytes.arbitrary::<u8>()?)),
    };
    Ok(range.expect("neither empty nor too long"))
}

impl Pair {
    fn insert(&mut self, range: Range) {
        let value = Arc::new(self.next);
        self.list.push((range, self.next, Arc::downgrade(&value)));
        self.registry.insert(range, self.next, value);
        self.next += 1;
    }

    fn remove(&mut self, bytes: &mut Unstructured<'_>) -> Result<()> {
        let nth = usize::from(bytes.arbitrary::<u16>()?);
        if self.list.is_empty() {
            assert!(!self.registry.remove(Range::ALL, self.next));
            return Ok(());
        }
        let (range, id, value) = self.list.swap_remove(nth % self.list.len());
        assert!(!self.registry.remove(range, self.next), "another's number");
        assert!(self.registry.remove(range, id));
        assert!(!self.registry.remove(range, id), "a second removal");
        self.removed.push(value);
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
        unsafe { &*registry }.walk(range, |shown, id| {
            seen.push((shown, *id));
            if seen.len() > most {
                return ControlFlow::Break(());
            }
            if depth < DEPTH && bytes.ratio(1, 8).unwrap_or(false) {
                result = self.step(bytes, depth + 1);
            }
            ControlFlow::Continue(())
        });
        let expected = &expected[..expected.len().min(most.saturating_add(1))];
        assert_eq!(seen, expected, "overlapping {range}");
        result
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>, depth: u32) -> Result<()> {
        match bytes.int_in_range(0..=15)? {
            0..=6 => self.insert(range(bytes)?),
            7..=10 => self.remove(bytes)?,
            // The same range again, with another number.
            11 if !self.list.is_empty() => {
                let nth = usize::from(bytes.arbitrary::<u8>()?) % self.list.len();
                self.insert(self.list[nth].0);
            }
            // Waits for the walks that are open.
            12 if depth == 0 => {
                self.registry.reclaim();
                let alive = |value: &Weak<u64>| value.upgrade().is_some();
                assert!(!self.removed.drain(..).any(|value| alive(&value)), "kept");
            }
            _ => {
                let range = range(bytes)?;
                self.walk(range, bytes, depth)?;
            }
        }
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
    while !bytes.is_empty() && pair.step(&mut bytes, 0).is_ok() {}
    let mut all = Vec::new();
    pair.registry.walk(Range::ALL, |range, id| {
        all.push((range, *id));
        ControlFlow::Continue(())
    });
    assert_eq!(all, pair.expected(Range::ALL));
    let alive = |values: &[Weak<u64>]| values.iter().any(|value| value.upgrade().is_some());
    let values: Vec<_> = pair.list.into_iter().map(|one| one.2).collect();
    assert!(
        values.iter().all(|value| value.upgrade().is_some()),
        "dropped while in it"
    );
    drop(pair.registry);
    assert!(!alive(&values) && !alive(&pair.removed), "kept");
}
