#[cfg(not(loom))]
mod real {
    use std::ops::ControlFlow;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use proptest::prelude::*;

    use crate::addr::Range;
    use crate::registry::Registry;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn it_agrees_with_a_naive_list(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            crate::fuzz::registry(&bytes);
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
