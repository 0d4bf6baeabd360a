#[cfg(not(loom))]
mod real {
    use std::ops::ControlFlow;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use proptest::prelude::*;

    use crate::addr::Range;
    use crate::registry::Registry;

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Range),
        Remove(usize),
        Walk(Range),
    }

    fn range() -> impl Strategy<Value = Range> {
        prop_oneof![
            8 => (0u64..4000, 1u64..200).prop_map(|(start, len)| Range::new(start, len).unwrap()),
            1 => (0u64..4000).prop_map(|start| Range::inclusive(start, u64::MAX).unwrap()),
        ]
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => range().prop_map(Step::Insert),
            3 => any::<usize>().prop_map(Step::Remove),
            3 => range().prop_map(Step::Walk),
        ]
    }

    fn hits(registry: &Registry<u64>, range: Range) -> Vec<u64> {
        let mut hits = Vec::new();
        registry.walk(range, |_, id| {
            hits.push(*id);
            ControlFlow::Continue(())
        });
        hits
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_naive_list(steps in prop::collection::vec(step(), 1..400)) {
            let registry = Registry::new();
            let mut naive: Vec<(Range, u64)> = Vec::new();
            let mut next = 0;
            for step in steps {
                match step {
                    Step::Insert(range) => {
                        registry.insert(range, next, Arc::new(next));
                        naive.push((range, next));
                        next += 1;
                    }
                    Step::Remove(nth) if !naive.is_empty() => {
                        let (range, id) = naive.swap_remove(nth % naive.len());
                        prop_assert!(registry.remove(range, id));
                        prop_assert!(!registry.remove(range, id), "a second removal finds nothing");
                    }
                    Step::Remove(_) => prop_assert!(!registry.remove(Range::ALL, next)),
                    Step::Walk(range) => {
                        let mut want: Vec<_> = naive.iter().filter(|one| one.0.overlaps(range)).collect();
                        want.sort_by_key(|one| (one.0.start(), one.1));
                        let want: Vec<u64> = want.into_iter().map(|one| one.1).collect();
                        prop_assert_eq!(hits(&registry, range), want);
                    }
                }
            }
        }
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
            Arc::new(Canary {
                alive: AtomicBool::new(true),
                living: living.clone(),
            })
        };
        let registry = Registry::new();
        let lasting = 64;
        for id in 0..lasting {
            registry.insert(Range::new(id * 10, 5).unwrap(), id, canary());
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let mut seen = 0;
                        registry.walk(Range::new(0u64, lasting * 10).unwrap(), |range, canary| {
                            assert!(
                                canary.alive.load(Ordering::Relaxed),
                                "a dropped value was shown"
                            );
                            seen += u64::from(range.len() == 5);
                            ControlFlow::Continue(())
                        });
                        assert_eq!(seen, lasting, "a lasting entry was missed");
                    }
                });
            }
            for round in 0..20_000u64 {
                let range = Range::new(round % 600, 7).unwrap();
                registry.insert(range, 1000 + round, canary());
                assert!(registry.remove(range, 1000 + round));
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
    use std::ops::ControlFlow;

    use loom::sync::atomic::{AtomicBool, Ordering};

    use crate::addr::Range;
    use crate::primitive::Arc;
    use crate::registry::Registry;

    /// R10: a walk beside an insertion that splits a node, and beside a removal, sees what is there throughout.
    #[test]
    fn a_walk_beside_a_change_sees_one_consistent_version() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let registry = std::sync::Arc::new(Registry::new());
            let page = |nth: u64| Range::new(nth << 12, 4096u64).unwrap();
            registry.insert(page(1), 1, Arc::new(1));
            registry.insert(page(3), 3, Arc::new(3));
            let walker = {
                let registry = registry.clone();
                loom::thread::spawn(move || {
                    let mut seen = Vec::new();
                    registry.walk(Range::ALL, |_, id| {
                        seen.push(*id);
                        ControlFlow::Continue(())
                    });
                    seen
                })
            };
            registry.insert(page(2), 2, Arc::new(2));
            assert!(registry.remove(page(2), 2));
            let seen = walker.join().unwrap();
            assert!(seen == [1, 3] || seen == [1, 2, 3], "{seen:?}");
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
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let registry = std::sync::Arc::new(Registry::new());
            let alive = Arc::new(AtomicBool::new(true));
            let range = Range::new(0u64, 4096).unwrap();
            registry.insert(range, 1, Arc::new(Canary(alive.clone())));
            let walker = {
                let (registry, alive) = (registry.clone(), alive.clone());
                loom::thread::spawn(move || {
                    registry.walk(range, |_, _| {
                        loom::thread::yield_now();
                        assert!(alive.load(Ordering::SeqCst), "shown and reclaimed");
                        ControlFlow::Continue(())
                    });
                })
            };
            assert!(registry.remove(range, 1));
            walker.join().unwrap();
        });
    }
}
