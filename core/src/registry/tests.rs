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

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn it_agrees_with_a_naive_list(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            crate::fuzz::registry(&bytes);
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
        for one in &all {
            registry.insert([one.clone()]);
        }
        assert!(registry.check() <= 5, "16 below a node, 8 at least");
        while let Some(gone) = all.pop() {
            assert_eq!(registry.remove([&*gone]).0, 1);
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
                assert_eq!(registry.remove([&*mine]).0, 1);
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
            assert_eq!(registry.remove([&*second]).0, 1);
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
            assert_eq!(registry.remove([&*second]).0, 1);
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
            assert_eq!(registry.remove([&same]).0, 1);
            walker.join().unwrap();
        });
    }
}
