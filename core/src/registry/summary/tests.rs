//! The summary against plain lists, and where its words come to lie.

use proptest::prelude::*;

use super::table::{Cell, place};
use super::*;

fn range() -> impl Strategy<Value = Range> {
    let len = (0u32..64, any::<u64>()).prop_map(|(shift, len)| len >> shift);
    (any::<u64>(), len)
        .prop_map(|(start, len)| Range::inclusive(start, start.saturating_add(len)).unwrap())
}

/// Hugging the borders of granules, where mistakes are.
fn near() -> impl Strategy<Value = Range> {
    let edge = (0u32..9, 0u64..4, -2i64..3).prop_map(|(level, nth, off)| {
        let shift = PAGE_SHIFT + level * LEVEL_SHIFT;
        let at = nth.checked_shl(shift).unwrap_or(0);
        at.wrapping_add_signed(off << PAGE_SHIFT)
    });
    (edge.clone(), edge).prop_map(|(a, b)| Range::inclusive(a.min(b), a.max(b)).unwrap())
}

fn pages(range: Range) -> (u64, u64) {
    (range.start().get() >> 12, range.last().get() >> 12)
}

proptest! {
    #[test]
    fn the_granules_cover_the_pages_of_a_range_and_no_other(range in prop_oneof![range(), near()]) {
        let mut runs = Vec::new();
        let mut words = 0;
        cover(range, |level, word, mask| {
            words += 1;
            let shift = level * LEVEL_SHIFT;
            each(mask, |bit| {
                let first = (word * 64 + bit as u64) << shift;
                runs.push((first, first + ((1 << shift) - 1)));
            });
        });
        prop_assert!(words <= 2 * LEVELS);
        runs.sort_unstable();
        let gapless = runs.windows(2).all(|two| two[0].1 + 1 == two[1].0);
        prop_assert!(gapless);
        prop_assert_eq!((runs[0].0, runs[runs.len() - 1].1), pages(range));
    }

    #[test]
    fn it_agrees_with_a_naive_list_to_the_page(
        steps in prop::collection::vec((any::<bool>(), prop_oneof![range(), near()], any::<usize>()), 1..120),
        asked in prop::collection::vec(prop_oneof![range(), near()], 1..40),
    ) {
        let (summary, mut marks) = (Summary::new(), Marks::default());
        let mut naive: Vec<Range> = Vec::new();
        for (insert, range, nth) in steps {
            if insert || naive.is_empty() {
                summary.mark(&mut marks, range);
                naive.push(range);
            } else {
                let gone = naive.swap_remove(nth % naive.len());
                summary.unmark(&mut marks, gone);
            }
        }
        for range in asked {
            let (first, last) = pages(range);
            let hit = naive.iter().any(|one| {
                let (from, to) = pages(*one);
                from <= last && to >= first
            });
            let told = summary.may_hit(range);
            prop_assert!(told || !hit, "{range} is overlapped");
            // Large ones are not looked for.
            prop_assert!(!told || hit || last - first > 64, "{range} is not overlapped");
        }
        naive.into_iter().for_each(|range| summary.unmark(&mut marks, range));
        prop_assert!(marks.counts.is_empty());
        prop_assert_eq!(summary.levels.load(Ordering::Relaxed), 0);
        prop_assert!(!summary.may_hit(Range::new(0u64, 1u64 << 12).unwrap()));
    }
}

/// Of the words of `count` entries that lie `distance` words apart, those that are not where they are looked for first.
fn displaced(distance: u64, count: u64) -> f64 {
    let (summary, mut marks) = (Summary::new(), Marks::default());
    for nth in 0..count {
        let start = (nth * distance) << (PAGE_SHIFT + LEVEL_SHIFT);
        summary.mark(&mut marks, Range::new(start, 1u64 << PAGE_SHIFT).unwrap());
    }
    let cells = &summary.pages.table().cells;
    let is_displaced = |(at, cell): &(usize, &Cell)| {
        let key = cell.key.load(Ordering::Relaxed);
        key != 0 && place(key, cells.len()) != *at
    };
    cells.iter().enumerate().filter(is_displaced).count() as f64 / count as f64
}

#[test]
fn words_at_even_distances_seldom_meet() {
    let counts = [50, 100, 200, 400, 1_000, 2_500, 5_000, 10_000, 30_000];
    for count in counts.into_iter().chain([60_000, 100_000, 300_000]) {
        let share = displaced(1, count);
        assert!(share < 0.02, "{share} of {count} in a row");
    }
    let distances = [
        2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 4096,
    ];
    let shares = distances
        .iter()
        .flat_map(|distance| counts.map(|count| displaced(*distance, count)));
    let mean = shares.sum::<f64>() / (distances.len() * counts.len()) as f64;
    assert!(mean < 0.1, "{mean}");
}

#[test]
fn what_a_walk_asks_for_is_where_it_looks() {
    let (summary, mut marks) = (Summary::new(), Marks::default());
    assert_eq!(summary.pages.hint(key(0, 0)), None, "it is near");
    for word in 0..30_000u64 {
        let start = word << (PAGE_SHIFT + LEVEL_SHIFT);
        summary.mark(&mut marks, Range::new(start, 1u64 << PAGE_SHIFT).unwrap());
    }
    let found = |word: &u64| {
        let key = key(0, *word);
        summary.pages.hint(key) == Some(std::ptr::from_ref(summary.pages.table().find(key)))
    };
    let there = (0..30_000).filter(found).count();
    assert!(there > 29_000, "{there} of 30 000");
}

#[test]
fn words_that_come_and_go_do_not_make_it_grow_for_ever() {
    let (summary, mut marks) = (Summary::new(), Marks::default());
    for nth in 0..100_000u64 {
        let range = Range::new(nth << 20, 1u64 << 16).unwrap();
        summary.mark(&mut marks, range);
        assert!(summary.may_hit(range));
        summary.unmark(&mut marks, range);
        assert!(!summary.may_hit(range));
    }
    assert_eq!(summary.pages.table().cells.len(), LEAST);
}
