use std::ops::ControlFlow;

use crate::addr::Range;
use crate::primitive::Arc;
use crate::registry::{Entry, Registry};

/// An entry that carries something.
struct One<T> {
    range: Range,
    number: u64,
    #[cfg_attr(loom, allow(dead_code, reason = "it is dropped"))]
    carried: T,
}

impl<T> Entry for One<T> {
    fn range(&self) -> Range {
        self.range
    }

    fn number(&self) -> u64 {
        self.number
    }
}

fn one<T>(range: Range, number: u64, carried: T) -> Arc<One<T>> {
    Arc::new(One {
        range,
        number,
        carried,
    })
}

/// One whole invalidation.
fn walk<T>(registry: &Registry<One<T>>, range: Range, mut visit: impl FnMut(&One<T>)) {
    let claim = registry.active().claim(range).expect("a free slot");
    if !registry.misses(claim, range) {
        registry.walk(claim, range, |found| {
            visit(&found);
            ControlFlow::Continue(())
        });
    }
    registry.active().end(claim);
}

fn hits<T>(registry: &Registry<One<T>>, range: Range) -> Vec<u64> {
    let mut hits = Vec::new();
    walk(registry, range, |one| hits.push(one.number));
    hits
}

#[cfg(not(loom))]
mod real {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Vec<Range>),
        Remove(Vec<usize>),
        Walk(Range),
    }

    /// In few pages, at many places, across the borders of large ones, and without an end.
    fn range() -> impl Strategy<Value = Range> {
        let new = |start: u64, len: u64| Range::new(start, len).unwrap();
        prop_oneof![
            4 => (0u64..4000, 1u64..200).prop_map(move |(start, len)| new(start, len)),
            6 => (0u64..600, 1u64..20).prop_map(move |(page, pages)| new(page << 12, pages << 12)),
            2 => (0u64..9, 1u64..4, 0u64..4, 1u64..4).prop_map(move |(level, nth, page, pages)| {
                let start = (nth << (12 + 6 * level).min(61)) + (page << 12);
                new(start - (2 << 12).min(start), pages << 12)
            }),
            1 => (0u64..4000, 0u32..40).prop_map(move |(start, shift)| new(start << 12, 1 << (12 + shift))),
            1 => (0u64..4000).prop_map(|start| Range::inclusive(start << 12, u64::MAX).unwrap()),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => prop::collection::vec(range(), 1..8).prop_map(Step::Insert),
            3 => prop::collection::vec(any::<usize>(), 1..8).prop_map(Step::Remove),
            4 => range().prop_map(Step::Walk),
        ]
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_naive_list(steps in prop::collection::vec(step(), 1..100)) {
            let registry = Registry::new();
            let mut naive: Vec<Arc<One<()>>> = Vec::new();
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Insert(ranges) => {
                        let new: Vec<_> = ranges.into_iter().map(|range| {
                            next += 1;
                            one(range, next, ())
                        }).collect();
                        registry.insert(new.iter().cloned());
                        naive.extend(new);
                    }
                    Step::Remove(which) => {
                        let mut gone = Vec::new();
                        for nth in which {
                            if !naive.is_empty() {
                                gone.push(naive.swap_remove(nth % naive.len()));
                            }
                        }
                        let entries = || gone.iter().map(|one| &**one);
                        prop_assert_eq!(registry.remove(entries()), gone.len());
                        prop_assert_eq!(registry.remove(entries()), 0, "a second removal finds nothing");
                    }
                    Step::Walk(range) => {
                        let mut want: Vec<_> = naive.iter().filter(|one| one.range.overlaps(range)).collect();
                        want.sort_by_key(|one| (one.range.start(), one.number));
                        let want: Vec<u64> = want.into_iter().map(|one| one.number).collect();
                        prop_assert_eq!(hits(&registry, range), want);
                    }
                }
                registry.check();
            }
        }
    }

    #[test]
    fn it_stays_flat_while_it_grows_and_shrinks() {
        let registry = Registry::new();
        let mut all: Vec<_> = (0..20_000u64)
            .map(|nth| {
                let at = nth.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
                one(Range::new(at << 12, 1u64 << 16).unwrap(), nth, ())
            })
            .collect();
        all.iter().for_each(|one| registry.insert([one.clone()]));
        assert!(registry.check() <= 5, "16 below a node, 8 at least");
        while let Some(gone) = all.pop() {
            assert_eq!(registry.remove([&*gone]), 1);
        }
        assert_eq!(registry.check(), 1);
        assert!(hits(&registry, Range::ALL).is_empty());
    }

    /// A value that says when it is used after it was dropped.
    struct Canary {
        alive: AtomicBool,
        living: Arc<AtomicUsize>,
    }

    impl Drop for Canary {
        fn drop(&mut self) {
            self.alive.store(false, Ordering::Relaxed);
            self.living.fetch_sub(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn walkers_beside_writers_see_every_lasting_entry_and_no_dropped_one() {
        let living = Arc::new(AtomicUsize::new(0));
        let canary = || {
            living.fetch_add(1, Ordering::Relaxed);
            Canary {
                alive: AtomicBool::new(true),
                living: living.clone(),
            }
        };
        let registry = Registry::new();
        let lasting = 64;
        let page = |nth: u64| Range::new(nth << 12, 4096u64).unwrap();
        registry.insert((0..lasting).map(|nth| one(page(nth * 10), nth, canary())));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for nth in 0..2 {
                let (registry, stop) = (&registry, &stop);
                scope.spawn(move || {
                    let ranges = [Range::ALL, Range::new(0u64, 64u64 << 12).unwrap(), page(20)];
                    let expected = [lasting, 7, 1];
                    let mut turn = nth;
                    while !stop.load(Ordering::Relaxed) {
                        turn += 1;
                        let mut seen = 0;
                        walk(registry, ranges[turn % 3], |one| {
                            let alive = one.carried.alive.load(Ordering::Relaxed);
                            assert!(alive, "a dropped value was shown");
                            seen += u64::from(one.number < lasting);
                        });
                        assert_eq!(seen, expected[turn % 3], "a lasting entry was missed");
                    }
                });
            }
            for round in 0..20_000u64 {
                // Over the lasting ones and between them, and now and then far away, so that the summary grows anew.
                let at = if round % 3 == 0 {
                    round << 10
                } else {
                    round % 600
                };
                let mine = one(page(at), 1000 + round, canary());
                registry.insert([mine.clone()]);
                assert_eq!(registry.remove([&*mine]), 1);
            }
            stop.store(true, Ordering::Relaxed);
        });
        drop(registry);
        assert_eq!(living.load(Ordering::Relaxed), 0, "every value is dropped");
    }
}

/// `RUSTFLAGS="--cfg loom" cargo test -p shootdown --release --lib model`
#[cfg(loom)]
mod model {
    use loom::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn page(nth: u64) -> Range {
        Range::new(nth << 12, 4096u64).unwrap()
    }

    fn check(model: impl Fn() + Sync + Send + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }

    /// R10: a walk beside an insertion that splits a node, and beside a removal, sees what is there throughout.
    #[test]
    fn a_walk_beside_a_change_sees_one_consistent_version() {
        check(|| {
            let registry = std::sync::Arc::new(Registry::new());
            registry.insert([one(page(1), 1, ()), one(page(3), 3, ())]);
            let walker = {
                let registry = registry.clone();
                loom::thread::spawn(move || hits(&registry, Range::ALL))
            };
            let second = one(page(2), 2, ());
            registry.insert([second.clone()]);
            assert_eq!(registry.remove([&*second]), 1);
            let seen = walker.join().unwrap();
            assert!(seen == [1, 3] || seen == [1, 2, 3], "{seen:?}");
        });
    }

    /// The summary beside a writer that marks and unmarks the same bit, and replaces the table: an entry that is there throughout is
    /// found.
    #[test]
    fn a_walk_beside_another_entry_of_the_page_finds_the_lasting_one() {
        check(|| {
            let registry = std::sync::Arc::new(Registry::new());
            registry.insert([one(page(1), 1, ())]);
            let walker = {
                let registry = registry.clone();
                loom::thread::spawn(move || hits(&registry, page(1)))
            };
            let second = one(page(1), 2, ());
            registry.insert([second.clone()]);
            assert_eq!(registry.remove([&*second]), 1);
            let seen = walker.join().unwrap();
            assert!(seen == [1] || seen == [1, 2], "{seen:?}");
        });
    }

    /// The table of the summary is replaced beside a walk.
    #[test]
    fn a_walk_beside_a_summary_that_grows_finds_the_lasting_one() {
        check(|| {
            let registry = std::sync::Arc::new(Registry::new());
            registry.insert([one(page(1), 1, ()), one(page(64), 2, ())]);
            let walker = {
                let registry = registry.clone();
                loom::thread::spawn(move || hits(&registry, page(1)))
            };
            registry.insert([one(page(128), 3, ())]);
            assert_eq!(walker.join().unwrap(), [1]);
        });
    }

    /// R8, the index by itself: of a walk and a newcomer that look for each other one finds the other.
    #[test]
    fn a_walk_and_a_newcomer_do_not_miss_each_other() {
        check(|| {
            let registry = std::sync::Arc::new(Registry::new());
            let walker = {
                let registry = registry.clone();
                loom::thread::spawn(move || {
                    // Not ended: as long as a slow invalidation lasts.
                    let claim = registry.active().claim(page(1)).unwrap();
                    let mut found = 0;
                    if !registry.misses(claim, page(1)) {
                        registry.walk(claim, page(1), |_| {
                            found += 1;
                            ControlFlow::Continue(())
                        });
                    }
                    found
                })
            };
            registry.insert([one(page(1), 1, ())]);
            let told = registry.active().may_have_missed(page(1));
            assert!(
                walker.join().unwrap() == 1 || told,
                "they missed each other"
            );
        });
    }

    struct Canary(Arc<AtomicBool>);

    impl Drop for Canary {
        fn drop(&mut self) {
            self.0.store(false, Ordering::SeqCst);
        }
    }

    /// A walk beside a removal and the reclamation that follows: what is shown is alive for as long as it is shown.
    #[test]
    fn a_walk_never_sees_a_reclaimed_entry() {
        check(|| {
            let registry = std::sync::Arc::new(Registry::new());
            let alive = Arc::new(AtomicBool::new(true));
            let mine = one(page(0), 1, Canary(alive.clone()));
            registry.insert([mine]);
            let walker = {
                let (registry, alive) = (registry.clone(), alive.clone());
                loom::thread::spawn(move || {
                    walk(&registry, page(0), |_| {
                        loom::thread::yield_now();
                        assert!(alive.load(Ordering::SeqCst), "shown and reclaimed");
                    });
                })
            };
            let same = One {
                range: page(0),
                number: 1,
                carried: Canary(Arc::new(AtomicBool::new(true))),
            };
            assert_eq!(registry.remove([&same]), 1);
            walker.join().unwrap();
        });
    }
}
