//! Every case, by criterion: `cargo bench -p shootdown-bench --bench time`.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use shootdown_bench::case::{self, Case};

/// What it is called, and how it is made.
type Made = (&'static str, fn() -> Case);

fn all() -> Vec<Made> {
    vec![
        ("no hit of 10", || case::invalidation(10, 0)),
        ("no hit of 1k", || case::invalidation(1_000, 0)),
        ("no hit of 100k", || case::invalidation(100_000, 0)),
        ("no hit of 1k, iset", || case::iset_query(1_000, 0)),
        ("no hit of 1k, sorted vec", || case::vec_query(1_000, 0)),
        ("one hit of 1k", || case::invalidation(1_000, 1)),
        ("one hit of 100k", || case::invalidation(100_000, 1)),
        ("one hit of 1k, iset", || case::iset_query(1_000, 1)),
        ("register, unregister beside 1k", || case::pair(1_000)),
        ("register, unregister beside 100k", || case::pair(100_000)),
        ("insert, remove beside 1k, iset", || case::iset_pair(1_000)),
        ("unregister", || case::unregister(1_000)),
        ("SRCU grace period", case::grace),
        ("SRCU section", case::section),
        ("begin, lock, retry", case::fault),
        ("lock", case::notifier_lock),
        ("two threads, one space", || case::disjoint(2, true)),
        ("two threads, two spaces", || case::disjoint(2, false)),
        ("one thread", || case::disjoint(1, true)),
        ("one device", || case::devices(1, Duration::from_micros(10))),
        ("64 devices", || {
            case::devices(64, Duration::from_micros(10))
        }),
        ("unmap, managed", case::managed_unmap),
        ("unmap, raw", case::raw_unmap),
    ]
}

fn time(criterion: &mut Criterion) {
    for (name, make) in all() {
        let mut made = None;
        criterion.bench_function(name, |bencher| {
            // Made when it is its turn, and only if it is asked for.
            let case = made.get_or_insert_with(make);
            bencher.iter_custom(|times| case.run(times));
        });
    }
}

criterion_group!(benches, time);
criterion_main!(benches);
