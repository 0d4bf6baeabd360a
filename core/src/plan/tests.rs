//! The plan against every cover that there is.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::tlb::{Completion, DeviceTlb, FlushCommand, Issue, Limits, Ticket};

struct Tlb {
    limits: Limits,
    splits_pages: bool,
}

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        self.limits
    }
    fn splits_pages(&self) -> bool {
        self.splits_pages
    }
    fn issue(&self, _: FlushCommand) -> Issue {
        Issue::Queued
    }
    fn dispatch(&self) -> Ticket {
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        Completion::Done
    }
}

fn device(pages_per_command: u64, full_flush_cost: u64, splits_pages: bool) -> Device {
    let limits = Limits {
        entry_sizes: PageSizes::all(),
        pages_per_command,
        commands_per_batch: 8,
        full_flush_cost,
    };
    Device::new(
        "a device",
        Tlb {
            limits,
            splits_pages,
        },
    )
}

fn plan(pieces: &[(Range, PageSizes)], device: &Device) -> Vec<Scope> {
    plan_of(pieces, device, false).scopes().to_vec()
}

fn plan_of(pieces: &[(Range, PageSizes)], device: &Device, cut: bool) -> FlushPlan {
    let mut plan = FlushPlan::new();
    make(&mut plan, pieces, device, cut);
    plan
}

fn make(plan: &mut FlushPlan, pieces: &[(Range, PageSizes)], device: &Device, cut: bool) {
    let walk = |_: Range, each: &mut dyn FnMut(Range, PageSizes)| {
        for (range, sizes) in pieces {
            each(*range, *sizes);
        }
    };
    plan.make(Range::ALL, Pieces::Of(&walk), device, cut);
}

fn one(len: u64, size: PageSize, cost: u64) -> Vec<Scope> {
    let piece = (Range::new(0u64, len).unwrap(), size.into());
    plan(&[piece], &device(1024, cost, false))
}

#[test]
fn a_gigabyte_of_huge_pages_is_one_command() {
    let scopes = one(1 << 30, PageSize::TwoMiB, 4);
    let range = Range::new(0u64, 1 << 30).unwrap();
    let page_size = PageSize::TwoMiB;
    assert_eq!(scopes, [Scope::Pages { range, page_size }]);
}

#[test]
fn more_commands_than_a_full_flush_costs_become_one() {
    assert_eq!(one(16 << 20, PageSize::FourKiB, 4).len(), 4);
    assert_eq!(one((16 << 20) + 1, PageSize::FourKiB, 4), [Scope::Tag]);
    assert_eq!(one(1 << 30, PageSize::FourKiB, u64::MAX), [Scope::Tag]);
    assert_eq!(one(32 << 20, PageSize::FourKiB, u64::MAX).len(), 8);
}

#[test]
fn a_device_that_splits_pages_is_flushed_of_the_smaller_ones_too() {
    let piece = [(Range::new(0u64, 2 << 20).unwrap(), PageSizes::TWO_MIB)];
    assert_eq!(plan(&piece, &device(1024, 4, true)).len(), 3);
    assert_eq!(plan(&piece, &device(1024, 4, false)).len(), 1);
}

#[test]
fn a_command_may_end_at_two_to_the_64() {
    let range = Range::new(u64::MAX - 0xfff, 0x1000).unwrap();
    let page_size = PageSize::FourKiB;
    let scopes = plan(&[(range, page_size.into())], &device(1024, 4, true));
    assert_eq!(scopes, [Scope::Pages { range, page_size }]);
    let whole = (Range::ALL, PageSizes::all());
    assert_eq!(plan(&[whole], &device(1024, 4, true)), [Scope::Tag]);
}

/// The fewest intervals of `most` pages that cover `pages`, by trying for each page every interval that holds it, the last page first.
fn fewest(pages: &BTreeSet<u64>, most: u64) -> usize {
    let pages: Vec<u64> = pages.iter().copied().collect();
    // How many intervals the pages from the nth on need.
    let mut need = vec![0; pages.len() + 1];
    for (nth, page) in pages.iter().enumerate().rev() {
        let starts = page.saturating_sub(most - 1)..=*page;
        let after = |start: u64| pages.partition_point(|page| *page < start + most);
        let best = starts.map(|start| 1 + need[after(start)]).min();
        need[nth] = best.unwrap_or(usize::MAX);
    }
    need[0]
}

/// Pieces in the order of their addresses, in small pages: how far from the end of the one before, how many pages of which size.
fn pieces() -> impl Strategy<Value = Vec<(Range, PageSizes)>> {
    let piece = (0u64..40, 1u64..12, 0usize..3);
    prop::collection::vec(piece, 1..10).prop_map(|all| {
        let mut at = 0u64;
        let place = |(gap, count, nth): (u64, u64, usize)| {
            let size = PageSize::ALL[nth];
            let count = if size == PageSize::TwoMiB {
                count.div_ceil(4)
            } else {
                count
            };
            let start = (at + gap * size.bytes()).next_multiple_of(size.bytes());
            let range = Range::new(start, count * size.bytes()).unwrap();
            at = range.end().unwrap().get();
            (range, size.into())
        };
        all.into_iter().map(place).collect()
    })
}

proptest! {
    #[test]
    fn no_cover_of_any_set_of_pages_has_fewer_commands(
        pieces in pieces(),
        most in 1u64..24,
        cost in 1u64..12,
        splits in any::<bool>(),
    ) {
        let scopes = plan(&pieces, &device(most, cost, splits));
        // What is to be flushed, page by page.
        let mut wanted: BTreeMap<PageSize, BTreeSet<u64>> = BTreeMap::new();
        for (range, sizes) in &pieces {
            for size in PageSize::ALL {
                let own = sizes.contains(size.into());
                if own || splits && sizes.bits() > size.bytes() {
                    let page = |addr: u64| addr >> size.shift();
                    let pages = page(range.start().get())..=page(range.last().get());
                    wanted.entry(size).or_default().extend(pages);
                }
            }
        }
        let least: usize = wanted.values().map(|pages| fewest(pages, most)).sum();
        if least as u64 > cost.min(8) {
            prop_assert_eq!(scopes, [Scope::Tag]);
            return Ok(());
        }
        prop_assert_eq!(scopes.len(), least, "{:?}", scopes);
        for scope in &scopes {
            let Scope::Pages { range, page_size } = scope else {
                panic!("{scope:?} where {least} commands do");
            };
            prop_assert!(range.is_aligned(*page_size) && range.pages(*page_size) <= most);
            let page = |addr: u64| addr >> page_size.shift();
            let covered = page(range.start().get())..=page(range.last().get());
            wanted.entry(*page_size).or_default().retain(|page| !covered.contains(page));
        }
        prop_assert!(wanted.values().all(BTreeSet::is_empty), "not covered: {wanted:?}");
    }
}

proptest! {
    // Most are the same whatever they depend on: a full flush.
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn a_plan_that_fits_another_device_is_that_devices_own(
        pieces in pieces(),
        limits in [(1u64..24, 1u64..12), (1u64..24, 1u64..12)],
        (batch, sizes, splits) in ([1usize..10, 1usize..10], [1u8..8, 1u8..8], any::<[bool; 2]>()),
        // What the second has from the first, mostly all but one.
        same in prop::sample::select(vec![31u8, 30, 29, 27, 23, 15, 0]),
        cut in any::<bool>(),
    ) {
        let devices = [0, 1].map(|nth| {
            let from = |bit: u8| if same >> bit & 1 == 1 { 0 } else { nth };
            let chosen = PageSize::ALL.into_iter().enumerate();
            let chosen = chosen.filter(|(size, _)| sizes[from(0)] >> size & 1 == 1);
            let limits = Limits {
                entry_sizes: chosen.map(|(_, size)| PageSizes::from(size)).collect(),
                pages_per_command: limits[from(1)].0,
                full_flush_cost: limits[from(2)].1,
                commands_per_batch: batch[from(3)],
            };
            Device::new("a device", Tlb { limits, splits_pages: splits[from(4)] })
        });
        let [mut own, others] = [0, 1].map(|nth| plan_of(&pieces, &devices[nth], cut));
        prop_assert!(own.fits(Range::ALL, &devices[0], cut));
        prop_assert!(!own.fits(Range::page(crate::Addr::new(0), PageSize::FourKiB), &devices[0], cut));
        if own.fits(Range::ALL, &devices[1], cut) {
            prop_assert_eq!(own.scopes(), others.scopes());
        }
        make(&mut own, &pieces, &devices[1], cut);
        prop_assert_eq!(own.scopes(), others.scopes(), "nothing is left of the plan before");
    }
}
