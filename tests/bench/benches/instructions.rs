//! Instructions of the hot paths, counted by callgrind: `tests/bench/counts` runs these and holds them against counts.txt.
//!
//! What is counted is what [`shootdown_bench::case`] times: a thousand operations each, after some that make what a first one makes.

#![expect(missing_docs, reason = "what gungraun's macros make has none")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use gungraun::Callgrind;
use gungraun::prelude::*;
use shootdown::{
    Addr, AddressSpace, Deadlines, Map, Memory, MemoryError, PageSize, PageSizes, Range,
    Registration, Rights, Translation,
};
use shootdown_bench::case::{self, Case};
use shootdown_bench::ground::{Empty, Tlb};

/// What counts.txt takes its figures to be of.
const TIMES: u64 = 1_000;

fn warm(mut case: Case) -> Case {
    case.run(64);
    case
}

#[library_benchmark]
#[bench::no_hit_of_10(warm(case::invalidation(10, 0)))]
#[bench::no_hit_of_1k(warm(case::invalidation(1_000, 0)))]
#[bench::no_hit_of_100k(warm(case::invalidation(100_000, 0)))]
#[bench::one_hit_of_1k(warm(case::invalidation(1_000, 1)))]
#[bench::one_hit_of_100k(warm(case::invalidation(100_000, 1)))]
#[bench::pair_beside_1k(warm(case::pair(1_000)))]
#[bench::pair_beside_100k(warm(case::pair(100_000)))]
#[bench::begin_retry(warm(case::fault()))]
#[bench::one_device(warm(case::devices(1, Duration::ZERO)))]
fn path(mut case: Case) -> Case {
    case.run(TIMES);
    case
}

/// Memory with nothing behind it: what is left of an unmap is the framework's own.
struct Nothing;

const ARENA: u64 = 1 << 40;

impl Memory for Nothing {
    fn id(&self) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        NEXT.fetch_add(1, Relaxed)
    }

    fn arena(&self) -> Range {
        Range::new(ARENA, 1 << 30).expect("an arena")
    }

    fn page_sizes(&self) -> PageSizes {
        PageSizes::FOUR_KIB
    }

    fn map(&self, _: Range, _: PageSize, _: Rights) -> Result<(), MemoryError> {
        Ok(())
    }

    fn unmap(&self, _: Range) -> Result<(), MemoryError> {
        Ok(())
    }

    fn discard(&self, _: Range) -> Result<(), MemoryError> {
        Ok(())
    }

    fn protect(&self, _: Range, _: Rights) -> Result<(), MemoryError> {
        Ok(())
    }

    fn remap(&self, _: Range, _: Range) -> Result<(), MemoryError> {
        Ok(())
    }

    fn translate(&self, _: Addr) -> Option<Translation> {
        None
    }
}

/// Pages, side by side, all of one registration.
struct Mapped {
    space: AddressSpace,
    pages: Vec<Range>,
    _registration: Registration,
}

fn mapped() -> Mapped {
    const PAGE: u64 = 4096;
    let space = AddressSpace::managed(Arc::new(Nothing), Deadlines::default());
    let warm = 64;
    let pages: Vec<Range> = (0..TIMES + warm)
        .map(|nth| {
            let map = Map::anonymous(PAGE).at(Range::new(ARENA + nth * PAGE, PAGE)
                .expect("a page")
                .start());
            space.map(map).expect("a page")
        })
        .collect();
    let around = Range::new(ARENA, (TIMES + warm) * PAGE).expect("a range");
    let target = Tlb::target(Duration::ZERO);
    let registration = space.register(around, Arc::new(Empty), &[target]);
    let (first, pages) = pages.split_at(warm as usize);
    for page in first {
        space.unmap(*page).expect("an unmap");
    }
    Mapped {
        space,
        pages: pages.to_vec(),
        _registration: registration.expect("a registration"),
    }
}

#[library_benchmark]
#[bench::of_a_page(mapped())]
fn unmap(mapped: Mapped) -> Mapped {
    for page in &mapped.pages {
        mapped.space.unmap(*page).expect("an unmap");
    }
    mapped
}

library_benchmark_group!(name = paths, benchmarks = [path, unmap]);

main!(
    config = LibraryBenchmarkConfig::default()
        // Caches are not looked at: where things lie would change the figures.
        .tool(Callgrind::with_args(["--cache-sim=no"]))
        // Where valgrind was unpacked, not installed.
        .pass_through_env("VALGRIND_LIB"),
    library_benchmark_groups = paths
);
