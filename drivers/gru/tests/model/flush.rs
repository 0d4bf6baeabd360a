//! What a shootdown costs: the purges that the chiplets really see.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::{LONG, Rig, at};
use shootdown::{AddressSpace, Map, PageSize, Range, Rights};
use shootdown_gru::{Config, Element, Instruction};
use shootdown_hw_model::gru::ChipletConfig;

const SMALL: u64 = 4096;

fn rig(chiplets: u32) -> Rig {
    Rig::new(chiplets, ChipletConfig::default(), Config::default())
}

/// Purges of pages, of an ASID, and of everything that a chiplet has seen.
fn purges(rig: &Rig, chiplet: usize) -> [u64; 3] {
    let counts = rig.model.chiplets()[chiplet].counts();
    [
        counts.purges_pages,
        counts.purges_asid,
        counts.purges_global,
    ]
}

/// What one call costs on a chiplet.
fn cost(rig: &Rig, chiplet: usize, call: impl FnOnce()) -> [u64; 3] {
    let before = purges(rig, chiplet);
    call();
    let after = purges(rig, chiplet);
    std::array::from_fn(|nth| after[nth] - before[nth])
}

/// The test's own idea of what is mapped: the size of the page behind each 4 KiB.
#[derive(Default)]
struct Pages(BTreeMap<u64, PageSize>);

impl Pages {
    fn map(&mut self, range: Range, size: PageSize) {
        for page in 0..range.len() as u64 / SMALL {
            self.0.insert(range.start().get() / SMALL + page, size);
        }
    }

    fn small(range: Range) -> std::ops::RangeInclusive<u64> {
        range.start().get() / SMALL..=range.last().get() / SMALL
    }

    /// The fewest purges that cover the range, each of pages of one size, and of fewer than make it a complete one.
    fn fewest(&self, range: Range) -> u64 {
        let mut all: BTreeMap<PageSize, BTreeSet<u64>> = BTreeMap::new();
        for page in Self::small(range) {
            let size = self.0[&page];
            all.entry(size)
                .or_default()
                .insert(page * SMALL / size.bytes());
        }
        let need = |pages: BTreeSet<u64>| {
            let pages: Vec<_> = pages.into_iter().collect();
            let mut need = vec![0; pages.len() + 1];
            for (nth, page) in pages.iter().enumerate().rev() {
                // Any first page that leaves this one inside.
                need[nth] = (page.saturating_sub(1022)..=*page)
                    .map(|first| 1 + need[pages.partition_point(|page| *page < first + 1023)])
                    .min()
                    .unwrap();
            }
            need[0]
        };
        all.into_values().map(need).sum()
    }

    /// A change of a part of a large page leaves small ones.
    fn cut(&mut self, range: Range) {
        for addr in [range.start().get(), range.last().get() + 1] {
            let Some(size) = self.0.get(&(addr / SMALL)).copied() else {
                continue;
            };
            if !addr.is_multiple_of(size.bytes()) {
                self.map(Range::page(addr.into(), size), PageSize::FourKiB);
            }
        }
    }
}

#[test]
fn no_set_of_purges_that_covers_what_changes_is_smaller() {
    let rig = rig(1);
    let space = rig.space();
    let segment = rig.gru.segment(&space).unwrap();
    let mut random = 7u64;
    let mut below = |limit: u64| {
        random = random
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (random >> 33) % limit
    };
    // A tiling of all sizes, in one piece of 32 MiB.
    let total = 32 << 20;
    let arena = space
        .map(Map::anonymous(total).page_size(PageSize::TwoMiB))
        .unwrap();
    space.unmap(arena).unwrap();
    let base = arena.start().get();
    let mut pages = Pages::default();
    let fill = |space: &AddressSpace, pages: &mut Pages, from: u64, to: u64, nth: u64| {
        let mut from = from;
        while from < to {
            let size = PageSize::ALL[(from / SMALL + nth) as usize % 3];
            let fits = from.is_multiple_of(size.bytes()) && from + size.bytes() <= to;
            let size = if fits { size } else { PageSize::FourKiB };
            let map = Map::anonymous(size.bytes()).page_size(size);
            let range = space.map(map.at(from.into())).unwrap();
            pages.map(range, size);
            from += size.bytes();
        }
    };
    for nth in 0..16 {
        let size = PageSize::ALL[nth as usize % 3];
        let from = base + nth * (2 << 20);
        let map = Map::anonymous(2 << 20).page_size(size).at(from.into());
        pages.map(space.map(map).unwrap(), size);
    }
    let (mut ranged, mut full) = (0, 0);
    for round in 0..80 {
        let span = if round % 10 == 9 {
            total / SMALL
        } else {
            [64, 1200][round as usize % 2]
        };
        let len = 1 + below(span);
        let first = below(total / SMALL - len + 1);
        let range = Range::new(base + first * SMALL, len * SMALL).unwrap();
        let least = pages.fewest(range);
        let change = below(3);
        let seen = cost(&rig, 0, || match change {
            0 => space.unmap(range).unwrap(),
            1 => space.discard(range).unwrap(),
            _ => space.protect(range, Rights::READ_WRITE).unwrap(),
        });
        // Limits declare that a full flush costs as much as four purges of pages.
        let want = if least > 4 { [0, 1, 0] } else { [least, 0, 0] };
        assert_eq!(seen, want, "round {round}: {range}");
        ranged += seen[0];
        full += seen[1];
        pages.cut(range);
        if change == 0 {
            let end = range.start().get() + range.len() as u64;
            fill(&space, &mut pages, range.start().get(), end, round);
        }
    }
    assert!(ranged > 60 && full > 2, "{ranged} {full}");
    drop(segment);
    rig.clean();
}

/// PERF.md's row: for 1 GiB behind one context, the hardware's minimum or one full flush. The minimum is 256 purges of 1024 pages of
/// 4 KiB, or one of 512 of 2 MiB.
#[test]
fn a_gibibyte_of_large_pages_costs_one_purge_and_one_of_small_ones_a_full_flush() {
    const BYTES: u64 = 1 << 30;
    let frames = BYTES / SMALL + (16 << 10);
    let rig = Rig::with_frames(frames, 1, ChipletConfig::default(), Config::default());
    let space = rig.space_of(BYTES + (64 << 20));
    let segment = rig.gru.segment(&space).unwrap();
    for (size, want) in [
        (PageSize::TwoMiB, [1, 0, 0]),
        (PageSize::FourKiB, [0, 1, 0]),
    ] {
        let buffer = space.map(Map::anonymous(BYTES).page_size(size)).unwrap();
        let minimum = (buffer.pages(size)).div_ceil(1024);
        assert!(minimum == 1 || minimum == 256);
        // Some of it is in the TLB.
        let stride = (BYTES / 64 / 8) as i64;
        let set = Instruction::vset(buffer.start(), 1, Element::Double, 64).stride(stride);
        segment.run(0, &set, LONG).unwrap();
        let asid = segment.asid().unwrap();
        let chiplet = &rig.model.chiplets()[0];
        assert!(chiplet.tlb_holds(asid, buffer));
        let seen = cost(&rig, 0, || space.unmap(buffer).unwrap());
        assert_eq!(seen, want, "{size}");
        assert!(!chiplet.tlb_holds(asid, buffer));
    }
    drop(segment);
    rig.clean();
}

#[test]
fn a_chiplet_without_a_context_of_the_space_is_not_touched() {
    let rig = rig(3);
    let (space, other) = (rig.space(), rig.space());
    let buffer = space.map(Map::anonymous(8 << 12)).unwrap();
    let set = Instruction::vset(buffer.start(), 1, Element::Double, 1);
    // On the first two chiplets; on the third there is somebody else.
    let segments: Vec<_> = (0..2).map(|_| rig.gru.segment(&space).unwrap()).collect();
    let others = rig.gru.segment(&other).unwrap();
    let mut names: Vec<_> = segments.iter().map(|one| one.chiplet()).collect();
    names.sort_unstable();
    assert_eq!((names, others.chiplet()), (vec!["gru0", "gru1"], "gru2"));
    for segment in &segments {
        segment.run(0, &set, LONG).unwrap();
    }
    let part = |nth: u64| Range::new(at(buffer.start(), nth << 12), 4096).unwrap();
    let before: Vec<_> = (0..3).map(|nth| purges(&rig, nth)).collect();
    space.unmap(part(0)).unwrap();
    let after: Vec<_> = (0..3)
        .map(|nth| purges(&rig, nth)[0] - before[nth][0])
        .collect();
    assert_eq!(after, [1, 1, 0]);

    // Where its last context has gone the ASID goes instead, once, and the entry stays without harm.
    let mut segments = segments;
    let position = segments.iter().position(|one| one.chiplet() == "gru0");
    let gone = segments.swap_remove(position.unwrap());
    let asid = gone.asid().unwrap();
    gone.run(
        0,
        &Instruction::vset(part(1).start(), 1, Element::Double, 1),
        LONG,
    )
    .unwrap();
    drop(gone);
    let retired = rig.gru.stats().asids_retired;
    let entry = part(1);
    for nth in 1..3 {
        assert_eq!(cost(&rig, 0, || space.unmap(part(nth)).unwrap()), [0, 0, 0]);
    }
    assert!(rig.model.chiplets()[0].tlb_holds(asid, entry));
    let stats = rig.gru.stats();
    assert_eq!(stats.asids_retired, retired + 1);
    assert!(stats.purges_spared > 0);
    let seen: u64 = (0..3)
        .map(|nth| purges(&rig, nth).iter().sum::<u64>())
        .sum();
    assert_eq!(
        seen,
        stats.purges_pages + stats.purges_asid + stats.purges_whole
    );
    drop((segments, others));
    rig.clean();
}
